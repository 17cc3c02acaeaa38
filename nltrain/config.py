"""A run's configuration: one `RunConfig` put together from each room's own frozen dataclass.

Every field can be set as `path.to.field=value`; members of a tuple of named parts are addressed by name
(`levels.levels.slow.lr=1e-4`). Guarantees: an unknown field, a value of the wrong type and an impossible combination
are refused with the field, the value and what to do; `to_dict` and `from_dict` are inverse, so a checkpoint can say
exactly what it was trained with.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nltrain.checkpoint.config import CheckpointConfig
from nltrain.data.config import DataConfig
from nltrain.errors import ConfigError, require
from nltrain.levels.config import LevelsConfig
from nltrain.model.config import ModelConfig
from nltrain.runtime.config import ClusterConfig
from nltrain.settings import MAY_CHANGE, flatten, may_change_patterns, part_type
from nltrain.track.config import TrackConfig

DERIVED = {
    "levels.fold_every_tokens": "checkpoint.every_tokens",
    "levels.schedule.total_tokens": "train.total_tokens",
}
"""{field: the field of another room that gives its value where it is None}; `RunConfig.resolved` fills it in.

On resume such a field may differ from the stored one together with the field that it is derived from.
"""


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, how the work is cut on a machine, and when to look at the result."""

    total_tokens: int = 1_048_576
    """Training tokens over all ranks; the run ends at the last whole quantum."""
    micro_batch_size: int = field(default=4, metadata=MAY_CHANGE)
    """Sequences per rank in one forward/backward; a matter of memory, never of the result."""
    validate_every_tokens: int = field(default=262_144, metadata=MAY_CHANGE)
    """Tokens between validations, rounded up to whole quanta; 0: only at the end."""
    validation_sequences: int = field(default=64, metadata=MAY_CHANGE)
    """Held-out sequences per validation, always the first ones of the validation split; 0: none."""
    sample_tokens: int = field(default=64, metadata=MAY_CHANGE)
    """Tokens to generate as a sample at the end; 0: none."""
    seed: int = 0
    """Seed of the initial weights; the order of the data has its own (`data.seed`)."""
    reference_max_tokens: int = field(default=50_000_000, metadata=MAY_CHANGE)
    """Count the text's unigram and bigram entropies when it has at most this many training tokens."""

    def __post_init__(self) -> None:
        for name in ("total_tokens", "micro_batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}", value, "must be at least 1")
        for name in ("validate_every_tokens", "validation_sequences", "sample_tokens", "reference_max_tokens"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "must not be negative")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    name: str = field(metadata=MAY_CHANGE)
    """The run's name; resubmitting the same name resumes it."""
    output: str = field(metadata=MAY_CHANGE)
    """Absolute folder on rank 0's machine for metrics, plots and the summary."""
    model: ModelConfig
    data: DataConfig
    levels: LevelsConfig
    checkpoint: CheckpointConfig = field(metadata=MAY_CHANGE)
    train: TrainConfig = field(default_factory=TrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig, metadata=MAY_CHANGE)
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        quantum, total, every = self.quantum_tokens, self.train.total_tokens, self.checkpoint.every_tokens
        require(
            self.output.startswith("/"),
            "output",
            self.output,
            "must be an absolute folder, since a job's working directory is a copy",
        )
        self.levels.check_sequences(self.data.seq_len, self.cluster.max_workers)
        check_compile(self)
        require(total >= quantum, "train.total_tokens", total, f"less than one quantum of {quantum} tokens; raise it")
        require(
            every % quantum == 0,
            "checkpoint.every_tokens",
            every,
            f"not a whole number of quanta of {quantum} tokens",
        )
        levels = self._resolved_levels()
        schedule, fold = levels.schedule, levels.fold_every_tokens
        require(
            schedule.kind == "constant" or schedule.total_tokens == total,
            "levels.schedule.total_tokens",
            schedule.total_tokens,
            f"must equal train.total_tokens={total}, or the {schedule.kind} schedule ends elsewhere than the run; "
            "leave it at none to have it follow train.total_tokens",
        )
        require(
            fold is None or every % fold == 0,
            "levels.fold_every_tokens",
            fold,
            f"checkpoint.every_tokens={every} must be a whole multiple of it, or saves would not resume exactly at "
            "another world size; leave it at none to fold at each save by tokens",
        )

    def resolved(self) -> "RunConfig":
        """This config with every value that DERIVED names filled in: what a run uses, prints and stores."""
        return replace(self, levels=self._resolved_levels())

    def _resolved_levels(self) -> LevelsConfig:
        levels = self.levels
        if levels.fold_every_tokens is None and self.checkpoint.every_tokens:
            levels = replace(levels, fold_every_tokens=self.checkpoint.every_tokens)
        if levels.schedule.total_tokens is None:
            # A constant schedule has no end: 0 stands for that in every stored config.
            total_tokens = 0 if levels.schedule.kind == "constant" else self.train.total_tokens
            levels = replace(levels, schedule=replace(levels.schedule, total_tokens=total_tokens))
        return levels

    @property
    def quantum_tokens(self) -> int:
        """Tokens of one quantum: the shortest period of a level."""
        return self.levels.quantum

    @property
    def num_quanta(self) -> int:
        """Whole quanta in `train.total_tokens`: where the run ends."""
        return self.train.total_tokens // self.quantum_tokens


