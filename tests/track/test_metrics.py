"""What the rows of a run say, when attempts overlap."""

import json

import pytest

from nltrain.track.metrics import MetricsLog, effective, log_fault, read_rows
from nltrain.track.report import summarise, write_report


def run_with_a_kill(folder):
    """Attempt 1 trains 6 quanta of 100 tokens; attempt 2 resumes at 400 and ends at 1,000."""
    counts = {"base": {"done": 10, "skipped": 0, "due": 10}}
    for attempt, (first, last) in enumerate([(0, 600), (400, 1000)], start=1):
        log = MetricsLog(folder, attempt)
        log.log("attempt", first, workers=2, tokens_lost=200 if first else 0)
        for tokens in range(first + 100, last + 1, 100):
            log.log("tick", tokens, level="base", period_tokens=100, skipped="")
            log.log(
                "step", tokens, loss=10.0 - tokens / 200, step_tokens=100, seconds=0.5, data_wait_s=0.01,
                total_tokens=1000, level_updates=counts,
            )  # fmt: skip
        if attempt == 2:
            log.log("end", last, reason="finished", level_updates=counts, weights_sha256="ab")
        else:
            log_fault(folder, signal="SIGKILL", rank=1, pid=1, tokens=600)
        log.close()


def test_superseded_rows_do_not_count(tmp_path):
    run_with_a_kill(tmp_path)
    steps = [(row["attempt"], row["tokens"]) for row in effective(read_rows(tmp_path)) if row["kind"] == "step"]
    assert steps == [(1, 100), (1, 200), (1, 300), (1, 400)] + [(2, t) for t in range(500, 1001, 100)]


def test_the_summary_counts_each_token_once(tmp_path):
    run_with_a_kill(tmp_path)
    summary = write_report(tmp_path)
    assert summary["tokens"] == 1000
    assert summary["tokens_per_s"] == pytest.approx(200.0)
    assert (summary["loss_first"], summary["loss_last"]) == (9.5, 5.0)
    assert (summary["kills"], summary["resumes"], summary["tokens_repeated"]) == (1, 1, 200)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "cadence.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    log = MetricsLog(tmp_path, 1)
    log.log("attempt", 0, workers=1, tokens_lost=0)
    log.close()
    with log.path.open("a") as file:
        file.write('{"kind": "step", "tok')
    assert [row["kind"] for row in read_rows(tmp_path)] == ["attempt"]


def test_a_run_without_steps_has_no_summary():
    with pytest.raises(ValueError, match="no step"):
        summarise([])
