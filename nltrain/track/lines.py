"""The lines that a run prints for people. Pure functions of plain values; nothing here prints."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nltrain.track.rows import StepRow

MOST_NAMED = 8
"""Parts that the line about left-out samples names."""


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def progress_line(row: StepRow, tokens_per_s: float, eta_s: float, ticks: Mapping[str, int]) -> str:
    """One log step. `tokens_per_s` is smoothed; `ticks`: {level: its ticks since the last line}."""
    num_steps = row.total_tokens // (row.tokens // row.step)  # total tokens by tokens of one quantum
    share = row.data_wait_s / max(row.seconds, 1e-9)
    loss = math.nan if row.loss is None else row.loss
    left_out = f"{row.left_out_tokens:,} tokens left out | " if row.left_out else ""
    names = " ".join(name if count == 1 else f"{count}x{name}" for name, count in ticks.items())
    return (
        f"step {row.step:>{len(str(num_steps))}}/{num_steps} | {row.tokens:,} tokens | loss {loss:.4f} | {left_out}"
        f"{tokens_per_s:,.0f} tok/s | data wait {100 * share:.1f} % | memory {row.memory_bytes / 2**30:.2f} GiB | "
        f"ETA {duration(eta_s)} | {names}"
    )


def left_out_line(parts: Sequence[Mapping[str, Any]]) -> str:
    """What the guard left out. `parts`: as in `LeftOutRow`."""
    named = [
        f"rank {part['rank']}: samples {', '.join(map(str, part['samples']))} ({part['reason']})"
        for part in parts[:MOST_NAMED]
    ]
    if len(parts) > MOST_NAMED:
        named.append(f"and {len(parts) - MOST_NAMED} more, all in the row")
    return f"left out {sum(part['tokens'] for part in parts):,} tokens: {'; '.join(named)}"


def attempt_line(
    attempt: int, workers: int, tokens: int, resumed_from: str | None, tokens_lost: int, reason: str
) -> str:
    """The start of an attempt; the values are those of `AttemptRow`."""
    if resumed_from is None:
        return f"attempt {attempt}: a new run with {workers} workers"
    return (
        f"attempt {attempt}: resumed from checkpoint {resumed_from} at {tokens:,} tokens with {workers} workers; "
        f"{tokens_lost:,} tokens are trained again ({reason})"
    )


def level_line(level: Mapping[str, Any]) -> str:
    """The resolved numbers of one level, as `LevelScheduler.describe` gives them."""
    return (
        f"level {level['name']}: {level['num_parameters']:,} parameters, every {level['period_tokens']:,} tokens "
        f"(phase {level['phase_tokens']:,}), {level['optimizer']} lr {level['lr']:g}, ZeRO-{level['zero_stage']} "
        f"({level['mode']}), {level['decay']}"
    )


def evaluation_line(name: str, tokens: int, metrics: Mapping[str, Any]) -> str:
    """The result of an evaluation; the one named "validation" has the metrics of `ValidationRow`."""
    if name != "validation":
        values = ", ".join(f"{key} {value:,.6g}" for key, value in metrics.items() if value is not None)
        return f"{name} at {tokens:,} tokens: {values}"
    beside = "".join(
        f", {kind} {metrics[f'{kind}_entropy']:.4f}"
        for kind in ("unigram", "bigram")
        if metrics[f"{kind}_entropy"] is not None
    )
    return (
        f"validation at {tokens:,} tokens: loss {metrics['loss']:.4f} nats per token, perplexity "
        f"{metrics['perplexity']:.2f}{beside} ({metrics['targets']:,} targets)"
    )


def fold_line(num_bytes: int, bytes_per_s: int, left_s: float) -> str:
    """Why a stopped run folds its gradient sums: the save of `num_bytes` may take longer than the `left_s` seconds."""
    speed = f"at {bytes_per_s / 1e6:,.0f} MB/s" if bytes_per_s else "at a speed that no save has shown yet"
    return (
        f"stopping: {num_bytes / 1e9:.2f} GB {speed} are not sure to be written in the {left_s:.0f} s that are "
        f"left. Gradient sums are folded first: the run goes on within fp32 rounding, not bit for bit"
    )


def left_line(reason: str, tokens: int) -> str:
    """The end of an attempt before the run is complete; `reason` as in `EndRow`."""
    return f"{reason}: checkpoint at {tokens:,} tokens is committed"


def finished_line(summary: Mapping[str, Any], path: Path) -> str:
    """The end of the run: its summary, and where that lies."""
    first, last = (f"{x:.4f}" if x is not None else "-" for x in (summary["loss_first"], summary["loss_last"]))
    return f"finished: {summary['tokens']:,} tokens in {duration(summary['seconds'])}, loss {first} -> {last}; {path}"
