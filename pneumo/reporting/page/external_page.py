"""External validation: a page of its own, and sections of the run's report.html."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pneumo.dataset.overlap import Overlap
from pneumo.evaluation.estimates import Estimate, as_json
from pneumo.evaluation.external import (
    RECALIBRATION_FRACTION,
    ExternalEvaluation,
    FrozenChoices,
    SetSummary,
)
from pneumo.evaluation.set_shift import SetShift
from pneumo.reporting.figures.external import list_columns
from pneumo.reporting.page.embedding import make_environment
from pneumo.reporting.page.formatting import Cell, count, decimal, fine_percent, percent
from pneumo.reporting.page.model_card import CLAIM

UNKNOWN_PATIENTS = (
    "Patients of this set are unknown: each image counts as one, so its intervals are too narrow"
)


@dataclass(frozen=True)
class ExternalSet:
    """All results on one external set."""

    layout: str
    phantoms: bool
    """Whether the images are phantoms, not radiographs."""
    evaluation: ExternalEvaluation
    shift: SetShift
    overlap: Overlap
    warning: str | None

    def to_json(self) -> dict[str, Any]:
        """The set's object in `external/metrics.json`."""
        left_out = as_json(self.overlap, leave_out={"keys"})
        return {
            "layout": self.layout,
            "left_out": left_out,
            "warning": self.warning,
            **as_json(self.evaluation),
            "shift": as_json(self.shift),
        }


def render_external(
    run: str,
    sets: Mapping[str, ExternalSet],
    frozen: FrozenChoices,
    matrix: Mapping[str, Mapping[str, Any]],
    *,
    created: str,
    split_warning: str | None,
    phantoms: bool,
) -> tuple[str, str]:
    """The page, and its sections alone for `insert_external`. `matrix` has the AUROC of each run
    (row) on each set (column), as in metrics.json; `split_warning` and `phantoms` are of the run's
    own store."""
    columns = list_columns(matrix)
    shown = {
        "run": run,
        "created": created,
        "split_warning": split_warning,
        "phantoms": phantoms,
        "columns": columns,
        "matrix": {
            name: [Estimate(**found) if (found := row.get(c)) else None for c in columns]
            for name, row in matrix.items()
        },
        "sets": [_describe(name, one, frozen) for name, one in sets.items()],
    }
    templates = ("external.html.j2", "external_sets.html.j2")
    page, sections = (make_environment().get_template(t).render(shown) for t in templates)
    return page, sections


def insert_external(report: str, sections: str) -> str:
    """A run's report.html with these `sections`, which replace earlier ones and what it says of
    their absence; unchanged where an older version wrote it."""
    link = '<a href="#elsewhere">External validation</a>'
    parts = {
        "elsewhere": sections,
        "elsewhere-link": f"<li>{link}</li>",
        "elsewhere-limits": f"For other data see {link}; performance elsewhere is unknown.",
        "elsewhere-open": "",
        "elsewhere-count": f"{len(CLAIM) + 1}",
        "elsewhere-item": f'<tr><td class="n">33</td><td>External data</td><td>{link}</td></tr>',
    }
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = report.partition(begin)
        if found:
            report = f"{before}{begin}{text}{end}{rest.partition(end)[2]}"
    return report


def _describe(name: str, one: ExternalSet, frozen: FrozenChoices) -> dict[str, Any]:
    found, shift = one.evaluation, one.shift
    calibrated = "uncalibrated" if frozen.scaling is None else "as calibrated on the run's val"
    points = [
        (f"{word} at the threshold of {frozen.points[point].rule}", both)
        for word, rates in (("Sensitivity", found.sensitivity), ("Specificity", found.specificity))
        for point, both in rates.items()
        if point in ("decision", "screening")
    ]
    rows = [
        ("AUROC", found.auroc),
        *points,
        (f"Brier score, {calibrated}", found.brier),
        ("Mean predicted − observed risk", found.in_the_large),
        ("AUROC of view, sex, age and spacing alone", found.metadata_auroc),
    ]
    return {
        "name": name,
        "phantoms": one.phantoms,
        "who": f"{_who(found.external)}, "
        f"{fine_percent(found.external.positives / found.external.n)} positive; the internal test "
        f"has {fine_percent(found.internal.positives / found.internal.n)}",
        "left": _left_out_sentence(one),
        "warnings": [
            *([] if one.warning is None else [one.warning]),
            *([] if found.external.patients is not None else [UNKNOWN_PATIENTS]),
        ],
        "rows": rows,
        "notes": [
            _case_mix_sentence(found),
            _recalibration_sentence(found),
            _shift_sentence(shift),
        ],
    }


def _who(found: SetSummary) -> str:
    if found.patients is None:
        return f"{count(found.n, 'image')}, patients unknown"
    return f"{count(found.n, 'study', 'studies')} of {count(found.patients, 'patient')}"


def _left_out_sentence(one: ExternalSet) -> str:
    left, sets = one.overlap, (one.evaluation.internal, one.evaluation.external)
    if None in (found.patients for found in sets):
        return (
            f"Left out: {count(left.of_patients + left.of_pictures, 'image')} that the model has "
            "seen. As patients are unknown, other images of patients that it was trained or "
            "chosen on may be left."
        )
    return (
        f"Left out: {count(left.of_patients, 'study', 'studies')} of "
        f"{count(left.patients, 'patient')} that the model was trained or chosen on, and "
        f"{count(left.of_pictures, 'picture')} that it has seen, with "
        f"{count(left.of_their_patients, 'other study', 'other studies')} of their patients."
    )


def _case_mix_sentence(found: ExternalEvaluation) -> str:
    mix = found.case_mix
    if not mix.by:
        return f"Case mix: {mix.auroc.reason}."
    return (
        f"Case mix: weighted to the internal test's {', '.join(mix.by)} the AUROC of this set is "
        f"{Cell.of(mix.auroc)}; {percent(mix.covered)} of the internal test has such studies "
        "of both classes here."
    )


def _recalibration_sentence(found: ExternalEvaluation) -> str:
    new = found.recalibration
    if new.slope is None:
        return f"Recalibration: {new.brier_before.reason}."
    unit = "images" if found.external.patients is None else "patients"
    return (
        f"Recalibration on {percent(RECALIBRATION_FRACTION)} of the {unit} "
        f"({count(new.fitted_on, 'study', 'studies')}) would change the Brier score of the other "
        f"{new.evaluated_on:,} by {Cell.of(new.difference, signed=True)}, to "
        f"{Cell.of(new.brier_after)}. The table above is without recalibration."
    )


def _shift_sentence(shift: SetShift) -> str:
    spacing = " and ".join(
        "unknown" if mm is None else f"{mm:.3f} mm" for mm in shift.spacing_median_mm
    )
    return (
        f"Images: a linear classifier separates the two sets with an AUROC of "
        f"{Cell.of(shift.told_apart)} ({shift.pictures[0]} and {shift.pictures[1]} images); the "
        f"histograms of gray levels differ by {decimal(shift.gray_distance, 2)} of 1, their means "
        f"are {decimal(shift.gray_mean[0], 2)} and {decimal(shift.gray_mean[1], 2)}; median "
        f"spacing {spacing} (internal and external)."
    )
