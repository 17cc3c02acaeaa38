"""What happened to a run from outside of it, kept beside its checkpoints: why a group of workers came to its end.

Written by the controller (a failure, a resize, a strike against a node) and the watchdogs (a rank is stuck; a hang: it
was killed for it), one small object each, because the machine that noticed need not be the one that keeps the metrics.
Keys: `<run>/events/<unix ms>-<kind>-<who>.json`.
"""

import json
import time
from collections.abc import Collection
from typing import Any

from nltrain.track.metrics import EventStore, Row

# States of a Linux process: stopped, traced, in a system call that cannot be interrupted.
_NOT_RUNNING = ("T", "t", "D")


def put_event(store: EventStore, run: str, kind: str, who: str, **values: Any) -> None:
    """Keep one event. `who` tells events of the same millisecond apart: "controller", "rank_0001"."""
    now_s = time.time()
    body = {"kind": kind, "time_s": round(now_s, 3)} | values
    store.put(f"{run}/events/{int(now_s * 1000):015d}-{kind}-{who}.json", json.dumps(body).encode())


def read_events(store: EventStore, run: str, since_s: float = 0.0, kinds: Collection[str] = ()) -> list[Row]:
    """Events at or after `since_s` (Unix), oldest first; with `kinds` those of these kinds alone."""
    prefix = f"{run}/events/"
    keys = sorted(item.key for item in store.list(prefix))
    recent = [key for key in keys if int(key.removeprefix(prefix).partition("-")[0]) >= since_s * 1000]
    if kinds:
        recent = [key for key in recent if key.removeprefix(prefix).split("-")[1] in kinds]
    return [json.loads(store.get(key)) for key in recent]


def behind(events: list[Row], killed: bool = False) -> Row | None:
    """Of the ranks that were stuck together, the one that the others waited for; None where there was no hang.

    A rank that was stuck may have gone on: a hang is what one was killed for, or is known to have been (`killed`).

    When one rank hangs in a collective all look hung: named is one whose process does not run, else the one that has
    joined the fewest collectives, else the one that came least far, else the longest silent.
    """
    stuck = [event for event in events if event["kind"] in ("hang", "stuck")]
    if not stuck or not (killed or any(event["kind"] == "hang" for event in stuck)):
        return None
    return min(
        stuck,
        key=lambda each: (
            not each["process_state"].startswith(_NOT_RUNNING),
            each.get("collectives", 0),
            each["beats"],
            -each["silent_s"],
            each["kind"],
        ),
    )


def reason_of(events: list[Row]) -> str:
    """One line out of the events since the last attempt began; empty where there is none.

    A hang explains the deaths that the watchdogs brought about.
    """
    first = behind(events)
    if first is not None:
        ahead = max(event.get("collectives", 0) for event in events) - first.get("collectives", 0)
        return (
            f"hang: rank {first['rank']} made no progress for {first['silent_s']:.0f} s while {first['phase']} "
            f"(process {first['process_state']}{f', {ahead} collectives behind' if ahead else ''}); "
            f"stacks in {first.get('stacks', 'nowhere: it was gone before they were taken')}"
        )
    told = [event for event in events if "reason" in event]
    return str(told[-1]["reason"]) if told else ""
