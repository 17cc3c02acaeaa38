"""The token clock: no tick lost, none doubled, whatever the cuts, restarts and resizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nltrain.levels.clock import TokenClock, staggered_phases
from nltrain.levels.config import LevelsError
from nltrain.levels.quantum import cut_quantum


@st.composite
def clocks(draw):
    quantum = draw(st.integers(1, 64))
    period = draw(st.integers(quantum, 50 * quantum))
    return quantum, TokenClock(period, draw(st.integers(0, period - 1)))


@given(clocks(), st.integers(0, 300))
def test_ticks_by_T_are_exactly_the_floor(made, quanta):
    quantum, clock = made
    ticks = sum(clock.due(n * quantum, (n + 1) * quantum) for n in range(quanta))
    assert ticks == (quanta * quantum + clock.phase) // clock.period


@given(clocks(), st.lists(st.integers(0, 40), max_size=8))
def test_restarts_neither_lose_nor_double_a_tick(made, runs):
    """Each run starts from T alone, as a resumed process does."""
    quantum, clock = made
    tokens, ticks = 0, []
    for quanta in runs:
        fresh = TokenClock(clock.period, clock.phase)
        for _ in range(quanta):
            if fresh.due(tokens, tokens + quantum):
                ticks.append(tokens + quantum)
            tokens += quantum
    total = sum(runs)
    assert ticks == [(n + 1) * quantum for n in range(total) if clock.due(n * quantum, (n + 1) * quantum)]


@given(clocks(), st.integers(1, 300))
def test_windows_cover_every_token_once(made, quanta):
    quantum, clock = made
    last, covered = 0, 0
    for n in range(quanta):
        tokens = (n + 1) * quantum
        if clock.due(tokens - quantum, tokens):
            covered += tokens - last
            last = tokens
        assert clock.last_tick(tokens, quantum) == last
        assert clock.window(tokens, quantum) == tokens - last
    assert covered + (quanta * quantum - last) == quanta * quantum


@settings(max_examples=300)
@given(st.integers(1, 60), st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_every_cut_and_resize_takes_every_sequence_once_in_order(num_sequences, micro_batch, worlds):
    """One quantum per world size: growing, shrinking and odd sizes see the same sequences in the same quantum."""
    for world_size in worlds:
        steps = cut_quantum(num_sequences, micro_batch, world_size)
        taken = [i for step in steps for indices in step for i in indices]
        assert taken == list(range(num_sequences))
        for step in steps:
            sizes = [len(indices) for indices in step]
            assert len(sizes) == world_size
            assert max(sizes) <= micro_batch and max(sizes) - min(sizes) <= 1
        assert len(steps) == -(-num_sequences // (micro_batch * world_size))


@pytest.mark.parametrize("periods", [(1, 2, 8, 32), (1, 2, 4, 8, 16), (1, 4, 16), (2, 4, 8, 32), (1, 3, 9, 27)])
def test_staggered_slow_levels_never_tick_together(periods):
    quantum = 48
    phases = staggered_phases([p * quantum for p in periods], [None] * len(periods), quantum)
    made = [TokenClock(p * quantum, phase) for p, phase in zip(periods, phases, strict=True) if p > 1]
    for n in range(500):
        assert sum(clock.due(n * quantum, (n + 1) * quantum) for clock in made) <= 1


def test_unequal_periods_coincide_as_rarely_as_the_chosen_shifts_allow():
    quantum, periods = 10, (10, 25, 70)
    phases = staggered_phases(periods, (None,) * 3, quantum)
    assert all(0 <= phase < period for phase, period in zip(phases, periods, strict=True))
    made = [TokenClock(p, phase) for p, phase in zip(periods, phases, strict=True)]
    for tokens in range(0, 5000, quantum):
        assert [clock.ticks(tokens) for clock in made] == [
            (tokens + phase) // p for p, phase in zip(periods, phases, strict=True)
        ]


def test_given_phases_are_kept_and_the_others_avoid_them():
    phases = staggered_phases((10, 40, 40), (None, 30, None), 10)
    assert phases[0] == 0 and phases[1] == 30 and phases[2] != 30


@pytest.mark.parametrize(("period", "phase"), [(0, 0), (4, 4), (4, -1)])
def test_an_impossible_clock_is_refused(period, phase):
    with pytest.raises(LevelsError, match="phase"):
        TokenClock(period, phase)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_empty_cut_is_refused(arguments):
    with pytest.raises(LevelsError, match="must be >= 1"):
        cut_quantum(*arguments)
