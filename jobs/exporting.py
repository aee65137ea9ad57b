"""Export an evaluated run to a folder that scores DICOM files without pneumo: ONNX, a torch.export
program, the preprocessing, the frozen threshold and calibration, a model card, digests."""

import hashlib
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor, nn

from jobs.evaluation.evaluated_run import METRICS, find_evaluated_checkpoints, parse_metrics
from jobs.evaluation.ray_scoring import Scoring, load_members
from jobs.terminal.entry_point import tell
from jobs.terminal.places import UNFINISHED
from pneumo import storage
from pneumo.command_line import ExportArguments, Invocation
from pneumo.dataset.phantoms.drawing import render_study
from pneumo.dataset.phantoms.population import draw_population
from pneumo.errors import ConfigError, DataError, RunError
from pneumo.evaluation.calibration import Scaling
from pneumo.evaluation.estimates import as_json
from pneumo.evaluation.file_predictions import FrozenRule
from pneumo.images.letterbox import letterbox
from pneumo.loading.augmentation import normalise
from pneumo.network.scoring import Member, score_images
from pneumo.training.checkpoints import load_checkpoint
from pneumo.version import describe_code

SCHEMA_VERSION = 1
NOTICE = "Research use only, never a diagnostic device."
DIGESTS = "SHA256SUMS"
_COPIED = ("preprocessing.py", "score.py", "requirements.txt")
_FILLED_IN = ("README.md", "model_card.md")
_TOLERANCE = 1e-4
"""Of ONNX's logits to torch's, which differ by rounding; absolute below 1, relative above."""


