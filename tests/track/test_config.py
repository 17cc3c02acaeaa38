"""The options of tracking are refused outside their range."""

import pytest

from nltrain.track.config import TrackConfig


def test_a_line_every_quantum_is_the_most():
    assert TrackConfig().log_every_quanta == 1
    with pytest.raises(ValueError, match=r"track\.log_every_quanta=0"):
        TrackConfig(log_every_quanta=0)
