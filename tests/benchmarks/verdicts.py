"""Whether what a report concludes is true as often as it says: data sets with a known truth.

    python -m tests.benchmarks.verdicts [--sets 500] [--resamples 400]

Data sets are drawn from one population with RSNA-like numbers of images per patient, whose images
are alike. Printed are two tables in Markdown: of every interval, how often it holds the
population's value, for 150 and for 40 patients; and of every sentence that concludes something, how
often it is printed where it is false, in designs in which it always is. The goals: 93 to 97 % from
100 patients on, and at most 5 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits

from pneumo.config import EvaluateConfig
from pneumo.dataset.quality import find_shifts
from pneumo.dataset.study_table import StudyRow
from pneumo.evaluation import metrics
from pneumo.evaluation.baselines import (
    Metadata,
    MetadataModel,
    SickerView,
    find_sicker_view,
    fit_metadata,
)
from pneumo.evaluation.calibration import calibrate
from pneumo.evaluation.comparison import ComparedRuns, compare
from pneumo.evaluation.estimates import Estimate, Floats
from pneumo.evaluation.evaluation import Fitted, SplitEvaluation, evaluate_split
from pneumo.evaluation.logistic_regression import fit_logistic, fit_offset
from pneumo.evaluation.map_scores import MAPS, MEASURES, BoxScores, summarise_saliency
from pneumo.evaluation.operating_points import choose_points, predictive_values
from pneumo.evaluation.predictions import Predictions, sigmoid
from pneumo.reporting.page.performance_section import comparison_sentence
from pneumo.reporting.page.saliency_section import ENOUGH_FOR_PRIOR, saliency_sentence
from pneumo.reporting.page.subgroup_section import worst_subgroup_sentence
from pneumo.reporting.page.summary import is_shown_to_rank, view_sentence

NUM_IMAGES = (1, 1, 1, 1, 1, 1, 2, 2, 3, 5)
"""Of a patient, with equal chances: a mean of 1.8, as in RSNA's data."""
HIGH, OF_BOTH_CLASSES = "sensitivity_95", ("balanced_accuracy", "lr_positive")
"""A point at which sensitivity is often exactly 1, and metrics that depend on both classes."""
EFFECT, ALIKE = 1.7, 0.5
"""How far positives score above negatives, and the part of a score's variance that a patient's
images share."""
PREVALENCE, PATIENT_RISK = 0.225, 0.6
"""Of studies; and the part of the variance of the latent severity that a patient's images share."""
AP = (0.75, 0.35)
"""The fraction of AP among positives and among negatives."""
PATIENTS = (150, 40)
MEASURES_OF_CALIBRATION = (
    "brier", "log_loss", "slope", "intercept", "intercept_at_slope_1", "in_the_large",
)  # fmt: skip


# --- the population ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Women:
    """How women differ from men, without the model's knowledge."""

    fraction: float = 0.43
    ill: float = 0.0
    """How much higher than PREVALENCE theirs is, and men's lower."""
    effect: float = 0.0
    """How much further their positives score above negatives."""


ALIKE_WOMEN = Women()


def draw(
    num_patients: int,
    rng: np.random.Generator,
    split: str,
    *,
    effect: float = EFFECT,
    ap: tuple[float, float] = AP,
    women: Women = ALIKE_WOMEN,
) -> Predictions:
    """Studies of so many patients. The logits are a calibrated model's: of a score from two normals
    `effect` apart the log odds are effect * (score - effect / 2) + those of the prevalence."""
    patient = np.repeat(np.arange(num_patients), rng.choice(NUM_IMAGES, size=num_patients))
    n = len(patient)

    def draw_correlated(fraction: float) -> Floats:
        """Standard normals, of whose variance a patient's images share `fraction`."""
        own, common = rng.normal(size=n), rng.normal(size=num_patients)[patient]
        drawn: Floats = np.sqrt(1 - fraction) * own + np.sqrt(fraction) * common
        return drawn

    severity, for_view, noise = draw_correlated(PATIENT_RISK), rng.random(n), draw_correlated(ALIKE)
    age = rng.integers(18, 90, num_patients)[patient].astype(np.float64)
    is_woman = (rng.random(num_patients) < women.fraction)[patient]
    target = (ndtr(severity) < PREVALENCE + np.where(is_woman, 1, -1) * women.ill).astype(np.int8)
    is_ap = for_view < np.where(target == 1, *ap)
    score = (effect + women.effect * is_woman) * target + noise
    odds = np.log(PREVALENCE / (1 - PREVALENCE))
    logit = (effect * (score - effect / 2) + odds if effect else score).astype(np.float32)
    names = np.char.add(f"{split}-", np.arange(n).astype(np.str_))
    return Predictions(
        key=names,
        patient=np.char.add(f"{split}-", patient.astype(np.str_)),
        split=np.full(n, split),
        target=target,
        logit=logit,
        probability=sigmoid(logit),
        calibrated_probability=np.full(n, np.nan),
        checkpoint=np.full(n, "best"),
        finding=np.where(target == 1, "Lung Opacity", "Normal"),
        age=age,
        sex=np.where(is_woman, "F", "M"),
        view=np.where(is_ap, "AP", "PA"),
        spacing_mm=rng.choice([0.139, 0.143, 0.168, 0.171], n),
        box_area_fraction=np.where(target == 1, 0.1, np.nan),
    )


