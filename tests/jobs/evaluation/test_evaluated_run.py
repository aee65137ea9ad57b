"""Which checkpoints of a run are scored, and what the report says of that."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.evaluation.evaluated_run import (
    METRICS,
    find_checkpoints,
    find_differences,
    find_evaluated_run,
    find_metrics,
    read_predictions,
)
from jobs.evaluation.ray_scoring import Scoring
from jobs.evaluation.result_files import describe_command, describe_selection
from pneumo.command_line import EvaluateArguments, parse_command_line
from pneumo.config import Config, EvaluateConfig
from pneumo.config_layers import override
from pneumo.dataset.study_table import encode_parquet
from pneumo.errors import RunError
from pneumo.training.checkpoint_writer import METRICS_LOG
from pneumo.training.checkpoints import claim_run, load_checkpoint, read_index, save_checkpoint
from tests.jobs.conftest import Prepared
from tests.predictions import make_predictions

AUROCS = [0.7, 0.6, 0.95, 0.8, 0.8, 0.7]
"""The best epoch is the third of six; the last two are kept besides."""


@pytest.fixture(scope="module")
def overfitted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("overfitted") / "run"
    attempt = claim_run(str(run))
    base = load_checkpoint(str(trained), read_index(str(trained)).best)
    history: tuple[dict[str, float | None], ...] = tuple(
        {"epoch": n, "val/auroc": auroc} for n, auroc in enumerate(AUROCS, 1)
    )
    for epoch in range(1, len(AUROCS) + 1):
        checkpoint = replace(base, epoch=epoch, history=history[:epoch])
        last = epoch == len(AUROCS)
        save_checkpoint(str(run), checkpoint, attempt=attempt, keep_last=2, finished=last)
    (run / METRICS_LOG).write_text("".join(f'{{"epoch": {n + 1}}}\n' for n in range(len(AUROCS))))
    return run


def test_the_history_is_that_of_the_run_not_of_the_checkpoint(
    prepared: Prepared, overfitted: Path
) -> None:
    arguments = EvaluateArguments(store=str(prepared.store), run=str(overfitted))
    run = find_evaluated_run(arguments, EvaluateConfig())
    assert run.checkpoint.epoch == 3
    assert [epoch["epoch"] for epoch in run.history] == [1, 2, 3, 4, 5, 6]

    (overfitted / METRICS_LOG).rename(overfitted / "elsewhere")
    assert len(find_evaluated_run(arguments, EvaluateConfig()).history) == 3
    (overfitted / "elsewhere").rename(overfitted / METRICS_LOG)


def test_the_last_checkpoints_are_those_in_a_row(overfitted: Path) -> None:
    def epochs(ensemble: int | str) -> list[int]:
        return [weights.entry.epoch for weights in find_checkpoints(str(overfitted), ensemble)]

    assert [entry.epoch for entry in read_index(str(overfitted)).entries] == [3, 5, 6]
    assert epochs("best") == [3]
    assert epochs(1) == [6]
    assert epochs(2) == [6, 5]
    with pytest.raises(RunError, match="of its last checkpoints 2 are kept, not the 3"):
        epochs(3)


def test_the_report_says_which_checkpoint_was_taken(overfitted: Path) -> None:
    def told(ensemble: int | str) -> str:
        return describe_selection(Scoring(find_checkpoints(str(overfitted), ensemble)), ensemble)

    assert told("best") == "The checkpoint of the highest AUROC on val."
    assert told(1) == "The last checkpoint."
    assert told(2).startswith("The mean logit of 2 checkpoints: run/epoch-0006")


def test_the_report_says_how_to_evaluate_again(prepared: Prepared, overfitted: Path) -> None:
    def command(**changes: object) -> str:
        config = override(Config(), changes)
        arguments = EvaluateArguments(store=str(prepared.store), run=str(overfitted))
        return describe_command(find_evaluated_run(arguments, config.evaluate), config)

    usual = "python -m jobs.evaluate --store STORE --run RUN"
    assert command() == usual
    asked = command(
        **{"seed": 7, "evaluate.ensemble": 2, "evaluate.operating_point": "sensitivity"}
    )
    assert asked.startswith(f"{usual} --seed 7 ")
    flags = shlex.split(asked)[3:]
    again = parse_command_line("evaluate", flags, {}).config
    assert (again.seed, again.evaluate.ensemble, again.evaluate.operating_point) == (
        7,
        2,
        "sensitivity",
    )


def test_settings_that_change_no_weights_are_no_difference() -> None:
    other = override(Config(), {"seed": 1, "train.keep_checkpoints": 5, "data.cache": "stream"})
    assert find_differences([Config(), other]) == ["seed"]
    other = override(Config(), {"data.image_size": 96, "train.lr": 0.5})
    assert find_differences([Config(), other]) == ["data.image_size", "train.lr"]


def test_metrics_are_those_of_an_evaluated_run(tmp_path: Path) -> None:
    assert find_metrics(str(tmp_path)) is None
    path = tmp_path / METRICS
    path.write_text('{"test": {}}')
    assert find_metrics(str(tmp_path)) == {"test": {}}
    path.write_text('{"test": ')
    with pytest.raises(RunError, match=r"metrics\.json: no JSON; evaluate the run again"):
        find_metrics(str(tmp_path))


def test_predictions_of_an_older_version_or_broken_ones_are_refused(tmp_path: Path) -> None:
    """Also by --external, which reads those of the run itself."""
    path = tmp_path / "predictions.parquet"
    table = pq.read_table(io.BytesIO(make_predictions(9).to_parquet()))
    for content in (encode_parquet(table.drop_columns("spacing_mm")), b"PAR1 is all"):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"--run .*: its .* is broken, or of an older"):
            read_predictions(str(tmp_path), "--run")
