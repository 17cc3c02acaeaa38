"""What happened to a run from outside of it, kept beside its checkpoints: why a group of workers came to its end.

Written by the controller (a failure, a resize) and the watchdogs (a hang), one small object each, because the machine
that noticed need not be the one that keeps the metrics. Keys: `<run>/events/<attempt>-<unix ms>-<kind>-<who>.json`.
What belongs to which attempt is told by the number of the newest attempt, never by a clock: those of machines differ.
"""

import json
import re
import time
from typing import Any

from nltrain.track.metrics import EventStore, Row

# States of a Linux process: stopped, traced, in a system call that cannot be interrupted.
_NOT_RUNNING = ("T", "t", "D")
_EVENT = re.compile(r"(\d{6,14})-\d{15}-")


def newest_attempt(store: EventStore, run: str) -> int:
    """The number of the run's newest attempt; 0 where none has begun."""
    names = (item.key.rsplit("/", 1)[-1].removesuffix(".json") for item in store.list(f"{run}/attempts/"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def put_event(store: EventStore, run: str, kind: str, who: str, **values: Any) -> None:
    """Keep one event of the newest attempt. `who` tells events of the same moment apart: "controller", "rank_0001"."""
    now_s, attempt = time.time(), newest_attempt(store, run)
    body = {"kind": kind, "attempt": attempt, "time_s": round(now_s, 3)} | values
    key = f"{run}/events/{attempt:06d}-{int(now_s * 1000):015d}-{kind}-{who}.json"
    store.put(key, json.dumps(body).encode())


def read_events(store: EventStore, run: str, since_attempt: int = 0) -> list[Row]:
    """Events of attempts `since_attempt` and later, oldest first; those kept before events had an attempt are of 0."""
    prefix = f"{run}/events/"
    keys = sorted(item.key for item in store.list(prefix))
    matches = [(_EVENT.match(key.removeprefix(prefix)), key) for key in keys]
    return [json.loads(store.get(key)) for match, key in matches if (int(match[1]) if match else 0) >= since_attempt]


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
