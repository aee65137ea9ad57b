"""Data set shift: gray levels and pixel spacing of two sets, and whether a classifier can tell
their images apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pneumo.evaluation.bootstrap import resample
from pneumo.evaluation.estimates import Estimate, count_equal_patients
from pneumo.evaluation.ranking import auroc_statistic

_THUMBNAIL, _BINS = 16, 16
_FEWEST = 10


@dataclass(frozen=True)
class SetShift:
    """How the images of the external set differ from those of the run's own test."""

    gray_distance: float
    """Total variation distance of the two histograms of gray levels, 0 (equal) to 1."""
    gray_mean: tuple[float, float]
    """Internal and external, in [0, 1]."""
    spacing_median_mm: tuple[float | None, float | None]
    """Internal and external."""
    told_apart: Estimate
    """AUROC of a linear domain classifier on 16 x 16 pixels and 16 gray levels, fitted on half of
    the patients, among the others: 0.5 is no difference, 1 is a perfect separation of the sets.
    (Lopez-Paz & Oquab 2017: scores of several folds are of several classifiers, and dependent, so
    their pooled AUROC has no interval.)"""
    pictures: tuple[int, int]
    """Images of each set that the classifier was given."""


def classify_sets(
    internal: Sequence[npt.NDArray[np.uint8]],
    external: Sequence[npt.NDArray[np.uint8]],
    patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """See `SetShift.told_apart`. Images are (S, S) uint8; `patients` are those of `internal`, then
    of `external`."""
    groups = np.asarray(patients)
    is_external = np.repeat([0, 1], [len(internal), len(external)])
    if min(len(np.unique(groups[is_external == one])) for one in (0, 1)) < _FEWEST:
        return Estimate.undefined(f"fewer than {_FEWEST} patients")
    features = np.array([_features(picture) for picture in (*internal, *external)])
    halves = StratifiedGroupKFold(2, shuffle=True, random_state=seed)
    fitted, rest = next(iter(halves.split(features, is_external, groups)))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    score = model.fit(features[fitted], is_external[fitted]).decision_function(features[rest])
    found = resample(
        groups[rest],
        {"auroc": auroc_statistic(is_external[rest], score)},
        resamples=resamples,
        seed=seed,
        effective_patients=min(
            count_equal_patients(groups[rest][is_external[rest] == one]) for one in (0, 1)
        ),
    )
    return found["auroc"].estimate()


def _features(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    small = cv2.resize(picture, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)
    counts = np.bincount(picture.ravel() // (256 // _BINS), minlength=_BINS)
    return np.concatenate([small.ravel() / 255, counts / picture.size])


def measure_shift(
    histograms: tuple[Sequence[int], Sequence[int]],
    spacings: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    told_apart: Estimate,
    pictures: tuple[int, int],
) -> SetShift:
    """The shift between two sets, internal first: `histograms` of gray levels (256,) each, and
    `spacings` in mm, NaN where unknown."""
    fractions = [np.asarray(one, np.float64) / max(sum(one), 1) for one in histograms]
    means = [float((one * np.arange(256)).sum() / 255) for one in fractions]
    known = [one[~np.isnan(one)] for one in spacings]
    medians = [float(np.median(one)) if len(one) else None for one in known]
    return SetShift(
        gray_distance=float(np.abs(fractions[0] - fractions[1]).sum() / 2),
        gray_mean=(means[0], means[1]),
        spacing_median_mm=(medians[0], medians[1]),
        told_apart=told_apart,
        pictures=pictures,
    )
