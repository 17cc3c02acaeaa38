"""Configuration of levels: who steps when, with which optimizer, on which ZeRO stage.

Frozen dataclasses, validated on construction; an error names field, value and remedy. Every period and every schedule
is counted in global training tokens T, never in optimizer steps. The result therefore does not depend on world size,
micro-batch and accumulation. Imports neither deepspeed nor torch.
"""

import math
from dataclasses import dataclass, field, replace

from nltrain.errors import ConfigError, require
from nltrain.levels import optimizers
from nltrain.settings import MAY_CHANGE

MODES = {1: "local", 2: "sharded", 3: "gathered"}
"""{ZeRO stage: how a level sums its gradients over ranks, docs/levels.md}."""
SCHEDULES = ("constant", "linear", "cosine", "wsd")
VECTORS = "vectors"
"""As a member of no_decay: every parameter of fewer than two dimensions."""
NO_DECAY = (VECTORS, "*bias", "*norm.*", "*conv.*", "*memories.*")
"""Not decayed by default: vectors and scalars, biases of any shape, norms, convolutions, memories."""
EXTENSIONS = ("follow", "rewarm", "flat", "refuse")


LevelsError = ConfigError
"""The name by which this room raises ConfigError for a split into levels that cannot be honoured."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate factor as a function of T (tokens). It is the same for all levels, so that all warm up together."""

    kind: str = "constant"
    """constant | linear | cosine | wsd (warm-up, stable, linear decay); shape after the warm-up"""
    warmup_tokens: int = 0
    """tokens over which the factor rises linearly from 0 to 1"""
    total_tokens: int | None = None
    """tokens at which the factor reaches min_lr_fraction; unused by constant. None: the run's train.total_tokens"""
    min_lr_fraction: float = 0.0
    """factor at and after total_tokens, in [0, 1]"""
    decay_fraction: float = 0.2
    """wsd only: the last part of total_tokens over which the factor decays, in (0, 1]"""
    # On resume the schedules as a whole are compared: what a change does to the learning rates is logged, or refused.
    extension: str = field(default="follow", metadata=MAY_CHANGE)
    """what a run does that is resumed with another schedule: follow (take the new curve at once, and log it), refuse,
    or from extends_tokens on: rewarm (rise to 1 over warmup_tokens, then decay to total_tokens) or flat (keep the last
    factor)"""
    extends_tokens: int = field(default=0, metadata=MAY_CHANGE)
    """rewarm and flat only: total_tokens of the earlier schedule, which holds up to that T; 0: no earlier schedule"""

    def __post_init__(self) -> None:
        def need(holds: bool, name: str, remedy: str) -> None:
            require(holds, f"levels.schedule.{name}", getattr(self, name), remedy)

        need(self.kind in SCHEDULES, "kind", f"choose one of {', '.join(SCHEDULES)}")
        need(self.warmup_tokens >= 0, "warmup_tokens", "must be at least 0")
        need(0 <= self.min_lr_fraction <= 1, "min_lr_fraction", "must lie in [0, 1]")
        need(0 < self.decay_fraction <= 1, "decay_fraction", "must lie in (0, 1]")
        need(self.extension in EXTENSIONS, "extension", f"choose one of {', '.join(EXTENSIONS)}")
        extended = self.extension in ("rewarm", "flat")
        need(
            self.extends_tokens > self.warmup_tokens if extended else self.extends_tokens >= 0,
            "extends_tokens",
            f"extension={self.extension} needs the total_tokens with which the schedule before ended",
        )
        if self.kind == "constant" or self.total_tokens is None:
            return
        least = self.extends_tokens + self.warmup_tokens
        need(
            not extended or self.total_tokens > least,
            "total_tokens",
            f"must be above extends_tokens + warmup_tokens = {least}: train longer, or lower warmup_tokens",
        )
        need(
            self.total_tokens > self.warmup_tokens,
            "total_tokens",
            f"{self.kind} needs more than warmup_tokens = {self.warmup_tokens}",
        )

    @property
    def end_tokens(self) -> int:
        """`total_tokens`; 0 of a constant schedule that has none. Raises ConfigError where it has yet to be given."""
        require(
            self.kind == "constant" or self.total_tokens is not None,
            "levels.schedule.total_tokens",
            self.total_tokens,
            f"{self.kind} needs it: give the tokens at which the schedule ends",
        )
        return self.total_tokens or 0

    def factor(self, tokens: int) -> float:
        """Multiplier of every level's lr for an update made at T = `tokens`."""
        ended, end = self.extends_tokens, self.end_tokens
        if self.extension not in ("rewarm", "flat") or self.kind == "constant":
            return self._curve(tokens, 0, end, 0.0)
        if tokens <= ended or self.extension == "flat":
            return self._curve(min(tokens, ended), 0, ended, 0.0)
        return self._curve(tokens, ended, end, self._curve(ended, 0, ended, 0.0))

    def _curve(self, tokens: int, begin: int, end: int, low: float) -> float:
        """The shape between T = `begin`, where it rises from `low`, and T = `end`."""
        start = begin + self.warmup_tokens
        if tokens < start:
            return low + (1 - low) * (tokens - begin) / self.warmup_tokens
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            start = max(start, begin + round((end - begin) * (1 - self.decay_fraction)))
        progress = min(1.0, max(0.0, (tokens - start) / max(1, end - start)))
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.min_lr_fraction + (1 - self.min_lr_fraction) * shape

    def change_at(self, tokens: int, before: "ScheduleConfig") -> tuple[float, float] | None:
        """(factor, factor) of `before` and of this schedule at T = `tokens`; None where they agree from there on."""
        ends = sorted({tokens, before.end_tokens, self.end_tokens, self.extends_tokens} - {0})
        samples = [
            tokens,
            *(end for end in ends if end > tokens),
            *((tokens + end) // 2 for end in ends if end > tokens),
        ]
        if all(math.isclose(before.factor(each), self.factor(each), abs_tol=1e-9) for each in samples):
            return None
        return before.factor(tokens), self.factor(tokens)


@dataclass(frozen=True)
class LevelConfig:
    """One level: a named set of parameters with one clock, one optimizer, one clip norm and one ZeRO stage."""

    name: str
    """unique among the levels; names the level in logs, metrics and checkpoints"""
    parameters: tuple[str, ...]
    """fnmatch patterns over named_parameters(), or ("rest",) for everything no other level matches"""
    period_tokens: int
    """tokens between two updates (ticks), >= the quantum"""
    phase_tokens: int | None = None
    """tick when floor((T + phase) / period) grows; None staggers slow levels so that their ticks do not coincide"""
    optimizer: str = "adamw"
    """name of an optimizer in levels/optimizers.py: adamw, sgd, ..."""
    lr: float = 1e-3
    """learning rate of a tick before the schedule's factor, >= 0; at 0 the weights stay and the moments still change"""
    betas: tuple[float, float] = (0.9, 0.95)
    """adamw only: decay of the two moments per tick"""
    eps: float = 1e-8
    """adamw only: added to the root of the second moment"""
    momentum: float = 0.0
    """sgd only: momentum per tick, in [0, 1)"""
    weight_decay: float = 0.0
    """decoupled, per base period: a tick multiplies weights by (1 - lr weight_decay)^(window tokens / base period)"""
    no_decay: tuple[str, ...] = NO_DECAY
    """fnmatch patterns over named_parameters(): not decayed; "vectors": all with fewer than two dimensions"""
    clip_norm: float | None = 1.0
    """largest norm of the level's mean gradient over the window; None does not clip"""
    zero_stage: int = field(default=1, metadata=MAY_CHANGE)
    """1: sums locally, reduces at the tick; 2: reduces every micro-step into shards; 3: also shards the weights"""
    offload: bool = field(default=False, metadata=MAY_CHANGE)
    """keeps masters and optimizer state in host memory between ticks: saves 12 bytes per parameter / world size"""
    frozen: bool = False
    """never updated; its weights are still sharded, saved and exported"""
    max_relative_change: float | None = None
    """caps ||dW|| / ||W|| of one tick over the level; None does not cap"""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "parameters", (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)
        )
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(
            self, "no_decay", (self.no_decay,) if isinstance(self.no_decay, str) else tuple(self.no_decay)
        )

        def need(holds: bool, name: str, remedy: str) -> None:
            require(holds, f"levels.levels.{self.name}.{name}", getattr(self, name), remedy)

        need(bool(self.name) and "/" not in self.name, "name", "must be a non-empty string without '/'")
        need(bool(self.parameters), "parameters", 'give at least one pattern, or ("rest",)')
        need(self.parameters == ("rest",) or "rest" not in self.parameters, "parameters", '"rest" must stand alone')
        need(self.period_tokens >= 1, "period_tokens", "must be at least 1")
        need(
            self.phase_tokens is None or 0 <= self.phase_tokens < self.period_tokens,
            "phase_tokens",
            f"must be none or lie in [0, period_tokens={self.period_tokens})",
        )
        for name, remedy in optimizers.problems(self):
            need(False, name, remedy)
        need(self.lr >= 0 and math.isfinite(self.lr), "lr", "must be finite and at least 0")
        need(
            self.weight_decay >= 0 and self.lr * self.weight_decay < 1,
            "weight_decay",
            "must be at least 0, below 1 / lr",
        )
        need(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive, or none for no clipping")
        need(
            self.zero_stage in MODES,
            "zero_stage",
            "choose 1, 2 or 3 (stage 0 reduces whole modules and cannot skip a level that is not due)",
        )
        need(
            self.max_relative_change is None or self.max_relative_change > 0,
            "max_relative_change",
            "must be positive, or none for no cap",
        )

    @property
    def mode(self) -> str:
        """local, sharded or gathered: how gradients are summed over ranks at this ZeRO stage."""
        return MODES[self.zero_stage]


@dataclass(frozen=True)
class LevelsConfig:
    """All levels of a run and what they share."""

    levels: tuple[LevelConfig, ...]
    """in tick order; the fastest is usually called base and takes the rest"""
    quantum_tokens: int | None = None
    """tokens between possible ticks (the global batch), a multiple of seq_len; None: the smallest period"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """learning-rate factor over T"""
    dtype: str = "fp32"
    """fp32 | bf16: dtype of the model's weights and activations; masters, moments and gradient sums are always fp32"""
    reduce_dtype: str = "fp32"
    """fp32 | bf16: dtype of gradients on the network for levels that are due every quantum; bf16 halves their bytes.
    Gradients of slower levels, whose windows sum many quanta, and folds are always reduced in fp32"""
    fold_every_tokens: int | None = None
    """tokens between reductions of local gradient sums into shards: a save there is exact at any world size. None: the
    run's checkpoint.every_tokens; no such reductions where that is 0"""
    lr_period_exponent: float = 0.0
    """x: a level's lr is multiplied by (period / base period)^x; in our runs 1 was too high, 0 to 0.5 were alike"""
    max_lr: float | None = None
    """cap on every level's lr after that scaling; None does not cap"""
    beta_period_exponent: float = 0.0
    """y: a level's betas become beta^((period / base period)^y)"""
    spike_sigma: float | None = 6.0
    """a spike is a mean loss this many standard deviations above those of the last 128 micro-steps; the ranks that
    cause one are left out; None: never"""
    max_consecutive_skips: int = 16
    """the run stops after this many micro-steps in a row with a rank left out, or skipped ticks of a level in a row"""
    bucket_elements: int = field(default=2**25, metadata=MAY_CHANGE)
    """elements per flattened group, which is one collective; smaller groups overlap more, larger have less latency"""
    prefetch_elements: int = field(default=50_000_000, metadata=MAY_CHANGE)
    """ZeRO-3: largest number of weights gathered ahead of use; as many stay gathered until backward; 0: none"""
    measure_changes: bool = True
    """logs ||dW||/||W|| and drift ||W - W_0||/||W_0|| of every tick; W_0 takes 4 bytes per parameter / world size"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))

        def need(holds: bool, name: str, remedy: str) -> None:
            require(holds, f"levels.{name}", getattr(self, name), remedy)

        names = [level.name for level in self.levels]
        require(bool(names), "levels.levels", names, "is empty: give at least one level")
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "levels.levels", names, f"two levels of one name: {', '.join(twice)}; rename one")
        rest = [level.name for level in self.levels if level.parameters == ("rest",)]
        require(len(rest) <= 1, "levels.levels", names, f'{", ".join(rest)} all take ("rest",); at most one level may')
        need(self.dtype in ("fp32", "bf16"), "dtype", "choose fp32 or bf16")
        need(self.reduce_dtype in ("fp32", "bf16"), "reduce_dtype", "choose fp32 or bf16")
        need(self.quantum_tokens is None or self.quantum_tokens > 0, "quantum_tokens", "must be positive or none")
        need(self.max_consecutive_skips >= 1, "max_consecutive_skips", "must be at least 1")
        need(self.spike_sigma is None or self.spike_sigma > 0, "spike_sigma", "must be positive or none")
        need(self.bucket_elements >= 1, "bucket_elements", "must be at least 1")
        need(self.max_lr is None or self.max_lr > 0, "max_lr", "must be positive or none")
        for level in self.levels:
            require(
                level.period_tokens >= self.quantum,
                f"levels.levels.{level.name}.period_tokens",
                level.period_tokens,
                f"is below the quantum of {self.quantum} tokens: a level ticks once per quantum at most; raise it or "
                "lower levels.quantum_tokens",
            )
        need(
            self.reduce_dtype == "fp32" or any(level.period_tokens == self.quantum for level in self.levels),
            "reduce_dtype",
            f"no level is due every quantum of {self.quantum} tokens, and slower ones are reduced in fp32; choose fp32",
        )
        need(
            self.fold_every_tokens is None or self.fold_every_tokens >= self.quantum,
            "fold_every_tokens",
            f"must be at least the quantum of {self.quantum} tokens",
        )

    @property
    def quantum(self) -> int:
        """Tokens of one quantum."""
        return self.quantum_tokens or min(level.period_tokens for level in self.levels)

    @property
    def base_period_tokens(self) -> int:
        """The shortest period; lr, betas and weight decay are scaled relative to it."""
        return min(level.period_tokens for level in self.levels)

    def reduce_dtype_of(self, level: LevelConfig) -> str:
        """Dtype of the gradients of `level` on the network, at a tick or in a micro-step."""
        return self.reduce_dtype if level.period_tokens == self.quantum else "fp32"

    def check_sequences(self, seq_len: int, max_world_size: int) -> int:
        """Sequences of `seq_len` tokens per quantum; refuses a quantum that cannot feed `max_world_size` ranks."""
        lower = max(1, self.quantum // seq_len) * seq_len
        require(
            self.quantum % seq_len == 0,
            "levels.quantum_tokens",
            self.quantum,
            f"is not a whole number of sequences of {seq_len} tokens; use {lower} or {lower + seq_len}",
        )
        num_sequences = self.quantum // seq_len
        require(
            num_sequences >= max_world_size,
            "levels.quantum_tokens",
            self.quantum,
            f"holds {num_sequences} sequences of {seq_len} tokens, fewer than {max_world_size} ranks. Raise it to at "
            f"least {max_world_size * seq_len}, with periods, lr and decay as levels.recipes.larger_quantum does "
            "(jobs/hope_1p3b_256.py), or begin with sequences of at most "
            f"{self.quantum // max_world_size} tokens (data.seq_len), or lower cluster.max_workers",
        )
        return num_sequences

    def resolved(self) -> tuple[LevelConfig, ...]:
        """Levels with lr and betas scaled by their period: the numbers that a run uses and logs."""
        levels = []
        for level in self.levels:
            ratio = level.period_tokens / self.base_period_tokens
            lr = level.lr * ratio**self.lr_period_exponent
            lr = lr if self.max_lr is None else min(lr, self.max_lr)
            betas = tuple(beta ** (ratio**self.beta_period_exponent) for beta in level.betas)
            levels.append(replace(level, lr=lr, betas=betas))
        return tuple(levels)