@dataclass(frozen=True, eq=False)
class Population:
    """Enough studies that their sampling error is negligible, and the values that never change."""

    rows: Predictions
    metadata: MetadataModel
    sicker_view: SickerView
    fixed: Mapping[str, float]

    @classmethod
    def draw(cls, num_patients: int) -> Population:
        """A population, and a train split that metadata are fitted on."""
        rng = np.random.default_rng(1)
        rows = draw(num_patients, rng, "test")
        train = Metadata.of(draw(2000, rng, "train"))
        metadata = fit_metadata(train)
        auroc, alone = metrics.auroc(rows.target, rows.logit), metadata.score(rows)
        of_view = metrics.auroc(rows.target, rows.view == "AP")
        fixed = {
            "AUROC": auroc,
            "AUROC, DeLong by patient": auroc,
            "average precision": float(average_precision_score(rows.target, rows.logit)),
            "sensitivity at specificity 0.90": float(ndtr(EFFECT - ndtri(0.9))),
            "AUROC within AP": auroc,
            "AUROC within PA": auroc,
            "gain over view": auroc - of_view,
            "gain over view, DeLong by patient": auroc - of_view,
            "gain over metadata": auroc - metrics.auroc(rows.target, alone),
            **_measure_calibration("as scored", rows.target, rows.logit),
        }
        for sex in ("F", "M"):
            fixed[f"AUROC, sex {sex}"] = auroc
        for measure in ("auroc", "sensitivity", "specificity", "in_the_large"):
            fixed[f"gap of sex F, {measure}"] = 0.0
        return cls(rows, metadata, find_sicker_view(train), fixed)

    def find_truth(self, fitted: Fitted) -> dict[str, float]:
        """What each interval of test should hold at these thresholds, after this calibration."""
        target, logit = self.rows.target, self.rows.logit.astype(np.float64)
        found = dict(self.fixed)
        for name in ("decision", "screening", HIGH):
            threshold = fitted.points[name].logit
            if threshold is None:
                continue
            called = logit >= threshold
            outcomes = (called & (target == 1), called & (target == 0),
                        ~called & (target == 1), ~called & (target == 0))  # fmt: skip
            cells = [np.array([float(part.sum())]) for part in outcomes]
            rates = {key: float(rate(*cells)[0]) for key, rate in metrics.RATES.items()}
            found |= {f"{key}, {name}": value for key, value in rates.items()}
            both = predictive_values(np.array(rates["recall"]), np.array(rates["specificity"]), 0.1)
            found |= {
                f"{key} at 10 %, {name}": float(v)
                for key, v in zip(("PPV", "NPV"), both, strict=True)
            }
            if name == "decision":
                for sex in ("F", "M"):
                    found[f"sensitivity, sex {sex}"] = rates["recall"]
                    found[f"specificity, sex {sex}"] = rates["specificity"]
        scaling = fitted.calibration.chosen
        if scaling is not None:
            scaled = scaling.slope * logit + scaling.intercept
            found |= _measure_calibration("calibrated", target, scaled)
        return found


def _measure_calibration(
    when: str, target: npt.NDArray[Any], logit: npt.NDArray[Any]
) -> dict[str, float]:
    part = slice(0, 60_000)
    y, x = target[part].astype(float), np.asarray(logit[part], dtype=np.float64)
    p, one = sigmoid(x), np.ones((len(x), 1))
    slope, intercept = fit_logistic(x, y, one)
    found = {
        "brier": float(np.mean((p - y) ** 2)),
        "log_loss": float(np.mean(np.logaddexp(0, np.where(y == 1, -x, x)))),
        "slope": float(slope[0]),
        "intercept": float(intercept[0]),
        "intercept_at_slope_1": float(fit_offset(x, y, one)[0]),
        "in_the_large": float(p.mean() - y.mean()),
    }
    return {f"{key}, {when}": value for key, value in found.items()}


