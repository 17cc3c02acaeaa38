"""What the tests of levels and benchmarks.levels measure on real ranks: functions (..., Ranks) -> result of rank 0."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._level_toys import (
    NAMES,
    SEQ_LEN,
    Toy,
    gathered,
    levels,
    train,
    train_dense,
    worst_error,
)
from benchmarks._ranks import Ranks
from nltrain.levels.ledger import CONTROL, FOLD, OTHER, predicted_bytes
from nltrain.levels.scheduler import LevelScheduler

STAGES = {
    "zero1": (1, 1, 1, 1),
    "zero2": (2, 2, 2, 2),
    "zero3": (3, 3, 3, 3),
    "mix3211": (3, 2, 1, 1),
    "mix1231": (1, 2, 3, 1),
}
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr": 0.3, "weight_decay": 0.01},
    "momentum": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)},
}
# With a clip so tight that every tick clips, and without.
CLIPS = {"clip": 0.05, "free": None}
QUANTA = 64  # one micro-step each: periods are 1, 2, 8 and 32 micro-steps
MODES = {"local": 1, "sharded": 2, "gathered": 3}
# Sequences per quantum of `base_gradient`: the same ones on every number of ranks.
REDUCE_SEQUENCES = 24
# Sequences per quantum: no world size divides it, 4 ranks leave one without a sequence in the short micro-step.
TRAJECTORY_SEQUENCES = 13
TRAJECTORY_QUANTA = 24
TRAJECTORY_STAGES = (3, 2, 1, 1)
# (world size, micro-batch): accumulation follows; 13 sequences in micro-steps of 13, 2, 10, 2, 6, 9, 4, 8.
CUTS = [(1, 13), (1, 2), (2, 5), (2, 1), (3, 2), (3, 3), (4, 1), (4, 2)]


def half_an_ulp(model: nn.Module) -> None:
    """Changes every weight by about half a unit in its last place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-24 * torch.randn(parameter.shape, generator=generator))


