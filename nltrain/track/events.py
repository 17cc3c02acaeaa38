"""What happened to a run from outside of it, kept beside its checkpoints: why a group of workers came to its end.

Written by the controller (a failure, a resize, a strike against a node) and the watchdogs (a rank is stuck; a hang: it
was killed for it), one small object each, because the machine that noticed need not be the one that keeps the metrics.
Keys: `<run>/events/<attempt>-<unix ms>-<kind>-<who>.json`. What belongs to which attempt is told by the number of the
newest attempt, never by a clock: those of machines differ.
"""

import json
import re
import time
from collections.abc import Collection
from typing import Any

from nltrain.track.metrics import EventStore, Row

# States of a Linux process: stopped, traced, in a system call that cannot be interrupted.
_NOT_RUNNING = ("T", "t", "D")
_EVENT = re.compile(r"(?:(?P<attempt>\d{6,14})-)?(?P<ms>\d{15})-(?P<kind>[^-]+)-")


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


def read_events(
    store: EventStore, run: str, since_attempt: int = 0, *, since_s: float = 0.0, kinds: Collection[str] = ()
) -> list[Row]:
    """Events of attempts `since_attempt` and later and of at or after `since_s` (Unix), oldest first.

    With `kinds` those of these kinds alone. Events kept before events had an attempt are of attempt 0.
    """
    prefix = f"{run}/events/"
    wanted = []
    for key in sorted(item.key for item in store.list(prefix)):
        parts = _EVENT.match(key.removeprefix(prefix))
        if parts is None or int(parts["attempt"] or 0) < since_attempt or int(parts["ms"]) < since_s * 1000:
            continue
        if not kinds or parts["kind"] in kinds:
            wanted.append(key)
    return [json.loads(store.get(key)) for key in wanted]


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
