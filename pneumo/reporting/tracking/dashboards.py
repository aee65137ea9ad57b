"""W&B workspaces as code: three views of a project. Built without a network; saving needs a key."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from pneumo.evaluation.shown_studies import ERRORS, OUTCOMES

with warnings.catch_warnings():
    # The package uses deprecated parts of pydantic.
    warnings.simplefilter("ignore", DeprecationWarning)
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

HEADLINES = ("auroc", "average_precision", "recall", "specificity", "gain_over_view", "map_auprc")
CHARTS = ("roc", "precision_recall", "reliability", "decision_curve", "confusion")


def build_views(project: str, entity: str) -> dict[str, Any]:
    """The workspaces Train, Tune and Evaluate, by name; needs no network."""
    sections = {"Train": _train(), "Tune": _tune(), "Evaluate": _evaluate()}
    return {
        name: workspaces.Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=[
                workspaces.Section(name=title, panels=list(shown), is_open=True)
                for title, shown in found.items()
            ],
        )
        for name, found in sections.items()
    }


def _train() -> Mapping[str, Sequence[Any]]:
    def line(title: str, *keys: str) -> Any:
        return panels.LinePlot(title=title, x="epoch", y=list(keys))

    return {
        "Learning": [
            line("Loss", "train/loss", "val/loss"),
            line("AUROC on val", "val/auroc", "val/ema_auroc"),
            line("Average precision on val", "val/average_precision", "val/ema_average_precision"),
            line("Calls at p = 0.5 on val", "val/recall", "val/specificity", "val/precision"),
            line("Calibration slope on val (1 is right)", "val/calibration_slope"),
            line("Learning rate", "train/lr"),
            line("Length of the gradient", "train/grad_norm"),
        ],
        "Throughput": [
            line("Images a second", "perf/images_per_s"),
            line("Share of the time waiting for data", "perf/data_wait"),
            line("Seconds a step", "perf/step_p50_s", "perf/step_p95_s"),
            line("Seconds an epoch", "perf/epoch_s"),
            line("GPU memory, GB", "perf/gpu_memory_gb"),
            line("GPU at work, %", "perf/gpu_utilisation"),
        ],
    }


def _tune() -> Mapping[str, Sequence[Any]]:
    columns = [
        panels.ParallelCoordinatesPlotColumn(metric=key)
        for key in ("c::train.lr", "c::train.pos_weight", "tune/objective")
    ]
    return {
        "Search": [
            panels.ParallelCoordinatesPlot(columns=columns),
            panels.ParameterImportancePlot(with_respect_to="tune/objective"),
            panels.ScatterPlot(x="c::train.lr", y="tune/objective"),
            panels.ScatterPlot(x="c::train.pos_weight", y="tune/objective"),
        ],
        "Learning": [panels.LinePlot(title="Objective on val", x="epoch", y=["val/objective"])],
        "Trials": [panels.WeavePanelSummaryTable(table_name="tune/trials")],
    }


def _evaluate() -> Mapping[str, Sequence[Any]]:
    galleries = [f"eval/gallery/{outcome}" for outcome in OUTCOMES]
    errors = [f"eval/errors/{outcome}" for outcome in ERRORS]
    return {
        "Headlines": [
            panels.ScalarChart(title=name, metric=f"eval/test/{name}") for name in HEADLINES
        ],
        "Curves": [_draw_table(name) for name in CHARTS],
        "Where it looks": [panels.MediaBrowser(media_keys=[key]) for key in galleries],
        "Errors": [panels.MediaBrowser(media_keys=[key]) for key in errors],
        "Studies and groups": [
            panels.WeavePanelSummaryTable(table_name="eval/predictions"),
            panels.WeavePanelSummaryTable(table_name="eval/subgroups"),
        ],
        "Runs": [panels.RunComparer()],
    }


def _draw_table(name: str) -> Any:
    """The chart of a table that `wandb_media` logs."""
    table = {"summaryTable": {"tableKey": f"eval/{name}_table"}}
    if name == "confusion":
        columns = ("Actual", "Predicted", "nPredictions")
        fields, chart = {column: column for column in columns}, "wandb/confusion_matrix/v1"
    else:
        fields, chart = {"x": "x", "y": "y", "class": "series"}, "wandb/area-under-curve/v0"
    return panels.CustomChart(query=table, chart_name=chart, chart_fields=fields)


def describe_view(view: Any) -> dict[str, Any]:
    """The workspace as JSON, in the format of wandb_workspaces."""
    found: dict[str, Any] = TypeAdapter(type(view)).dump_python(view, mode="json")
    return found
