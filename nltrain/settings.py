"""What a config field says of itself, and the dotted paths of a nested config. Standard library only: a shared leaf.

A room marks each field of its config dataclass that may differ between a checkpoint and the run that resumes from it,
because the field decides where and how fast to train, not what:

    cache_bytes: int = field(default=8 << 30, metadata=MAY_CHANGE)

A field without a mark decides what is trained; a run with another value is refused on resume.
"""

import dataclasses
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_KEY = "may_change"

MAY_CHANGE: Mapping[str, str] = MappingProxyType({_KEY: "always"})
"""Metadata of a field that may differ on resume. On a field that holds a dataclass: everything below may differ."""
MAY_CHANGE_WITH_DATA: Mapping[str, str] = MappingProxyType({_KEY: "with other data"})
"""Metadata of a field that may differ on resume where `checkpoint.other_data` allows other data."""


def may_change_patterns(cls: type, with_other_data: bool = False, path: str = "") -> tuple[str, ...]:
    """The fields below config dataclass `cls` that may differ on resume, as dotted paths, in the order of the fields.

    A field that holds a dataclass is searched, and so are the members of a tuple of dataclasses, whose names are
    written `*` (`levels.levels.*.offload`). with_other_data: whether MAY_CHANGE_WITH_DATA counts too. path: what the
    paths begin with, its last dot included.
    """
    allowed = {MAY_CHANGE[_KEY], *([MAY_CHANGE_WITH_DATA[_KEY]] if with_other_data else [])}
    hints, found = typing.get_type_hints(cls), []
    for each in dataclasses.fields(cls):
        kind, name = hints[each.name], path + each.name
        if each.metadata.get(_KEY) in allowed:
            found.append(name)
        elif dataclasses.is_dataclass(kind):
            found += may_change_patterns(typing.cast(type, kind), with_other_data, f"{name}.")
        elif part := part_type(kind):
            found += may_change_patterns(part, with_other_data, f"{name}.*.")
    return tuple(found)


def part_type(kind: Any) -> type | None:
    """The dataclass X where the type `kind` is tuple[X, ...], else None."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and arguments and dataclasses.is_dataclass(arguments[0]):
        return typing.cast(type, arguments[0])
    return None


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{dotted path: leaf} of a config's JSON form.

    The parts of a list that all have a name are addressed by it: `levels.levels.slow.lr`. Any other list is a leaf, and
    so is an empty dict. path: the path of `tree` itself.
    """
    if isinstance(tree, Mapping) and tree:
        items = [(str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list) and tree and all(isinstance(part, Mapping) and "name" in part for part in tree):
        items = [(str(part["name"]), part) for part in tree]
    else:
        return {path: tree}
    return {k: v for name, value in items for k, v in flatten(value, f"{path}.{name}" if path else name).items()}
