"""The metrics of an epoch: scikit-learn's numbers, the same on any ranks, None where undefined."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from sklearn.linear_model import LogisticRegression

from pneumo.network.scoring import Scores
from pneumo.training.validation import compute_metrics
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def make_scores(logits: list[float], targets: list[int]) -> Scores:
    keys = np.array([f"key-{i}" for i in range(len(logits))], dtype=np.str_)
    return Scores(keys, np.array(logits, dtype=np.float32), np.array(targets, dtype=np.int8))


def compute(logits: list[float], targets: list[int]) -> dict[str, float]:
    scores = make_scores(logits, targets)
    return compute_metrics(scores, scores, 3.0, CPU)


def test_metrics_are_those_of_scikit_learn_and_half_is_a_positive_call() -> None:
    logits, targets = [-1.0, 0.0, -2.0, 3.0, 30.0, 31.0], [0, 1, 1, 0, 0, 1]
    found = compute(logits, targets)
    called = [int(logit >= 0) for logit in logits]
    assert found["auroc"] == pytest.approx(reference.roc_auc_score(targets, logits), abs=1e-12)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(targets, called), abs=1e-12)
    assert found["precision"] == pytest.approx(reference.precision_score(targets, called), abs=1e-9)
    assert found["recall"] == pytest.approx(reference.recall_score(targets, called), abs=1e-12)
    specificity = reference.recall_score(targets, called, pos_label=0)
    assert found["specificity"] == pytest.approx(specificity, abs=1e-12)
    precision = reference.average_precision_score(targets, logits)
    assert found["average_precision"] == pytest.approx(precision, abs=1e-12)
    chances = 1 / (1 + np.exp(-np.array(logits)))
    assert found["brier"] == pytest.approx(reference.brier_score_loss(targets, chances), abs=1e-12)
    model = LogisticRegression(C=np.inf, tol=1e-12).fit(np.array(logits)[:, None], targets)
    assert found["calibration_slope"] == pytest.approx(model.coef_[0, 0], abs=1e-3)
    losses = [
        (3.0 if target else 1.0) * math.log1p(math.exp(-logit if target else logit))
        for logit, target in zip(logits, targets, strict=True)
    ]
    assert found["loss"] == pytest.approx(sum(losses) / 6, rel=1e-9)


def test_what_is_undefined_is_no_number() -> None:
    negatives = compute([-1.0, -2.0], [0, 0])
    assert negatives["accuracy"] == 1
    assert all(math.isnan(negatives[name]) for name in ("auroc", "precision", "recall"))
    diverged = compute([math.nan, 1.0], [0, 1])
    assert all(math.isnan(value) for value in diverged.values())


_RANK = """
import numpy as np
from pneumo.network.scoring import Scores
from pneumo.training.validation import compute_metrics

logits = np.array([-1, 0.5, 2, -3, 1], dtype=np.float32)
targets = np.array([0, 1, 1, 1, 0], dtype=np.int8)
whole = Scores(np.array(list("abcde")), logits, targets)
found = []
for ends in ([0, 2, 5], [0, 5, 5]):  # the second rank's slice may be empty
    here = slice(ends[rank], ends[rank + 1]) if size > 1 else slice(0, 5)
    mine = Scores(whole.keys[here], logits[here], targets[here])
    found.append(compute_metrics(mine, whole, 2.0, torch.device("cpu")))
(folder / f"{size}-{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.processors
def test_ranks_compute_together_what_one_does(tmp_path: Path) -> None:
    for size in (1, 2):
        run_ranks(_RANK, tmp_path, size)
    alone, *both = (
        json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json")
    )
    for rank in both:
        for found, expected in zip(rank, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-12)
