"""Values computed from the config: every sample once, whatever the ranks and wherever a run resumes."""

import runpy
from pathlib import Path

import pytest
import torch

from nltrain.config import override
from nltrain.derived import evaluation_setting, run_facts, samples_of, total_tokens
from nltrain.local.drill import QUANTUM, SEQ_LEN, SMALL

JOB = Path(__file__).resolve().parents[2] / "jobs" / "hope_tiny.py"
QUANTA = 8


@pytest.fixture(scope="module")
def config():
    values = SMALL | {"train.total_tokens": QUANTA * QUANTUM, "levels.schedule.total_tokens": QUANTA * QUANTUM}
    values |= {"data.prefix": "/data", "train.validate_every_tokens": 3 * QUANTUM}
    return override(runpy.run_path(str(JOB))["config"], [f"{key}={value}" for key, value in values.items()])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_ranks_share_every_sample_in_order(config, world_size):
    ranks = [list(samples_of(config, 2 * QUANTUM, rank, world_size)) for rank in range(world_size)]
    steps = zip(*ranks, strict=True)
    found = [sample for step in steps for part in step for sample in part]
    assert found == list(range(2 * QUANTUM // SEQ_LEN, QUANTA * QUANTUM // SEQ_LEN))


def test_rooms_get_plain_values(config):
    facts = run_facts(config)
    assert (facts.name, facts.total_tokens) == (config.name, total_tokens(config)) == (config.name, QUANTA * QUANTUM)
    assert facts.resolved["train"]["total_tokens"] == QUANTA * QUANTUM
    setting = evaluation_setting(config, 1, 2, torch.device("cpu"))
    assert [n for n in range(1, QUANTA + 1) if setting.due(n * QUANTUM)] == [3, 6, 8]
    assert (setting.rank, setting.world_size, setting.num_sequences) == (1, 2, SMALL["train.validation_sequences"])
