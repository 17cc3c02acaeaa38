"""Where a run's time went, from its rows alone: training, waiting, checkpoints, restarts, work done twice.

Guarantees: the parts are disjoint, so their sum over the wall time says how much is accounted for. The time between a
stop by the user and the next submission is not part of the wall time. Limits: the resolution is that of the step rows;
what a killed attempt did after its last row counts as restart.
"""

from collections import Counter
from typing import Any

from nltrain.track.metrics import Row, effective, on_one_clock

_TIMED = ("step", "validation", "end", "attempt")
_STALLS = ("checkpoint", "checkpoint_failed")


def goodput(rows: list[Row]) -> dict[str, Any]:
    """All times in seconds. `rows`: those of all attempts in the order of writing, with at least one step."""
    rows = on_one_clock(rows)
    attempts = [row for row in rows if row["kind"] == "attempt"]
    timed = [row for row in rows if row["kind"] in _TIMED]
    counted = {id(row) for row in effective(rows)}
    parts = dict.fromkeys(
        ("training", "data_wait", "repeated", "validation", "checkpoint_stall", "startup", "restart", "finishing"), 0.0
    )
    parts["checkpoint_stall"] = sum(row["stall_seconds"] for row in rows if row["kind"] in _STALLS)
    idle_s = 0.0
    begun_s: float = attempts[0].get("started_s") or attempts[0]["time_s"]
    stalled_s = 0.0  # stalls since `busy_until_s`: they are no part of a gap
    busy_until_s = begun_s
    stopped = False
    gap = "startup"
    for row in (row for row in rows if row["kind"] in _TIMED + _STALLS):
        match row["kind"]:
            case "attempt":
                if stopped:  # the user took it away and brought it back
                    started_s: float = row.get("started_s") or row["time_s"]
                    idle_s += max(0.0, started_s - busy_until_s)
                    busy_until_s, gap = max(busy_until_s, started_s), "startup"
                elif row is not attempts[0]:
                    gap = "restart"
                stopped = False
            case "step":
                if gap:
                    parts[gap] += max(0.0, row["time_s"] - row["seconds"] - busy_until_s)
                seconds = row["seconds"]
                if id(row) in counted:
                    parts["training"] += seconds - min(row["data_wait_s"], seconds)
                    parts["data_wait"] += min(row["data_wait_s"], seconds)
                else:
                    parts["repeated"] += seconds
                busy_until_s, gap, stalled_s = row["time_s"], "", 0.0
            case "validation":
                parts["validation"] += row.get("seconds", 0.0)
                busy_until_s, stalled_s = row["time_s"], 0.0
            case "end":
                parts["finishing"] += max(0.0, row["time_s"] - busy_until_s - stalled_s)
                busy_until_s, stopped = row["time_s"], row["reason"] == "stopped"
                if not stopped:
                    gap = "restart"
            case _:
                stalled_s += row["stall_seconds"]
    wall_s = max(row["time_s"] for row in timed) - begun_s - idle_s
    accounted_s = sum(parts.values())
    return {
        "wall_s": round(wall_s, 2),
        **{f"{name}_s": round(seconds, 2) for name, seconds in parts.items()},
        "goodput": round(parts["training"] / max(wall_s, 1e-9), 4),
        "accounted": round(min(1.0, accounted_s / max(wall_s, 1e-9)), 4),
        "restarts": [_restart(row) for row in attempts[1:]],
        "stragglers": stragglers(rows),
    }


def _restart(row: Row) -> dict[str, Any]:
    """One attempt after the first: where it went on, what that cost, and why it was needed."""
    return {
        "attempt": row["attempt"],
        "from_tokens": row["tokens"],
        "tokens_wasted": row["tokens_lost"],
        "workers": row["workers"],
        "reason": row.get("reason", ""),
    }


def stragglers(rows: list[Row], at_least: float = 1.2) -> list[dict[str, Any]]:
    """Ranks whose forward passes took `at_least` times the median rank's in a log interval, the most frequent first."""
    steps = [row for row in rows if row["kind"] == "step" and row.get("slowest_over_median")]
    late = [row for row in steps if row["slowest_over_median"] >= at_least]
    found = []
    for rank, count in Counter(row["slowest_rank"] for row in late).most_common(8):
        ratios = sorted(row["slowest_over_median"] for row in late if row["slowest_rank"] == rank)
        found.append(
            {"rank": rank, "share_of_rows": round(count / len(steps), 3), "median_ratio": ratios[len(ratios) // 2]}
        )
    return found
