"""Step rows from the counters of one rank: real collectives of a group of one."""

import json

import pytest
import torch

from nltrain.collectives import Ranks
from nltrain.store import open_store
from nltrain.track.config import TrackConfig
from nltrain.track.metrics import read_rows
from nltrain.track.progress import Meter
from nltrain.track.record import Record, RunFacts
from nltrain.track.rows import LeftOutRow, StepRow, of_kind
from nltrain.track.steps import StepLog
from tests.track.support import CPU, add, tick

pytestmark = pytest.mark.usefixtures("group_of_one")


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
