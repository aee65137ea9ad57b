"""Thresholds chosen on one split by a rule: Youden's index, a sensitivity or a specificity."""

import math

import numpy as np
import numpy.typing as npt

from pneumo.evaluation.metrics import check_scores


def youden_threshold(target: npt.ArrayLike, probability: npt.ArrayLike) -> float:
    """The threshold of the greatest sensitivity + specificity - 1 (Youden 1950).

    One of the probabilities; of equally good ones the highest. Raises MetricError for one class
    only or a NaN.

    >>> pneumo.youden_threshold([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])
    0.9
    """
    from sklearn.metrics import roc_curve  # takes a second to import

    positive, probability64 = check_scores(target, probability)
    false_alarms, sensitivity, threshold = roc_curve(
        positive, probability64, drop_intermediate=False
    )
    positives, negatives = int(positive.sum()), int((~positive).sum())
    true = np.rint(sensitivity * positives).astype(np.int64)
    false = np.rint(false_alarms * negatives).astype(np.int64)
    # In integers, so that equally good ones are equal. The first point has an infinite threshold,
    # which calls nothing positive.
    return float(threshold[1:][np.argmax((true * negatives - false * positives)[1:])])


def sensitivity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, sensitivity: float
) -> float:
    """The highest threshold with at least `sensitivity` (0, 1].

    It is the probability of a positive. Raises MetricError for one class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    descending = np.sort(probability64[positive])[::-1]
    # Without the 1e-9, 0.9 * 10 = 9.000000000000002 would require a tenth positive.
    needed = math.ceil(sensitivity * len(descending) - 1e-9)
    return float(descending[max(needed, 1) - 1])


def specificity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, specificity: float
) -> float:
    """The lowest threshold with at least `specificity` (0, 1].

    It is one of the probabilities, or the next float above the highest of them. Raises MetricError
    for one class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    negatives = np.sort(probability64[~positive])
    candidates = np.unique(probability64)
    below = np.searchsorted(negatives, candidates, side="left")
    enough = np.flatnonzero(below >= specificity * len(negatives) - 1e-9)
    if len(enough) == 0:
        return float(np.nextafter(candidates[-1], np.inf))
    return float(candidates[enough[0]])
