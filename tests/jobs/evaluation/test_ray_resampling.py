"""Intervals are the same however many workers compute the resamples."""

import math
from dataclasses import replace
from functools import partial

from jobs.evaluation.ray_resampling import choose_map, map_on_workers
from pneumo.config import ClusterConfig, EvaluateConfig
from pneumo.evaluation.baselines import Metadata, fit_metadata
from pneumo.evaluation.comparison import compare
from pneumo.evaluation.estimates import as_json
from pneumo.evaluation.evaluation import evaluate
from pneumo.evaluation.external import FrozenChoices, evaluate_external
from tests.predictions import make_predictions


def list_leaves(tree, path=""):
    """(path, value) of every number and text of a JSON tree."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [leaf for key, one in pairs for leaf in list_leaves(one, f"{path}/{key}")]
    return [(path, tree)]


def assert_same_on_any_number_of_workers(judge):
    """`judge` gives a JSON tree, of how the blocks of resamples are computed."""
    alone, one, two = (
        list_leaves(judge(map_blocks))
        for map_blocks in (
            map,
            partial(map_on_workers, ClusterConfig(num_workers=1)),
            partial(map_on_workers, ClusterConfig(num_workers=2)),
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


def test_an_evaluation_is_the_same_on_any_number_of_workers(ray_here):
    rows = make_predictions(24_000, images_per_patient=2)
    train = Metadata.of(make_predictions(500, seed=1))
    config = EvaluateConfig(bootstrap_resamples=100)

    def judge(map_blocks):
        found = evaluate(rows, config=config, seed=0, train=train, map_blocks=map_blocks)
        return found.to_metrics(run="r", dataset={})

    assert_same_on_any_number_of_workers(judge)


def test_a_comparison_is_the_same_on_any_number_of_workers(ray_here):
    first = make_predictions(4_000, images_per_patient=2).subset("test")
    second = replace(first, logit=first.logit[::-1].copy())
    assert_same_on_any_number_of_workers(
        lambda map_blocks: as_json(
            compare(first, second, resamples=100, seed=0, map_blocks=map_blocks)
        )
    )


def test_an_external_validation_is_the_same_on_any_number_of_workers(ray_here):
    internal, external = (
        make_predictions(4_000, images_per_patient=2, seed=seed).subset("test") for seed in (0, 1)
    )
    train = Metadata.of(make_predictions(500, seed=2))
    frozen = FrozenChoices({}, None, fit_metadata(train))
    assert_same_on_any_number_of_workers(
        lambda map_blocks: as_json(
            evaluate_external(
                internal,
                external,
                frozen,
                resamples=100,
                seed=0,
                min_patients=10,
                map_blocks=map_blocks,
            )
        )
    )


def test_few_predictions_are_not_sent():
    config = ClusterConfig()
    assert choose_map(config, 1000) is map
    assert isinstance(choose_map(config, 1_000_000), partial)
