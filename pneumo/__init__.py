"""Training and evaluation of a pneumonia classifier on frontal chest X-rays. Research use only.

The science lives here and runs without Ray, Kubernetes or W&B. `jobs` runs it on a Ray cluster,
`cluster` submits those jobs from a laptop. Importing this package loads nothing heavy: the names of
`__all__`, for notebooks and scripts, are loaded when they are first used.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

__version__ = "0.1.0"

_PLACES = {
    "Callbacks": "pneumo.training.callbacks",
    "Config": "pneumo.config",
    "World": "pneumo.loading.sample_order",
    "auroc": "pneumo.evaluation.metrics",
    "compose_picture": "pneumo.reporting.figures.case_pictures",
    "confusion": "pneumo.evaluation.metrics",
    "fit": "pneumo.training.fit",
    "load_model": "pneumo.notebook",
    "open_store": "pneumo.notebook",
    "prepare_store": "pneumo.notebook",
    "write_phantoms": "pneumo.dataset.phantoms.source_folder",
    "youden_threshold": "pneumo.evaluation.metrics",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> _Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pneumo' has no attribute {name!r}")
    return getattr(_import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
