"""The rule that an evaluation froze, and the table that comes of it."""

import csv
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.csv
import pytest
from scipy.special import expit

from pneumo.errors import RunError
from pneumo.evaluation.file_predictions import (
    NOT_A_NUMBER,
    NOTICE,
    FilePredictions,
    FrozenRule,
    count_formulas,
    encode_csv,
)
from tests import present


def make_metrics(**changes: Any) -> dict[str, Any]:
    return {
        "operating_points": {"decision": {"threshold": 0.6}},
        "model": {"scoring": {"checkpoints": [{"sha256": "ab"}], "views": 3}},
        "dataset": {"image_size": 224},
        **changes,
    }


def make_readings() -> FilePredictions:
    return FilePredictions(
        file=np.array(["a.dcm", "deep/b.dcm", "c, d.dcm"]),
        logit=np.array([2.0, np.nan, -1.0], dtype=np.float32),
        overlay=np.array(["overlays/a.dcm.png", "", ""]),
        reason=np.array(["", "no_pixels", ""]),
        message=np.array(["", "no pixel data", ""]),
        view=np.array(["PA", "", ""]),
        warnings=np.array(["doubtful:turned; left_out:WindowWidth", "", "doubtful:turned"]),
    )


def read_back(readings: FilePredictions, rule: FrozenRule) -> list[dict[str, Any]]:
    table = readings.to_table(rule, "epoch-0001.pt")
    assert table.schema.metadata[b"notice"].decode() == NOTICE
    rows: list[dict[str, Any]] = pyarrow.csv.read_csv(
        io.BytesIO(encode_csv(table)),
        convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=True),
    ).to_pylist()
    return rows


@pytest.mark.parametrize(
    ("found", "slope", "intercept"),
    [
        ({"method": "temperature", "temperature": 4.0, "slope": 0.25, "intercept": 0.0}, 0.25, 0.0),
        ({"method": "platt", "slope": 0.8, "intercept": -0.3}, 0.8, -0.3),
    ],
)
def test_what_the_evaluation_froze_is_used(
    found: dict[str, Any], slope: float, intercept: float
) -> None:
    rule = FrozenRule.from_metrics(make_metrics(calibration=found))
    assert rule.threshold == 0.6
    assert rule.checkpoints == ("ab",)
    assert (rule.views, rule.stored_size) == (3, 224)
    assert rule.calibration is not None
    assert (rule.calibration.slope, rule.calibration.intercept) == (slope, intercept)
    used = read_back(make_readings(), rule)[0]
    assert used["file"] == "a.dcm"
    assert used["probability"] == pytest.approx(expit(2.0))
    assert used["calibrated_probability"] == pytest.approx(expit(slope * 2.0 + intercept))
    assert used["decision"] == 1
    assert used["reason"] is None


def test_a_file_that_cannot_be_used_has_a_reason_and_no_number() -> None:
    rows = {row["file"]: row for row in read_back(make_readings(), FrozenRule.from_metrics(None))}
    bad = rows["deep/b.dcm"]
    assert (bad["reason"], bad["message"]) == ("no_pixels", "no pixel data")
    numbers = ("logit", "probability", "calibrated_probability", "decision")
    assert [bad[name] for name in numbers] == [None] * 4
    assert rows["c, d.dcm"]["logit"] == -1


def test_an_infinite_logit_is_called_nothing() -> None:
    found = make_readings()
    wild = replace(
        found,
        logit=np.array([np.inf, np.nan, np.nan], np.float32),
        reason=np.array([NOT_A_NUMBER, "no_pixels", NOT_A_NUMBER]),
    )
    rule = FrozenRule.from_metrics(make_metrics())
    assert present(wild.decide(rule)).tolist() == [False] * 3
    assert wild.num_scored == 0
    assert wild.unusable == {"no_pixels": 1, NOT_A_NUMBER: 2}
    for row in read_back(wild, rule):
        assert (row["logit"], row["probability"], row["decision"]) == (None, None, None)


def test_without_an_evaluation_there_is_no_decision_and_it_is_said() -> None:
    rule = FrozenRule.from_metrics(None)
    assert (rule.threshold, rule.calibration, rule.checkpoints) == (None, None, None)
    assert rule.threshold_reason == rule.calibration_reason == "the run is not evaluated"
    assert {row["decision"] for row in read_back(make_readings(), rule)} == {None}
    assert make_readings().decide(rule) is None


@pytest.mark.parametrize(
    ("calibration", "reason"),
    [
        (None, "fitted no calibration"),
        ({"method": None, "reason": "val has one class only"}, "val has one class only"),
    ],
)
def test_no_calibration_is_null_with_a_reason(calibration: Any, reason: str) -> None:
    rule = FrozenRule.from_metrics(make_metrics(calibration=calibration))
    assert rule.calibration is None
    assert reason in str(rule.calibration_reason)


def test_no_threshold_carries_the_evaluations_reason() -> None:
    point = {"decision": {"threshold": None, "reason": "val: one class only"}}
    rule = FrozenRule.from_metrics(make_metrics(operating_points=point))
    assert (rule.threshold, rule.threshold_reason) == (None, "val: one class only")


def test_an_evaluation_from_before_ensembles_names_no_checkpoint() -> None:
    rule = FrozenRule.from_metrics(make_metrics(model={}))
    assert (rule.checkpoints, rule.views, rule.threshold) == (None, 1, 0.6)


@pytest.mark.parametrize(
    "broken", [{}, {"operating_points": {}}, make_metrics(model={"scoring": 3})]
)
def test_other_json_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="evaluate the run again"):
        FrozenRule.from_metrics(broken)


def test_parts_join_by_file_and_bad_ones_are_counted() -> None:
    whole = FilePredictions.join([make_readings()])
    assert whole.file.tolist() == ["a.dcm", "c, d.dcm", "deep/b.dcm"]
    assert whole.num_scored == 2
    assert whole.unusable == {"no_pixels": 1}


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@a", "\tx"])
def test_a_name_that_a_spreadsheet_would_run_is_escaped_in_the_csv(name: str) -> None:
    readings = replace(make_readings(), file=np.array([name, "a=b", "c"]))
    table = readings.to_table(FrozenRule.from_metrics(None), "best")
    assert table["file"].to_pylist() == [name, "a=b", "c"]
    rows = list(csv.DictReader(io.StringIO(encode_csv(table).decode())))
    assert [row["file"] for row in rows] == [f"'{name}", "a=b", "c"]
    assert count_formulas(readings) == 1


def test_warnings_are_counted_by_code() -> None:
    assert make_readings().warned == {"doubtful:turned": 2, "left_out:WindowWidth": 1}
