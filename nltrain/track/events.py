"""What happened to a run from outside of it, kept beside its checkpoints: why a group of workers came to its end.

Written by the controller (a failure, a resize) and the watchdogs (a hang), one small object each, because the machine
that noticed need not be the one that keeps the metrics. Keys: `<run>/events/<unix ms>-<kind>-<who>.json`.
"""

import json
import time
from typing import Any

from nltrain.track.metrics import EventStore, Row

# States of a Linux process: stopped, traced, in a system call that cannot be interrupted.
_NOT_RUNNING = ("T", "t", "D")


def put_event(store: EventStore, run: str, kind: str, who: str, **values: Any) -> None:
    """Keep one event. `who` tells events of the same millisecond apart: "controller", "rank_0001"."""
    now_s = time.time()
    body = {"kind": kind, "time_s": round(now_s, 3)} | values
    store.put(f"{run}/events/{int(now_s * 1000):015d}-{kind}-{who}.json", json.dumps(body).encode())


def read_events(store: EventStore, run: str, since_s: float = 0.0) -> list[Row]:
    """Events at or after `since_s` (Unix), oldest first."""
    prefix = f"{run}/events/"
    keys = sorted(item.key for item in store.list(prefix))
    recent = [key for key in keys if int(key.removeprefix(prefix).partition("-")[0]) >= since_s * 1000]
    return [json.loads(store.get(key)) for key in recent]


def reason_of(events: list[Row]) -> str:
    """One line out of the events since the last attempt began; empty where there is none.

    A hang explains the deaths that the watchdogs brought about. When one rank hangs, the others wait for it and look
    hung too: named is one whose process does not run, else the one that came least far, else the longest silent.
    """
    hangs = [event for event in events if event["kind"] == "hang"]
    if hangs:
        first = min(hangs, key=lambda e: (not e["process_state"].startswith(_NOT_RUNNING), e["beats"], -e["silent_s"]))
        return (
            f"hang: rank {first['rank']} made no progress for {first['silent_s']:.0f} s while {first['phase']} "
            f"(process {first['process_state']}); stacks in {first['stacks']}"
        )
    return str(events[-1]["reason"]) if events else ""