def parity(
    make: Callable[[], nn.Module],
    stages: str,
    optimizer: str,
    clip: str,
    dtype: str,
    micro_batch: int,
    accumulate: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Worst error over the tensors after QUANTA micro-steps, absolute and relative to how far the reference moved."""
    quantum = micro_batch * ranks.world_size * SEQ_LEN * accumulate
    config = levels(
        quantum,
        stages=STAGES[stages],
        shared={**OPTIMIZERS[optimizer], "clip_norm": CLIPS[clip]},
        dtype=dtype,
        # Several groups per level, and parameters larger than a group, for a model of either size.
        bucket_elements=2_000 if make is Toy else 20_000,
    )
    model = make()
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    quanta = range(QUANTA // accumulate)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, quanta, micro_batch)
    weights = gathered(scheduler)
    counts = scheduler.counts
    scheduler.close()
    if ranks.rank:
        return {}
    start = dict(make().named_parameters())
    reference, twin_error = dense_reference(make, optimizer, clip, micro_batch, accumulate, ranks.world_size)
    moved = {name: value - start[name].detach() for name, value in reference.items()}
    return {
        "error": worst_error(weights, reference.items()),
        "relative_to_change": max(
            ((weights[name] - start[name].detach() - change).norm() / change.norm()).item()
            for name, change in moved.items()
        ),
        "twin_error": twin_error,
        "ticks": len(ticks),
        **{f"due_{name}": count["due"] for name, count in counts.items()},
    }


@cache
def dense_reference(
    make: Callable[[], nn.Module], optimizer: str, clip: str, micro_batch: int, accumulate: int, world_size: int
) -> tuple[dict[str, Tensor], float]:
    """Weights of dense training, which knows neither stages nor dtypes, and how far a twin half an ulp away ends."""
    quantum = micro_batch * world_size * SEQ_LEN * accumulate
    config = levels(quantum, shared={**OPTIMIZERS[optimizer], "clip_norm": CLIPS[clip]})
    quanta, reference = range(QUANTA // accumulate), make()
    train_dense(reference, config, quanta, micro_batch, world_size)
    trained = {name: value.detach() for name, value in reference.named_parameters()}
    if make is Toy or optimizer != "adamw":
        return trained, 0.0
    twin = make()
    half_an_ulp(twin)
    train_dense(twin, config, quanta, micro_batch, world_size)
    return trained, worst_error(dict(twin.named_parameters()), reference.named_parameters())


def count(mode: str, dtype: str, reduce_dtype: str, accumulate: int, ranks: Ranks) -> dict[str, Any]:
    """Measured and predicted payload of every level over 16 quanta."""
    micro_batch, quanta = 1, 16
    quantum = accumulate * micro_batch * ranks.world_size * SEQ_LEN
    config = levels(
        quantum,
        (1, 2, 4, 8),
        (MODES[mode],) * 4,
        {"optimizer": "sgd", "lr": 0.1},
        dtype=dtype,
        reduce_dtype=reduce_dtype,
        prefetch_elements=0,
    )
    model = Toy()
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    ledger = scheduler.ledger
    rows: dict[str, list[tuple[bool, float]]] = {name: [] for name in NAMES}
    elements = []
    for quantum_index in range(quanta):
        before = {name: ledger.payload(name) for name in NAMES}
        touched = dict(ledger.optimizer_elements)
        ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(quantum_index, quantum_index + 1), 1)
        due = {tick.name for tick in ticks}
        for name in NAMES:
            rows[name].append((name in due, ledger.payload(name) - before[name]))
            elements.append((name in due, ledger.optimizer_elements.get(name, 0) - touched.get(name, 0)))
    weight_bytes = 2 if dtype == "bf16" else 4
    ratios = {}
    for name, engine in scheduler.engines.items():
        expected = predicted_bytes(
            mode,
            engine.num_parameters,
            ranks.world_size,
            scheduler.counts[name]["done"],
            quanta * accumulate,
            2 if reduce_dtype == "bf16" and name == "base" else 4,
            weight_bytes,
        )
        ratios[name] = ledger.payload(name) / expected
    result = {
        "ratios": ratios,
        "offbeat_bytes": sum(sent for name in NAMES for due, sent in rows[name] if not due),
        "offbeat_elements": sum(n for due, n in elements if not due),
        "due_elements": sum(n for due, n in elements if due),
        "control": sum(ledger.charged(name, CONTROL) for name in (*NAMES, "-")),
        "fold": sum(ledger.charged(name, FOLD) for name in NAMES),
        "other": ledger.rows[OTHER].num_bytes if OTHER in ledger.rows else 0,
        "tick_bytes": sum(tick.num_bytes for tick in ticks),
    }
    scheduler.fold()
    result["fold_of_empty_windows"] = sum(ledger.charged(name, FOLD) for name in NAMES)
    scheduler.close()
    return result


def base_gradient(make: Callable[[], nn.Module], stage: int, ranks: Ranks) -> float:
    """||g_bf16 - g_fp32|| / ||g_fp32|| of base's mean gradient over one quantum, read off an SGD step of lr 1."""
    change: dict[str, list[Tensor]] = {}
    for reduce_dtype in ("fp32", "bf16"):
        per_level = {name: {"lr": 0.0} for name in ("fast", "mid", "slow")}
        shared = {"optimizer": "sgd", "lr": 1.0, "clip_norm": None}
        made = levels(
            REDUCE_SEQUENCES * SEQ_LEN, (1, 2, 4, 8), (stage, 1, 1, 1), shared, per_level, reduce_dtype=reduce_dtype
        )
        model = make()
        scheduler = LevelScheduler(model, made, SEQ_LEN)
        train(model, scheduler, ranks.rank, ranks.world_size, range(1), 2)
        weights = gathered(scheduler)
        scheduler.close()
        start = dict(make().named_parameters())
        change[reduce_dtype] = [
            weights[name] - start[name].detach() for name in weights if ranks.rank == 0 and "cms" not in name
        ]
    if ranks.rank:
        return 0.0
    exact, rounded = (torch.cat([x.flatten() for x in change[dtype]]) for dtype in ("fp32", "bf16"))
    return ((rounded - exact).norm() / exact.norm()).item()


def trajectory(micro_batch: int, ranks: Ranks) -> dict[str, Any]:
    """Ticks, gradient norms and final weights of TRAJECTORY_QUANTA quanta; the same data on any number of ranks."""
    config = levels(
        TRAJECTORY_SEQUENCES * SEQ_LEN,
        periods=(1, 2, 4, 8),
        stages=TRAJECTORY_STAGES,
        shared={"optimizer": "sgd", "lr": 0.3, "clip_norm": 0.5},
        bucket_elements=2000,
    )
    model = Toy(seed=ranks.rank)  # ranks start from rank 0's weights
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(TRAJECTORY_QUANTA), micro_batch)
    weights = gathered(scheduler)
    scheduler.close()
    return {
        "ticks": [(tick.name, tick.tokens, tick.window_tokens, tick.skipped) for tick in ticks],
        "norms": [tick.grad_norm for tick in ticks],
        "weights": weights,
    }
