"""What differs between the config a checkpoint was made with and the present one, and whether that may be."""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

from nltrain.checkpoint.errors import ConfigChangedError
from nltrain.settings import flatten

ABSENT = "<absent>"


class Difference(NamedTuple):
    """A field whose stored value is not the present one."""

    field: str  # dotted path; parts of a list that have names are addressed by them: levels.slow.lr
    stored: Any
    present: Any

    def __str__(self) -> str:
        return f"{self.field}: stored {self.stored!r}, now {self.present!r}"


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """All fields whose values differ, by dotted path; tuples equal lists, as JSON has only the one."""
    before, now = (flatten(json.loads(json.dumps(config))) for config in (stored, present))
    return [
        Difference(field, before.get(field, ABSENT), now.get(field, ABSENT))
        for field in sorted(before.keys() | now.keys())
        if before.get(field, ABSENT) != now.get(field, ABSENT)
    ]


def check_config(
    stored: Mapping[str, Any],
    present: Mapping[str, Any],
    may_change: Iterable[str] = (),
    derived: Mapping[str, str] = MappingProxyType({}),
) -> list[Difference]:
    """The allowed differences; raises ConfigChangedError where any other field differs.

    may_change: fnmatch patterns over dotted paths; `data` also stands for everything below it.
    derived: {field: the field that gives its value}. Where a field has the value of its source, and the source differs
    and is allowed to, the field is allowed to differ with it.
    """
    patterns = tuple(may_change)

    def fits(field: str) -> bool:
        return any(fnmatchcase(field, pattern) or fnmatchcase(field, f"{pattern}.*") for pattern in patterns)

    found = {difference.field: difference for difference in differences(stored, present)}

    def follows(difference: Difference) -> bool:
        source = found.get(derived.get(difference.field, ""))
        return source is not None and fits(source.field) and difference.present == source.present

    allowed: list[Difference] = []
    refused: list[Difference] = []
    for difference in found.values():
        (allowed if fits(difference.field) or follows(difference) else refused).append(difference)
    if refused:
        raise ConfigChangedError(
            "the config differs from the stored one in what changes the training: "
            + "; ".join(map(str, refused))
            + ". Restore these values, name the fields in checkpoint.may_change, or start a new run"
        )
    # A field that the stored config's release did not have, and that may change, is no change.
    return [difference for difference in allowed if difference.stored != ABSENT]


def check_state(
    state: Any, config: Mapping[str, Any] | None, may_change: Iterable[str], derived: Mapping[str, str]
) -> list[Difference]:
    """`check_config` with the config in a stored state; nothing to compare where one of them has none."""
    if config is None or not isinstance(state, dict) or "config" not in state:
        return []
    return check_config(state["config"], config, may_change, derived)
