"""What the rows of a run say, when attempts overlap."""

import json
import time

from nltrain.store import open_store
from nltrain.track.metrics import (
    MetricsLog,
    RowsReader,
    effective,
    fetch_missing,
    log_fault,
    published_key,
    read_rows,
)
from nltrain.track.report import summarise
from nltrain.track.rows import StepRow, of_kind
from tests.track.support import row, run_with_a_kill


def test_superseded_rows_do_not_count(tmp_path):
    run_with_a_kill(tmp_path)
    steps = [(each.attempt, each.tokens) for each in of_kind(effective(read_rows(tmp_path)), StepRow)]
    assert steps == [(1, 100), (1, 200), (1, 300), (1, 400)] + [(2, t) for t in range(500, 1001, 100)]


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    log = MetricsLog(tmp_path, 1)
    log.log(row("attempt", workers=1))
    log.close()
    with log.path.open("a") as file:
        file.write('{"kind": "step", "tok')
    assert [each.kind for each in read_rows(tmp_path)] == ["attempt"]


def test_a_second_read_has_what_was_written_since_the_first_and_a_torn_line_once_it_is_whole(tmp_path):
    reader = RowsReader(tmp_path)
    assert reader.read() == []
    first, second = MetricsLog(tmp_path, 1), MetricsLog(tmp_path, 2)
    first.log(row("attempt", workers=1))
    second.log(row("attempt", 100, workers=2))
    assert [each.tokens for each in reader.read()] == [0, 100]
    line = json.dumps(row("step", 100).to_json() | {"attempt": 1, "time_s": 1.0}) + "\n"
    with first.path.open("a") as file:
        file.write(line[:20])
        file.flush()
        assert [each.tokens for each in reader.read()] == [0, 100]
        file.write(line[20:])
    log_fault(tmp_path, signal="SIGKILL", rank=0, pid=1, tokens=100)
    assert [each.kind for each in reader.read()] == ["fault", "attempt", "step", "attempt"]
    assert reader.read() == read_rows(tmp_path)
    first.close(), second.close()


def test_rows_are_ordered_by_attempt_whatever_the_clocks_say(tmp_path, monkeypatch):
    """Attempt 2 runs on a machine that is a day behind; the planted fault was noted on a third one, a day ahead."""
    for attempt, now_s in ((1, 200_000.0), (2, 113_600.0)):
        monkeypatch.setattr(time, "time", lambda now_s=now_s: now_s)
        log = MetricsLog(tmp_path, attempt)
        log.log(row("attempt", workers=1))
        log.log(row("step", 100 * attempt, step_tokens=100, seconds=0.5, loss=1.0))
        log.close()
    monkeypatch.setattr(time, "time", lambda: 300_000.0)
    log_fault(tmp_path, signal="SIGKILL", rank=0, pid=1, tokens=100)
    assert [each.get("attempt") for each in read_rows(tmp_path)] == [None, 1, 1, 2, 2]
    summary = summarise(read_rows(tmp_path))
    assert summary["seconds"] == 0
    assert (summary["kills"], summary["tokens"]) == (1, 200)


def test_a_row_is_written_with_the_attempt_and_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1234.56789)
    log = MetricsLog(tmp_path, 3)
    written = log.log(row("sample", 5, text="x"))
    log.close()
    assert json.loads(log.path.read_text()) == written.to_json()
    assert (written.attempt, written.time_s, written["version"]) == (3, 1234.568, 1)


def test_rows_of_other_machines_are_fetched_and_own_ones_are_kept(tmp_path):
    store = open_store(str(tmp_path / "store"))
    log = MetricsLog(tmp_path / "out", 2)
    log.log(row("sample", 5, text="mine"))
    log.close()
    for attempt in (1, 2):
        path = tmp_path / f"attempt_{attempt:04d}.jsonl"
        store.put(
            published_key("r", path), b'{"kind": "sample", "attempt": %d, "tokens": 1, "text": "old"}\n' % attempt
        )
    fetch_missing(store, "r", tmp_path / "out")
    assert [each["text"] for each in read_rows(tmp_path / "out")] == ["old", "mine"]
