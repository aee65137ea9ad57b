"""What can be guessed without a pixel, and what the model adds."""

import csv
import dataclasses
import gzip
import json
from functools import partial

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pneumo.dataset.study_table import StudyRow
from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap
from pneumo.evaluation.baselines import (
    Metadata,
    SickerView,
    compare_with_metadata,
    compare_with_view,
    find_sicker_view,
    fit_metadata,
    metadata_statistics,
    view_statistics,
)
from pneumo.evaluation.predictions import sigmoid
from tests import present
from tests.predictions import judge, make_plain, make_predictions

pytestmark = pytest.mark.processors


def resample(rows, parts):
    few = rows.count_rarer_class()
    return bootstrap.resample_sets(
        rows.patient, parts, resamples=200, seed=0, effective_patients=few
    )


def test_the_auroc_within_a_view_is_that_of_the_subgroup_with_its_interval():
    test = judge(make_predictions(600)).test
    of_view = {group.name: group.auroc for group in test.subgroups.groups if group.by == "view"}
    for name, within in test.view.within.items():
        ends = present(of_view[name].low), present(of_view[name].high)
        assert (within.low, within.high) == pytest.approx(ends), name


def test_metadata_baseline_is_fitted_on_train_and_paired_with_the_model():
    rows = make_predictions(2000, images_per_patient=2)
    model = fit_metadata(Metadata.of(make_predictions(2000, seed=1)))
    score = partial(model.score, rows)
    found = compare_with_metadata(rows, score, resample(rows, metadata_statistics(rows, score, 10)))
    alone, own = (roc_auc_score(rows.target, score) for score in (model.score(rows), rows.logit))
    assert model.n == found.n == 2000
    assert alone > 0.65  # AP is twice as common among the positives
    assert found.alone_auroc.value == pytest.approx(alone)
    assert found.gain.value == pytest.approx(own - alone)
    assert present(found.gain.low) > 0
    assert found.gain_delong.difference.value == pytest.approx(own - alone)
    assert present(found.gain_delong.p_value) < 1e-6


def test_every_feature_can_carry_the_label():
    plain = dataclasses.replace(
        make_predictions(600),
        view=np.full(600, "PA"), sex=np.full(600, "F"), age=np.full(600, 50.0),
        spacing_mm=np.full(600, 0.143),
    )  # fmt: skip
    positive = plain.target == 1
    assert fit_metadata(Metadata.of(plain)).pipeline is None
    for column, values in {
        "view": np.where(positive, "AP", "PA"),
        "sex": np.where(positive, "M", ""),
        "age": np.where(positive, 90.0, np.nan),
        "spacing_mm": np.where(positive, 0.168, 0.143),
    }.items():
        rows = dataclasses.replace(plain, **{column: values})
        assert roc_auc_score(rows.target, fit_metadata(Metadata.of(rows)).score(rows)) == 1, column


def test_values_that_train_never_had_are_scored():
    model = fit_metadata(Metadata.of(make_predictions(500)))
    odd = dataclasses.replace(
        make_predictions(3),
        view=np.array(["", "AP", "PA"]), age=np.array([np.nan, 3.0, 150.0]),
        spacing_mm=np.array([np.nan, 0.5, 0.2]),
    )  # fmt: skip
    assert np.isfinite(model.score(odd)).all()


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (None, "no metadata of train"),
        (Metadata.of(make_predictions(0)), "no metadata of train"),
        (
            Metadata.of(dataclasses.replace(make_predictions(9), target=np.zeros(9, np.int8))),
            "train: one class only",
        ),
        (
            Metadata.of(
                make_plain(
                    9, view=np.full(9, ""), sex=np.full(9, ""), age=np.full(9, np.nan),
                    spacing_mm=np.full(9, np.nan), target=np.arange(9) % 2,
                )
            ),
            "train: no metadata, or the same of all studies",
        ),
    ],
)  # fmt: skip
def test_no_baseline_without_metadata_of_both_classes(train, reason):
    rows = make_predictions(100)
    model = fit_metadata(train)
    score = partial(model.score, rows)
    found = compare_with_metadata(rows, score, resample(rows, metadata_statistics(rows, score, 10)))
    assert found.alone_auroc.reason == found.gain_delong.difference.reason == reason
    with pytest.raises(MetricError, match=r"no metadata|one class"):
        model.score(rows)


def test_metadata_of_a_store_is_that_of_its_rows():
    rows = [
        StudyRow("a", "p", "train", 1, "Lung Opacity", (), 61, "F", "AP", 0.143, "", ""),
        StudyRow("b", "q", "test", 0, "Normal", (), 5, "M", "PA", 0.2, "", ""),
        StudyRow("c", "r", "train", 0, "Normal", (), None, None, None, None, "", ""),
    ]
    found = Metadata.of_split(rows, "train")
    assert found.target.tolist() == [1, 0]
    assert found.view.tolist() == ["AP", ""]
    assert found.sex.tolist() == ["F", ""]
    np.testing.assert_array_equal(found.age, [61, np.nan])
    np.testing.assert_array_equal(found.spacing_mm, [0.143, np.nan])


