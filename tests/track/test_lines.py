"""The lines for people: what they say, and that they are the ones that users and tests know."""

from pathlib import Path

from nltrain.track import lines
from tests.track.support import row

STEP = {"step": 7, "total_tokens": 1200, "loss": 2.5, "seconds": 2.0, "data_wait_s": 0.5, "memory_bytes": 2**30}


def test_times_are_short():
    assert [lines.duration(s) for s in (0, 62, 3723)] == ["0:00", "1:02", "1:02:03"]


def test_the_progress_line():
    line = lines.progress_line(row("step", 700, **STEP), 1500.0, 62, {"base": 2, "slow(skipped)": 1})
    assert line == (
        "step  7/12 | 700 tokens | loss 2.5000 | 1,500 tok/s | data wait 25.0 % | memory 1.00 GiB | ETA 1:02 | "
        "2xbase slow(skipped)"
    )
    nothing = row("step", 700, **STEP | {"loss": None, "left_out": 1, "left_out_tokens": 1024})
    assert "loss nan | 1,024 tokens left out |" in lines.progress_line(nothing, 1.0, 0, {})


def test_what_is_left_out_is_named_up_to_a_limit():
    parts = [{"rank": n, "samples": [n, n + 1], "tokens": 600, "reason": "loss spike"} for n in range(10)]
    line = lines.left_out_line(parts)
    assert line.startswith("left out 6,000 tokens: rank 0: samples 0, 1 (loss spike); rank 1:")
    assert line.endswith("; and 2 more, all in the row")
    assert "more" not in lines.left_out_line(parts[:8])


def test_the_start_of_an_attempt():
    assert lines.attempt_line(1, 2, 0, None, 0, "") == "attempt 1: a new run with 2 workers"
    assert lines.attempt_line(2, 3, 1000, "c", 2000, "gone") == (
        "attempt 2: resumed from checkpoint c at 1,000 tokens with 3 workers; 2,000 tokens are trained again (gone)"
    )


def test_an_evaluation():
    metrics = {"loss": 1.0, "perplexity": 2.718, "targets": 3000, "unigram_entropy": 4.0, "bigram_entropy": None}
    assert lines.evaluation_line("validation", 1000, metrics) == (
        "validation at 1,000 tokens: loss 1.0000 nats per token, perplexity 2.72, unigram 4.0000 (3,000 targets)"
    )
    line = lines.evaluation_line("accuracy", 1000, {"accuracy": 0.25, "n": 3000, "none": None})
    assert line == "accuracy at 1,000 tokens: accuracy 0.25, n 3,000"


def test_a_level():
    level = {"name": "slow", "num_parameters": 1000, "period_tokens": 4096, "phase_tokens": 0, "optimizer": "adamw"}
    level |= {"lr": 0.004, "zero_stage": 1, "mode": "local", "decay": "no decay"}
    assert lines.level_line(level) == (
        "level slow: 1,000 parameters, every 4,096 tokens (phase 0), adamw lr 0.004, ZeRO-1 (local), no decay"
    )


def test_the_ends():
    assert lines.left_line("stopped", 1000) == "stopped: checkpoint at 1,000 tokens is committed"
    summary = {"tokens": 1000, "seconds": 62, "loss_first": None, "loss_last": 2.0}
    line = lines.finished_line(summary, Path("/out/summary.json"))
    assert line == "finished: 1,000 tokens in 1:02, loss - -> 2.0000; /out/summary.json"
    assert lines.fold_line(2_000_000_000, 100_000_000, 9.6).startswith(
        "stopping: 2.00 GB at 100 MB/s are not sure to be written in the 10 s that are left."
    )
    assert "at a speed that no save has shown yet" in lines.fold_line(1, 0, 1.0)
