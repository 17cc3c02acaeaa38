"""The token clock: which level is due when, in pure integers.

After T tokens, T a multiple of the quantum, a level of period C and phase p has made floor((T + p) / C) ticks. This
does not depend on how a quantum is cut into micro-steps, on the world size or on restarts. Tokens beyond the period
count towards the next tick. T is the only clock state: a resumed run cannot disagree with an uninterrupted one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nltrain.levels.config import LevelsError


@dataclass(frozen=True)
class TokenClock:
    """Ticks of one level. All quantities in tokens."""

    period: int
    phase: int = 0

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 <= self.phase < self.period:
            raise LevelsError(f"TokenClock(period={self.period}, phase={self.phase}): needs 0 <= phase < period")

    def ticks(self, tokens: int) -> int:
        """Ticks made by T = `tokens`."""
        return (tokens + self.phase) // self.period

    def due(self, before: int, after: int) -> bool:
        """Whether the level ticks at the end of the quantum that takes T from `before` to `after`."""
        return self.ticks(after) > self.ticks(before)

    def last_tick(self, tokens: int, quantum: int) -> int:
        """T of the last tick at or before `tokens`, 0 before the first: the multiple of the quantum that reached it."""
        count = self.ticks(tokens)
        if count == 0:
            return 0
        return -(-(count * self.period - self.phase) // quantum) * quantum

    def next_tick(self, tokens: int, quantum: int) -> int:
        """T of the first tick after `tokens`."""
        return -(-((self.ticks(tokens) + 1) * self.period - self.phase) // quantum) * quantum

    def window(self, tokens: int, quantum: int) -> int:
        """Tokens consumed since the last tick."""
        return tokens - self.last_tick(tokens, quantum)


def staggered_phases(periods: Sequence[int], phases: Sequence[int | None], quantum: int) -> tuple[int, ...]:
    """Phases in tokens. Given phases are kept; each None is chosen so that no two slow levels tick in one quantum.

    A level that is due in nearly every quantum (period < 2 quanta) coincides with all others and gets phase 0. Slow
    levels are placed one by one, the fastest first. Each takes the smallest phase that gives the fewest coincidences
    with those already placed. Where the periods have no common divisor, some coincidences cannot be avoided.
    """
    horizon = 4096  # quanta looked at: more than the least common multiple of any sensible set of periods
    taken: set[int] = set()
    result = [0 if phase is None else phase for phase in phases]

    def ticks(period: int, phase: int) -> set[int]:
        last = -(-horizon * quantum // period)
        return {-(-(k * period - phase) // quantum) for k in range(1, last + 1)}

    slow = [i for i, period in enumerate(periods) if period >= 2 * quantum]
    for i in slow:
        if phases[i] is not None:
            taken |= ticks(periods[i], result[i])
    for i in sorted((i for i in slow if phases[i] is None), key=lambda i: periods[i]):
        candidates = range(0, min(periods[i], 128 * quantum), quantum)
        coincidences = {phase: len(ticks(periods[i], phase) & taken) for phase in candidates}
        result[i] = min(candidates, key=lambda phase: (coincidences[phase], phase))
        taken |= ticks(periods[i], result[i])
    return tuple(result)