def list_intervals(test: SplitEvaluation) -> dict[str, Estimate]:
    """The intervals of a split by the names of `Population.find_truth`."""
    at = test.at["decision"]
    found = {
        "AUROC": test.auroc,
        "AUROC, DeLong by patient": test.auroc_delong_clustered,
        "average precision": test.average_precision,
        "sensitivity at specificity 0.90": test.sensitivity_at_specificity_90,
        **{f"{key}, decision": rate for key, rate in at.rates.items()},
        "recall, screening": test.at["screening"].rates["recall"],
        **{f"{key}, {HIGH}": test.at[HIGH].rates[key] for key in OF_BOTH_CLASSES},
        f"PPV at 10 %, {HIGH}": test.at[HIGH].at_prevalence[1].ppv,
        "PPV at 10 %, decision": at.at_prevalence[1].ppv,
        "NPV at 10 %, decision": at.at_prevalence[1].npv,
        "gain over view": test.view.gain,
        "gain over view, DeLong by patient": test.view.gain_delong.difference,
        "gain over metadata": test.metadata.gain,
        **{f"AUROC within {view}": one for view, one in test.view.within.items()},
    }
    for when, part in (("as scored", test.before), ("calibrated", test.after)):
        for key in MEASURES_OF_CALIBRATION:
            found[f"{key}, {when}"] = getattr(part, key)
    for group in test.subgroups.groups:
        if group.by == "sex":
            found[f"AUROC, sex {group.name}"] = group.auroc
            found[f"sensitivity, sex {group.name}"] = group.rates["recall"]
            found[f"specificity, sex {group.name}"] = group.rates["specificity"]
        if (group.by, group.name) == ("sex", "F"):
            found |= {f"gap of sex F, {measure}": gap for measure, gap in group.gaps.items()}
    return found


# --- intervals -----------------------------------------------------------------------------------


@dataclass
class Count:
    """In how many sets something was true, of those in which it could be decided."""

    hits: int = 0
    sets: int = 0

    def add(self, is_so: bool) -> None:
        """Count one more set."""
        self.hits, self.sets = self.hits + is_so, self.sets + 1

    def __str__(self) -> str:
        return f"{100 * self.hits / self.sets:.1f} %" if self.sets else "none"


@dataclass(frozen=True)
class Settings:
    """How many sets and resamples: the run time grows with both."""

    sets: int
    resamples: int

    def evaluate(
        self, population: Population, patients: int, rng: np.random.Generator, **changes: Any
    ) -> tuple[Fitted, SplitEvaluation]:
        """Choose on a val of so many patients, and evaluate a test of as many."""
        val, test = (draw(patients, rng, split, **changes) for split in ("val", "test"))
        config, seed = (
            EvaluateConfig(bootstrap_resamples=self.resamples),
            int(rng.integers(1 << 30)),
        )
        calibration = calibrate(val, min_patients=config.min_patients, seed=seed)
        points = choose_points(val, config)
        fitted = Fitted(points, calibration, population.metadata, population.sicker_view)
        test = dataclasses.replace(test, calibrated_probability=calibration.apply(test.logit))
        return fitted, evaluate_split(test, "test", fitted, config=config, seed=seed)


@dataclass(frozen=True)
class Coverage:
    """How often the intervals of sets of one size contain the truth."""

    intervals: Mapping[str, Count]
    scaled: Count
    """How often a scaling is fitted, though the network is calibrated."""
    ece: tuple[float, float]
    """The mean calibration error of this calibrated network, and what was told of one."""


def cover(population: Population, patients: int, settings: Settings) -> Coverage:
    """Draw the sets of so many patients, and judge each."""
    rng = np.random.default_rng(patients)
    intervals: dict[str, Count] = defaultdict(Count)
    scaled, errors = Count(), []
    for _ in range(settings.sets):
        fitted, test = settings.evaluate(population, patients, rng)
        truth = population.find_truth(fitted)
        for name, one in list_intervals(test).items():
            if one.low is not None:
                low, high = one.low, np.inf if one.high is None else one.high
                intervals[name].add(low <= truth[name] <= high)
        if fitted.calibration.chosen is not None:
            scaled.add(fitted.calibration.chosen.method != "none")
        errors.append((test.before.ece.value, test.before.ece_if_calibrated))
    shown, told = np.mean(np.array(errors, dtype=float), axis=0)
    return Coverage(intervals, scaled, (float(shown), float(told)))


