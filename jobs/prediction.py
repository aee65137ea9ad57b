"""Score image files, DICOM or others, with a run's model: CSV, Parquet and Grad-CAM overlays.

File names are kept, as the results go to the user's own folder. Nothing goes to W&B.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.evaluation.evaluated_run import find_evaluated_checkpoints, find_metrics
from jobs.evaluation.ray_scoring import (
    Scoring,
    WorkerSettings,
    choose_worker_settings,
    load_members,
    run_tasks,
    split_work,
)
from jobs.predicted_files import OVERLAYS, find_files
from jobs.ray_cluster.session import ray_session, wait_for_resources
from jobs.terminal.entry_point import tell
from jobs.terminal.places import UNFINISHED
from jobs.terminal.progress import Progress
from pneumo import storage
from pneumo.command_line import Invocation, PredictArguments
from pneumo.config import ClusterConfig
from pneumo.dataset.study_table import encode_parquet
from pneumo.errors import AccessError, DataError
from pneumo.evaluation.estimates import as_json
from pneumo.evaluation.file_predictions import (
    NOT_A_NUMBER,
    NOTICE,
    FilePredictions,
    FrozenRule,
    count_formulas,
    encode_csv,
)
from pneumo.evaluation.predictions import sigmoid
from pneumo.images.dicom import GrayImage
from pneumo.images.dicom_files import UnusableFile, read_pictures
from pneumo.network.gradcam import gradcam
from pneumo.network.scoring import Member, prepare_input, score_images
from pneumo.reporting.figures.case_pictures import draw_overlay
from pneumo.reporting.figures.style import show_threshold
from pneumo.reporting.tracking.tracked_run import name_group
from pneumo.training.checkpoints import load_checkpoint

SCHEMA_VERSION = 1
CSV = "predictions.csv"
PARQUET = "predictions.parquet"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Task:
    """What a worker receives to score files."""

    source_url: str
    output_url: str
    scoring: Scoring
    stored_size: int
    """Images are decoded to this height and width, as in the evaluated store, and then resampled to
    the network's input size."""
    overlays: bool
    worker: WorkerSettings


def predict(invocation: Invocation) -> None:
    """Score the files below `--source` with the run of `--run`; the summary is written last.

    Raises SourceError without a file, RunError without a model, and DataError when no file could be
    scored.
    """
    arguments, config = invocation.arguments, invocation.config
    assert isinstance(arguments, PredictArguments)
    output_url = storage.normalise(arguments.output)
    source_url, files = find_files(arguments.source, output_url)
    run_urls = [storage.normalise(url) for url in (arguments.run, *arguments.members)]
    rule = FrozenRule.from_metrics(find_metrics(run_urls[0]))
    scoring = Scoring(find_evaluated_checkpoints(run_urls, rule), views=rule.views)
    first = scoring.checkpoints[0]
    image_size = load_checkpoint(first.run_url, first.entry).image_size
    with ray_session(show_logs=arguments.debug):
        wait_for_resources(config.cluster, 1)
        task = Task(
            source_url,
            output_url,
            scoring,
            rule.stored_size or image_size,
            not arguments.no_overlays,
            choose_worker_settings(config.cluster, rule.stored_size or image_size),
        )
        clear(output_url)
        predictions = _predict_all(files, task, config.cluster)
    summary = write_predictions(predictions, task, rule, run_urls[0])
    print_summary(summary, output_url)
    if not predictions.num_scored:
        raise DataError(
            f"predict: none of {len(files)} files could be scored; {output_url}/{CSV} says why"
        )


