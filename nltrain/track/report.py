"""What a run was, told from its rows alone: the summary, the cadence plot, the loss plot."""

import json
from pathlib import Path
from typing import Any

from nltrain.track.goodput import goodput
from nltrain.track.metrics import Row, effective, on_one_clock, read_rows


def summarise(rows: list[Row]) -> dict[str, Any]:
    """The run in one dict. `seconds` is wall time from the first start to the last row, restarts included."""
    rows = on_one_clock(rows)
    counted = effective(rows)
    attempts = [row for row in rows if row["kind"] == "attempt"]
    steps = [row for row in counted if row["kind"] == "step"]
    ends = [row for row in rows if row["kind"] == "end"]
    if not attempts or not steps:
        raise ValueError("no step was logged: nothing to summarise")
    validations = [row for row in counted if row["kind"] == "validation"]
    tokens = max(row["tokens"] for row in steps)
    seconds = rows[-1]["time_s"] - attempts[0]["time_s"]
    trained_s = sum(row["seconds"] for row in steps)
    last = ends[-1] if ends else steps[-1]
    return {
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(sum(row["step_tokens"] for row in steps) / max(trained_s, 1e-9), 1),
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "val_loss": validations[-1]["loss"] if validations else None,
        "val_perplexity": validations[-1]["perplexity"] if validations else None,
        "unigram_entropy": validations[-1]["unigram_entropy"] if validations else None,
        "bigram_entropy": validations[-1]["bigram_entropy"] if validations else None,
        "level_updates": last["level_updates"],
        "kills": sum(row["kind"] == "fault" and row.get("signal") == "SIGKILL" for row in rows),
        "resumes": sum(row["tokens"] > 0 for row in attempts),
        "tokens_repeated": sum(row["tokens_lost"] for row in attempts),
        "workers": attempts[-1]["workers"],
        "checkpoints": sum(row["kind"] == "checkpoint" for row in counted),
        "data_wait_share": round(sum(row["data_wait_s"] for row in steps) / max(trained_s, 1e-9), 5),
        "finished": bool(ends) and ends[-1]["reason"] == "finished",
        "weights_sha256": last.get("weights_sha256"),
        "goodput": goodput(rows),
    }


def cadence_plot(rows: list[Row], path: Path) -> None:
    """One row per level, one mark per update, x = tokens: the picture of a multi-timescale run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counted = effective(rows)
    ticks = [row for row in counted if row["kind"] == "tick"]
    names = list(dict.fromkeys(row["level"] for row in sorted(ticks, key=lambda row: row["period_tokens"])))
    resumes = [row["tokens"] for row in rows if row["kind"] == "attempt" and row["tokens"] > 0]
    figure, axes = pyplot.subplots(figsize=(10, 0.7 * len(names) + 1.4), layout="constrained")
    colours = pyplot.get_cmap("viridis")
    for height, name in enumerate(names):
        mine = [row for row in ticks if row["level"] == name]
        done = [row["tokens"] for row in mine if not row["skipped"]]
        skipped = [row["tokens"] for row in mine if row["skipped"]]
        colour = colours(0.85 * height / max(1, len(names) - 1))
        width = max(0.25, min(1.2, 300 / max(1, len(done))))  # single marks, also where there are hundreds
        axes.plot(done, [height] * len(done), "|", color=colour, markersize=18, markeredgewidth=width)
        axes.plot(skipped, [height] * len(skipped), "x", color="crimson", markersize=8)
    for index, tokens in enumerate(resumes):
        axes.axvline(tokens, color="grey", linestyle=":", label=None if index else "resumed after a kill")
    periods = {row["level"]: row["period_tokens"] for row in ticks}
    counts = {name: sum(row["level"] == name and not row["skipped"] for row in ticks) for name in names}
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


def loss_plot(rows: list[Row], path: Path) -> None:
    """Training and validation loss in nats per token beside the unigram and bigram entropies of the text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counted = effective(rows)
    steps = [row for row in counted if row["kind"] == "step"]
    validations = [row for row in counted if row["kind"] == "validation"]
    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    axes.plot([row["tokens"] for row in steps], [row["loss"] for row in steps], linewidth=0.8, label="training")
    if validations:
        axes.plot(
            [row["tokens"] for row in validations], [row["loss"] for row in validations], "o-", label="validation"
        )
        for name, style in (("unigram_entropy", "--"), ("bigram_entropy", ":")):
            value = validations[-1][name]
            if value is not None:
                axes.axhline(value, color="grey", linestyle=style, label=f"{name.replace('_', ' ')} {value:.2f}")
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_report(run_folder: str | Path) -> dict[str, Any]:
    """Write summary.json, cadence.png and loss.png beside the metrics; returns the summary."""
    folder = Path(run_folder)
    rows = read_rows(folder)
    summary = summarise(rows)
    cadence_plot(rows, folder / "cadence.png")
    loss_plot(rows, folder / "loss.png")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
