"""Events that happened to a run from outside, kept beside its checkpoints: why a group of workers ended.

The controller writes them (a failure, a resize, a strike against a node) and the watchdogs (a rank is stuck; a hang:
the watchdog killed it), one small object each, because the machine that noticed need not be the one that keeps the
metrics. Keys: `<run>/events/<attempt>-<unix ms>-<kind>-<who>.json`. An event belongs to the attempt that was the newest
when it was written; no clock decides this, because clocks of machines differ.
"""

import json
import re
import time
from collections.abc import Collection
from typing import Any

from nltrain.store import Store

Event = dict[str, Any]
"""`kind`, `attempt`, `time_s` and what its author adds: `reason`, `rank`, `silent_s`, ..."""

# States of a Linux process: stopped, traced, in a system call that cannot be interrupted.
_NOT_RUNNING = ("T", "t", "D")
_EVENT = re.compile(r"(?:(?P<attempt>\d{6,14})-)?(?P<ms>\d{15})-(?P<kind>[^-]+)-")


def newest_attempt(store: Store, run: str) -> int:
    """The number of the run's newest attempt; 0 where none has begun."""
    names = (item.key.rsplit("/", 1)[-1].removesuffix(".json") for item in store.list(f"{run}/attempts/"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def put_event(store: Store, run: str, kind: str, who: str, **values: Any) -> None:
    """Write one event of the newest attempt. `who` ("controller", "rank_0001") is part of the key.

    No event overwrites another one: the second of one author in one millisecond gets the next free one. Raises
    StoreError.
    """
    now_s, attempt = time.time(), newest_attempt(store, run)
    body = json.dumps({"kind": kind, "attempt": attempt, "time_s": round(now_s, 3)} | values).encode()
    ms = int(now_s * 1000)
    while not store.put_if_absent(f"{run}/events/{attempt:06d}-{ms:015d}-{kind}-{who}.json", body):
        ms += 1


def read_events(
    store: Store, run: str, since_attempt: int = 0, *, since_s: float = 0.0, kinds: Collection[str] = ()
) -> list[Event]:
    """Events of attempts `since_attempt` and later, written at or after `since_s` (Unix time), oldest first.

    With `kinds`, only events of these kinds. Events without an attempt in their key are old; they count as attempt 0.
    Raises StoreError.
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


def behind(events: list[Event], killed: bool = False) -> Event | None:
    """The event of the rank that the other stuck ranks waited for; None where there was no hang.

    A stuck rank may recover, so "stuck" events alone are no hang: a watchdog must have killed a rank (a "hang" event),
    or the caller knows that one was killed (`killed`). When one rank hangs in a collective, all ranks look hung. The
    culprit is a rank whose process does not run, else the one that has joined the fewest collectives, else the one with
    the fewest beats, else the one that was silent longest.
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


def reason_of(events: list[Event]) -> str:
    """One line that explains the end of the last attempt, from the events since it began; empty without events.

    A hang takes precedence: the failures beside it are ranks that the watchdogs killed.
    """
    first = behind(events)
    if first is not None:
        ahead = max(event.get("collectives", 0) for event in events) - first.get("collectives", 0)
        return (
            f"hang: rank {first['rank']} made no progress for {first['silent_s']:.0f} s while {first['phase']} "
            f"(process {first['process_state']}{f', {ahead} collectives behind' if ahead else ''}); "
            f"stacks in {first.get('stacks', 'nowhere: it was gone before they were taken')}"
        )
    reasons = [str(event["reason"]) for event in events if "reason" in event]
    return reasons[-1] if reasons else ""
