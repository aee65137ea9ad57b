"""Predictions of single files: a row for each file, decided by the run's frozen threshold.

Unlike everything else that pneumo writes, they contain the user's own file names, so they are
written to the user's own folder and nowhere else.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pneumo.errors import RunError
from pneumo.evaluation.calibration import Scaling
from pneumo.evaluation.operating_points import DECISION, call_positive
from pneumo.evaluation.predictions import sigmoid

NOT_A_NUMBER = "not_a_number"
"""The reason of a file that could be read, but whose logit is not finite."""
NOTICE = "Research use only: not a medical device, not validated for clinical use."


@dataclass(frozen=True)
class FrozenRule:
    """The threshold and the calibration that a run's evaluation froze on val, for later data."""

    threshold: float | None
    """On the probability, not the calibrated one."""
    threshold_logit: float | None
    """The same on the logit; None for runs of an older version."""
    threshold_reason: str | None
    calibration: Scaling | None
    calibration_reason: str | None
    checkpoints: tuple[str, ...] | None
    """SHA-256 of the checkpoints whose mean logit was evaluated."""
    views: int
    stored_size: int | None
    """Height and width of the evaluated images in the store, in pixels."""
    phantoms: bool = False
    """Whether the model was trained and evaluated on phantoms."""

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any] | None) -> Self:
        """The rule in a metrics.json; without threshold and calibration for None.

        Raises RunError for the metrics.json of another version.
        """
        if metrics is None:
            reason = "the run is not evaluated"
            return cls(None, None, reason, None, reason, None, 1, None)
        try:
            point = metrics["operating_points"][DECISION]
            threshold, logit = point["threshold"], point.get("threshold_logit")
            scoring = metrics["model"].get("scoring")
            fitted, calibration, why = metrics.get("calibration") or {}, None, None
            if fitted.get("method") is None:
                why = str(fitted.get("reason") or "the run's evaluation fitted no calibration")
            else:
                slope, intercept = float(fitted["slope"]), float(fitted["intercept"])
                log_loss = fitted.get("log_loss", math.nan)
                calibration = Scaling(fitted["method"], slope, intercept, log_loss)
            return cls(
                threshold=None if threshold is None else float(threshold),
                threshold_logit=None if logit is None else float(logit),
                threshold_reason=point.get("reason") if threshold is None else None,
                calibration=calibration,
                calibration_reason=why,
                checkpoints=scoring and tuple(c["sha256"] for c in scoring["checkpoints"]),
                views=scoring["views"] if scoring else 1,
                stored_size=metrics["dataset"].get("image_size"),
                phantoms=bool(metrics["dataset"].get("phantoms")),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"metrics.json of the run: no evaluation that this version reads ({error!r}); "
                "evaluate the run again with --overwrite"
            ) from error


@dataclass(frozen=True, eq=False)
class FilePredictions:
    """A row for each file; all arrays have shape (N,). Texts are Python's, as one long path would
    make every row of a NumPy text array as long."""

    file: npt.NDArray[np.object_]
    """Path below the source."""
    logit: npt.NDArray[np.float32]
    """NaN where the file is unusable; NaN or infinite with the reason NOT_A_NUMBER."""
    overlay: npt.NDArray[np.object_]
    """Path of the Grad-CAM overlay below the output; '' where there is none."""
    reason: npt.NDArray[np.object_]
    """Why there is no score: missing, unreadable, a code of `pneumo.errors.DicomError`, or
    NOT_A_NUMBER; '' where there is a score."""
    message: npt.NDArray[np.object_]
    """The reason in words."""
    view: npt.NDArray[np.object_]
    """AP or PA from the header; '' where unknown."""
    warnings: npt.NDArray[np.object_]
    """Codes of what was repaired in the file or is doubtful in its image, separated by '; '."""

    def __len__(self) -> int:
        return len(self.file)

    @property
    def num_scored(self) -> int:
        """Files with a score."""
        return int((self.reason == "").sum())

    @property
    def unusable(self) -> dict[str, int]:
        """Files without a score, by reason."""
        return dict(sorted(Counter(self.reason[self.reason != ""].tolist()).items()))

    @property
    def warned(self) -> dict[str, int]:
        """Files with a warning, by its code."""
        codes = (code for text in self.warnings.tolist() if text for code in text.split("; "))
        return dict(sorted(Counter(codes).items()))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All parts, sorted by file: the result does not depend on how the work was split."""
        columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        order = np.argsort(columns["file"], kind="stable")
        return cls(**{name: column[order] for name, column in columns.items()})

    def decide(self, rule: FrozenRule) -> npt.NDArray[np.bool_] | None:
        """Whether each file is called positive; None without a threshold. False without a
        score."""
        if rule.threshold is None:
            return None
        if rule.threshold_logit is None:
            called = sigmoid(self.logit) >= rule.threshold
        else:
            called = call_positive(self.logit, rule.threshold_logit)
        return np.asarray((self.reason == "") & called)

    def to_table(self, rule: FrozenRule, checkpoint: str) -> pa.Table:
        """The rows with calibrated probability and decision by `rule`; null without a score."""
        is_missing = self.reason != ""

        def numbers(values: npt.NDArray[Any] | None, kind: pa.DataType) -> pa.Array:
            if values is None:
                return pa.nulls(len(self), kind)
            return pa.array(values, kind, mask=is_missing)

        calibrated = rule.calibration.apply(self.logit) if rule.calibration else None
        called = self.decide(rule)
        texts = {name: getattr(self, name) for name in _TEXTS}
        columns = {
            "file": pa.array(self.file, pa.string()),
            "logit": numbers(self.logit, pa.float32()),
            "probability": numbers(sigmoid(self.logit), pa.float64()),
            "calibrated_probability": numbers(calibrated, pa.float64()),
            "decision": numbers(None if called is None else called.astype(np.int8), pa.int8()),
            "checkpoint": pa.array([checkpoint] * len(self), pa.string()),
            **{
                name: pa.array(values, pa.string(), mask=values == "")
                for name, values in texts.items()
            },
        }
        return pa.table(columns).replace_schema_metadata({"notice": NOTICE})


def encode_csv(table: pa.Table) -> bytes:
    """The table as CSV with a header line; null is empty. A text that a spreadsheet would take for
    a formula gets an apostrophe in front."""
    for i, name in enumerate(table.column_names):
        if pa.types.is_string(table.schema.field(i).type):
            safe = pc.replace_substring_regex(table[name], _FORMULA, r"'\1")
            table = table.set_column(i, name, safe)
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
    return buffer.getvalue()


_FORMULA = r"^([=+@\t\r-])"
_TEXTS = ("view", "warnings", "overlay", "reason", "message")


def count_formulas(readings: FilePredictions) -> int:
    """Number of files whose name a spreadsheet would take for a formula."""
    return sum(re.match(_FORMULA, name) is not None for name in readings.file.tolist())
