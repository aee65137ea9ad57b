"""Inputs of the report besides the evaluation: the data, the model, how to reproduce it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pneumo.dataset.contact_sheets import ContactSheet
from pneumo.dataset.quality import Quality
from pneumo.dataset.source import RSNA
from pneumo.dataset.splits import LeakageAudit


@dataclass(frozen=True)
class DataFacts:
    """What the report says of the data."""

    digest: str
    """Of the manifest."""
    image_size: int
    """Height and width of the stored images, in pixels."""
    seed: int
    """Of the preparation."""
    audit: LeakageAudit
    quality: Quality
    contact: Sequence[ContactSheet]
    """Images of train by finding; may be empty."""
    phantoms: bool = False
    """Whether the images are phantoms, not radiographs."""
    layout: str = RSNA
    """Of the source; 'joined' of several stores."""
    sources: Sequence[str] = ()
    """Names of the joined stores; empty otherwise."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of images that were left out by a rule, by reason."""


@dataclass(frozen=True)
class ModelFacts:
    """What the report says of the model."""

    backbone: str
    initialisation: str
    """One sentence: the initial weights."""
    is_pretrained: bool
    fell_back: bool
    """Whether other weights were configured but not available."""
    epoch: int
    """Of the checkpoint, counted from 1."""
    image_size: int
    """Height and width of the input, in pixels."""
    selection: str
    """One or two sentences: which checkpoints are scored, and how their logits are combined."""
    mean: float
    """Of the gray levels of train, 0 to 1; the input is standardised by it and `std`."""
    std: float


@dataclass(frozen=True)
class Provenance:
    """What is needed to reproduce the evaluation."""

    run: str
    """The run's name."""
    created: str
    """The time, as text."""
    seed: int
    recipe: str
    """The settings of training and evaluation as TOML, which --recipe takes."""
    command: str
    citation: str
    """How to cite this evaluation."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions, code revision and digests by name."""
