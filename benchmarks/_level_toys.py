"""A small model with four levels and awkward sizes, its data, and the dense reference every engine must equal."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nltrain.levels.clock import TokenClock, staggered_phases
from nltrain.levels.config import LevelConfig, LevelsConfig
from nltrain.levels.quantum import cut_quantum
from nltrain.levels.scheduler import LevelScheduler, Tick
from nltrain.model import build, preset

WIDTH, HIDDEN, VOCAB, SEQ_LEN = 33, 47, 50, 8  # nothing divides by 2, 3 or 4 that could
NAMES = ("base", "fast", "mid", "slow")


class MLP(nn.Module):
    """x plus a two-layer GELU perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[..., WIDTH] to the same shape."""
        return x + self.down(F.gelu(self.up(x)))


class Model(Protocol):
    """What the cases train: Toy, or a language model with levels of the same names."""

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats, summed over targets other than -100."""
        ...


class Toy(nn.Module):
    """Embedding, head and a norm in base; one MLP per memory level."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.norm, self.head = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
            self.cms = nn.ModuleDict({name: MLP() for name in NAMES[1:]})

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 tokens [B, T] to logits [B, T, VOCAB]."""
        x = self.embed(tokens)
        for level in self.cms.values():
            x = level(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in fp32 nats, summed over targets other than -100."""
        logits = self(tokens).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def hope_tiny() -> nn.Module:
    """The tiny Hope model, with memory chunks short enough that these sequences have two."""
    config = preset("hope", "tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(replace(config, rule=replace(config.rule, chunk_mem=4, chunk_other=4)))


def levels(
    quantum: int,
    periods: tuple[int, ...] = (1, 2, 8, 32),
    stages: tuple[int, ...] = (1, 1, 1, 1),
    shared: dict | None = None,
    per_level: dict[str, dict] | None = None,
    **config: Any,
) -> LevelsConfig:
    """Periods in quanta of `quantum` tokens."""
    made = []
    for name, period, stage in zip(NAMES, periods, stages, strict=True):
        patterns = ("rest",) if name == "base" else (f"*cms.{name}.*",)
        settings = {"zero_stage": stage, **(shared or {}), **(per_level or {}).get(name, {})}
        made.append(LevelConfig(name, patterns, period_tokens=period * quantum, **settings))
    return LevelsConfig(tuple(made), quantum_tokens=quantum, **config)


def sequence(index: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of one global sequence; one target in five is ignored."""
    generator = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(0, VOCAB, (SEQ_LEN + 1,), generator=generator)
    ignored = torch.rand(SEQ_LEN, generator=generator) < 0.2
    return tokens[:-1], torch.where(ignored, -100, tokens[1:])


def batch(indices: range) -> tuple[Tensor, Tensor]:
    """Sequences of a rank; a rank without one gets a single sequence whose targets are all ignored."""
    if not indices:
        tokens, targets = sequence(0)
        return tokens[None], torch.full_like(targets, -100)[None]
    rows = [sequence(i) for i in indices]
    return torch.stack([t for t, _ in rows]), torch.stack([t for _, t in rows])


Spoil = Callable[[int, int, int, Tensor], Tensor]  # (quantum, micro-step, rank, loss) -> loss


def train(
    model: Model,
    scheduler: LevelScheduler,
    rank: int,
    world_size: int,
    quanta: range,
    micro_batch: int,
    spoil: Spoil | None = None,
) -> list[Tick]:
    """Trains the quanta of the global data in `quanta`; every rank returns the same ticks."""
    ticks = []
    for quantum in quanta:
        first = quantum * scheduler.num_sequences
        for step, ranges in enumerate(cut_quantum(scheduler.num_sequences, micro_batch, world_size)):
            mine = ranges[rank]
            tokens, targets = batch(range(first + mine.start, first + mine.stop))
            scheduler.start_micro_step()
            loss = model.loss(tokens, targets)
            if spoil is not None:
                loss = spoil(quantum, step, rank, loss)
            scheduler.backward(loss, int((targets != -100).sum()))
        ticks += scheduler.finish_quantum()
    return ticks


class Dense:
    """The definition: one process, the whole batch, one plain optimizer per level, mean gradient over the window."""

    def __init__(self, model: nn.Module, config: LevelsConfig, sets: dict[str, list[nn.Parameter]]) -> None:
        self.model, self.config, self.sets, self.tokens = model, config, sets, 0
        made = config.resolved()
        phases = staggered_phases([c.period_tokens for c in made], [c.phase_tokens for c in made], config.quantum)
        self.clocks = {c.name: TokenClock(c.period_tokens, p) for c, p in zip(made, phases, strict=True)}
        self.decayed = {
            c.name: [p for path, p in model.named_parameters() if _is_in(p, sets[c.name]) and _decays(c, path, p)]
            for c in made
        }
        self.targets = dict.fromkeys(sets, 0)
        self.last_tick = dict.fromkeys(sets, 0)
        self.levels = {c.name: c for c in made}
        self.optimizers = {}
        for c in made:
            self.optimizers[c.name] = self._optimizer(c, sets[c.name])

    @staticmethod
    def _optimizer(level: LevelConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """torch's own: a reference that asked the product's registry would prove nothing."""
        if level.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=level.lr, momentum=level.momentum)
        assert level.optimizer == "adamw", f"no dense reference of {level.optimizer}"
        return torch.optim.AdamW(parameters, lr=level.lr, betas=level.betas, eps=level.eps, weight_decay=0.0)

    def micro_step(self, loss_sum: Tensor, num_targets: int) -> None:
        """Backward of a summed loss; counts its targets for every level."""
        loss_sum.backward()
        for name in self.sets:
            self.targets[name] += num_targets

    def finish_quantum(self) -> None:
        """Advances T by a quantum and steps every level that is due."""
        before, self.tokens = self.tokens, self.tokens + self.config.quantum
        for name, c in self.levels.items():
            if not self.clocks[name].due(before, self.tokens):
                continue
            parameters, optimizer = self.sets[name], self.optimizers[name]
            for p in parameters:
                p.grad.div_(self.targets[name])
            if c.clip_norm is not None:
                # In fp64: torch's clip_grad_norm_ sums a large tensor in fp32 and is off by 1e-6 for Hope's embedding.
                norm = sum(p.grad.double().square().sum().item() for p in parameters) ** 0.5
                for p in parameters:
                    p.grad.mul_(min(1.0, c.clip_norm / (norm + 1e-6)))
            lr = c.lr * self.config.schedule.factor(self.tokens)
            window = self.tokens - self.last_tick[name]
            with torch.no_grad():
                for p in self.decayed[name]:
                    p.mul_((1 - lr * c.weight_decay) ** (window / self.config.base_period_tokens))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            self.targets[name], self.last_tick[name] = 0, self.tokens


def _is_in(parameter: nn.Parameter, parameters: list[nn.Parameter]) -> bool:
    return any(parameter is own for own in parameters)


def _decays(level: LevelConfig, path: str, parameter: nn.Parameter) -> bool:
    spared = "vectors" in level.no_decay and parameter.dim() <= 1
    return not spared and not any(fnmatchcase(path, pattern) for pattern in level.no_decay)


def level_sets(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each level, by its name; base has all that no memory level has."""
    sets = {
        name: [p for path, p in model.named_parameters() if fnmatchcase(path, f"*cms.{name}.*")] for name in NAMES[1:]
    }
    memories = {id(p) for own in sets.values() for p in own}
    return {"base": [p for p in model.parameters() if id(p) not in memories], **sets}


def train_dense(
    model: nn.Module,
    config: LevelsConfig,
    quanta: range,
    micro_batch: int,
    world_size: int,
    dense: Any = None,
) -> None:
    """The dense reference fed in the same micro-steps: each global micro-batch as one. `dense`: another than Dense."""
    dense = dense or Dense(model, config, level_sets(model))
    sequences = config.quantum // SEQ_LEN
    for quantum in quanta:
        for ranges in cut_quantum(sequences, micro_batch, world_size):
            first = quantum * sequences
            tokens, targets = batch(range(first + ranges[0].start, first + ranges[-1].stop))
            dense.micro_step(model.loss(tokens, targets), int((targets != -100).sum()))
        dense.finish_quantum()


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / max(||b||, 0.01 sqrt(numel)): small tensors near zero are judged by their size, not by nothing."""
    return ((a - b).norm() / max(b.norm().item(), 0.01 * b.numel() ** 0.5)).item()


def gathered(scheduler: LevelScheduler) -> dict[str, Tensor]:
    """Full fp32 weights by name (on rank 0; empty tensors elsewhere)."""
    return {name: value.clone() for name, value in scheduler.weights()}


def worst_error(weights: dict[str, Tensor], reference: Iterable[tuple[str, Tensor]]) -> float:
    """The largest `relative_error` of any tensor."""
    return max(relative_error(weights[name], value.detach()) for name, value in reference)
