"""Rows as JSON and back; rows of the code before; rows of a version to come."""

import dataclasses
import json
import math

import pytest

from nltrain.track.goodput import goodput
from nltrain.track.metrics import effective, on_one_clock, read_rows, tail
from nltrain.track.report import summarise, write_report
from nltrain.track.rows import (
    KINDS,
    VERSION,
    EvaluationRow,
    TickRow,
    UnknownRow,
    ValidationRow,
    evaluation_row,
    from_json,
)
from nltrain.track.wandb_view import numbers
from tests.track.support import OLD_RUN, row

LINES = [json.loads(line) for path in sorted((OLD_RUN / "metrics").glob("*")) for line in path.read_text().splitlines()]
FAILED = {
    "kind": "checkpoint_failed", "attempt": 1, "tokens": 9, "time_s": 1.0, "name": "x", "error": "no room",
    "num_bytes": 0, "stall_seconds": 0.5, "write_seconds": 0.0, "deleted": [], "saved_tokens": 8,
}  # fmt: skip
EVALUATION = {
    "kind": "evaluation", "attempt": 1, "tokens": 9, "time_s": 1.0, "name": "a", "metrics": {"b": 0.5}, "seconds": 2.0,
}  # fmt: skip
ONE_OF_EACH = {each["kind"]: each for each in [*LINES, FAILED, EVALUATION]}
DIGEST = {"weights_sha256": None}  # in rows of an end that is no finish: left out before, null now


def test_there_is_an_example_of_every_kind():
    assert set(ONE_OF_EACH) == set(KINDS)


@pytest.mark.parametrize("old", [*LINES, FAILED, EVALUATION], ids=lambda old: old["kind"])
def test_an_old_row_is_read_and_written_again_with_the_same_values(old):
    read = from_json(old)
    assert type(read) is KINDS[old["kind"]]
    expected = old | {"version": VERSION}
    assert read.to_json() == (DIGEST | expected if old["kind"] == "end" else expected)
    assert from_json(json.loads(json.dumps(read.to_json()))) == read


def test_an_old_run_has_the_summary_that_the_code_before_gave_it(tmp_path):
    (tmp_path / "metrics").symlink_to(OLD_RUN / "metrics")
    assert write_report(tmp_path) == json.loads((OLD_RUN / "summary.json").read_text())
    assert (tmp_path / "cadence.png").stat().st_size > 0 < (tmp_path / "loss.png").stat().st_size


def test_old_rows_are_followed_as_they_appear():
    path = OLD_RUN / "metrics" / "attempt_0001.jsonl"
    rows = list(iter(tail(path).__next__, None))
    assert [each["kind"] for each in rows] == [json.loads(line)["kind"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", sorted({name for each in LINES for name in each} - {"kind"}))
def test_every_reader_works_where_a_field_is_missing(name):
    rows = [from_json({k: v for k, v in each.items() if k != name}) for each in LINES]
    assert summarise(rows)["tokens"] == (0 if name == "tokens" else 370944)
    assert goodput(rows)["training_s"] >= 0
    assert len(effective(on_one_clock(rows))) > 0
    assert all(isinstance(value, int | float) for each in rows[1:] for value in numbers(each).values())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_missing_field_is_the_empty_value_of_its_type(kind):
    bare = from_json({"kind": kind})
    assert all(not getattr(bare, each.name) for each in dataclasses.fields(bare))


def test_fields_and_kinds_of_another_version_do_no_harm():
    assert from_json(LINES[0] | {"version": 99, "new": 1}) == from_json(LINES[0])
    strange = {"kind": "strange", "version": 99, "attempt": 2, "tokens": 5, "time_s": 1.0, "new": {"a": 1}}
    read = from_json(strange)
    assert isinstance(read, UnknownRow)
    assert (read.attempt, read.tokens, read["new"], read.to_json()) == (2, 5, {"a": 1}, strange)


def test_a_number_that_is_not_finite_is_written_as_null():
    tick = dataclasses.replace(row("tick", 5, level="slow", lr=0.1), drift=math.nan, grad_norm=math.inf)
    written = json.loads(json.dumps(tick.to_json(), allow_nan=False))
    assert (written["drift"], written["grad_norm"], written["lr"]) == (None, None, 0.1)
    read = from_json(written)
    assert isinstance(read, TickRow) and read.drift is None


def test_a_row_can_be_read_by_name():
    tick = row("tick", 5, level="slow")
    assert (tick["kind"], tick["level"], tick.get("tokens"), tick.get("none", 7)) == ("tick", "slow", 5, 7)
    with pytest.raises(KeyError):
        tick["none"]


def test_validation_has_a_row_of_its_own_and_other_evaluations_share_one():
    metrics = {"loss": 1.0, "perplexity": 2.7, "targets": 3, "unigram_entropy": None, "bigram_entropy": 2.0}
    validation = evaluation_row("validation", 5, metrics, 0.5)
    assert isinstance(validation, ValidationRow) and validation.bigram_entropy == 2.0
    other = evaluation_row("accuracy", 5, {"accuracy": 0.25}, 0.5)
    assert isinstance(other, EvaluationRow) and numbers(other)["evaluation/accuracy/accuracy"] == 0.25


def test_rows_of_the_folder_are_typed():
    assert {type(each) for each in read_rows(OLD_RUN)} <= set(KINDS.values())
