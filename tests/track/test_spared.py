"""Writes that may fail: one line a minute, and one when they work again."""

import errno

from nltrain.track import spared
from nltrain.track.spared import Spared


def full():
    raise OSError(errno.ENOSPC, "No space left on device", "/out/x")


def test_failures_are_printed_once_a_minute_and_counted(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(spared.time, "monotonic", lambda: now[0])
    write = Spared("metrics")
    for _ in range(3):
        write(full)
    assert capsys.readouterr().out == (
        "metrics cannot be written /out/x: No space left on device: they are lost until that is mended; "
        "training goes on\n"
    )
    now[0] = 61.0
    write(lambda: None)
    assert capsys.readouterr().out == "metrics are written again; 3 were lost\n"
    write(lambda: None)
    assert capsys.readouterr().out == ""
