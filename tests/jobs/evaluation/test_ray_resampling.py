"""Intervals are the same however many workers compute the resamples."""

import json

from jobs.evaluation.ray_resampling import Spreading, share_resamples
from pneumo.config import ClusterConfig, EvaluateConfig
from pneumo.evaluation.baselines import Metadata
from pneumo.evaluation.bootstrap import in_turn
from pneumo.evaluation.evaluation import evaluate
from tests.predictions import make_predictions


def test_an_evaluation_is_the_same_on_any_number_of_workers(ray_here):
    rows = make_predictions(24_000, images_per_patient=2)
    train = Metadata.of(make_predictions(500, seed=1))
    config = EvaluateConfig(bootstrap_resamples=100)

    def judge(share):
        found = evaluate(rows, config=config, seed=0, train=train, share=share)
        return json.dumps(found.to_metrics(run="r", dataset={}))

    alone = judge(in_turn)
    for workers in (1, 2):
        assert judge(Spreading(ClusterConfig(num_workers=workers))) == alone


def test_few_predictions_are_not_sent():
    config = ClusterConfig()
    assert share_resamples(config, 1000) is in_turn
    assert isinstance(share_resamples(config, 1_000_000), Spreading)