def check_compile(config: RunConfig) -> None:
    """Refuse compiled blocks over ZeRO-3: torch would leave most of them uncompiled, with no more than a warning."""
    gathered = [level.name for level in config.levels.levels if level.zero_stage == 3]
    require(
        config.model.compile != "blocks" or not gathered,
        "model.compile",
        config.model.compile,
        f"level {', '.join(gathered)} is at zero_stage=3, whose gathering of weights cannot be compiled; choose "
        "model.compile=steps or none, or zero_stage 1 or 2",
    )


def check_vocabulary(config: RunConfig, vocab_size: int) -> None:
    """Refuse a dataset with tokens that the model has no embedding for: on a GPU that ends in an unreadable assert."""
    require(
        vocab_size <= config.model.vocab_size,
        "model.vocab_size",
        config.model.vocab_size,
        f"the dataset at data.prefix={config.data.prefix} has {vocab_size} tokens; prepare it with "
        f"vocab_size={config.model.vocab_size}, or raise the model's",
    )


def may_change_on_resume(config: RunConfig) -> tuple[str, ...]:
    """Patterns of the fields in which `config` may differ from that of the checkpoint from which its run goes on."""
    patterns = may_change_patterns(RunConfig, config.checkpoint.other_data)
    # A constant schedule has no end, whatever an earlier release stored as one.
    return (*patterns, "levels.schedule.total_tokens") if config.levels.schedule.kind == "constant" else patterns


def to_dict(config: Any) -> dict[str, Any]:
    """JSON-able dict of a config dataclass."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """Inverse of `to_dict`. Raises ConfigError for a field that `cls` does not have."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise ConfigError(_unknown(path + name, known))
    return cls(**{name: _restore(hints[name], value, f"{path}{name}.") for name, value in values.items()})


def override(config: Any, assignments: Sequence[str]) -> Any:
    """Apply `path.to.field=value` assignments together, then validate once. Raises ConfigError."""
    tree = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"{assignment!r}: an override is written path.to.field=value")
        _assign(type(config), tree, path.split("."), text, path)
    return from_dict(type(config), tree)


def describe(config: Any) -> str:
    """The resolved config, one `field = value` per line."""
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in flatten(to_dict(config)).items())


def _assign(cls: type, tree: dict[str, Any], path: list[str], text: str, full: str) -> None:
    hints = typing.get_type_hints(cls)
    name, rest = path[0], path[1:]
    if name not in hints:
        raise ConfigError(_unknown(full, set(hints), name))
    kind = hints[name]
    if dataclasses.is_dataclass(kind) and rest:
        _assign(typing.cast(type, kind), tree[name], rest, text, full)
    elif (part := part_type(kind)) and rest:
        members = {member.get("name"): member for member in tree[name]}
        if rest[0] not in members or not rest[1:]:
            raise ConfigError(_unknown(full, {str(member) for member in members}, rest[0]))
        _assign(part, members[rest[0]], rest[1:], text, full)
    elif rest:
        raise ConfigError(f"{full}: {name} has no fields of its own")
    else:
        tree[name] = _parse(kind, text, full)


def _restore(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return from_dict(typing.cast(type, kind), value, path)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else _restore(inner[0], value, path)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        arguments = typing.get_args(kind)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_restore(arguments[0], member, path) for member in value)
        return tuple(_restore(inner, member, path) for inner, member in zip(arguments, value, strict=True))
    return value


def _parse(kind: Any, text: str, full: str) -> Any:
    """A command-line value as `kind`; integers may be written 1_000_000 or 5e5, tuples as a,b,c or JSON."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if text not in map(str, choices):
            raise ConfigError(f"{full}={text!r}: choose one of {', '.join(map(str, choices))}")
        return next(choice for choice in choices if str(choice) == text)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is int:
            number = float(text) if any(c in text.lower() for c in ".e") else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            return float(text)
        if kind is str:
            return text
        if typing.get_origin(kind) in (tuple, dict, list):
            if text.startswith(("[", "{")):
                return json.loads(text)
            return [_parse(typing.get_args(kind)[0], part, full) for part in text.split(",") if part]
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{full}={text!r}: not a valid {getattr(kind, '__name__', kind)}") from None
    raise ConfigError(f"{full}={text!r}: set its fields one by one ({full}.<field>=value)")


def _unknown(full: str, known: set[str], name: str | None = None) -> str:
    near = difflib.get_close_matches(name or full.rsplit(".", 1)[-1], known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
    return f"{full}: no such field; {hint}"
