import json
import re
import shutil
import tomllib
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from jobs import evaluate
from jobs.evaluation.ray_scoring import (
    RunCheckpoint,
    ScoredStore,
    Scoring,
    explain_studies,
    score_maps,
    score_splits,
)
from jobs.evaluation.shown_studies import choose_pictures, list_boxes
from jobs.evaluation.wandb_results import read_evaluation
from pneumo.command_line import parse_command_line
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.study_table import StudyRow, read_studies, tabulate_studies, write_studies
from pneumo.evaluation.map_scores import prior_map, score_map
from pneumo.evaluation.operating_points import Decision
from pneumo.evaluation.predictions import Predictions, sigmoid
from pneumo.reporting.tracking.media import Gallery, Table
from pneumo.training.checkpoints import read_index
from tests.identifiers import Identifiers
from tests.jobs.conftest import EVALUATION, NUM_STUDIES, Prepared


def read_predictions(run: Path) -> Predictions:
    return Predictions.from_parquet((run / "predictions.parquet").read_bytes())


def read_store(store: Path) -> dict[str, StudyRow]:
    """What is known of the store's studies, by key."""
    return read_studies(str(store), read_manifest(str(store)))


def test_every_study_of_val_and_test_is_scored_once(prepared: Prepared, evaluated: Path) -> None:
    predictions = read_predictions(evaluated)
    manifest = read_manifest(str(prepared.store))
    assert len(set(predictions.key)) == len(predictions)
    for split in ("val", "test"):
        assert len(predictions.subset(split)) == manifest.splits[split].samples
    assert not len(predictions.subset("train"))


def test_metrics_are_those_of_the_predictions(evaluated: Path) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_text())
    test = read_predictions(evaluated).subset("test")
    assert metrics["schema_version"] == 4
    assert metrics["dataset"]["warning"] is None
    assert (metrics["evaluation"]["seed"], metrics["evaluation"]["bootstrap_resamples"]) == (0, 200)
    assert metrics["dataset"]["quarantined"] == 0
    assert metrics["dataset"]["duplicates_across_splits"] == 0
    assert metrics["dataset"]["duplicates_across_patients"] == 0
    assert metrics["test"]["n"] == len(test)
    assert metrics["test"]["positives"] == int(test.target.sum())
    assert metrics["test"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(test.target, test.logit), abs=1e-9
    )
    point = metrics["operating_points"]["decision"]
    called = test.probability >= point["threshold"]
    assert point["chosen_on"] == "val"
    assert metrics["test"]["confusion"] == {
        "tp": int((called & (test.target == 1)).sum()),
        "fp": int((called & (test.target == 0)).sum()),
        "fn": int((~called & (test.target == 1)).sum()),
        "tn": int((~called & (test.target == 0)).sum()),
    }


def test_calibrated_probabilities_are_those_of_the_metrics(evaluated: Path) -> None:
    found = json.loads((evaluated / "metrics.json").read_text())["calibration"]
    predictions = read_predictions(evaluated)
    assert found["method"] is not None
    np.testing.assert_allclose(
        predictions.calibrated_probability,
        sigmoid(found["slope"] * predictions.logit.astype(float) + found["intercept"]),
        rtol=1e-9,
    )


