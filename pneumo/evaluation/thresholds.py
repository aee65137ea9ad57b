"""Thresholds chosen on one split by a rule: Youden's index, a sensitivity, a specificity."""

import math

import numpy as np
import numpy.typing as npt

from pneumo.evaluation.metrics import check_scores


def youden_threshold(target: npt.ArrayLike, probability: npt.ArrayLike) -> float:
    """The threshold of the greatest sensitivity + specificity - 1 (Youden 1950).

    Always one of the probabilities; of equally good ones the highest. Raises MetricError for one
    class only or a NaN.

    >>> pneumo.youden_threshold([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])
    0.9
    """
    from sklearn.metrics import (
        roc_curve,  # a second; who only applies a threshold has no need of it
    )

    positive, probability64 = check_scores(target, probability)
    false_alarms, sensitivity, threshold = roc_curve(
        positive, probability64, drop_intermediate=False
    )
    positives, negatives = int(positive.sum()), int((~positive).sum())
    true = np.rint(sensitivity * positives).astype(np.int64)
    false = np.rint(false_alarms * negatives).astype(np.int64)
    # In whole numbers, so that equally good ones are equal. The first point calls nothing positive:
    # its threshold is infinite and no use on new data.
    return float(threshold[1:][np.argmax((true * negatives - false * positives)[1:])])


def sensitivity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, sensitivity: float
) -> float:
    """The highest threshold that keeps at least `sensitivity` (0, 1] of the positives.

    Always the probability of a positive. Raises MetricError for one class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    descending = np.sort(probability64[positive])[::-1]
    # The guard keeps 0.9 * 10 = 9.000000000000002 from asking for a tenth positive.
    needed = math.ceil(sensitivity * len(descending) - 1e-9)
    return float(descending[max(needed, 1) - 1])


def specificity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, specificity: float
) -> float:
    """The lowest threshold that clears at least `specificity` (0, 1] of the negatives.

    Always one of the probabilities, or the next float above the highest where none clears enough.
    Raises MetricError for one class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    negatives = np.sort(probability64[~positive])
    candidates = np.unique(probability64)
    cleared = np.searchsorted(negatives, candidates, side="left")
    enough = np.flatnonzero(cleared >= specificity * len(negatives) - 1e-9)
    if len(enough) == 0:
        return float(np.nextafter(candidates[-1], np.inf))
    return float(candidates[enough[0]])
