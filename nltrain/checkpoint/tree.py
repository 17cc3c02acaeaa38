"""A rank's own state as JSON plus tensors: {"rng": tensor, "count": 3} becomes text and named tensors, and back.

Only dicts with text keys, lists, text, numbers, booleans, None and tensors are taken: nothing that would need a pickle.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nltrain.checkpoint.errors import CheckpointError

_MARK = "__tensor__"


def split(value: Any, path: str = "rank_state") -> tuple[Any, dict[str, Tensor]]:
    """(JSON with a reference where a tensor was, tensors by name). Raises CheckpointError naming what does not fit."""
    if isinstance(value, Tensor):
        return {_MARK: path, "shape": list(value.shape)}, {path: value}
    tensors: dict[str, Tensor] = {}
    if isinstance(value, Mapping):
        plain: Any = {}
        for key, child in value.items():
            if not isinstance(key, str) or key == _MARK:
                raise CheckpointError(f"{path} has the key {key!r}: use text keys other than {_MARK}")
            plain[key], found = split(child, f"{path}.{key}")
            tensors |= found
        return plain, tensors
    if isinstance(value, list | tuple):
        plain = []
        for position, child in enumerate(value):
            text, found = split(child, f"{path}.{position}")
            plain.append(text)
            tensors |= found
        return plain, tensors
    if value is None or isinstance(value, str | bool | int | float):
        return value, tensors
    raise CheckpointError(f"{path} is a {type(value).__name__}: a checkpoint holds JSON values and tensors only")


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split` (tuples come back as lists). A reference to no tensor raises KeyError."""
    if isinstance(plain, dict):
        if _MARK in plain:
            return tensors[plain[_MARK]].view(plain["shape"])
        return {key: join(child, tensors) for key, child in plain.items()}
    if isinstance(plain, list):
        return [join(child, tensors) for child in plain]
    return plain


def canonical_json(value: Any, what: str = "state") -> bytes:
    """One spelling per value, for hashing and storing. Raises CheckpointError naming what is not JSON."""
    plain, tensors = split(value, what)
    if tensors:
        raise CheckpointError(f"{next(iter(tensors))} is a tensor: put it into the fragments or into the rank state")
    return dump(plain)


def dump(plain: Any) -> bytes:
    """What `split` returned, as bytes: sorted keys, no spaces."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def sha256_of(value: Any, what: str = "state") -> str:
    """The hash of a JSON value, the same for every spelling of it. Raises CheckpointError naming what is not JSON."""
    return hashlib.sha256(canonical_json(value, what)).hexdigest()
