"""What differs between the config a checkpoint was made with and the present one, and whether that may be."""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from nltrain.checkpoint.errors import ConfigChangedError

ABSENT = "<absent>"


class Difference(NamedTuple):
    field: str  # dotted path; parts of a list that have names are addressed by them: levels.slow.lr
    stored: Any
    present: Any

    def __str__(self) -> str:
        return f"{self.field}: stored {self.stored!r}, now {self.present!r}"


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and value and all(isinstance(part, Mapping) and "name" in part for part in value):
        children = [(str(part["name"]), part) for part in value]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for key, child in children:
        found |= _leaves(child, f"{path}.{key}" if path else key)
    return found


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """All fields whose values differ, by dotted path; tuples equal lists, as JSON has only the one."""
    before, now = (_leaves(json.loads(json.dumps(config))) for config in (stored, present))
    return [
        Difference(field, before.get(field, ABSENT), now.get(field, ABSENT))
        for field in sorted(before.keys() | now.keys())
        if before.get(field, ABSENT) != now.get(field, ABSENT)
    ]


def check_config(
    stored: Mapping[str, Any], present: Mapping[str, Any], may_change: Iterable[str] = ()
) -> list[Difference]:
    """The allowed differences. A field that matches no pattern of `may_change` and differs raises ConfigChangedError.

    A pattern is an fnmatch over the dotted path; `data` also stands for everything below it.
    """
    patterns = tuple(may_change)
    allowed: list[Difference] = []
    refused: list[Difference] = []
    for difference in differences(stored, present):
        fits = any(
            fnmatchcase(difference.field, pattern) or fnmatchcase(difference.field, f"{pattern}.*")
            for pattern in patterns
        )
        (allowed if fits else refused).append(difference)
    if refused:
        raise ConfigChangedError(
            "the config differs from the stored one in what changes the training: "
            + "; ".join(map(str, refused))
            + ". Restore these values, name the fields in checkpoint.may_change, or start a new run"
        )
    # A field that the stored config's release did not have, and that may change, is no change.
    return [difference for difference in allowed if difference.stored != ABSENT]


def check_state(state: Any, config: Mapping[str, Any] | None, may_change: Iterable[str]) -> list[Difference]:
    """`check_config` with the config in a stored state; nothing to compare where one of them has none."""
    if config is None or not isinstance(state, dict) or "config" not in state:
        return []
    return check_config(state["config"], config, may_change)
