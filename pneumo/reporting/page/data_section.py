"""The sections on the data: facts of the leakage audit and of data quality, and charts."""

from collections.abc import Mapping
from typing import Any

from pneumo.dataset.manifest import Duplicates
from pneumo.dataset.quality import Quality
from pneumo.dataset.splits import LeakageAudit
from pneumo.reporting.figures import data_charts
from pneumo.reporting.page.embedding import inline_svg, to_data_uri
from pneumo.reporting.page.formatting import count, percent
from pneumo.reporting.page.page_inputs import DataFacts


def describe_audit(data: DataFacts) -> dict[str, str]:
    """The facts below the table of splits, by name."""
    audit, quality = data.audit, data.quality
    leaked = "unknown: no mapping from images to patients"
    if audit.leaked_by_image is not None:
        leaked = f"{percent(audit.leaked_by_image)} of the val studies"
    verb = "leaks" if audit.unit == "image" else "would have leaked"
    return {
        "Assignment to splits": split_rule_sentence(audit, data.seed),
        "Patients in more than one split": f"{audit.shared_patients:,}"
        if audit.has_patients
        else "unknown",
        f"A split by image {verb}": leaked,
        "Quarantined": _list_reasons(quality.quarantined, "none"),
        "Tables and headers disagree": _list_reasons(quality.contradictions, "on no study"),
    }


def list_exclusions(data: DataFacts) -> list[tuple[str, int]]:
    """Why studies of the source are in no split, and how many."""
    reasons = {
        **{f"Left out: {reason}": number for reason, number in data.left_out.items()},
        "Not on the list of the split": data.audit.unlisted,
        "Could not be used (quarantined)": sum(data.quality.quarantined.values()),
    }
    return [(reason, number) for reason, number in reasons.items() if number]


def split_rule_sentence(audit: LeakageAudit, seed: int) -> str:
    """How studies were assigned to splits."""
    if audit.named is not None:
        own = audit.named == "published"
        return "the split that the source publishes" if own else f"the named split {audit.named}"
    if audit.list_digest is None:
        return f"a hash of the {audit.unit} by seed {seed}, salt {audit.salt}"
    words = f"a list, SHA-256 {audit.list_digest}"
    if audit.unlisted:
        studies = count(audit.unlisted, "study", "studies")
        return f"{words}; it does not name {studies}, which are in no split"
    return f"{words}; it names every study"


def describe_duplicates(duplicates: Duplicates, *, has_patients: bool) -> str:
    """How many images are duplicates, and the effect on the metrics."""
    if not duplicates.pictures:
        return "No two studies have the same stored picture."
    words = [
        f"{duplicates.studies:,} studies share {count(duplicates.pictures, 'picture')}, pixel by "
        "pixel."
    ]
    if duplicates.across_patients and has_patients:
        words.append(
            f"{count(duplicates.across_patients, 'of them is', 'of them are')} with more than one "
            "patient: one patient under two numbers, or a file under the wrong name. Keeping "
            "patients in one split does not keep these apart."
        )
    if duplicates.across_splits:
        words.append(
            f"{count(duplicates.across_splits, 'is', 'are')} in more than one split: each leaks, "
            "and the numbers of val and test are too good. Leave one of each out of the source."
        )
    else:
        words.append(
            "None is in more than one split, so no metric of val or test is affected; within a "
            "split such a study counts as often as it occurs."
        )
    return " ".join(words)


PROPERTIES = {
    "label": "Label",
    "finding": "Finding",
    "view": "View",
    "sex": "Sex",
    "age": "Age, years",
    "spacing": "Pixel spacing",
}
"""The counted properties, and their headings."""


def _list_reasons(reasons: Mapping[str, int], none: str) -> str:
    """`5 studies: not dicom 3, missing 2`, the most frequent first."""
    if not reasons:
        return none
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{reason.replace('_', ' ')} {number:,}" for reason, number in ordered)
    return f"{count(sum(reasons.values()), 'study', 'studies')}: {listed}"


def draw_quality_charts(quality: Quality) -> list[dict[str, Any]]:
    """Ages and gray levels by split."""
    medians, means = [], []
    for name, split in quality.splits.items():
        age, gray = split.age_median, split.intensity.mean
        medians.append(f"{name} {'unknown' if age is None else f'{age:g}'}")
        means.append(f"{name} {'unknown' if gray is None else f'{gray:.3f}'}")
    ages = f"Age by split; median {', '.join(medians)}"
    levels = f"Gray levels by split; mean {', '.join(means)}"
    return [
        inline_svg(data_charts.draw_ages(quality), ages),
        inline_svg(data_charts.draw_intensity(quality), levels),
    ]


def show_contact_sheets(data: DataFacts) -> list[dict[str, str]]:
    """Each sheet as an image, with its caption."""
    return [
        {"source": to_data_uri(data_charts.draw_contact_sheet(sheet)), "caption": sheet.caption}
        for sheet in data.contact
    ]
