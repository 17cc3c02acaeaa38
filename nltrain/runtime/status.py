"""`nltrain status RUN`: what a run is doing or did, read from its folder or from beside its checkpoints in the store.

Needs no cluster and no running job. RUN is the run's output folder, or the run's URL in the store
(s3://bucket/runs/NAME, or that folder).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from nltrain.checkpoint.catalog import list_checkpoints
from nltrain.errors import UserError
from nltrain.store import MissingObjectError, open_store
from nltrain.store.places import split_url
from nltrain.track.events import newest_attempt, read_events
from nltrain.track.lines import duration
from nltrain.track.status import EVERY_S, KEY

# A run publishes its status every few seconds while it trains. Without one for this long, it is saving, stuck or gone.
SILENT_AFTER_S = 12 * EVERY_S
ENDED = ("finished", "stopped")


class StatusError(UserError, ValueError):
    """No run was found; the message says where it was looked for."""


def read_status(url: str, now_s: float | None = None) -> dict[str, Any]:
    """The run's last snapshot with `age_s`, `alive`, and its newest checkpoint with its age. Raises StatusError.

    `state` is "failed", with `why`, where the job has given up and no later attempt has begun.
    """
    now_s = time.time() if now_s is None else now_s
    try:
        found = json.loads(open_store(url).get(KEY))
    except MissingObjectError:
        found = _before_the_first_snapshot(url)
    # Clocks differ: a time stamp in the future comes from a clock that is ahead of this one, and means now.
    found["age_s"] = round(max(0.0, now_s - found["time_s"]), 1)
    store = open_store(found["checkpoint_url"])
    if found["state"] not in ENDED and (why := _why_failed(store, found["run"])):
        found |= {"state": "failed", "why": why}
    found["alive"] = found["state"] in ("starting", "training", "resized", "preempted") and (
        found["age_s"] < SILENT_AFTER_S
    )
    complete = [info for info in list_checkpoints(store, found["run"]) if info.complete]
    newest = complete[-1] if complete else None
    found["checkpoint"] = newest and {
        "name": newest.name,
        "tokens": newest.tokens,
        "age_s": round(max(0.0, now_s - newest.created_s), 1),
    }
    return found


def _why_failed(store: Any, run: str) -> str:
    """Why the job gave up; empty where it did not, or where a later attempt has begun."""
    events = read_events(store, run, newest_attempt(store, run))
    final = [event for event in events if event["kind"] == "failure" and event.get("final")]
    # An attempt that was overtaken fails as well, but then the newer attempt counts.
    return str(final[-1]["reason"]) if final and final[-1].get("error_type") != "StaleAttemptError" else ""


def _before_the_first_snapshot(url: str) -> dict[str, Any]:
    """A status for a run at CHECKPOINT_URL/NAME that has events but no status yet. Raises StatusError."""
    parent, run = split_url(url)
    if parent and (events := read_events(open_store(parent), run)):
        levels: dict[str, Any] = {}
        known = {"tokens": 0, "total_tokens": 0, "attempt": 0, "workers": 0, "attempts": [], "levels": levels}
        return known | {"run": run, "state": "starting", "checkpoint_url": parent, "time_s": events[-1]["time_s"]}
    raise StatusError(
        f"{url}: no {KEY} there; give the run's output folder, or CHECKPOINT_URL/NAME as the job printed them"
    ) from None


def describe_status(status: dict[str, Any]) -> str:
    """The status as text for people."""
    tokens, total = status["tokens"], status["total_tokens"]
    state = status["state"]
    if state == "failed":
        state = f"failed: {status['why']}"
    if not status["alive"] and state in ("starting", "training"):
        state = f"silent for {duration(status['age_s'])} (was {state}): saving, restarting, or gone"
        state += " (if the clocks of the two machines agree)"
    lines = [
        f"run {status['run']}: {state}",
        f"  tokens      {tokens:,} of {total:,} ({100 * tokens / max(total, 1):.1f} %)",
    ]
    if status.get("loss") is not None:
        speed = status["tokens_per_s"]
        left = f", {duration((total - tokens) / max(speed, 1e-9))} left" if status["alive"] else ""
        lines.append(f"  loss        {status['loss']:.4f} nats per token, {speed:,.0f} tok/s{left}")
    lines.append(f"  attempt     {status['attempt']} with {status['workers']} workers")
    checkpoint = status["checkpoint"]
    lines.append(
        f"  checkpoint  {checkpoint['tokens']:,} tokens, {duration(checkpoint['age_s'])} old ({checkpoint['name']})"
        if checkpoint
        else "  checkpoint  none yet"
    )
    restarts = status["attempts"][1:]
    wasted = sum(attempt["tokens_lost"] for attempt in restarts)
    lines.append(f"  restarts    {len(restarts)}, {wasted:,} tokens trained again")
    for attempt in restarts[-10:]:
        lines.append(
            f"    attempt {attempt['attempt']} at {attempt['from_tokens']:,} tokens, {attempt['workers']} workers, "
            f"{attempt['tokens_lost']:,} tokens again: {attempt['reason']}"
        )
    for name, level in status["levels"].items():
        upcoming = level["next_tick_tokens"]
        when = "frozen" if upcoming is None else f"next at {upcoming:,} (in {upcoming - tokens:,})"
        done = f"{level['done']} of {level['due']} updates" + (f", {level['skipped']} skipped" * bool(level["skipped"]))
        lines.append(f"  level {name:<10} every {level['period_tokens']:,} tokens, {done}, {when}")
    return "\n".join(lines)


def status_main(arguments: Sequence[str]) -> int:
    """`nltrain status RUN [--json]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nltrain status", description="What a run is doing, live or finished.")
    parser.add_argument("run", help="output folder of the run, or its URL in the store: s3://bucket/runs/NAME")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    options = parser.parse_args(arguments)
    try:
        status = read_status(options.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(status) if options.json else describe_status(status))
    return 0
