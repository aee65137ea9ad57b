"""What the report is told besides the evaluation: the data, the model, how to do it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pneumo.dataset.contact_sheets import ContactSheet
from pneumo.dataset.quality import Quality
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
    """Pictures of train by finding; may be empty."""
    phantoms: bool = False
    """Whether the images are drawn, not radiographs."""

    @property
    def has_patients(self) -> bool:
        """Whether it is known which studies are of one patient."""
        return self.audit.leaked_by_image is not None


@dataclass(frozen=True)
class ModelFacts:
    """What the report says of the model."""

    backbone: str
    initialisation: str
    """One sentence: where the weights started."""
    is_pretrained: bool
    fell_back: bool
    """Whether other weights had been asked for."""
    epoch: int
    """Of the checkpoint, counted from 1."""
    image_size: int
    """Height and width of the input, in pixels."""
    selection: str
    """One sentence: which checkpoints were taken, and how they are scored."""
    mean: float
    """Of train's gray levels, which the input is standardised by, from 0 to 1; as `std`."""
    std: float


@dataclass(frozen=True)
class Provenance:
    """What it takes to do it again."""

    run: str
    """The run's name."""
    created: str
    """When, as the reader shall see it."""
    seed: int
    recipe: str
    """The whole configuration as TOML, which --recipe takes."""
    command: str
    citation: str
    """What a paper says of this evaluation."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions, code revision and digests by name."""
