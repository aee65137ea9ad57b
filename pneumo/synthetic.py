"""Phantom chest X-rays: python -m pneumo.synthetic --out DIR --studies 200 [--layout chexpert]"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pneumo.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Write a folder of phantoms; return 0, or 2 for a mistake in the arguments."""
    options = _read_arguments(argv)
    from pneumo.dataset.phantoms.layouts import PHANTOM_LAYOUTS
    from pneumo.dataset.phantoms.population import draw_population
    from pneumo.dataset.phantoms.source_folder import write_phantoms

    try:
        written = write_phantoms(
            Path(options.out),
            num_studies=options.studies,
            seed=options.seed,
            num_processes=options.jobs,
            layout=PHANTOM_LAYOUTS[options.layout],
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command starts over", file=sys.stderr)
        return 130
    studies = draw_population(options.studies, options.seed)
    print(
        f"phantoms: {'written' if written else 'already complete'}: {len(studies)} studies of "
        f"{len({study.patient for study in studies})} patients, "
        f"{sum(study.positive for study in studies)} positive, in {options.out}"
    )
    return 0


def _read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pneumo.synthetic",
        description="Write phantom chest X-rays in the layout of a public data set.",
        allow_abbrev=False,
    )
    add = partial(parser.add_argument, metavar="N")
    add("--out", required=True, metavar="DIR", help="folder to write (required)")
    add("--studies", type=int, default=200, help="images to draw (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the population (default: %(default)s)")
    add("--jobs", type=int, help="processes to use (default: one per CPU)")
    parser.add_argument(
        "--layout",
        default="rsna",
        choices=("rsna", "own-table", "nih", "chexpert", "vindr", "kermany"),
        help="the data set whose layout is written (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if not options.out or "://" in options.out:
        parser.error(f"--out: got {options.out!r}, expected a folder of this machine")
    for flag, least in (("studies", 1), ("seed", 0), ("jobs", 1)):
        if (value := getattr(options, flag)) is not None and value < least:
            parser.error(f"--{flag}: got {value}, expected {least} or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