@pytest.fixture(scope="module")
def overwritten(
    prepared: Prepared, evaluated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run evaluated once more, without saliency, and compared with its first evaluation."""
    run = Path(shutil.copytree(evaluated, tmp_path_factory.mktemp("overwritten") / "run"))
    (run / "gallery" / "tp-99.webp").write_bytes(b"of another threshold")
    flags = ["--overwrite", "--evaluate.saliency", "false", "--compare-with", str(evaluated)]
    where = ["--store", str(prepared.store), "--run", str(run)]
    assert evaluate.main([*where, *EVALUATION, *flags]) == 0
    return run


def test_another_run_is_compared_with(
    prepared: Prepared,
    evaluated: Path,
    overwritten: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    comparison = json.loads((overwritten / "metrics.json").read_text())["comparison"]
    # Both folders are called `run`, and are told apart.
    assert evaluated.name == "run"
    assert (comparison["first"], comparison["second"]) == ("run (1)", "run (2)")
    for split in ("val", "test"):
        assert comparison[split]["n"] == len(read_predictions(overwritten).subset(split))
        assert comparison[split]["auroc"]["difference"]["value"] == pytest.approx(0, abs=1e-6)

    run = Path(shutil.copytree(overwritten, tmp_path / "run"))
    arguments = ["--store", str(prepared.store), "--run", str(run), "--overwrite", *EVALUATION]
    assert evaluate.main([*arguments, "--compare-with", str(tmp_path / "nothing")]) == 2
    assert "nothing: is not evaluated; evaluate it first" in capsys.readouterr().err
    fewer = read_predictions(run).take(np.arange(5))
    (run / "predictions.parquet").write_bytes(fewer.to_parquet())
    assert evaluate.main([*arguments, "--compare-with", str(run)]) == 2
    assert "was evaluated on another store" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 5])
def test_any_number_of_workers_gives_the_same_predictions(
    prepared: Prepared, evaluated: Path, workers: int
) -> None:
    weights = RunCheckpoint(str(evaluated), read_index(str(evaluated)).best)
    scored = ScoredStore(Scoring((weights,)), str(prepared.store))
    config = override(Config(), {"cluster.num_workers": workers})
    found = score_splits(scored, ("val", "test"), config)
    before = read_predictions(evaluated)
    order, mine = np.argsort(before.key), np.argsort(found.keys)
    assert found.keys[mine].tolist() == before.key[order].tolist()
    np.testing.assert_allclose(found.logits[mine], before.logit[order], atol=1e-4)


def test_maps_are_scored_against_the_boxes_of_every_positive(
    prepared: Prepared, evaluated: Path
) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_text())
    point = metrics["operating_points"]["decision"]
    for split in ("val", "test"):
        found, counts = metrics[split]["saliency"], point[split]["confusion"]
        assert found["positives"] == metrics[split]["positives"]
        assert found["unscored"] == 0
        assert found["all"]["n"] == metrics[split]["positives"]
        assert found["true_positives"]["n"] == counts["tp"]
        assert found["false_negatives"]["n"] == counts["fn"]
        # The store is small; what the summary of more holds is tested in tests/pneumo.
        boxes = found["all"]["n"]
        assert found["all"]["reason"] == f"{boxes} studies with boxes, fewer than 5"
    of_train = list_boxes(read_store(prepared.store), "train")
    assert metrics["test"]["saliency"]["prior_studies"] == len(of_train)


@pytest.mark.parametrize("workers", [1, 2])
def test_maps_score_the_same_on_any_number_of_workers(
    prepared: Prepared, evaluated: Path, workers: int
) -> None:
    """And as the slow way does, one study after the other."""
    weights = RunCheckpoint(str(evaluated), read_index(str(evaluated)).best)
    scored = ScoredStore(Scoring((weights,)), str(prepared.store))
    config = override(Config(), {"cluster.num_workers": workers})
    boxes = list_boxes(read_store(prepared.store), "train")
    prior = prior_map(list(boxes.values()), 64)
    (found,) = score_maps(scored, {"train": boxes}, prior, config).values()
    assert found.keys.tolist() == sorted(boxes)

    keys = found.keys.tolist()
    explained = explain_studies(scored, "train", keys, config)
    expected = np.array([score_map(explained[key].cam, boxes[key]) for key in keys])
    np.testing.assert_allclose(found.column("cam", "energy"), expected[:, -1], atol=1e-3)
    np.testing.assert_allclose(found.values[:, 1], [score_map(prior, boxes[key]) for key in keys])


def test_cases_say_what_is_known_of_the_study_and_why_it_is_shown(
    prepared: Prepared, evaluated: Path
) -> None:
    weights = RunCheckpoint(str(evaluated), read_index(str(evaluated)).best)
    scored = ScoredStore(Scoring((weights,)), str(prepared.store))
    studies, test = read_store(prepared.store), read_predictions(evaluated).subset("test")
    threshold = float(np.median(test.logit))
    settings = {"evaluate.pictures": 3}
    config = override(Config(), settings)
    found = choose_pictures(scored, test, studies, Decision(threshold), config)

    for outcome, cases in found.gallery.items():
        assert {case.outcome for case in cases} <= {outcome}
        reasons = ["most certain", "least certain", "random"]
        assert [case.why for case in cases] == reasons[: len(cases)]
    for outcome, cases in found.errors.items():
        assert {case.outcome for case in cases} <= {outcome}
        wrong = (test.target == int(outcome == "fn")) & (
            (test.logit >= threshold) == (outcome == "fp")
        )
        surest = sorted(test.probability[wrong], reverse=outcome == "fp")[:6]
        assert [case.probability for case in cases] == surest
    shown = [case for cases in (*found.gallery.values(), *found.errors.values()) for case in cases]
    assert shown
    for case in shown:
        assert case.cam is not None
        assert bool(case.boxes) == (case.target == 1)
        assert (case.finding == "Lung Opacity") == (case.target == 1)
        assert re.fullmatch(r"(\d+0-\d*9)?|0-9|90\+", case.age_band)
    assert {case.view for case in shown} <= {"AP", "PA", ""}
    strata = {(case.outcome, case.view): case.stratum_size or 0 for case in found.sample}
    assert sum(strata.values()) == len(test)
    assert all(case.boxes == () and case.cam is None for case in found.grid)


def test_errors_are_counted_by_finding(evaluated: Path) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_text())
    found = metrics["test"]["errors_by_finding"]
    counts = metrics["test"]["confusion"]
    assert sum(of["n"] for of in found.values()) == metrics["test"]["n"]
    assert sum(of["errors"] for of in found.values()) == counts["fp"] + counts["fn"]
    assert found["Lung Opacity"]["errors"] == counts["fn"]


def test_more_checkpoints_than_a_run_has_are_refused(
    prepared: Prepared, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--store", str(prepared.store), "--run", str(trained), *EVALUATION]
    assert evaluate.main([*flags, "--evaluate.ensemble", "3"]) == 2
    assert "of its last checkpoints 2 are kept, not the 3 of" in capsys.readouterr().err
    assert evaluate.main([*flags, "--members", str(trained)]) == 2
    assert "a run is given twice" in capsys.readouterr().err


def test_the_pictures_are_pictures(evaluated: Path) -> None:
    for name in ("metrics.png", "prediction_grid.png", "gradcam_example.png", "data_quality.png"):
        with Image.open(evaluated / "figures" / name) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10  # not a blank sheet
    assert "<svg" in (evaluated / "figures" / "roc.svg").read_text()
    assert list((evaluated / "gallery").glob("*.webp"))


def test_the_report_needs_no_network_and_says_what_it_is_for(evaluated: Path) -> None:
    html = (evaluated / "report.html").read_text()
    assert len(html) < 3_000_000
    assert "Research use only" in html
    assert "<script" not in html
    assert not re.findall(r"""(?:src|href)=["']https?://""", html)
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert f"{metrics['test']['auroc']['value']:.3f}" in html


def test_the_recipe_in_the_report_is_the_run_s(evaluated: Path, tmp_path: Path) -> None:
    page = (evaluated / "report.html").read_text()
    (shown,) = re.findall(r"--recipe takes them</summary><pre><code>(.*?)</code>", page, re.DOTALL)
    (tmp_path / "shown.toml").write_text(unescape(shown))
    assert not {"prepare", "split", "tune"} & set(tomllib.loads(unescape(shown)))
    flags = ["--store", "s", "--recipe", str(tmp_path / "shown.toml")]
    again = parse_command_line("train", flags, {}).config
    trained = Config.model_validate_json((evaluated / "config.json").read_text())
    for section in ("seed", "data", "augment", "model", "train", "cluster", "tracking"):
        assert getattr(again, section) == getattr(trained, section)


def test_the_report_shows_the_data(prepared: Prepared, evaluated: Path) -> None:
    html = (evaluated / "report.html").read_text()
    train = read_manifest(str(prepared.store)).splits["train"]
    assert '<h2 id="quality">' in html
    assert f"n = {train.samples}" in html
    assert html.count('alt="Chest X-rays. ') == 3  # a sheet a finding
    assert "Normal: 12 of " in html


def test_wandb_is_told_of_the_data_and_what_is_wrong_with_them(
    prepared: Prepared, evaluated: Path
) -> None:
    told = read_evaluation(str(evaluated))
    assert told is not None
    dataset = json.loads((evaluated / "metrics.json").read_text())["dataset"]
    for name in ("quarantined", "duplicates_across_splits", "duplicates_across_patients"):
        assert told.summary[f"data/{name}"] == dataset[name]
    counts, sheets = told.media["data/counts"], told.media["data/contact"]
    assert isinstance(counts, Table)
    assert {len(row) for row in counts.rows} == {len(counts.columns)}
    assert isinstance(sheets, Gallery)
    assert len(sheets.pictures) == 3
    said = "".join(picture.caption for picture in sheets.pictures)
    studies = read_store(prepared.store).values()
    assert not [row for row in studies if row.key in said or row.patient in said]


def test_no_identifier_of_the_source_reaches_the_run(prepared: Prepared, evaluated: Path) -> None:
    identifiers = Identifiers.of(prepared.source)
    assert len(identifiers.texts) > 2 * NUM_STUDIES
    assert (evaluated / "tracking" / "pictures.parquet").exists()
    assert identifiers.find_in(evaluated) == []


def test_no_identifier_of_the_source_reaches_the_run_of_a_training(
    prepared: Prepared, trained: Path
) -> None:
    assert (trained / "tracking" / "dataset.json").exists()
    said = (trained.parent / "said").read_text()
    assert re.search(r"epoch +2/2 ", said)
    assert Identifiers.of(prepared.source).find_in(trained, said) == []


def test_a_test_set_is_looked_at_once(
    prepared: Prepared, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--store", str(prepared.store), "--run", str(evaluated), *EVALUATION]
    assert evaluate.main(flags) == 2
    assert "is evaluated already" in capsys.readouterr().err


def test_scores_that_are_no_numbers_give_reasons_and_no_pictures(
    prepared: Prepared, overflowing: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(overflowing, tmp_path / "run"))
    assert evaluate.main(["--store", str(prepared.store), "--run", str(run), *EVALUATION]) == 0
    logits = read_predictions(run).subset("test").logit
    assert 0 < np.isfinite(logits).sum() < len(logits)
    metrics = json.loads((run / "metrics.json").read_text())
    why = "scores are NaN or infinite"
    assert why in metrics["test"]["fault"]
    assert metrics["test"]["errors_by_finding"] is None
    assert why in metrics["test"]["errors_by_finding_reason"]
    for group in ("true_positives", "false_negatives"):
        assert why in metrics["test"]["saliency"][group]["reason"]
    assert list((run / "gallery").glob("*")) == []


def test_overwriting_leaves_nothing_of_the_earlier_evaluation(
    evaluated: Path, overwritten: Path
) -> None:
    assert not (overwritten / "gallery" / "tp-99.webp").exists()
    before, after = (
        json.loads((at / "metrics.json").read_text()) for at in (evaluated, overwritten)
    )
    assert after["test"]["n"] == before["test"]["n"]
    assert before["test"]["saliency"] is not None
    assert after["test"]["saliency"] is None
    assert after["test"]["saliency_reason"] == "evaluate.saliency is off"
    assert after["test"]["auroc"]["value"] == pytest.approx(before["test"]["auroc"]["value"])


def test_another_store_is_refused(
    prepared: Prepared, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(prepared.store, tmp_path / "store"))
    manifest = read_manifest(str(store)).model_copy(update={"seed": 77})
    (store / "manifest.json").write_text(manifest.model_dump_json())
    assert evaluate.main(["--store", str(store), "--run", str(trained), *EVALUATION]) == 2
    assert "is not the store that" in capsys.readouterr().err
    assert not (trained / "metrics.json").exists()


def test_a_run_without_a_checkpoint_is_refused(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--store", str(prepared.store), "--run", str(tmp_path / "no")]) == 2
    assert "no checkpoint in it" in capsys.readouterr().err


def test_a_damaged_shard_stops_the_evaluation_and_is_named(
    prepared: Prepared, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(prepared.store, tmp_path / "store"))
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shard = store / read_manifest(str(store)).splits["test"].shards[0].name
    shard.write_bytes(shard.read_bytes()[:-512])
    assert evaluate.main(["--store", str(store), "--run", str(run), *EVALUATION]) == 1
    assert "shard test/000000-" in capsys.readouterr().err
    assert not (run / "metrics.json").exists()


def test_a_changed_label_stops_the_evaluation(
    prepared: Prepared, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(prepared.store, tmp_path / "store"))
    table = list(read_store(store).values())
    table[0] = replace(table[0], target=1 - table[0].target)
    write_studies(str(store), tabulate_studies(table))
    assert evaluate.main(["--store", str(store), "--run", str(trained), *EVALUATION]) == 1
    assert "studies.parquet: not what the manifest says" in capsys.readouterr().err
    assert not (trained / "metrics.json").exists()
