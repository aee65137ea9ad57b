"""What W&B would get of an evaluation, without W&B."""

import base64
import dataclasses
import io
import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import track
from jobs.evaluation.evaluated_run import EvaluatedRun
from jobs.evaluation.job import write_results
from jobs.evaluation.ray_scoring import RunCheckpoint, ScoredStore, Scoring
from jobs.evaluation.result_files import Results, compose_metrics, describe_results
from jobs.evaluation.shown_studies import describe_age
from jobs.evaluation.wandb_results import cap_ages, read_evaluation, write_tracking
from pneumo.config import Config
from pneumo.dataset.contact_sheets import ContactSheet
from pneumo.dataset.manifest import read_manifest
from pneumo.evaluation.predictions import Predictions
from pneumo.images.boxes import Box
from pneumo.reporting.figures.case_pictures import Case, Pictures
from pneumo.reporting.figures.style import encode_image
from pneumo.reporting.tracking.media import ConfusionChart, Gallery, LineChart, Picture, Table
from pneumo.reporting.tracking.tracked_run import make_run_id, prepare_tracking
from pneumo.training.checkpoints import Checkpoint, CheckpointEntry
from tests import present
from tests.pneumo.reporting.page.test_degenerate import damage, predictions
from tests.pneumo.reporting.page.test_page import DATA
from tests.pneumo.reporting.tracking.run_folders import write_training
from tests.predictions import judge


def case(target=1, probability=0.9):
    rng = np.random.default_rng(0)
    return Case(
        image=rng.integers(0, 256, (224, 224)).astype(np.uint8),
        target=target,
        probability=probability,
        threshold=0.5,
        is_called=True,
        boxes=[Box(56, 28, 112, 56)] if target else [],
        cam=np.linspace(0, 1, 112, dtype=np.float32)[None].repeat(112, axis=0),
        finding="Lung Opacity" if target else "Normal",
        why="most certain",
    )


PICTURES = Pictures(
    [case()],
    {"tp": [case()], "fn": []},
    {"fp": [case(0)]},
    [],
    sample=[dataclasses.replace(case(), view="AP", stratum_size=17)],
)


def judged():
    return judge(predictions())


def leave(run, subject, data=DATA, found=None, pictures=PICTURES, saliency=None, config=None):
    """A run's folder after an evaluation with pictures of 224 pixels."""
    subject = dataclasses.replace(subject, run_url=str(run))
    config = config or Config()
    shown = Results(data, found or judged(), pictures, saliency or {}, None)
    (run / "figures").mkdir(parents=True)
    (run / "figures" / "data_quality.png").write_bytes(encode_image(case().image))
    prepare_tracking(str(run), subject.manifest)
    report = describe_results(subject, shown, config)
    write_tracking(run / "tracking", subject, shown, report, config.tracking)
    predictions = shown.evaluation.predictions.to_parquet(subject.scored.scoring.to_json())
    (run / "predictions.parquet").write_bytes(predictions)
    (run / "metrics.json").write_text(json.dumps(compose_metrics(subject, shown, config)))
    return run


def read(run):
    return present(read_evaluation(str(run)))


def test_numbers_and_charts_are_those_of_the_evaluation(subject, tmp_path):
    found = judged()
    told = read(leave(tmp_path / "run", subject, found=found))
    rates = found.test.at["decision"].rates
    assert told.summary["eval/test/auroc"] == found.test.auroc.value
    assert told.summary["eval/test/recall_low"] == rates["recall"].low
    assert told.summary["eval/worst_group"] == found.test.subgroups.worst.name
    assert told.summary["eval/val/auroc"] == found.val.auroc.value
    screening = found.test.at["screening"].rates["recall"]
    assert told.summary["eval/test/recall_screening"] == screening.value
    assert told.summary["eval/test/calibration_intercept"] == found.test.before.intercept.value
    assert set(told.media["eval/roc"].series) == {"val (chosen on it)", "test", "chance"}
    assert told.summary["data/phantoms"] is False
    for name in ("roc", "precision_recall", "reliability", "decision_curve"):
        chart = told.media[f"eval/{name}"]
        assert isinstance(chart, LineChart)
        assert len(chart.rows()) > 5
    assert told.media["eval/confusion"].counts == dataclasses.asdict(
        found.test.at["decision"].counts
    )
    groups = told.media["eval/subgroups"]
    assert isinstance(groups, Table)
    assert len(groups.rows) == len(found.test.subgroups.groups)
    assert {len(row) for row in groups.rows} == {len(groups.columns)}
    assert told.config["evaluate"]["ensemble"] == "best"


