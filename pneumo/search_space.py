"""The search space: dotted keys of the configuration, and what each may be.

    [tune.space]
    train.lr = ["log_uniform", 1e-5, 3e-3]
    train.pos_weight = ["log_uniform", 0.5, 10, 5]    # 5 points where a grid is searched
    augment.rotation_degrees = ["uniform", 0, 15]
    train.warmup_fraction = ["choice", 0.0, 0.1]
    data.image_size = ["integer", 160, 224]           # both ends included
    model.backbone = "resnet34"                       # fixed; ["fixed", "resnet34"] is the same

Whether a key exists and may have such values, `config_layers.check_space` checks.
"""

import math
from collections.abc import Mapping
from itertools import islice, product
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, model_serializer, model_validator

Scalar = bool | int | float | str | None
Kind = Literal["log_uniform", "uniform", "integer", "choice", "fixed"]

KINDS: tuple[Kind, ...] = get_args(Kind)
_FORMS = (
    '["log_uniform", low, high], ["uniform", low, high], ["integer", low, high], '
    '["choice", value, …] or a value'
)


class Domain(BaseModel, frozen=True):
    """What one key may be; written and read as a list, or as the value alone where it is fixed."""

    kind: Kind
    values: tuple[Scalar, ...]
    """(low, high) of a range, the choices, or the one value."""
    points: int | None = None
    """How many values of a range a grid takes."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, written: Any) -> Any:
        if isinstance(written, Mapping):
            raise ValueError(f"give {_FORMS}; got {dict(written)!r}")  # noqa: TRY004  pydantic's
        if not isinstance(written, list | tuple):
            return {"kind": "fixed", "values": (written,)}
        kind, *values = written or (None,)
        if kind not in KINDS:
            raise ValueError(f"give {_FORMS}; got {list(written)!r}")
        if any(isinstance(value, list | Mapping) for value in values):
            raise ValueError(f"values must be plain, got {list(written)!r}")
        if kind in ("choice", "fixed"):
            return {"kind": kind, "values": tuple(values)}
        if len(values) not in (2, 3):
            raise ValueError(f'give ["{kind}", low, high]; got {list(written)!r}')
        return {
            "kind": kind,
            "values": tuple(values[:2]),
            "points": values[2] if len(values) == 3 else None,
        }

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.kind == "fixed":
            if len(self.values) != 1:
                raise ValueError(f'["fixed", value] takes one value, got {len(self.values)}')
            return self
        if self.kind == "choice":
            if not self.values:
                raise ValueError('["choice", …] without a value to choose')
            if len(set(map(repr, self.values))) != len(self.values):
                raise ValueError(f"a choice is given twice in {self.values}")
            return self
        self._check_range()
        return self

    def _check_range(self) -> None:
        number = (int,) if self.kind == "integer" else (int, float)
        for value in self.values:
            is_number = isinstance(value, number) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):  # type: ignore[arg-type]
                what = "whole numbers" if self.kind == "integer" else "numbers"
                raise ValueError(f"{self.kind} is between {what}, got {value!r}")
        if self.low > self.high:
            raise ValueError(f"the low {self.low:g} is above the high {self.high:g}")
        if self.kind == "log_uniform" and self.low <= 0:
            raise ValueError(f"log_uniform needs a low above 0, got {self.low:g}")
        if self.points is not None and self.points < 2:
            raise ValueError(f"a grid takes at least 2 points of a range, got {self.points}")

    @model_serializer
    def _write(self) -> Any:
        return [self.kind, *self.values, *([] if self.points is None else [self.points])]

    @property
    def low(self) -> float:
        """The lowest value of a range."""
        assert isinstance(self.values[0], int | float)
        return self.values[0]

    @property
    def high(self) -> float:
        """The highest value of a range, included."""
        assert isinstance(self.values[1], int | float)
        return self.values[1]

    @property
    def varies(self) -> bool:
        """Whether it can have more than one value."""
        return self.kind != "fixed" and len(set(map(repr, self.values))) > 1

    def samples(self) -> tuple[Scalar, ...]:
        """Values to check in place of every draw: the ends of a range and a value between them that
        is no round number; every choice."""
        if self.kind in ("choice", "fixed"):
            return self.values
        if self.kind == "integer":
            return tuple(dict.fromkeys([*self.values, min(int(self.low) + 1, int(self.high))]))
        between = self.low + (self.high - self.low) / math.sqrt(2)
        return tuple(dict.fromkeys([float(self.low), float(self.high), between]))

    def grid(self) -> tuple[Scalar, ...]:
        """The values that a grid takes, from low to high.

        Raises ValueError for a range that does not say how many.
        """
        if self.kind in ("choice", "fixed"):
            return self.values
        if self.low == self.high:
            return (self.values[0],)
        if self.points is None and self.kind == "integer":
            return tuple(range(int(self.low), int(self.high) + 1))
        if self.points is None:
            raise ValueError(
                "a grid needs the number of points: "
                f'["{self.kind}", {self.low:g}, {self.high:g}, 5]'
            )
        steps = [i / (self.points - 1) for i in range(self.points)]
        if self.kind == "log_uniform":
            between = [self.low * (self.high / self.low) ** step for step in steps[1:-1]]
        else:
            between = [self.low + (self.high - self.low) * step for step in steps[1:-1]]
        if self.kind == "integer":
            between = [round(value) for value in between]
        return tuple(dict.fromkeys([self.values[0], *between, self.values[1]]))


Space = dict[str, Domain]
"""The domain of each searched setting, by dotted key."""


def flatten(tree: Any, prefix: str = "") -> Any:
    """Tables within tables as dotted keys: TOML reads `train.lr = …` as a table."""
    if not isinstance(tree, Mapping):
        return tree
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def sample(space: Mapping[str, Domain], limit: int = 2048) -> list[dict[str, Scalar]]:
    """Settings to check in place of every draw: all combinations of the domains' samples, or the
    first `limit` of them and each sample by itself."""
    keys = list(space)
    combinations = product(*(space[key].samples() for key in keys))
    found = [dict(zip(keys, values, strict=True)) for values in islice(combinations, limit)]
    if len(found) == limit:
        found += [{**found[0], key: value} for key in keys for value in space[key].samples()]
    return found


def grid_points(space: Mapping[str, Domain]) -> int:
    """How many settings a grid has. Raises ValueError naming the key of a range without points."""
    count = 1
    for key, domain in space.items():
        try:
            count *= len(domain.grid())
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return count
