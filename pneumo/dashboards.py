"""`python -m pneumo.dashboards`: W&B workspaces as JSON; saved with `--save --entity TEAM`."""

import argparse
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pneumo.dashboards", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--project", default="pneumo", help="the W&B project (default pneumo)")
    parser.add_argument("--entity", default="", help="the W&B team or user")
    parser.add_argument("--save", action="store_true", help="save them at W&B; needs a key")
    options = parser.parse_args(argv)
    if options.save and not options.entity:
        parser.error("--save needs --entity, the W&B team or user")

    from pneumo.reporting.tracking.dashboards import build_views, describe_view  # takes seconds

    views = build_views(options.project, options.entity)
    if not options.save:
        json.dump({name: describe_view(view) for name, view in views.items()}, sys.stdout, indent=1)
        print()
        return 0
    for name, view in views.items():
        try:
            print(f"{name}: {view.save().url}")
        # Whatever W&B throws, a person reads one line.
        except Exception as error:
            message = (str(error).splitlines() or [""])[0]
            print(f"error: {name}: not saved ({type(error).__name__}: {message})", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
