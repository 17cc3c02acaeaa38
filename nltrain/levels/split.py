"""Which parameter belongs to which level: complete and disjoint, or an error that names the parameter.

Works on any nn.Module. Tied weights are one parameter: all its names count for matching, the first one names it. A
module that holds parameters directly belongs to one level, because a ZeRO engine gathers whole modules; at ZeRO-3
such a module may not contain another level's modules either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from nltrain.levels.config import NO_DECAY, VECTORS, LevelConfig, LevelsError


@dataclass(frozen=True)
class LevelPart:
    """The parameters of one level, in model order, and the largest modules that hold nothing but them."""

    config: LevelConfig
    parameters: tuple[tuple[str, nn.Parameter], ...]
    modules: tuple[nn.Module, ...]
    spared: Mapping[str, str] = field(default_factory=dict)
    """{name: the pattern of no_decay that leaves it alone}; every other parameter decays"""
    places: Mapping[str, int] = field(default_factory=dict)
    """{name: which parameter of the model it is, in model order over all levels}"""

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters of the level."""
        return sum(parameter.numel() for _, parameter in self.parameters)

    @property
    def num_decayed(self) -> int:
        """Elements that weight decay multiplies at a tick; 0 where the level has none or is frozen."""
        if self.config.frozen or not self.config.weight_decay:
            return 0
        return sum(parameter.numel() for name, parameter in self.parameters if name not in self.spared)

    def describe_decay(self) -> str:
        """For plan and log: how much of the level decays, and how much each pattern of no_decay leaves alone."""
        if self.config.frozen or not self.config.weight_decay:
            return "no decay"
        spared: dict[str, int] = {}
        for name, parameter in self.parameters:
            if name in self.spared:
                spared[self.spared[name]] = spared.get(self.spared[name], 0) + parameter.numel()
        text = f"decay {self.config.weight_decay:g} on {self.num_decayed:,} of {self.num_parameters:,} parameters"
        return text + ("; not on " + ", ".join(f"{p} ({n:,})" for p, n in spared.items()) if spared else "")


def split_levels(model: nn.Module, levels: Sequence[LevelConfig]) -> tuple[LevelPart, ...]:
    """Splits the trainable parameters of `model` into `levels`; raises LevelsError naming what does not fit."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter
            if parameter.ndim == 0:
                raise LevelsError(f"parameter {name} has no dimension, which ZeRO cannot shard: give it the shape (1,)")

    level_of: dict[int, str] = {}
    rest = next((level.name for level in levels if level.parameters == ("rest",)), None)
    for level in levels:
        if level.name == rest:
            continue
        for pattern in level.parameters:
            matched = [key for key, aliases in names.items() if any(fnmatchcase(a, pattern) for a in aliases)]
            if not matched:
                raise LevelsError(
                    f"level {level.name!r}: pattern {pattern!r} matches no trainable parameter of the model"
                )
            for key in matched:
                other = level_of.setdefault(key, level.name)
                if other != level.name:
                    raise LevelsError(
                        f"parameter {names[key][0]} (names: {', '.join(names[key])}) is in two levels, {other!r} "
                        f"and {level.name!r}: narrow one of their patterns"
                    )
    unmatched = [aliases[0] for key, aliases in names.items() if key not in level_of]
    if unmatched and rest is None:
        raise LevelsError(
            f"{len(unmatched)} parameters are in no level, the first is {unmatched[0]}: "
            'add a pattern for them or give one level parameters=("rest",)'
        )
    for key in names:
        level_of.setdefault(key, rest or "")
    if rest is not None and not unmatched:
        raise LevelsError(f'level {rest!r} takes ("rest",) but every parameter is matched by another level: remove it')

    _check_modules(model, levels, level_of)
    _check_no_decay(levels, names, parameters)
    parts = []
    for level in levels:
        keys = [key for key in names if level_of[key] == level.name]
        own = tuple((names[key][0], parameters[key]) for key in keys)
        by = {names[key][0]: _spared_by(level.no_decay, names[key], parameters[key]) for key in keys}
        spared = {name: pattern for name, pattern in by.items() if pattern is not None}
        places = {names[key][0]: place for place, key in enumerate(names) if level_of[key] == level.name}
        parts.append(LevelPart(level, own, tuple(_largest_modules(model, level.name, level_of)), spared, places))
    return tuple(parts)


def _spared_by(patterns: Sequence[str], aliases: Sequence[str], parameter: nn.Parameter) -> str | None:
    """The first pattern of no_decay that takes the parameter in, by any of its names."""
    for pattern in patterns:
        if parameter.ndim < 2 if pattern == VECTORS else any(fnmatchcase(name, pattern) for name in aliases):
            return pattern
    return None


def _check_no_decay(
    levels: Sequence[LevelConfig], names: Mapping[int, Sequence[str]], parameters: Mapping[int, nn.Parameter]
) -> None:
    """Refuses a pattern that matches no parameter of the model; it may match none of its own level."""
    for level in levels:
        for pattern in level.no_decay:
            if pattern not in NO_DECAY and not any(
                _spared_by((pattern,), aliases, parameters[key]) for key, aliases in names.items()
            ):
                raise LevelsError(
                    f"level {level.name!r}: no_decay pattern {pattern!r} matches no trainable parameter of the model; "
                    "correct it or leave it out"
                )


def _levels_inside(module: nn.Module, level_of: dict[int, str], recurse: bool) -> dict[str, str]:
    """{level name: first parameter of it} among the trainable parameters of `module`."""
    found: dict[str, str] = {}
    for name, parameter in module.named_parameters(recurse=recurse):
        if id(parameter) in level_of:
            found.setdefault(level_of[id(parameter)], name)
    return found


def _check_modules(model: nn.Module, levels: Sequence[LevelConfig], level_of: dict[int, str]) -> None:
    stage = {level.name: level.zero_stage for level in levels}
    for path, module in model.named_modules():
        direct = _levels_inside(module, level_of, recurse=False)
        where = f"module {path or '(the model itself)'} ({type(module).__name__})"
        if len(direct) > 1:
            (a, first), (b, second) = list(direct.items())[:2]
            raise LevelsError(
                f"{where} holds parameters of two levels, {first} of {a!r} and {second} of {b!r}: "
                "put one of them into a module of its own"
            )
        for level, name in direct.items():
            others = [other for other in _levels_inside(module, level_of, recurse=True) if other != level]
            if stage[level] == 3 and others:
                raise LevelsError(
                    f"{where} holds {name} of level {level!r} at ZeRO-3 and modules of level {others[0]!r}: "
                    f"put {name} into a module of its own, or use zero_stage 1 or 2 for {level!r}"
                )


def _largest_modules(model: nn.Module, level: str, level_of: dict[int, str]) -> list[nn.Module]:
    if set(_levels_inside(model, level_of, recurse=True)) == {level}:
        return [model]
    return [module for child in model.children() for module in _largest_modules(child, level, level_of)]
