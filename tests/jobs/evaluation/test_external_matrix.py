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
    found = read_others(str(tmp_path), "train")
    assert found == {"train (2)": rows["a"], "train (3)": rows["b"], "b": rows["b"]}
    assert read_others(str(tmp_path), "new") == {
        "train": rows["a"],
        "train (2)": rows["b"],
        "b": rows["b"],
    }
    assert read_others(None, "train") == {}
