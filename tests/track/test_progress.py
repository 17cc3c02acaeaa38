"""Counters between two log rows: real collectives of a group of one."""

import pytest

from nltrain.track.progress import Meter, Speed
from tests.track.support import CPU, add

pytestmark = pytest.mark.usefixtures("group_of_one")


def test_an_interval_is_a_mean_over_targets_and_starts_anew():
    meter = Meter(CPU)
    add(meter, 30.0, 10)
    add(meter, 10.0, 10, left_out=5)
    first, second = meter.take(0.25), meter.take(0.0)
    assert (first.loss, first.left_out, first.left_out_tokens, first.data_wait_s) == (2.0, 1, 5, 0.25)
    assert (second.left_out, second.data_wait_s) == (0, 0.0) and second.loss != second.loss


def test_paused_time_is_not_that_of_the_steps(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    meter = Meter(CPU)
    with meter.paused():
        pass
    assert meter.take(0.0).seconds == 2.0


def test_the_speed_is_smoothed():
    speed = Speed()
    assert speed.update(100, 1.0) == 100
    assert speed.update(200, 1.0) == pytest.approx(110)
