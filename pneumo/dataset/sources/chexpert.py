"""CheXpert, small or full size -> studies: `train.csv`, `valid.csv` and frontal images.

https://stanfordmlgroup.github.io/competitions/chexpert
"""

from collections import Counter
from collections.abc import Mapping

from pneumo import storage
from pneumo.dataset.source import Source
from pneumo.dataset.sources.layout import Folder, Layout, StudyCollector, positive_labels
from pneumo.dataset.sources.tables import (
    LINE,
    first_present,
    read_first_line,
    read_numbers,
    read_table,
    read_texts,
)
from pneumo.errors import SourceError
from pneumo.images.headers import make_header

_PATH, _SIDE = "Path", "Frontal/Lateral"
_SPLITS = {"train.csv": "train_val", "valid.csv": "test"}
_KNOWN = (_PATH, _SIDE, "Sex", "Age", "AP/PA", "No Finding", "Pneumonia")
_UNCERTAIN = -1.0
_LATERAL, _IGNORED = "lateral views", "of uncertain label (prepare.uncertain ignore)"


def read_chexpert(folder: Folder, layout: Layout) -> Source:
    """The frontal images of both tables. "Pneumonia", or a column of prepare.positive, is 1, 0, -1
    (uncertain: prepare.uncertain decides) or blank (not mentioned: negative).

    Raises SourceError for a missing column, and for another label.
    """
    studies, left_out, seen = StudyCollector(folder, layout), Counter[str](), set[str]()
    for table_name, split in _SPLITS.items():
        name = first_present(folder.files, (table_name,))
        if name is not None:
            _read_table(folder, folder.files[name], split, studies, left_out, seen)
    policy = folder.settings.uncertain
    note = "blank labels count as negative, uncertain ones " + {
        "ignore": "are left out", "negative": "as negative", "positive": "as positive"
    }[policy]  # fmt: skip
    return studies.finish(left_out=left_out, notes=(note,))


def _read_table(
    folder: Folder,
    url: str,
    split: str,
    studies: StudyCollector,
    left_out: Counter[str],
    seen: set[str],
) -> None:
    positive = positive_labels(folder)
    table = read_table(url, _PATH, _SIDE, *positive, known=(*_KNOWN, *positive))
    labels = list(zip(*(read_numbers(table, name, url) for name in positive), strict=True))
    healthy = read_numbers(table, "No Finding", url)
    texts = (read_texts(table, name) for name in (_PATH, _SIDE, "Age", "Sex", "AP/PA"))
    rows = zip(table[LINE].to_pylist(), labels, healthy, *texts, strict=True)
    for row, marks, is_healthy, path, side, age, sex, view in rows:
        if side.casefold() != "frontal":
            left_out[_LATERAL] += 1
            continue
        target = _decide(marks, folder.settings.uncertain, f"{url}: row {row}")
        if target is None:
            left_out[_IGNORED] += 1
            continue
        parts = path.split("/")
        if len(parts) < 4 or ".." in parts or path in seen:
            raise SourceError(
                f"{url}: row {row}: not a path patientNNNNN/studyN/view.jpg, or a duplicate"
            )
        seen.add(path)
        mentioned = "Normal" if is_healthy == 1 else "Other finding"
        studies.add(
            path,
            f"chexpert/{parts[-3]}",
            # Paths start with the name of the download, which may not be the folder's name.
            storage.join(folder.url, *parts[-4:]),
            target,
            positive[0] if target else mentioned,
            header=make_header(age=age, sex=sex, view=view),
            published=split,
        )


def _decide(labels: tuple[float | None, ...], policy: str, where: str) -> int | None:
    """1 where a label is 1, else by the policy where one is uncertain, else 0; None: left out."""
    if any(label not in (None, 0, 1, _UNCERTAIN) for label in labels):
        raise SourceError(f"{where}: a label that is none of 1, 0, -1 and blank")
    if 1 in labels:
        return 1
    if _UNCERTAIN in labels:
        return {"ignore": None, "negative": 0, "positive": 1}[policy]
    return 0


def _is_chexpert(files: Mapping[str, str]) -> bool:
    name = first_present(files, tuple(_SPLITS))
    return name is not None and _SIDE.casefold() in read_first_line(files[name])


LAYOUT = Layout(
    name="chexpert",
    title="CheXpert",
    name_patterns=(r"(train|valid)(\.csv)?$", r"patient\d{5}$", "CheXpert"),
    missing=f"no train.csv or valid.csv with the columns {_PATH} and {_SIDE}",
    recognise=_is_chexpert,
    read=read_chexpert,
    settings=frozenset({"positive", "uncertain"}),
)
