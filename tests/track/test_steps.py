"""Step rows from the counters of one rank: real collectives of a group of one."""

import json

import pytest
import torch
import torch.distributed as dist

from nltrain.collectives import Ranks
from nltrain.store import open_store
from nltrain.track.config import TrackConfig
from nltrain.track.left_out import LeftOut
from nltrain.track.metrics import read_rows
from nltrain.track.progress import Meter, Speed
from nltrain.track.record import Record, RunFacts
from nltrain.track.rows import LeftOutRow, StepRow, of_kind
from nltrain.track.steps import StepLog
from tests.track.support import tick

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def add(meter, loss, targets, left_out=0):
    meter.start()
    meter.forward_ended()
    meter.add(*(torch.tensor(float(value), dtype=torch.float64) for value in (loss, targets, left_out)))


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


def test_what_was_left_out_has_its_samples_and_its_reason():
    left_out = LeftOut()
    for samples, verdict in (((1, 2), 0), ((3, 4), 1), ((5,), 2)):
        left_out.add(samples, 10 * len(samples), torch.tensor(verdict))
    assert left_out.take() == [
        {"samples": [3, 4], "tokens": 20, "reason": "loss not finite"},
        {"samples": [5], "tokens": 10, "reason": "loss spike"},
    ]
    assert left_out.take() == []


def test_steps_and_ticks_become_rows_and_a_line(tmp_path, capsys):
    facts = RunFacts("r", str(tmp_path / "out"), str(tmp_path / "store"), 1000, {})
    record = Record(TrackConfig(wandb="off"), facts, 0, open_store(facts.checkpoint_url), lambda: True)
    record.begin(1, 1, 200, None, 5.0)
    meter = Meter(CPU)
    steps = StepLog(record, meter, Ranks(), 1000)
    steps.start_at(200)
    for _ in range(2):
        steps.tick(tick("base", 300))
    steps.tick(tick("slow", 300, skipped="not finite"))
    add(meter, 30.0, 10, left_out=20)
    steps.count((3, 4), 20, torch.tensor(1))
    shown = steps.write(3, 300, {"base": {"done": 2, "skipped": 0, "due": 2}}, 0.5)
    assert shown["loss"] == 3.0
    add(meter, 10.0, 10)
    steps.count((5, 6), 20, torch.tensor(0))
    steps.write(4, 400, {}, 0.75)
    record.close(0)
    rows = read_rows(tmp_path / "out")
    found = [(each.step, each.step_tokens, each.loss, each.data_wait_s) for each in of_kind(rows, StepRow)]
    assert found == [(3, 100, 3.0, 0.5), (4, 100, 1.0, 0.25)]
    (left_out,) = of_kind(rows, LeftOutRow)
    assert (left_out.left_out_tokens, left_out.parts[0]["samples"], left_out.parts[0]["rank"]) == (20, [3, 4], 0)
    said = capsys.readouterr().out
    assert "step  3/10 | 300 tokens | loss 3.0000 | 20 tokens left out |" in said
    assert "| 2xbase slow(skipped)\n" in said
    assert "left out 20 tokens: rank 0: samples 3, 4 (loss not finite)\n" in said
    assert json.dumps(rows[-1].to_json(), allow_nan=False)
