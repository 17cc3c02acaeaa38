"""What rank 0 writes down, and that the other ranks write nothing."""

import json

import pytest

from nltrain.errors import ConfigError
from nltrain.store import open_store
from nltrain.track.config import TrackConfig
from nltrain.track.metrics import read_rows
from nltrain.track.record import Record, RunFacts, claim_folder
from nltrain.track.rows import AttemptRow, EndRow, GoodputRow, of_kind
from tests.track.support import row


@pytest.fixture
def make(tmp_path):
    opened = []

    def record(rank=0):
        facts = RunFacts("r", str(tmp_path / "out"), str(tmp_path / "store"), 1000, {})
        opened.append(Record(TrackConfig(wandb="off"), facts, rank, open_store(facts.checkpoint_url), lambda: True))
        return opened[-1]

    yield record
    for each in opened:
        each.close(0)


def step(tokens):
    return row("step", tokens, step=tokens // 100, step_tokens=100, seconds=0.5, loss=1.0, total_tokens=1000)


def test_a_resumed_attempt_knows_what_it_repeats(make, tmp_path):
    first = make()
    assert first.begin(1, 2, 0, None, 5.0) == "attempt 1: a new run with 2 workers"
    first.row(step(300))
    first.show("training", 300, True)
    first.close(1)
    again = make().begin(2, 1, 200, "c", 6.0)
    assert again == (
        "attempt 2: resumed from checkpoint c at 200 tokens with 1 workers; 100 tokens are trained again "
        "(submitted again)"
    )
    attempts = of_kind(read_rows(tmp_path / "out"), AttemptRow)
    assert [(each.attempt, each.tokens_lost, each.started_s) for each in attempts] == [(1, 0, 5.0), (2, 100, 6.0)]
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["total_tokens"], status["checkpoint_url"]) == (1000, str(tmp_path / "store"))


def test_an_evaluation_is_missing_where_the_step_is_on_record_and_its_row_is_not(make):
    record = make()
    record.begin(1, 1, 0, None, 5.0)
    assert record.missing_evaluations(100, ["validation", "accuracy"]) == []
    record.row(step(100))
    assert record.missing_evaluations(100, ["validation", "accuracy"]) == ["validation", "accuracy"]
    record.row(row("evaluation", 100, name="accuracy"))
    assert record.missing_evaluations(100, ["validation", "accuracy"]) == ["validation"]
    record.row(row("validation", 100, loss=1.0))
    assert record.missing_evaluations(100, ["validation", "accuracy"]) == []


def test_the_end_of_a_run_is_reported_and_published(make, tmp_path, capsys):
    record = make()
    assert record.report() is None  # no step: a line instead
    record.begin(1, 1, 0, None, 5.0)
    record.row(step(100))
    record.goodput(100)
    record.row(EndRow(tokens=100, reason="finished", level_updates={}, weights_sha256="ab"))
    record.publish()
    summary = record.report()
    record.close(0)
    assert (summary["weights_sha256"], summary["finished"]) == ("ab", True)
    assert len(of_kind(read_rows(tmp_path / "out"), GoodputRow)) == 1
    local = (tmp_path / "out" / "metrics" / "attempt_0001.jsonl").read_bytes()
    assert open_store(str(tmp_path / "store")).get("r/metrics/attempt_0001.jsonl") == local
    assert "no step is in the metrics" in capsys.readouterr().out


def test_other_ranks_write_nothing_but_who_they_are(make, tmp_path, capsys):
    record = make(rank=1)
    assert record.begin(1, 2, 0, None, 5.0) == ""
    record.row(step(100))
    record.show("training", 100, True)
    record.say("hello")
    record.goodput(100)
    record.publish()
    assert record.report() is None and record.missing_evaluations(100, ["validation"]) == []
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""
    record.note_rank({"rank": 1, "pid": 5})
    assert json.loads((tmp_path / "out" / "ranks" / "rank_0001.json").read_text())["pid"] == 5


def test_a_folder_belongs_to_one_run(tmp_path):
    claim_folder(tmp_path / "out", "a", "url")
    claim_folder(tmp_path / "out", "a", "url")
    with pytest.raises(ConfigError, match="holds the run 'a'"):
        claim_folder(tmp_path / "out", "b", "url")
