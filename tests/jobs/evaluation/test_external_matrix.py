"""The rows of other runs in the matrix of an external validation."""

import json
from pathlib import Path

from jobs.evaluation.external import read_others


def test_runs_of_one_name_have_a_row_each(tmp_path: Path) -> None:
    """As those of `make demo`, which are all called `train`."""
    (tmp_path / "external").mkdir()
    rows = {name: {"own test": {"value": value}} for name, value in (("a", 0.7), ("b", 0.8))}
    told = {
        "run": "train",
        "matrix": rows["a"],
        "matrix_of_others": {"train (2)": rows["b"], "b": rows["b"]},
    }
    (tmp_path / "external" / "metrics.json").write_text(json.dumps(told))
    found = read_others(str(tmp_path), "train", {})[0]
    assert found == {"train (2)": rows["a"], "train (3)": rows["b"], "b": rows["b"]}
    assert read_others(str(tmp_path), "new", {})[0] == {
        "train": rows["a"],
        "train (2)": rows["b"],
        "b": rows["b"],
    }
    assert read_others(None, "train", {"store": "a"}) == ({}, {"store": "a"})


def test_sets_of_one_name_have_a_column_each(tmp_path: Path) -> None:
    """The last folder of a store's path names it, so two sets may share a name."""
    (tmp_path / "external").mkdir()
    row = {name: {"value": 0.7} for name in ("own test", "store", "nih", "copy")}
    told = {"run": "b", "matrix": row, "matrix_of_others": {"c": {"store (2)": {"value": 0.6}}}}
    digests = {"store": "2", "nih": "3", "copy": "4", "store (2)": "5"}
    path = tmp_path / "external" / "metrics.json"
    own = {"store": "1", "nih": "3", "lung": "4"}

    path.write_text(json.dumps({**told, "digests": digests}))
    rows, known = read_others(str(tmp_path), "a", own)
    assert list(rows["b"]) == ["own test", "store (2)", "nih", "lung"]
    assert list(rows["c"]) == ["store (3)"]
    assert known == {**own, "store (2)": "2", "store (3)": "5"}

    path.write_text(json.dumps(told))  # by an older version
    rows, known = read_others(str(tmp_path), "a", own)
    assert list(rows["b"]) == ["own test", "store (2)", "nih (2)", "copy"]
    assert known == {**own, "store (2)": None, "nih (2)": None, "copy": None, "store (3)": None}
