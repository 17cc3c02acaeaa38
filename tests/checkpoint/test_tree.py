"""A rank's own state is JSON and tensors; anything else is refused by its path."""

import pytest
import torch

from nltrain.checkpoint.errors import CheckpointError
from nltrain.checkpoint.tree import canonical_json, join, sha256_of, split


def test_own_state_survives_text_and_tensors_unchanged() -> None:
    state = {"rng": torch.arange(5, dtype=torch.uint8), "list": [1, 0.1, None, {"w": torch.ones(2, 3)}], "s": "x"}
    plain, tensors = split(state)
    back = join(plain, {name: tensor.reshape(-1) for name, tensor in tensors.items()})
    assert torch.equal(back["rng"], state["rng"]) and torch.equal(back["list"][3]["w"], torch.ones(2, 3))
    assert back["list"][:3] == [1, 0.1, None] and back["s"] == "x"


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {3}}, {"a": b"bytes"}, {"a": object()}, {"__tensor__": "x"}])
def test_what_would_need_a_pickle_is_refused_by_name(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"^state(\.a)? "):
        canonical_json(value)


def test_one_hash_for_every_spelling_of_a_value() -> None:
    assert sha256_of({"b": (1, 2), "a": None}) == sha256_of({"a": None, "b": [1, 2]}) != sha256_of({"a": None})
    with pytest.raises(CheckpointError, match=r"state\.w is a tensor"):
        canonical_json({"w": torch.zeros(1)})
