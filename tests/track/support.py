"""Rows for tests: as short as their JSON."""

from pathlib import Path

from nltrain.track.rows import from_json

OLD_RUN = Path(__file__).parent / "old_run"
"""Rows as they were written before rows had a version: a run with five attempts, and the summary of its code."""


def row(kind, tokens=0, **values):
    return from_json({"kind": kind, "tokens": tokens} | values)


def tick(level, tokens, skipped=""):
    return row("tick", tokens, level=level, skipped=skipped)