def _predict_all(files: Sequence[str], task: Task, cluster: ClusterConfig) -> FilePredictions:
    worlds = split_work(len(files), cluster, task.worker)
    bounds = [len(files) * world.rank // world.size for world in worlds] + [len(files)]
    calls = [(task, files[a:b]) for a, b in pairwise(bounds) if a < b]
    results = run_tasks(predict_files, calls, cluster, Progress("predict", len(files), "files"))
    return FilePredictions.join(list(results))


def clear(output_url: str) -> None:
    """Remove the results of an earlier prediction, the summary first. `check_places` has found that
    nothing else is there under these names."""
    storage.write_text(storage.join(output_url, UNFINISHED), "jobs.predict has not finished here\n")
    for name in (SUMMARY, CSV, PARQUET):
        storage.remove(storage.join(output_url, name))
    storage.remove_below(storage.join(output_url, OVERLAYS))


# --- in a worker ----------------------------------------------------------------------------------


def predict_files(task: Task, files: Sequence[str]) -> FilePredictions:
    """The predictions for `files`, in their order; an unusable file gets a row with a reason.
    Overlays are written at once, so that memory does not grow."""
    torch.set_num_threads(task.worker.num_threads)
    members = load_members(task.scoring, task.worker.device)
    size = task.worker.batch_size
    return FilePredictions.join(
        [_predict_batch(task, members, files[i : i + size]) for i in range(0, len(files), size)]
    )


def _predict_batch(task: Task, members: Sequence[Member], files: Sequence[str]) -> FilePredictions:
    # Not by `storage.join`: an object's key may begin with a slash or contain `..`.
    urls = [f"{task.source_url.rstrip('/')}/{file}" for file in files]
    images = list(read_pictures(urls, task.stored_size))
    pixels = {
        i: image.pixels for i, image in enumerate(images) if not isinstance(image, UnusableFile)
    }
    logit = np.full(len(files), np.nan, dtype=np.float32)
    if pixels:
        pictures = list(pixels.values())
        logit[list(pixels)] = score_images(members, pictures, views=task.scoring.views)
    names = [_encodable(file) for file in files]
    scored = {names[i]: picture for i, picture in pixels.items() if np.isfinite(logit[i])}
    probabilities = zip(names, sigmoid(logit).tolist(), strict=True)
    captions = {name: f"p = {p:.3f}   {NOTICE}" for name, p in probabilities}
    overlays = _write_overlays(task, members[0], scored, captions) if task.overlays else {}
    rows = [_describe(image, x) for image, x in zip(images, logit, strict=True)]
    reason, message, view, warnings = np.array(rows, dtype=object).T
    return FilePredictions(
        file=np.array(names, dtype=object),
        logit=logit,
        overlay=np.array([overlays.get(name, "") for name in names], dtype=object),
        reason=reason,
        message=message,
        view=view,
        warnings=warnings,
    )


def _describe(image: GrayImage | UnusableFile, logit: np.float32) -> tuple[str, str, str, str]:
    """Why a file has no score, as a code and in words, and its view and warnings."""
    if isinstance(image, UnusableFile):
        return image.reason, image.message, "", ""
    view, warnings = image.header.view or "", "; ".join(image.warnings)
    if np.isfinite(logit):
        return "", "", view, warnings
    message = "the network's logit is NaN or infinite; did training diverge?"
    return NOT_A_NUMBER, message, view, warnings


def _write_overlays(
    task: Task,
    member: Member,
    pictures: Mapping[str, npt.NDArray[np.uint8]],
    captions: Mapping[str, str],
) -> dict[str, str]:
    """Draw pictures beside their Grad-CAM maps, where finite; returns their paths by name."""
    if not pictures:
        return {}
    cams = gradcam(member.network, prepare_input(list(pictures.values()), member))
    written = {}
    for (name, picture), cam in zip(pictures.items(), cams, strict=True):
        if np.isfinite(cam).all():
            path = f"{OVERLAYS}/{shorten_path(name)}.png"
            drawn = draw_overlay(picture, cam, captions[name])
            with suppress(AccessError):  # a folder `x.png` beside a file `x`: no overlay of one
                storage.write_bytes(storage.join(task.output_url, path), drawn)
                written[name] = path
    return written


def shorten_path(name: str) -> str:
    """The path of a file's overlay: a part that is too long for a file name gets a digest as its
    end; so does a part that would lead elsewhere, as in a key `a/../b`."""

    def shorten(part: str) -> str:
        data = part.encode()
        if part not in ("", ".", "..") and len(data) <= _MAX_PART_BYTES:
            return part
        digest = hashlib.sha256(data).hexdigest()[:16]
        return f"{data[: _MAX_PART_BYTES - 17].decode(errors='ignore')}-{digest}"

    return "/".join(map(shorten, name.split("/")))


_MAX_PART_BYTES = 200  # most file systems allow 255


def _encodable(file: str) -> str:
    """The path as text that can be written: a file's name may not be UTF-8."""
    return file.encode("utf-8", "backslashreplace").decode()


# --- results --------------------------------------------------------------------------------------


def write_predictions(
    predictions: FilePredictions, task: Task, rule: FrozenRule, run_url: str
) -> dict[str, Any]:
    """Write both tables, then the summary; returns the summary."""
    table = predictions.to_table(rule, task.scoring.checkpoint_name)
    storage.write_bytes(storage.join(task.output_url, PARQUET), encode_parquet(table))
    storage.write_bytes(storage.join(task.output_url, CSV), encode_csv(table))
    called = predictions.decide(rule)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "notice": NOTICE,
        "run": storage.last_part(run_url),
        "wandb_group": name_group(run_url),
        "trained_on_phantoms": rule.phantoms,
        "scoring": task.scoring.to_json(),
        "decoded_at": task.stored_size,
        "threshold": rule.threshold,
        "threshold_logit": rule.threshold_logit,
        "threshold_reason": rule.threshold_reason,
        "calibration": as_json(rule.calibration, leave_out={"log_loss"}),
        "calibration_reason": rule.calibration_reason,
        "files": len(predictions),
        "scored": predictions.num_scored,
        "called_positive": None if called is None else int(called.sum()),
        "unusable": predictions.unusable,
        "warned": predictions.warned,
        "escaped_in_csv": count_formulas(predictions),
    }
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    storage.write_text(storage.join(task.output_url, SUMMARY), text)
    storage.remove(storage.join(task.output_url, UNFINISHED))
    return summary


def print_summary(summary: dict[str, Any], output_url: str) -> None:
    """Print the counts on stdout, warnings on stderr."""
    if summary["trained_on_phantoms"]:
        tell("warning: the model was trained on drawn phantoms, not on radiographs")
    if summary["threshold"] is None:
        tell(f"warning: no decision: {summary['threshold_reason']}")
    if summary["calibration"] is None:
        tell(f"warning: no calibrated probability: {summary['calibration_reason']}")
    print(f"{summary['scored']} of {summary['files']} files scored")
    if summary["called_positive"] is not None:
        threshold = show_threshold(summary["threshold"])
        print(f"  {summary['called_positive']} at or above the threshold {threshold}")
    for reason, number in summary["unusable"].items():
        print(f"  {number} not usable: {reason}")
    for code, number in summary["warned"].items():
        print(f"  {number} with a warning: {code}")
    if summary["escaped_in_csv"]:
        tell(
            f"warning: {summary['escaped_in_csv']} file names begin like a formula; {CSV} "
            "has an apostrophe before them"
        )
    print(f"{NOTICE}\npredictions {storage.join(output_url, CSV)}")
