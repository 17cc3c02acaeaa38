"""Summary, cadence plot and loss plot of a run, made from its rows alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nltrain.track.goodput import goodput
from nltrain.track.metrics import effective, on_one_clock, read_rows
from nltrain.track.rows import (
    AttemptRow,
    CheckpointRow,
    EndRow,
    FaultRow,
    Row,
    StepRow,
    TickRow,
    ValidationRow,
    of_kind,
)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The run in one dict. `seconds` is wall time from the first start to the last row, restarts included.

    Raises ValueError where no attempt or no step is on record.
    """
    rows = on_one_clock(rows)
    counted = effective(rows)
    attempts, steps, ends = of_kind(rows, AttemptRow), of_kind(counted, StepRow), of_kind(rows, EndRow)
    if not attempts or not steps:
        raise ValueError("no step was logged: nothing to summarise")
    validations = of_kind(counted, ValidationRow)
    validation = validations[-1] if validations else None
    trained_s = sum(row.seconds for row in steps)
    return {
        "tokens": max(row.tokens for row in steps),
        "seconds": round(rows[-1].time_s - attempts[0].time_s, 1),
        "tokens_per_s": round(sum(row.step_tokens for row in steps) / max(trained_s, 1e-9), 1),
        "loss_first": steps[0].loss,
        "loss_last": steps[-1].loss,
        "val_loss": validation and validation.loss,
        "val_perplexity": validation and validation.perplexity,
        "unigram_entropy": validation and validation.unigram_entropy,
        "bigram_entropy": validation and validation.bigram_entropy,
        "level_updates": (ends or steps)[-1].level_updates,
        "kills": sum(row.signal == "SIGKILL" for row in of_kind(rows, FaultRow)),
        "resumes": sum(row.tokens > 0 for row in attempts),
        "tokens_repeated": sum(row.tokens_lost for row in attempts),
        "workers": attempts[-1].workers,
        "checkpoints": len(of_kind(counted, CheckpointRow)),
        "data_wait_share": round(sum(row.data_wait_s for row in steps) / max(trained_s, 1e-9), 5),
        "finished": bool(ends) and ends[-1].reason == "finished",
        "weights_sha256": ends[-1].weights_sha256 if ends else None,
        "goodput": goodput(rows),
    }


def cadence_plot(rows: Sequence[Row], path: Path) -> None:
    """One row per level, one mark per update, x = tokens: the picture of a multi-timescale run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ticks = of_kind(effective(rows), TickRow)
    names = list(dict.fromkeys(row.level for row in sorted(ticks, key=lambda row: row.period_tokens)))
    resumes = [row.tokens for row in of_kind(rows, AttemptRow) if row.tokens > 0]
    figure, axes = pyplot.subplots(figsize=(10, 0.7 * len(names) + 1.4), layout="constrained")
    colours = pyplot.get_cmap("viridis")
    for height, name in enumerate(names):
        mine = [row for row in ticks if row.level == name]
        done = [row.tokens for row in mine if not row.skipped]
        skipped = [row.tokens for row in mine if row.skipped]
        colour = colours(0.85 * height / max(1, len(names) - 1))
        width = max(0.25, min(1.2, 300 / max(1, len(done))))  # single marks, also where there are hundreds
        axes.plot(done, [height] * len(done), "|", color=colour, markersize=18, markeredgewidth=width)
        axes.plot(skipped, [height] * len(skipped), "x", color="crimson", markersize=8)
    for index, tokens in enumerate(resumes):
        axes.axvline(tokens, color="grey", linestyle=":", label=None if index else "resumed after a kill")
    periods = {row.level: row.period_tokens for row in ticks}
    counts = {name: sum(row.level == name and not row.skipped for row in ticks) for name in names}
    labels = [f"{name}\nevery {periods[name]:,} tokens\n{counts[name]} updates" for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title("Level updates")
    if resumes:
        axes.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def loss_plot(rows: Sequence[Row], path: Path) -> None:
    """Training and validation loss in nats per token beside the unigram and bigram entropies of the text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counted = effective(rows)
    steps, validations = of_kind(counted, StepRow), of_kind(counted, ValidationRow)
    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    axes.plot([row.tokens for row in steps], [_plotted(row.loss) for row in steps], linewidth=0.8, label="training")
    if validations:
        losses = [_plotted(row.loss) for row in validations]
        axes.plot([row.tokens for row in validations], losses, "o-", label="validation")
        last = validations[-1]
        for name, value, style in (("unigram", last.unigram_entropy, "--"), ("bigram", last.bigram_entropy, ":")):
            if value is not None:
                axes.axhline(value, color="grey", linestyle=style, label=f"{name} entropy {value:.2f}")
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plotted(loss: float | None) -> float:
    """A loss for matplotlib, which leaves a gap at nan."""
    return math.nan if loss is None else loss


def write_report(run_folder: str | Path) -> dict[str, Any]:
    """Write summary.json, cadence.png and loss.png beside the metrics; returns the summary."""
    folder = Path(run_folder)
    rows = read_rows(folder)
    summary = summarise(rows)
    cadence_plot(rows, folder / "cadence.png")
    loss_plot(rows, folder / "loss.png")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
