"""What a run would be, told without a GPU: the model on the meta device, its levels, its bytes. Nothing is downloaded.

Bytes follow from the engines: masters and moments are fp32 and sharded over the ranks at every ZeRO stage; gradients
are summed in fp32, whole on each rank at stage 1 and sharded at stages 2 and 3; weights are sharded at stage 3 alone.
Activations depend on kernels and compilation and are not in the figures.
"""

from dataclasses import dataclass

import torch

from nltrain.config import RunConfig
from nltrain.levels.clock import TokenClock, staggered_phases
from nltrain.levels.optimizers import optimizer_of
from nltrain.levels.quantum import best_group_size, cut_quantum
from nltrain.levels.split import LevelPart, split_levels
from nltrain.model import build

FP32_BYTES = 4
# As in LevelBytes, with their widths in the table.
COLUMNS = (
    ("weights", 9), ("gradients", 11), ("accumulator", 13), ("masters", 9), ("moments", 9), ("start", 8), ("total", 9)
)  # fmt: skip


@dataclass(frozen=True)
class LevelBytes:
    """Bytes of one level on one rank."""

    weights: int
    gradients: int
    accumulator: int
    masters: int
    moments: int
    start: int
    """W_0, kept to measure how far the level has drifted."""

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(vars(self).values())


def level_bytes(part: LevelPart, dtype_bytes: int, world_size: int, measured: bool) -> LevelBytes:
    """What one rank's device holds of a level between two ticks, and its gradients at the end of a backward."""
    n, level = part.num_parameters, part.config
    shard = -(-n // world_size)
    trained = 0 if level.frozen else 1
    awake = 0 if level.offload else 1  # asleep in host memory between two ticks
    return LevelBytes(
        weights=dtype_bytes * (shard if level.zero_stage == 3 else n),
        gradients=trained * dtype_bytes * n,
        accumulator=trained * FP32_BYTES * (n if level.zero_stage == 1 else shard),
        masters=awake * FP32_BYTES * shard,
        moments=awake * optimizer_of(level).state_bytes(level) * shard,
        start=awake * FP32_BYTES * shard * trained * measured,
    )


def dry_run(config: RunConfig) -> str:
    """The plan of the run as text. Raises what building the run would raise."""
    with torch.device("meta"):
        model = build(config.model)
    parts = split_levels(model, config.levels.resolved())
    world_size = config.cluster.max_workers
    dtype_bytes = 2 if config.levels.dtype == "bf16" else FP32_BYTES
    total = sum(part.num_parameters for part in parts)
    tokens = config.num_quanta * config.quantum_tokens
    per_rank = [level_bytes(part, dtype_bytes, world_size, config.levels.measure_changes) for part in parts]

    lines = [f"model: {total:,} parameters, {world_size} ranks ({config.cluster.device}), {config.levels.dtype}", ""]
    titles = (("parameters", 15), ("period", 14), ("updates", 10), ("ZeRO", 6), ("lr", 10), ("decay", 8), ("clip", 6))
    lines.append(f"{'level':<10}" + "".join(f"{title:>{width}}" for title, width in titles))
    levels = [part.config for part in parts]
    phases = staggered_phases(
        [level.period_tokens for level in levels], [level.phase_tokens for level in levels], config.quantum_tokens
    )
    for part, phase in zip(parts, phases, strict=True):
        level = part.config
        updates = 0 if level.frozen else TokenClock(level.period_tokens, phase).ticks(tokens)
        clip = "-" if level.clip_norm is None else f"{level.clip_norm:g}"
        lines.append(
            f"{level.name:<10}{part.num_parameters:>15,}{level.period_tokens:>14,}{updates:>10,}  "
            f"{level.zero_stage:>4}{level.lr:>10.2g}{level.weight_decay:>8.2g}{clip:>6}"
        )
    lines += ["", *(f"{part.config.name}: {part.describe_decay()}" for part in parts)]
    cut = cut_quantum(config.quantum_tokens // config.data.seq_len, config.train.micro_batch_size, world_size)
    step_tokens = [sum(len(sequences) for sequences in step) * config.data.seq_len for step in cut]
    lines += [
        "",
        f"{config.num_quanta:,} quanta of {config.quantum_tokens:,} tokens = {tokens:,} tokens",
        f"{len(cut)} micro-steps per quantum, of {step_tokens[0]:,} tokens"
        + (f", the last of {step_tokens[-1]:,}" if step_tokens[-1] != step_tokens[0] else ""),
        *_if_one_is_lost(config),
        "",
        f"{'GiB per rank':<14}" + "".join(f"{title:>{width}}" for title, width in COLUMNS),
    ]
    for part, need in zip(parts, per_rank, strict=True):
        lines.append(_row(part.config.name, need))
    sums = LevelBytes(*(sum(values) for values in zip(*(vars(need).values() for need in per_rank), strict=True)))
    lines.append(_row("all", sums))
    checkpoint = sum(
        part.num_parameters
        * (
            FP32_BYTES * (1 + (not part.config.frozen) * (1 + config.levels.measure_changes))
            + optimizer_of(part.config).state_bytes(part.config)
        )
        for part in parts
    )
    minutes = config.checkpoint.every_minutes
    by_clock = f" and {minutes:g} minutes" if minutes else ""
    token_bytes = 2 if config.model.vocab_size <= 2**16 else 4
    lines += [
        "",
        f"in the store: {tokens * token_bytes / 1e9:,.1f} GB of tokens for one pass; up to {checkpoint / 1e9:,.2f} GB "
        f"per checkpoint, one every {config.checkpoint.every_tokens:,} tokens{by_clock}, "
        f"the last {config.checkpoint.keep_last} kept",
    ]
    return "\n".join(lines)


def _if_one_is_lost(config: RunConfig) -> list[str]:
    """How an elastic group goes on with a worker less; `nltrain sizes` tells it for every number."""
    cluster = config.cluster
    if not cluster.elastic:
        return []
    num_sequences, fewest = config.quantum_tokens // config.data.seq_len, cluster.min_workers or 1
    sizes = [
        best_group_size(num_sequences, config.train.micro_batch_size, ranks, fewest)
        for ranks in (cluster.max_workers, cluster.max_workers - 1)
    ]
    return [size.describe() for size in sizes]


def _row(name: str, need: LevelBytes) -> str:
    gib = [value / 2**30 for value in (*vars(need).values(), need.total)]
    return f"{name:<14}" + "".join(f"{value:>{width}.2f}" for value, (_, width) in zip(gib, COLUMNS, strict=True))
