"""Rows for tests, as short as their JSON, and micro-steps for a meter."""

from pathlib import Path

import torch

from nltrain.track.metrics import MetricsLog, log_fault
from nltrain.track.rows import from_json

CPU = torch.device("cpu")
OLD_RUN = Path(__file__).parent / "old_run"
"""Rows as they were written before rows had a version: a run with five attempts, and the summary of its code."""


def row(kind, tokens=0, **values):
    return from_json({"kind": kind, "tokens": tokens} | values)


def tick(level, tokens, skipped=""):
    return row("tick", tokens, level=level, skipped=skipped)


def add(meter, loss, targets, left_out=0):
    """One micro-step: sum of losses, targets that count, targets left out."""
    meter.start()
    meter.forward_ended()
    meter.add(*(torch.tensor(float(value), dtype=torch.float64) for value in (loss, targets, left_out)))


def run_with_a_kill(folder):
    """Attempt 1 trains 6 quanta of 100 tokens; attempt 2 resumes at 400 and ends at 1,000."""
    counts = {"base": {"done": 10, "skipped": 0, "due": 10}}
    for attempt, (first, last) in enumerate([(0, 600), (400, 1000)], start=1):
        log = MetricsLog(folder, attempt)
        log.log(row("attempt", first, workers=2, tokens_lost=200 if first else 0))
        for tokens in range(first + 100, last + 1, 100):
            log.log(tick("base", tokens))
            log.log(row(
                "step", tokens, loss=10.0 - tokens / 200, step_tokens=100, seconds=0.5, data_wait_s=0.01,
                total_tokens=1000, level_updates=counts,
            ))  # fmt: skip
        if attempt == 2:
            log.log(row("end", last, reason="finished", level_updates=counts, weights_sha256="ab"))
        else:
            log_fault(folder, signal="SIGKILL", rank=1, pid=1, tokens=600)
        log.close()