@pytest.mark.parametrize("kind", ["nan", "empty", "one class", "too small"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_bad_predictions_are_told_without_what_they_do_not_give(subject, tmp_path, kind, split):
    found = judge(damage(kind, split))
    told = read(leave(tmp_path / "run", subject, found=found))
    assert "eval/subgroups" in told.media
    assert not [value for value in told.summary.values() if value is None or value != value]


def test_pictures_are_coarser_and_carry_their_overlays(subject, tmp_path):
    told = read(leave(tmp_path / "run", subject))
    gallery = told.media["eval/gallery/tp"]
    assert isinstance(gallery, Gallery)
    (picture,) = gallery.pictures
    with Image.open(io.BytesIO(picture.data)) as image:
        assert image.size == (192, 192)
    assert list(picture.boxes) == [(48, 24, 96, 48)]
    levels = np.asarray(Image.open(io.BytesIO(present(picture.map_levels))))
    assert levels.shape == (192, 192)
    assert np.unique(levels).tolist() == [0, 1, 2, 3]
    assert "eval/gallery/fn" not in told.media
    assert "eval/errors/fp" in told.media


def test_why_no_study_is_shown_is_told(subject, tmp_path):
    none = Pictures.none("no study")
    told = read(leave(tmp_path / "run", subject, pictures=none))
    assert told.summary["eval/not_shown"] == "no study"
    assert not [key for key in told.media if "gallery" in key or "predictions" in key]


def test_the_table_has_thumbnails_and_names_nobody(subject, tmp_path):
    table = read(leave(tmp_path / "run", subject)).media["eval/predictions"]
    assert isinstance(table, Table)
    assert not {"key", "patient", "age"} & set(table.columns)
    ((picture, *rest),) = table.rows
    assert isinstance(picture, Picture)
    assert len(rest) == len(table.columns) - 1
    assert rest[:3] == ["tp", 1, 0.9]
    assert rest[-1] == 17


@pytest.fixture
def subject(tiny_store):
    """A run of the smallest network on a store of noise."""
    url = tiny_store()
    manifest = read_manifest(url)
    checkpoint = Checkpoint(
        model={},
        optimizer={},
        epoch=1,
        config=Config(),
        manifest_digest=manifest.digest,
        image_size=manifest.image_size,
        mean=0.5,
        std=0.25,
        history=(),
        initialisation="random",
        code_version="test",
    )
    weights = tuple(
        RunCheckpoint(
            f"runs/{run}",
            CheckpointEntry(name=f"epoch-000{n}.pt", epoch=n, val_auroc=0.5, sha256=f"{n}" * 64),
        )
        for n, run in enumerate(("a b", "c"), start=1)
    )
    return EvaluatedRun(
        "runs/a b", url, manifest, checkpoint, ScoredStore(Scoring(weights), url), history=()
    )


def test_no_study_is_shown_larger_than_192_pixels_anywhere(subject, tmp_path):
    sheet = ContactSheet("Normal", 9, (np.full((224, 224), 99, np.uint8),) * 4, ("AP",) * 4)
    data = dataclasses.replace(DATA, contact=[sheet])
    told = read(leave(tmp_path / "run", subject, data=data))
    page = told.media["eval/report"].html
    assert told.outputs[0].files["report.html"] == page.encode()
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(found))).size
        for found in re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    ]
    assert len(sizes) == 4
    *studies, sheets = sorted(height for _, height in sizes)
    assert max(studies) == 192
    assert sheets <= 2 * 192 + 4  # two rows with a gap
    for key in ("eval/gallery/tp", "eval/errors/fp"):
        (picture,) = told.media[key].pictures
        assert Image.open(io.BytesIO(picture.data)).height == 192
    ((picture, *_),) = told.media["eval/predictions"].rows
    assert Image.open(io.BytesIO(picture.data)).height <= 192
    (sheet_told,) = told.media["data/contact"].pictures
    assert Image.open(io.BytesIO(sheet_told.data)).height <= 2 * 192 + 4


def test_lineage_names_each_store_and_run_and_moves_no_alias_of_an_input(subject, tmp_path):
    run = leave(tmp_path / "a b", subject)
    told, digest = read(run), subject.manifest.digest
    names = [make_run_id(checkpoint.run_url) for checkpoint in subject.scored.scoring.checkpoints]
    assert [(one.name, list(one.aliases)) for one in told.inputs] == [
        (f"dataset-{digest[:12]}", []),
        *((f"model-{name}", []) for name in names),
    ]
    assert [one.name for one in told.outputs] == [f"evaluation-{make_run_id(str(run))}"]
    models = told.inputs[1:]
    assert [m.metadata["checkpoint"] for m in models] == ["epoch-0001.pt", "epoch-0002.pt"]
    assert {m.metadata["dataset"] for m in models} == {digest}
    assert told.group == make_run_id(str(run))  # that of the training
    assert told.id.startswith(f"{told.group}-evaluate-")


