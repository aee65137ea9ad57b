"""What the store holds, for the template: the leakage audit and the data's quality."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pneumo.dataset.manifest import Duplicates
from pneumo.dataset.quality import Quality, SplitQuality
from pneumo.dataset.splits import LeakageAudit
from pneumo.reporting.figures import data_charts
from pneumo.reporting.page.embedding import embed, inline
from pneumo.reporting.page.formatting import count, fine_percent, percent, percent_range
from pneumo.reporting.page.page_inputs import DataFacts


def describe_data(data: DataFacts) -> dict[str, Any]:
    """The audit for the template: the table of splits and the facts below it."""
    audit, quality = data.audit, data.quality
    leaked = "unknown: no mapping from images to patients"
    if audit.leaked_by_image is not None:
        leaked = f"{percent(audit.leaked_by_image)} of the val studies"
    verb = "leaks" if audit.unit == "image" else "would have leaked"
    return {
        "digest": data.digest,
        "image_size": data.image_size,
        "unit": audit.unit,
        "flow": {
            "all": f"{_count_all(quality):,}",
            "quarantined": f"{sum(quality.quarantined.values()):,}",
            "splits": [(name, f"{split.studies:,}") for name, split in quality.splits.items()],
        },
        "splits": [_describe_split(name, data) for name in quality.splits],
        "facts": {
            "Who goes where": describe_rule(audit, data.seed),
            "Patients in more than one split": f"{audit.shared_patients:,}"
            if data.has_patients
            else "unknown",
            f"A split by image {verb}": leaked,
            "Quarantined": _list_reasons(quality.quarantined, "none"),
            "Tables and headers disagree": _list_reasons(quality.contradictions, "on no study"),
        },
    }


def _count_all(quality: Quality) -> int:
    used = sum(split.studies for split in quality.splits.values())
    return used + sum(quality.quarantined.values())


def _describe_split(name: str, data: DataFacts) -> dict[str, str]:
    split, audit = data.quality.splits[name], data.audit
    interval, shards = audit.prevalence.get(name), audit.shard_prevalence.get(name)
    return {
        "name": name,
        "patients": f"{split.patients:,}" if data.has_patients else "unknown",
        "studies": f"{split.studies:,}",
        "positives": f"{split.positives:,}",
        "prevalence": "" if interval is None else fine_percent(interval.value),
        "interval": "" if interval is None else f"({percent_range(interval.low, interval.high)})",
        "shards": "" if shards is None else percent_range(*shards),
    }


def describe_rule(audit: LeakageAudit, seed: int) -> str:
    """Who decided which split a study is in, in words."""
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
    """How many pictures occur twice, and what that does to the numbers."""
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
            "None is in more than one split, so no number of val or test is touched; within a "
            "split such a study counts as often as it occurs."
        )
    return " ".join(words)


_GROUPS = {
    "label": "Label",
    "finding": "Finding",
    "view": "View",
    "sex": "Sex",
    "age": "Age, years",
    "spacing": "Pixel spacing",
}


def describe_quality(data: DataFacts) -> dict[str, Any]:
    """The section on data quality for the template."""
    quality = data.quality
    splits = list(quality.splits.values())
    groups: list[dict[str, Any]] = [
        {
            "name": title,
            "rows": [
                (value, [_share_cell(s.counts[what][value], s.studies) for s in splits])
                for value in splits[0].counts[what]
            ],
        }
        for what, title in _GROUPS.items()
    ]
    ages = [_number(split.age_median, "{:g}".format) for split in splits]
    by_title = {group["name"]: group["rows"] for group in groups}
    by_title["Age, years"].append(("median of the known", ages))
    spacings = [_describe_spacing(split) for split in splits]
    by_title["Pixel spacing"].append(("median, quartiles, mm", spacings))
    gray = [split.intensity for split in splits]
    groups.append(
        {
            "name": "Gray level",
            "rows": [
                ("mean, 0 to 1", [_number(part.mean, "{:.3f}".format) for part in gray]),
                ("pure black", [_number(part.black, fine_percent) for part in gray]),
                ("pure white", [_number(part.white, fine_percent) for part in gray]),
            ],
        }
    )
    return {
        "splits": [(name, f"{split.studies:,}") for name, split in quality.splits.items()],
        "groups": groups,
        "shifts": [str(shift) for shift in quality.shifts if not shift.is_by_chance],
        "chances": [str(shift) for shift in quality.shifts if shift.is_by_chance],
        "warnings": [
            (code, [(f"{len(keys):,}", _list_keys(keys)) for keys in by_split.values()])
            for code, by_split in quality.warnings.items()
        ],
        "duplicates": describe_duplicates(quality.duplicates, has_patients=data.has_patients),
        "drawings": _draw_quality(quality),
        "contact": [
            {"source": embed(data_charts.draw_contact_sheet(sheet)), "caption": sheet.caption}
            for sheet in data.contact
        ],
    }


_MOST_KEYS = 100


def _list_keys(keys: Sequence[str]) -> str:
    more = f" … and {len(keys) - _MOST_KEYS:,} more, see the store's warnings.jsonl"
    return " ".join(keys[:_MOST_KEYS]) + (more if len(keys) > _MOST_KEYS else "")


def _share_cell(number: int, total: int) -> tuple[str, str]:
    return f"{number:,}", fine_percent(number / total) if total else ""


def _describe_spacing(split: SplitQuality) -> tuple[str, str]:
    if split.spacing_quartiles is None:
        return "unknown", ""
    low, median, high = split.spacing_quartiles
    return f"{median:.3f}", f"{low:.3f}–{high:.3f}"


def _number(value: float | None, show: Callable[[float], str]) -> tuple[str, str]:
    return "unknown" if value is None else show(value), ""


def _list_reasons(reasons: Mapping[str, int], none: str) -> str:
    """`5 studies: not dicom 3, missing 2`, the most frequent first."""
    if not reasons:
        return none
    told = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{reason.replace('_', ' ')} {number:,}" for reason, number in told)
    return f"{count(sum(reasons.values()), 'study', 'studies')}: {listed}"


def _draw_quality(quality: Quality) -> list[dict[str, Any]]:
    medians, means = [], []
    for name, split in quality.splits.items():
        medians.append(f"{name} {_number(split.age_median, '{:g}'.format)[0]}")
        means.append(f"{name} {_number(split.intensity.mean, '{:.3f}'.format)[0]}")
    ages = f"Age by split; median {', '.join(medians)}"
    levels = f"Gray levels by split; mean {', '.join(means)}"
    return [
        inline(data_charts.draw_ages(quality), ages),
        inline(data_charts.draw_intensity(quality), levels),
    ]
