"""What the saves of a run have cost so far: their rows, and whether one more fits into the time until a kill."""

from nltrain.checkpoint.checkpointer import Checkpointer
from nltrain.collectives import Ranks
from nltrain.supervision import Wish
from nltrain.track.lines import fold_line
from nltrain.track.record import Record
from nltrain.track.rows import CheckpointFailedRow, CheckpointRow

# Of the time until a kill, what is kept for everything but the files: gathering, the commit, the last rows.
LEAVE_RESERVE_S = 10.0
FOREVER_S = 1e9


class SaveLog:
    """Writes a row for every save that has ended, and remembers the size and speed of the last committed one."""

    def __init__(self, checkpoints: Checkpointer, record: Record, ranks: Ranks) -> None:
        """`ranks`: the group for `must_fold`."""
        self._checkpoints, self._record, self._ranks = checkpoints, record, ranks
        self._num_bytes, self._bytes_per_s = 0, 0.0  # as measured

    def write(self, tokens: int) -> None:
        """The rows of all saves that have ended since the last call; `tokens` is T now."""
        for result in self._checkpoints.poll():
            values = result._asdict() | {"saved_tokens": result.tokens, "deleted": list(result.deleted)}
            kind = CheckpointFailedRow if result.error else CheckpointRow
            self._record.row(kind(**values | {"tokens": tokens}))
            if not result.error:
                self._num_bytes = result.num_bytes
                self._bytes_per_s = result.num_bytes / max(result.write_seconds, 1e-3)
            self._record.publish()

    def must_fold(self, wish: Wish, unreduced_bytes: int, left_s: float) -> bool:
        """Whether gradient sums must be folded before the save with which the run leaves. Collective.

        Unreduced sums make a save several times as large. Where the world changes anyway (resize, preemption) they are
        folded. The user's stop keeps them, and with them the order of summation, unless writing them may take longer
        than the time until the kill; then a line says so. `unreduced_bytes`, `left_s`: those of this rank.
        """
        left_ms = int(1000 * min(FOREVER_S, max(0.0, left_s - LEAVE_RESERVE_S)))
        rows = self._ranks.gather_ints([unreduced_bytes, left_ms, int(self._bytes_per_s), self._num_bytes])
        unreduced, left_s = sum(row[0] for row in rows), min(row[1] for row in rows) / 1000
        bytes_per_s, size = rows[0][2], unreduced + rows[0][3]
        if not unreduced or wish != Wish.STOP:
            return bool(unreduced)
        if left_s >= FOREVER_S or size <= bytes_per_s * left_s:
            return False
        self._record.say(fold_line(size, bytes_per_s, left_s))
        return True