def test_an_evaluation_that_is_done_again_is_another_run(subject, tmp_path):
    run = leave(tmp_path / "run", subject)
    first = read(run)
    assert read(run) == first
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["test"]["auroc"]["value"] = 0.5
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert read(run).id != first.id
    (run / "metrics.json").unlink()
    assert read_evaluation(str(run)) is None


def test_project_and_group_are_those_of_the_training_unless_they_are_given(subject, tmp_path):
    run = leave(tmp_path / "run", subject)
    own = {"tracking": {"project": "lungs", "group": "trained"}}
    (run / "config.json").write_text(Config.model_validate(own).to_json())
    assert (read(run).tracking.project, read(run).group) == ("lungs", "trained")
    given = Config.model_validate({"tracking": {"group": "other"}})
    run = leave(tmp_path / "other", subject, config=given)
    (run / "config.json").write_text(Config.model_validate(own).to_json())
    assert (read(run).tracking.project, read(run).group) == ("lungs", "other")


def test_an_evaluation_that_lacks_a_file_is_told(subject, tmp_path, backend, capsys):
    run = write_training(leave(tmp_path / "run", subject), subject.store_url)
    (run / "tracking" / "pictures.parquet").unlink()
    assert track.main(["--run", str(run)]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("train http")
    assert "tracking/pictures.parquet: missing; the evaluation is of an older version" in told.err


def test_evaluations_at_the_same_time_are_both_counted(subject, tmp_path):
    config = Config.model_validate({"tracking": {"mode": "disabled"}})
    run, folder = tmp_path / "run", tmp_path / "new"
    run.mkdir()
    folder.mkdir()
    (run / "evaluations.jsonl").write_text("the one that ended since this one began\n")
    results = Results(DATA, judged(), PICTURES, {}, None)
    write_results(dataclasses.replace(subject, run_url=str(run)), results, folder, config)
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 2
    assert json.loads((run / "metrics.json").read_text())["evaluation"]["earlier"] == 1


def test_ages_above_89_are_one_group(subject, tmp_path):
    old = predictions()
    old = dataclasses.replace(old, age=np.where(np.arange(len(old)) % 2, 97.0, np.nan))
    kept = old.to_parquet({"views": 1})
    capped = Predictions.from_parquet(cap_ages(kept))
    assert np.isnan(capped.age[::2]).all()
    assert set(capped.age[1::2]) == {90.0}
    assert pq.read_schema(io.BytesIO(cap_ages(kept))) == pq.read_schema(io.BytesIO(kept))
    assert [describe_age(age) for age in (89, 90, 104, math.nan, 7)] == [
        "80-89", "90+", "90+", "", "0-9",
    ]  # fmt: skip
    told = read(leave(tmp_path / "run", subject))
    sent = told.outputs[0].files["predictions.parquet"]
    assert np.nanmax(Predictions.from_parquet(sent).age) <= 90


def test_the_command_sends_it_once_with_every_file(subject, tmp_path, backend, capsys):
    run = leave(tmp_path / "run", subject)
    backend.fault = "uploads 403"
    assert track.main(["--run", str(run)]) == 1
    assert "repeat the command to send the rest" in capsys.readouterr().err
    backend.fault = None
    for _ in range(2):
        assert track.main(["--run", str(run)]) == 0
        (name,) = backend.runs
        (row,) = backend.history(name)
        assert backend.exit_codes == {name: 0}
    told = read(run)
    charts = {f"{key}_table" if isinstance(m, LineChart | ConfusionChart) else key
              for key, m in told.media.items()}  # fmt: skip
    assert charts <= set(row)
    assert backend.summary(name)["eval/test/n"] == told.summary["eval/test/n"]
    assert backend.used[-3:] == [one.name for one in told.inputs]
    assert {one["state"] for one in backend.artifacts.values()} == {"COMMITTED"}
    (mask,) = [n for n in backend.uploads if "/mask/eval/gallery/tp" in n]
    levels = np.asarray(Image.open(io.BytesIO(backend.uploads[mask])))
    assert np.unique(levels).tolist() == [0, 1, 2, 3]
    assert backend.unknown == []
