"""Where a run's time went, from its rows alone: training, waiting, checkpoints, restarts, work done twice.

Guarantees: the parts are disjoint, so their sum over the wall time says how much is accounted for. The time between a
stop by the user and the next submission is not part of the wall time. Limits: the resolution is that of the step rows;
what a killed attempt did after its last row counts as restart.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from nltrain.track.metrics import began_s, effective, on_one_clock
from nltrain.track.rows import AttemptRow, EndRow, EvaluationRow, Row, SaveRow, StepRow, ValidationRow, of_kind

PARTS = ("training", "data_wait", "repeated", "validation", "checkpoint_stall", "startup", "restart", "finishing")


def goodput(rows: Sequence[Row]) -> dict[str, Any]:
    """All times in seconds. `rows`: those of all attempts in the order of writing, with at least one step."""
    rows = on_one_clock(rows)
    attempts = of_kind(rows, AttemptRow)
    counted = {id(row) for row in effective(rows)}
    spent = _Spent(attempts[0])
    for row in rows:
        match row:
            case AttemptRow():
                spent.attempt(row, first=row is attempts[0])
            case StepRow():
                spent.step(row, counts=id(row) in counted)
            case ValidationRow() | EvaluationRow():
                spent.evaluation(row)
            case EndRow():
                spent.end(row)
            case SaveRow():
                spent.save(row)
    timed = [row for row in rows if isinstance(row, AttemptRow | StepRow | ValidationRow | EvaluationRow | EndRow)]
    wall_s = max(row.time_s for row in timed) - began_s(attempts[0]) - spent.idle_s
    accounted_s = sum(spent.parts.values())
    return {
        "wall_s": round(wall_s, 2),
        **{f"{name}_s": round(seconds, 2) for name, seconds in spent.parts.items()},
        "goodput": round(spent.parts["training"] / max(wall_s, 1e-9), 4),
        "accounted": round(min(1.0, accounted_s / max(wall_s, 1e-9)), 4),
        "restarts": [_restart(row) for row in attempts[1:]],
        "stragglers": stragglers(rows),
    }


class _Spent:
    """Sums the parts, row after row. A gap is time that no row explains; `_gap` names the part it belongs to."""

    def __init__(self, first: AttemptRow) -> None:
        """The run begins with the attempt `first`."""
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.idle_s = 0.0
        """Between a stop by the user and the next submission."""
        self._busy_until_s = began_s(first)
        self._stalled_s = 0.0  # stalls of saves since then: already counted
        self._stopped = False
        self._gap = "startup"

    def attempt(self, row: AttemptRow, first: bool) -> None:
        """A gap begins: a restart, or the startup of a run that its user stopped and submitted again."""
        if self._stopped:
            self.idle_s += max(0.0, began_s(row) - self._busy_until_s)
            self._busy_until_s, self._gap = max(self._busy_until_s, began_s(row)), "startup"
        elif not first:
            self._gap = "restart"
        self._stopped = False

    def step(self, row: StepRow, counts: bool) -> None:
        """Steps end a gap. Those that a later attempt trained again are `repeated`."""
        if self._gap:
            self.parts[self._gap] += max(0.0, row.time_s - row.seconds - self._busy_until_s)
        waited_s = min(row.data_wait_s, row.seconds)
        if counts:
            self.parts["training"] += row.seconds - waited_s
            self.parts["data_wait"] += waited_s
        else:
            self.parts["repeated"] += row.seconds
        self._busy_until_s, self._gap, self._stalled_s = row.time_s, "", 0.0

    def evaluation(self, row: ValidationRow | EvaluationRow) -> None:
        """All evaluations count as `validation`."""
        self.parts["validation"] += row.seconds
        self._busy_until_s, self._stalled_s = row.time_s, 0.0

    def end(self, row: EndRow) -> None:
        """The time since the last row before, without the stalls of saves, is `finishing`."""
        self.parts["finishing"] += max(0.0, row.time_s - self._busy_until_s - self._stalled_s)
        self._busy_until_s, self._stopped = row.time_s, row.reason == "stopped"
        if not self._stopped:
            self._gap = "restart"

    def save(self, row: SaveRow) -> None:
        """Training waited for the copy to host memory."""
        self.parts["checkpoint_stall"] += row.stall_seconds
        self._stalled_s += row.stall_seconds


def _restart(row: AttemptRow) -> dict[str, Any]:
    """One attempt after the first: where it resumed, how many tokens that cost, and why it was needed."""
    return {
        "attempt": row.attempt,
        "from_tokens": row.tokens,
        "tokens_wasted": row.tokens_lost,
        "workers": row.workers,
        "reason": row.reason,
    }


def stragglers(rows: Sequence[Row], at_least: float = 1.2) -> list[dict[str, Any]]:
    """Ranks whose forward passes took `at_least` times the median rank's in a log interval, the most frequent first."""
    steps = [row for row in of_kind(rows, StepRow) if row.slowest_over_median]
    late = [row for row in steps if row.slowest_over_median >= at_least]
    found = []
    for rank, count in Counter(row.slowest_rank for row in late).most_common(8):
        ratios = sorted(row.slowest_over_median for row in late if row.slowest_rank == rank)
        found.append(
            {"rank": rank, "share_of_rows": round(count / len(steps), 3), "median_ratio": ratios[len(ratios) // 2]}
        )
    return found