class ExportedModel(nn.Module):
    """Pictures (B, 1, S, S) uint8 -> calibrated probability (B,) and logit (B,), float32."""

    def __init__(self, members: Sequence[Member], calibration: Scaling) -> None:
        super().__init__()
        self.networks = nn.ModuleList(member.network for member in members)
        self.to(memory_format=torch.contiguous_format)  # for others torch.export.save warns
        self.moments = [(member.mean, member.std) for member in members]
        self.slope, self.intercept = calibration.slope, calibration.intercept

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean logit of the networks, and its probability."""
        logits = [
            network(normalise(pixels, mean, std)).squeeze(1)
            for network, (mean, std) in zip(self.networks, self.moments, strict=True)
        ]
        logit = torch.stack(logits).mean(0)
        return torch.sigmoid(self.slope * logit + self.intercept), logit


def export(invocation: Invocation) -> None:
    """Write the folder of `--output`, its digests last.

    Raises ConfigError without the packages that write ONNX; RunError for a run that is not
    evaluated, has no threshold or calibration, or is scored in several views or input sizes;
    DataError where the logits of ONNX differ from torch's.
    """
    arguments = invocation.arguments
    assert isinstance(arguments, ExportArguments)
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise ConfigError("export: onnx and onnxscript are missing; pip install 'pneumo[onnx]'")
    run_urls = [storage.normalise(url) for url in (arguments.run, *arguments.members)]
    text = storage.read_text(storage.join(run_urls[0], METRICS))
    rule, metrics = read_rule(run_urls[0], text)
    scoring = Scoring(find_evaluated_checkpoints(run_urls, rule))
    members = load_members(scoring, "cpu")
    if len({member.image_size for member in members}) > 1:
        raise RunError(f"{run_urls[0]}: its checkpoints take pictures of several sizes; export one")
    facts = describe(rule, scoring, members, storage.last_part(run_urls[0]))
    facts["evaluation_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    assert rule.calibration is not None
    files = convert(ExportedModel(members, rule.calibration).eval(), facts)
    facts["onnx_differs_by"] = compare(files["model.onnx"], members)
    files["preprocessing.json"] = (json.dumps(facts, indent=1) + "\n").encode()
    files |= read_texts(facts, metrics)
    write(storage.normalise(arguments.output), files)
    print(f"{NOTICE}\nexport {storage.normalise(arguments.output)}")


def read_rule(run_url: str, text: str) -> tuple[FrozenRule, dict[str, Any]]:
    """The threshold and calibration frozen in the run's metrics.json, whose content is `text`, and
    all its metrics. Raises RunError where the run cannot be exported."""
    metrics = parse_metrics(run_url, text)
    rule = FrozenRule.from_metrics(metrics)
    if rule.threshold_logit is None:
        why = rule.threshold_reason or "an older version evaluated it; evaluate it again"
        raise RunError(f"{run_url}: no threshold to export: {why}")
    if rule.calibration is None:
        raise RunError(f"{run_url}: no calibration to export: {rule.calibration_reason}")
    if rule.views > 1:
        raise RunError(
            f"{run_url}: evaluated in {rule.views} views of each picture, and an export has one; "
            "evaluate it again without evaluate.tta"
        )
    return rule, metrics


def describe(
    rule: FrozenRule, scoring: Scoring, members: Sequence[Member], run: str
) -> dict[str, Any]:
    """The content of preprocessing.json."""
    first = load_checkpoint(scoring.checkpoints[0].run_url, scoring.checkpoints[0].entry)
    return {
        "schema_version": SCHEMA_VERSION,
        "notice": NOTICE,
        "decoded_at": rule.stored_size or first.image_size,
        "image_size": first.image_size,
        "normalised_in_the_model_by": [{"mean": m.mean, "std": m.std} for m in members],
        "threshold_logit": rule.threshold_logit,
        "threshold": rule.threshold,
        "calibration": as_json(rule.calibration, leave_out={"log_loss"}),
        "trained_on_phantoms": rule.phantoms,
        "run": run,
        "backbones": [member.backbone for member in members],
        "checkpoints": scoring.to_json()["checkpoints"],
        "store_digest": first.manifest_digest,
        "trained_by": first.code_version,
        "exported_by": describe_code(),
    }


def convert(model: ExportedModel, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """model.pt2 and model.onnx, for batches of any size; both contain `facts`."""
    import onnx  # installed by the extra `onnx`

    size = facts["image_size"]
    shapes = {"pixels": {0: torch.export.Dim("batch")}}
    example = torch.zeros((2, 1, size, size), dtype=torch.uint8)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    saved = io.BytesIO()
    torch.export.save(program, saved, extra_files={"facts.json": json.dumps(facts)})
    converted = torch.onnx.export(
        program, input_names=["pixels"], output_names=["probability", "logit"], verbose=False
    )
    assert converted is not None
    proto = converted.model_proto
    proto.doc_string = NOTICE
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in facts.items()}
    onnx.helper.set_model_props(proto, texts)
    return {"model.pt2": saved.getvalue(), "model.onnx": proto.SerializeToString()}


def compare(model: bytes, members: Sequence[Member]) -> float | None:
    """The largest difference between a logit of ONNX and of torch, over a few phantoms; None where
    onnxruntime is not installed. Raises DataError where it is beyond the tolerance."""
    if importlib.util.find_spec("onnxruntime") is None:
        tell("warning: onnxruntime is not installed, so model.onnx was not checked")
        return None
    import onnxruntime

    size = members[0].image_size
    drawn = [render_study(study)[0] for study in draw_population(4, seed=0)]
    pictures = [letterbox(picture, size)[0] for picture in drawn]
    expected = score_images(members, pictures)
    session = onnxruntime.InferenceSession(model)
    parts = [
        session.run(["logit"], {"pixels": np.stack(part)[:, None]})[0]
        for part in (pictures[:1], pictures[1:])
    ]
    difference = np.abs(np.concatenate(parts) - expected)
    if not (difference <= _TOLERANCE * np.maximum(1, np.abs(expected))).all():
        raise DataError(f"export: logits of ONNX and torch differ by {difference.max():.2g}")
    return float(difference.max())


def read_texts(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that are the same in every export, and the README and model card of this one."""
    folder = resources.files("jobs") / "exported"
    files = {name: (folder / name).read_bytes() for name in _COPIED}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["interval"] = show_interval
    for name in _FILLED_IN:
        template = environment.from_string((folder / f"{name}.j2").read_text())
        files[name] = template.render(facts=facts, metrics=metrics, test=metrics["test"]).encode()
    return files


def show_interval(estimate: Mapping[str, Any]) -> str:
    """`0.91 (0.85 to 0.96)`, or why there is none."""
    value, low, high = (estimate.get(name) for name in ("value", "low", "high"))
    if value is None:
        return f"none: {estimate.get('reason')}"
    return f"{value:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def write(output_url: str, files: Mapping[str, bytes]) -> None:
    """Write the files, and then their digests, for `sha256sum -c`."""
    storage.write_text(storage.join(output_url, UNFINISHED), "jobs.export has not finished here\n")
    storage.remove(storage.join(output_url, DIGESTS))
    for name, data in files.items():
        storage.write_bytes(storage.join(output_url, name), data)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    storage.write_text(storage.join(output_url, DIGESTS), "".join(lines))
    storage.remove(storage.join(output_url, UNFINISHED))
