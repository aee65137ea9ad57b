"""Intervals are the same however many workers compute the resamples."""

import math

from jobs.evaluation.ray_resampling import Spreading, share_resamples
from pneumo.config import ClusterConfig, EvaluateConfig
from pneumo.evaluation.baselines import Metadata
from pneumo.evaluation.bootstrap import in_turn
from pneumo.evaluation.evaluation import evaluate
from tests.predictions import make_predictions


def list_leaves(tree, path=""):
    """(path, value) of every number and text of a JSON tree."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [leaf for key, one in pairs for leaf in list_leaves(one, f"{path}/{key}")]
    return [(path, tree)]


def test_an_evaluation_is_the_same_on_any_number_of_workers(ray_here):
    rows = make_predictions(24_000, images_per_patient=2)
    train = Metadata.of(make_predictions(500, seed=1))
    config = EvaluateConfig(bootstrap_resamples=100)

    def judge(share):
        found = evaluate(rows, config=config, seed=0, train=train, share=share)
        return list_leaves(found.to_metrics(run="r", dataset={}))

    alone, one, two = (
        judge(share)
        for share in (
            in_turn,
            Spreading(ClusterConfig(num_workers=1)),
            Spreading(ClusterConfig(num_workers=2)),
        )
    )
    assert [path for path, _ in one] == [path for path, _ in alone]
    for (path, here), (_, there), (_, shared) in zip(alone, one, two, strict=True):
        if not isinstance(here, float):
            assert here == there == shared, path
            continue
        # In this process sums may be rounded otherwise.
        assert math.isclose(here, there, rel_tol=1e-9, abs_tol=1e-12), path
        assert math.isclose(there, shared, rel_tol=1e-9, abs_tol=1e-12), path


def test_few_predictions_are_not_sent():
    config = ClusterConfig()
    assert share_resamples(config, 1000) is in_turn
    assert isinstance(share_resamples(config, 1_000_000), Spreading)
