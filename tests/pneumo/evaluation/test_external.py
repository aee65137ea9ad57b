"""A model elsewhere: what is frozen stays so, and differences are those of plain arithmetic."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logit
from sklearn.metrics import brier_score_loss, roc_auc_score
from statsmodels.stats.proportion import confint_proportions_2indep

from pneumo.evaluation.baselines import Metadata, MetadataModel, fit_metadata
from pneumo.evaluation.calibration import Scaling
from pneumo.evaluation.estimates import as_json
from pneumo.evaluation.external import (
    RECALIBRATION_FRACTION,
    ExternalEvaluation,
    FrozenChoices,
    evaluate_external,
)
from pneumo.evaluation.operating_points import OperatingPoint
from pneumo.evaluation.predictions import Predictions, sigmoid
from pneumo.evaluation.set_shift import classify_sets, measure_shift
from tests import present
from tests.estimates import contains
from tests.predictions import make_plain

THRESHOLD = 0.4


def draw(seed: int, *, n: int = 400, signal: float = 2.0, shift: float = 0.0) -> Predictions:
    rng = np.random.default_rng(seed)
    target = (rng.random(n) < 0.3).astype(np.int8)
    logit = (rng.normal(size=n) + signal * target - 1 + shift).astype(np.float32)
    return make_plain(
        n,
        key=np.array([f"{seed}-{i}" for i in range(n)]),
        patient=np.array([f"{seed}-{i // 2}" for i in range(n)]),
        split=np.full(n, "test"),
        target=target,
        logit=logit,
        age=rng.integers(20, 80, n).astype(float),
        sex=rng.choice(["F", "M"], n),
        view=np.where(rng.random(n) < 0.3 + 0.4 * target, "AP", "PA"),
    )


INTERNAL, EXTERNAL = draw(0), draw(1, signal=1.0, shift=0.7)
FROZEN = FrozenChoices(
    {"decision": OperatingPoint("decision", "Youden's index", float(logit(THRESHOLD)))},
    Scaling("platt", 1.2, -0.1, 0.5),
    fit_metadata(Metadata.of(draw(2))),
)


def judge(external: Predictions = EXTERNAL, frozen: FrozenChoices = FROZEN) -> ExternalEvaluation:
    return evaluate_external(INTERNAL, external, frozen, resamples=200, seed=0, min_patients=10)


def test_values_are_those_of_scikit_learn() -> None:
    found = judge()
    for rows, auroc, brier in (
        (INTERNAL, found.auroc.internal, found.brier.internal),
        (EXTERNAL, found.auroc.external, found.brier.external),
    ):
        assert auroc.value == pytest.approx(roc_auc_score(rows.target, rows.logit))
        calibrated = sigmoid(1.2 * rows.logit - 0.1)
        assert brier.value == pytest.approx(brier_score_loss(rows.target, calibrated), abs=1e-6)
    gap = found.auroc.difference
    assert gap.value is not None
    assert gap.low is not None
    assert gap.high is not None
    assert gap.low < gap.value < gap.high < 0


def test_the_threshold_is_the_frozen_one() -> None:
    found = judge()
    called = EXTERNAL.probability >= THRESHOLD
    positive = EXTERNAL.target == 1
    assert found.sensitivity["decision"].external.value == pytest.approx(called[positive].mean())
    assert found.specificity["decision"].external.value == pytest.approx(
        (~called)[~positive].mean()
    )


@pytest.mark.parametrize("missed", [0, 3, 40])
@pytest.mark.parametrize("missed_here", [0, 6, 60])
def test_a_rate_of_exactly_0_or_1_has_an_interval_and_so_has_its_difference(
    missed: int, missed_here: int
) -> None:
    def make(name: str, positives: int, misses: int) -> Predictions:
        target = np.arange(2 * positives) < positives
        called = target & (np.arange(2 * positives) >= misses)
        names = np.array([f"{name}{i}" for i in range(2 * positives)])
        return make_plain(len(names), patient=names, target=target, logit=8.0 * called - 4)

    own, here = make("a", 40, missed), make("b", 60, missed_here)
    found = evaluate_external(own, here, FROZEN, resamples=200, seed=0, min_patients=10)
    for rates, counts in (
        (found.sensitivity["decision"], ((40 - missed, 40), (60 - missed_here, 60))),
        (found.specificity["decision"], ((40, 40), (60, 60))),
    ):
        sides = rates.internal, rates.external
        fixed = [k in (0, n) for k, n in counts]
        for one, (k, n), is_fixed in zip(sides, counts, fixed, strict=True):
            assert one.value == k / n
            assert (one.method == "Wilson over patients") == is_fixed
            assert contains(one, k / n)
        (k, n), (j, m) = counts
        gap = rates.difference
        reference = confint_proportions_2indep(j, m, k, n, method="newcomb")
        assert gap.value == pytest.approx(j / m - k / n)
        assert (gap.method == "Newcombe, of both intervals") == any(fixed)
        assert (gap.low, gap.high) == pytest.approx(reference, abs=0.03 if not all(fixed) else 1e-9)


def test_a_rate_has_the_sample_size_of_its_own_class() -> None:
    target = np.arange(604) < 4
    here = make_plain(604, target=target, logit=np.where(np.arange(604) % 5, -1.0, 1.0))
    found = judge(here)
    assert present(found.specificity["decision"].external.low) == pytest.approx(0.77, abs=0.02)
    assert found.specificity["decision"].difference.low is not None
    assert found.sensitivity["decision"].external.low is None


def test_an_equal_set_differs_by_chance_alone() -> None:
    found = judge(draw(3)).auroc.difference
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high


def test_the_case_mix_is_taken_from_the_internal_test() -> None:
    """Where the model is good in AP alone, a set of AP looks better than it is."""
    rng = np.random.default_rng(5)
    base = draw(6, n=2000, signal=0.0)
    is_ap = rng.random(2000) < 0.9
    logit = (base.logit + np.where(is_ap, 3.0 * base.target, 0)).astype(np.float32)
    rows = replace(base, logit=logit, probability=sigmoid(logit),
                   view=np.where(is_ap, "AP", "PA"))  # fmt: skip
    found = judge(rows)
    assert found.case_mix.by == ("view", "age", "sex")
    assert found.case_mix.auroc.value is not None
    assert found.auroc.external.value is not None
    assert found.case_mix.auroc.value < found.auroc.external.value - 0.05


def test_a_combination_of_one_class_is_not_part_of_the_case_mix() -> None:
    """Its negatives would be compared with the positives of other combinations only."""
    internal = draw(10, n=2000)
    rows = draw(11, n=2000)
    rows = rows.take((rows.view == "PA") | (rows.target == 0))
    without_ap = rows.take(rows.view == "PA")
    found, expected = (
        evaluate_external(internal, one, FROZEN, resamples=200, seed=0, min_patients=10).case_mix
        for one in (rows, without_ap)
    )
    assert found.covered == expected.covered < 0.7
    assert found.auroc.value == pytest.approx(expected.auroc.value)


def test_a_case_mix_that_hangs_on_a_few_patients_has_no_auroc() -> None:
    """Nine tenths of the weight lie on three studies in AP."""
    internal, rows = (
        replace(draw(seed, n=600), sex=np.full(600, "F"), age=np.full(600, 50.0))
        for seed in (12, 13)
    )
    internal = replace(internal, view=np.where(np.arange(600) % 10, "AP", "PA"))
    target = np.where(np.arange(600) < 3, np.arange(600) == 0, rows.target).astype(np.int8)
    rows = replace(rows, view=np.where(np.arange(600) < 3, "AP", "PA"), target=target)
    mix = evaluate_external(internal, rows, FROZEN, resamples=200, seed=0, min_patients=10).case_mix
    assert mix.covered == 1
    assert mix.auroc.value is None
    assert mix.auroc.reason == "the weighted patients of a class are worth 1, 10 are needed"


def test_a_set_with_all_kinds_of_studies_covers_the_internal_test_exactly() -> None:
    found = evaluate_external(
        EXTERNAL, draw(7, n=4000), FROZEN, resamples=200, seed=0, min_patients=10
    )
    assert found.case_mix.covered == 1
    found = judge(EXTERNAL.take(EXTERNAL.sex == "F"))
    assert found.case_mix.covered == (INTERNAL.sex == "F").mean()


def test_without_metadata_there_is_no_case_mix() -> None:
    nothing = np.array([""] * len(EXTERNAL), dtype=np.str_)
    rows = replace(EXTERNAL, view=nothing, sex=nothing, age=np.full(len(EXTERNAL), np.nan))
    mix = judge(rows).case_mix
    assert mix.auroc.value is None
    assert "unknown" in str(mix.auroc.reason)


def test_recalibration_is_judged_on_other_patients_than_it_is_fitted_on() -> None:
    found = judge().recalibration
    assert found.fitted_on + found.evaluated_on == len(EXTERNAL)
    assert found.fitted_on == pytest.approx(RECALIBRATION_FRACTION * len(EXTERNAL), abs=2)
    assert found.difference.value is not None
    assert found.difference.value < 0


def test_a_recalibration_is_fitted_on_enough_patients_and_never_reverses_the_ranking() -> None:
    few = judge(EXTERNAL.take(np.arange(len(EXTERNAL)) < 80)).recalibration
    assert few.slope is None
    assert "are needed" in str(few.brier_before.reason)
    reversed_ = judge(replace(EXTERNAL, logit=-EXTERNAL.logit)).recalibration
    assert reversed_.slope is None
    assert "does not mean a higher risk" in str(reversed_.difference.reason)


def test_a_run_without_calibration_or_metadata() -> None:
    found = judge(frozen=replace(FROZEN, scaling=None, metadata=MetadataModel(0, None)))
    plain = brier_score_loss(EXTERNAL.target, EXTERNAL.probability)
    assert found.brier.external.value == pytest.approx(plain, abs=1e-6)
    assert found.metadata_auroc.external.value is None


def test_all_of_it_is_json() -> None:
    told = json.loads(json.dumps(as_json(judge())))
    assert told["auroc"]["difference"]["value"] == judge().auroc.difference.value


def test_pictures_of_another_kind_are_told() -> None:
    rng = np.random.default_rng(0)
    dark, light = (
        [np.clip(rng.normal(mean, 20, (32, 32)), 0, 255).astype(np.uint8) for _ in range(40)]
        for mean in (90, 150)
    )
    patients = [str(i) for i in range(80)]
    told = classify_sets(dark, light, patients, resamples=100, seed=0)
    same = classify_sets(dark[:20], dark[20:], patients[:40], resamples=100, seed=0)
    assert told.value == 1.0
    assert same.value is not None
    assert same.value < 0.9
    few = classify_sets(dark[:3], light, patients[:43], resamples=100, seed=0)
    assert few.value is None
    one_patient = classify_sets(dark, light, ["0"] * 40 + patients[40:], resamples=100, seed=0)
    assert one_patient.reason == "fewer than 10 patients"


@pytest.mark.parametrize("images_per_patient", [1, 3])
def test_equal_sets_are_seldom_told_apart(images_per_patient: int) -> None:
    patients = np.repeat(np.arange(80), images_per_patient)
    of_first = int((patients < 40).sum())
    found = []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        shapes = rng.normal(size=(80, 4, 4))[patients] + rng.normal(size=(len(patients), 4, 4))
        pictures = np.clip(110 + 20 * shapes, 0, 255).astype(np.uint8)
        pictures = np.kron(pictures, np.ones((8, 8), np.uint8))
        found.append(
            classify_sets(
                list(pictures[:of_first]),
                list(pictures[of_first:]),
                patients.astype(str).tolist(),
                resamples=100,
                seed=seed,
            )
        )
    assert sum(one.low is not None and not contains(one, 0.5) for one in found) <= 8
    assert np.mean([present(one.value) for one in found]) == pytest.approx(0.5, abs=0.02)


def test_gray_levels_and_spacing() -> None:
    black, white = [4, *[0] * 255], [*[0] * 255, 4]
    spacings = (np.array([0.1, 0.3, np.nan]), np.array([np.nan]))
    shift = measure_shift((black, white), spacings, judge().auroc.external, (1, 1))
    assert (shift.gray_distance, shift.gray_mean) == (1.0, (0.0, 1.0))
    assert shift.spacing_median_mm == (0.2, None)