def cover_high_gap(population: Population, patients: int, settings: Settings) -> Count:
    """How often the gap of sensitivity is held where nearly all women with pneumonia are found."""
    women, count, rng = Women(effect=1.2), Count(), np.random.default_rng(patients)
    ill = draw(60_000, np.random.default_rng(1), "test", women=women)
    ill = ill.take(ill.target == 1)
    for _ in range(settings.sets):
        fitted, test = settings.evaluate(population, patients, rng, women=women)
        threshold = fitted.points["decision"].logit
        for group in test.subgroups.groups:
            gap = group.gaps["sensitivity"]
            if (group.by, group.name) == ("sex", "F") and gap.low is not None:
                assert gap.high is not None
                assert threshold is not None
                found = ill.logit >= threshold
                truth = found[ill.sex == "F"].mean() - found[ill.sex == "M"].mean()
                count.add(bool(gap.low <= truth <= gap.high))
    return count


# --- sentences -----------------------------------------------------------------------------------


def count_claims(
    settings: Settings, seed: int, claim: Callable[[np.random.Generator], bool]
) -> Count:
    """How often a sentence is printed."""
    rng, count = np.random.default_rng(seed), Count()
    for _ in range(settings.sets):
        count.add(claim(rng))
    return count


def list_claims(population: Population, settings: Settings) -> Iterable[tuple[str, str, Count]]:
    """Sentence, design in which it is false, how often it is printed."""
    for patients in (150, 500):
        yield (
            "Served worst: …",
            f"{patients} patients, all groups alike",
            count_claims(settings, 6, partial(_claims_any_group, population, settings, patients)),
        )
    yield (
        "Served worst: calibration … of sex …",
        "500 patients, women's risk 5 points too low, men's too high",
        count_claims(settings, 7, partial(_claims_one_sex, population, settings)),
    )
    yield (
        "(no warning:) the model ranks better than chance",
        "150 patients, AUROC 0.5",
        count_claims(settings, 1, partial(_claims_ranking, population, settings)),
    )
    yield (
        "the model's AUROC is higher (than by AP or PA alone)",
        "150 patients, both 0.70",
        count_claims(settings, 2, partial(_claims_above_view, population, settings)),
    )
    yield (
        "A ranks better (than B)",
        "150 patients, two equal models",
        count_claims(settings, 3, partial(_claims_better_run, settings)),
    )
    for n in (12, 60):
        for sentence, start, gains in (
            ("the maps agree better than a fixed map", "The network's maps agree", (0.0, 0.1)),
            ("a fixed map agrees better", "A fixed map of", (0.0, 0.1)),
            ("the maps point to the opacity at hand", "They point to", (0.1, 0.0)),
        ):
            yield (
                sentence,
                f"{n} positives, gains {gains[0]:g} over the fixed map, {gains[1]:g} over random",
                count_claims(settings, 4, partial(_claims_maps, settings, n, gains, start)),
            )
    for patients in (200, 2000):
        yield (
            "Do the splits differ? Yes.",
            f"{patients} patients in three splits at random",
            count_claims(settings, 5, partial(_claims_shift, patients)),
        )


def _claims_any_group(
    population: Population, settings: Settings, patients: int, rng: np.random.Generator
) -> bool:
    _, test = settings.evaluate(population, patients, rng, ap=(0.4, 0.4))
    return worst_subgroup_sentence(test.subgroups.worst).startswith("Served worst")


def _claims_one_sex(population: Population, settings: Settings, rng: np.random.Generator) -> bool:
    """Whether one of two equally large sexes is named, whose risks are as wrong."""
    women = Women(0.5, ill=0.08)
    _, test = settings.evaluate(population, 500, rng, ap=(0.4, 0.4), women=women)
    worst = test.subgroups.worst
    return worst.is_shown and (worst.by, worst.measure) == ("sex", "in_the_large")


def _claims_ranking(population: Population, settings: Settings, rng: np.random.Generator) -> bool:
    return is_shown_to_rank(settings.evaluate(population, 150, rng, effect=0.0)[1].auroc)