def see_view(rows, sicker, min_patients=10):
    return compare_with_view(
        rows, sicker, resample(rows, view_statistics(rows, sicker, min_patients))
    )


def test_the_view_that_is_sicker_in_train_counts_as_positive():
    """Where PA is, AP = 1 would rank worse than chance and every model would gain over it."""
    rows = make_predictions(1000, effect=0.25)
    rows = dataclasses.replace(rows, view=np.where(rows.view == "AP", "PA", "AP"))
    found = see_view(rows, find_sicker_view(Metadata.of(rows)))
    assert found.sicker_view == "PA"
    assert found.alone_auroc.value > 0.65
    assert found.gain_delong.difference.high < 0
    alone = dataclasses.replace(rows, view=np.full(1000, "PA"))
    unknown = see_view(rows, find_sicker_view(Metadata.of(alone)))
    assert unknown.gain.reason == "train: not both views are in it"


def test_no_baseline_of_fewer_patients_than_a_subgroup_needs():
    rows = make_predictions(400)
    view = np.where(np.cumsum(rows.target) <= 9, "PA", "AP")
    found = see_view(dataclasses.replace(rows, view=view), SickerView("AP"))
    assert "10 are needed" in found.within["PA"].reason
    assert found.within["AP"].value is not None
    small = see_view(rows, SickerView("AP"), min_patients=300)
    assert small.gain.reason == small.gain_delong.difference.reason
    assert "300 are needed" in small.gain.reason


def test_a_view_that_train_never_had_counts_as_the_mean_of_those_it_had():
    train = make_predictions(2000)
    only = train.take(train.view == "AP")
    model = fit_metadata(Metadata.of(only))
    rows = dataclasses.replace(only, view=np.full(len(only), "PA"))
    np.testing.assert_allclose(model.score(rows), model.score(only))


def test_metadata_regression_is_fitted_to_its_end():
    rows = make_predictions(900)
    model = fit_metadata(Metadata.of(rows))
    encode, regression = present(model.pipeline)
    columns = encode.transform(Metadata.of(rows).to_columns()).astype(float)
    residual = rows.target - sigmoid(model.score(rows))
    # scikit-learn's penalty of C = 1: the gradient of the likelihood is the coefficients.
    np.testing.assert_allclose(columns.T @ residual, regression.coef_[0], atol=1e-6)


def test_view_baseline_equals_scikit_learn_where_the_view_is_known():
    rows = make_predictions(1000)
    rows = dataclasses.replace(rows, view=np.where(np.arange(1000) < 100, "", rows.view))
    found = see_view(rows, find_sicker_view(Metadata.of(rows)))
    known = rows.take(rows.view != "")
    assert found.n == 900
    assert found.alone_auroc.value == pytest.approx(roc_auc_score(known.target, known.view == "AP"))
    assert found.model_auroc.value == pytest.approx(roc_auc_score(known.target, known.logit))
    for view in ("AP", "PA"):
        part = known.take(known.view == view)
        assert found.within[view].value == pytest.approx(roc_auc_score(part.target, part.logit))
    assert found.gain_delong.difference.value == pytest.approx(found.gain.value)


def test_metadata_reach_on_rsna_what_was_published_of_them(shared_data):
    """0.706 by view and 0.716 by all four, by patient-grouped 5-fold over the 26,684 studies."""
    folder = shared_data / "rsna-metadata"

    def read(name):
        with gzip.open(folder / f"{name}.csv.gz", "rt") as file:
            return list(csv.DictReader(file))

    with gzip.open(folder / "pneumonia-challenge-dataset-mappings_2018.json.gz") as file:
        patients = {row["subset_img_id"]: row["img_id"][:8] for row in json.load(file)}
    target = {row["patientId"]: int(row["Target"]) for row in read("stage_2_train_labels")}
    rows = [
        StudyRow(
            row["PatientID"],
            patients[row["PatientID"]],
            str(int(patients[row["PatientID"]]) % 5),
            target[row["PatientID"]],
            "Normal",
            (),
            int(row["PatientAge"]) if int(row["PatientAge"]) < 120 else None,
            row["PatientSex"],
            row["ViewPosition"],
            float(row["PixelSpacing"]),
            "",
            "",
        )
        for row in read("dicom_headers")
    ]
    label, score, is_ap = [], [], []
    for fold in "01234":
        others = [dataclasses.replace(row, split="train") for row in rows if row.split != fold]
        held_out = Metadata.of_split(rows, fold)
        pipeline = present(fit_metadata(Metadata.of_split(others, "train")).pipeline)
        label += held_out.target.tolist()
        score += pipeline.decision_function(held_out.to_columns()).tolist()
        is_ap += (held_out.view == "AP").tolist()
    assert len(label) == 26_684
    assert roc_auc_score(label, is_ap) == pytest.approx(0.706, abs=0.001)
    assert roc_auc_score(label, score) == pytest.approx(0.716, abs=0.003)
