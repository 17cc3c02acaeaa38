"""The rows and lines of a run's steps and ticks, on one rank. Only rank 0 writes; `write` is collective."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from nltrain.collectives import Ranks
from nltrain.track.left_out import LeftOut
from nltrain.track.lines import left_out_line, progress_line
from nltrain.track.progress import Meter, Speed
from nltrain.track.record import Record
from nltrain.track.rows import LeftOutRow, StepRow, TickRow


class StepLog:
    """Counts micro-steps on the device and ticks on the host until a step row is due."""

    def __init__(self, record: Record, meter: Meter, ranks: Ranks, total_tokens: int) -> None:
        """`meter` is the loop's own; `total_tokens`: T at the end of the run."""
        self._record, self._meter, self._ranks, self._total_tokens = record, meter, ranks, total_tokens
        self._left_out, self._speed = LeftOut(), Speed()
        self._ticks: Counter[str] = Counter()
        self._logged_at, self._waited_s = 0, 0.0

    def start_at(self, tokens: int) -> None:
        """The run goes on from T = `tokens`."""
        self._logged_at = tokens

    def count(self, samples: tuple[int, ...], num_targets: int, verdict: torch.Tensor) -> None:
        """One micro-step of this rank, as for `LeftOut.add`. No host sync."""
        self._left_out.add(samples, num_targets, verdict)

    def tick(self, row: TickRow) -> None:
        """Write the row of a tick, and name its level in the next line."""
        self._record.row(row)
        self._ticks[row.level + ("(skipped)" if row.skipped else "")] += 1

    def write(
        self, step: int, tokens: int, level_updates: Mapping[str, dict[str, int]], waited_s: float
    ) -> dict[str, Any]:
        """The row and the line of the steps since the last call, and what the guard left out. Collective, a host sync.

        step: quanta trained; tokens: T; waited_s: what this rank has waited for data since its start. Returns what
        `status.json` shows: `loss` (None where no target counted) and the smoothed `tokens_per_s`.
        """
        interval = self._meter.take(waited_s - self._waited_s)
        self._waited_s = waited_s
        trained, self._logged_at = tokens - self._logged_at, tokens
        row = StepRow(
            tokens=tokens,
            step=step,
            total_tokens=self._total_tokens,
            step_tokens=trained,
            tokens_per_s=round(trained / max(interval.seconds, 1e-9), 1),
            level_updates=dict(level_updates),
            **interval._asdict(),
        )
        self._record.row(row)
        self._write_left_out(tokens, interval.left_out)
        speed = self._speed.update(trained, interval.seconds)
        eta_s = (self._total_tokens - tokens) / speed
        self._record.say(progress_line(row, speed, eta_s, self._ticks))
        self._ticks = Counter()
        return {"loss": interval.loss if math.isfinite(interval.loss) else None, "tokens_per_s": round(speed, 1)}

    def _write_left_out(self, tokens: int, num_micro_steps: int) -> None:
        """A row and a line with the rank and the samples of every part that the guard left out."""
        own = self._left_out.take()
        if not num_micro_steps:  # equal on all ranks, so all of them gather or none does
            return
        everyone = self._ranks.gather(own)
        parts = [{"rank": rank} | part for rank, each in enumerate(everyone) for part in each]
        left_out_tokens = sum(part["tokens"] for part in parts)
        self._record.row(LeftOutRow(tokens=tokens, left_out_tokens=left_out_tokens, parts=parts))
        self._record.say(left_out_line(parts))