def _claims_above_view(
    population: Population, settings: Settings, rng: np.random.Generator
) -> bool:
    as_view = float(np.sqrt(2) * ndtri(0.5 + (AP[0] - AP[1]) / 2))
    _, test = settings.evaluate(population, 150, rng, effect=as_view)
    return "is higher by" in view_sentence(test.view)


def _claims_better_run(settings: Settings, rng: np.random.Generator) -> bool:
    first = draw(150, rng, "test")
    noise = np.random.default_rng(int(rng.integers(1 << 30))).normal(size=(2, len(first)))
    pair = [dataclasses.replace(first, logit=(first.logit + n).astype(np.float32)) for n in noise]
    found = compare(*pair, resamples=settings.resamples, seed=0)
    return " ranks better" in comparison_sentence(ComparedRuns("A", "B", {"test": found}))


def _claims_maps(
    settings: Settings, n: int, gains: tuple[float, float], start: str, rng: np.random.Generator
) -> bool:
    """Whether the sentence that so starts is printed of maps with these true gains of AUPRC."""
    patient = rng.integers(n, size=n)
    hard = rng.beta(1.2, 2.5, size=n)[patient]  # skewed, and alike within a patient
    values = np.empty((n, len(MAPS), len(MEASURES)))
    for k, gain in enumerate((0.0, *gains)):
        values[:, k] = (hard + 0.2 * rng.standard_exponential(n) - gain)[:, None]
    found = summarise_saliency(
        BoxScores(np.arange(n).astype(np.str_), values),
        patient=patient.astype(np.str_),
        is_called=np.ones(n, dtype=np.bool_),
        positives=n,
        checkpoint="best",
        prior_studies=ENOUGH_FOR_PRIOR,
        resamples=settings.resamples,
        seed=0,
    )
    return start in saliency_sentence(found)


def _claims_shift(patients: int, rng: np.random.Generator) -> bool:
    rows = draw(patients, rng, "all")
    names, index = np.unique(rows.patient, return_inverse=True)
    splits = rng.choice(["train", "val", "test"], p=[0.7, 0.15, 0.15], size=len(names))[index]
    unknown = rng.random((4, len(rows))) < 0.05
    by_split: dict[str, list[StudyRow]] = {"train": [], "val": [], "test": []}
    for k, split in enumerate(splits):
        by_split[split].append(
            StudyRow(
                key=str(rows.key[k]),
                patient=str(rows.patient[k]),
                split=str(split),
                target=int(rows.target[k]),
                finding=str(rows.finding[k]),
                boxes=(),
                age=None if unknown[0, k] else int(rows.age[k]),
                sex=None if unknown[1, k] else str(rows.sex[k]),
                view=None if unknown[2, k] else str(rows.view[k]),
                spacing_mm=None if unknown[3, k] else float(rows.spacing_mm[k]),
                pixels_digest="",
                source_blake3="",
            )
        )
    return any(not shift.is_by_chance for shift in find_shifts(by_split))


# --- printed -------------------------------------------------------------------------------------


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", type=int, default=500, help="data sets a design (default 500)")
    parser.add_argument("--resamples", type=int, default=400, help="of the bootstrap (default 400)")
    given = parser.parse_args()
    settings, start = Settings(given.sets, given.resamples), time.monotonic()
    with threadpool_limits(1):
        population = Population.draw(60_000)
        covered = {n: cover(population, n, settings) for n in PATIENTS}
        print(f"| interval | {' | '.join(f'{n} patients' for n in PATIENTS)} |")
        print(f"|---|{'---|' * len(PATIENTS)}")
        for name in covered[PATIENTS[0]].intervals:
            print(f"| {name} | {' | '.join(str(c.intervals[name]) for c in covered.values())} |")
        gaps = [str(cover_high_gap(population, n, settings)) for n in PATIENTS]
        print(f"| gap of sex F, sensitivity, nearly 1 | {' | '.join(gaps)} |")
        print("\n| sentence | where it is false | printed |\n|---|---|---|")
        for sentence, design, count in list_claims(population, settings):
            print(f"| {sentence} | {design} | {count} |", flush=True)
    for patients, found in covered.items():
        print(
            f"\n{patients} patients, a calibrated network: scaled in {found.scaled}; calibration "
            f"error {found.ece[0]:.4f} on average, told for a calibrated one {found.ece[1]:.4f}"
        )
    print(f"\n{settings.sets} sets a design, {(time.monotonic() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
