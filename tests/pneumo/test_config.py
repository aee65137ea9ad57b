"""The tree: frozen, with a digest, and without this machine's folders where others see it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pneumo.config import Config
from pneumo.config_layers import override

positive = st.floats(min_value=1e-300, allow_infinity=False, allow_nan=False)
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**31 - 1),
    "prepare.image_size": st.integers(32, 1024),
    "prepare.max_bad_fraction": st.floats(0, 1, exclude_max=True),
    "prepare.limit": st.none() | st.integers(1),
    "split.unit": st.sampled_from(["patient", "image"]),
    "split.val_fraction": st.floats(0.01, 0.5),
    "split.salt": st.none() | st.integers(0, 63),
    "data.image_size": st.none() | st.integers(32, 1024),
    "augment.rotation_degrees": st.floats(0, 180),
    "augment.scale_fraction": st.floats(0, 0.9, exclude_max=True),
    "model.weights": st.text(),
    "train.batch_size": st.integers(2),
    "train.lr": positive,
    "train.weight_decay": st.floats(0, allow_infinity=False, allow_nan=False),
    "train.pos_weight": positive | st.just("balanced"),
    "train.schedule": st.sampled_from(["constant", "cosine"]),
    "tune.early_stopping": st.sampled_from(["asha", "none"]),
    "evaluate.sensitivity": st.floats(0, 1, exclude_min=True),
    "cluster.use_gpu": st.booleans() | st.just("auto"),
    "cluster.max_failures": st.integers(-1),
    "tracking.entity": st.none() | st.text(),
}
changes = st.fixed_dictionaries({}, optional=CHANGES)


@given(changes)
def test_json_round_trip_gives_an_equal_tree_of_the_same_digest(values: dict[str, Any]) -> None:
    config = override(Config(), values)
    again = Config.model_validate_json(config.to_json())
    assert again == config
    assert again.digest() == config.digest()


@given(changes, st.sampled_from(sorted(CHANGES)), st.data())
def test_digest_changes_exactly_with_the_sections_that_it_covers(
    values: dict[str, Any], key: str, data: st.DataObject
) -> None:
    before = override(Config(), values)
    after = override(before, {key: data.draw(CHANGES[key])})
    section = key.split(".")[0]
    others = [name for name in Config.model_fields if name != section]
    assert (after.digest() == before.digest()) == (after == before)
    assert (after.digest(section) == before.digest(section)) == (after == before)
    assert after.digest(*others) == before.digest(*others)


def test_digest_does_not_depend_on_the_order_in_which_settings_were_given() -> None:
    one = Config.model_validate({"seed": 3, "train": {"lr": 0.1, "epochs": 2}})
    two = Config.model_validate({"train": {"epochs": 2, "lr": 0.1}, "seed": 3})
    assert one.digest() == two.digest()


def test_a_value_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.lr = 1.0  # type: ignore[misc]


def test_others_are_told_no_folder_and_no_bucket() -> None:
    config = override(
        Config(),
        {
            "model.weights": "/home/alice/enc.pt",
            "prepare.without": ["s3://alice/stores/nih/", "/home/alice/rsna"],
            "split.list": "file:///home/alice/split.csv",
            "tune.space": {
                "model.weights": ["choice", "random", "/home/alice/b.pt", "s3://alice/c.pt"]
            },
        },
    )
    told = config.without_paths()
    assert told["model"]["weights"] == "enc.pt"
    assert told["split"]["list"] == "split.csv"
    assert told["tune"]["space"]["model.weights"] == ["choice", "random", "b.pt", "c.pt"]
    assert told["prepare"]["without"] == ["nih", "rsna"]
    assert "alice" not in json.dumps(told)
    assert Config().without_paths() == Config().model_dump(mode="json")
