"""What a resume says of other data and another schedule, and whose state a rank takes over."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch

from nltrain.data.config import DataConfig
from nltrain.errors import ConfigError
from nltrain.levels.config import ScheduleConfig
from nltrain.resume import data_changes, rank_seed, saved_rank_states, schedule_changes, seed_all

DATA = DataConfig(prefix="/new", seed=0, window_shards=16)
BEFORE = ScheduleConfig("cosine", total_tokens=1000, min_lr_fraction=0.1)
STATE = {
    "dataset_fingerprint": "a" * 20,
    "data": {"seed": 0, "window_shards": 16, "datasets": [{"url": "/old"}]},
    "levels": {"tokens": 1000},
    "config": {"levels": {"schedule": vars(BEFORE)}},
}


def test_equal_data_need_no_word():
    assert data_changes(STATE, DATA, "a" * 20) == []


def test_other_data_are_named_with_their_order():
    found = data_changes(STATE, replace(DATA, seed=5), "b" * 20)
    assert found == [
        "other data from 1,000 tokens on: dataset /old (aaaaaaaaaaaa) -> /new (bbbbbbbbbbbb), data.seed 0 -> 5"
    ]


def test_a_schedule_that_goes_on_otherwise_is_described():
    assert schedule_changes(STATE, BEFORE) == []
    (line,) = schedule_changes(STATE, replace(BEFORE, total_tokens=2000))
    assert line.startswith("levels.schedule at 1,000 tokens: the lr factor was 0.1 and now is 0.55, then cosine to 0.1")
    flat = replace(BEFORE, total_tokens=2000, extension="flat", extends_tokens=1000)
    assert schedule_changes(STATE, flat) == [
        "levels.schedule at 1,000 tokens: the lr factor, 0.1 here, goes on as before (extension=flat)"
    ]
    (constant,) = schedule_changes(STATE, ScheduleConfig())
    assert constant.endswith("the lr factor was 0.1 and now is 1 (extension=follow)")


def test_a_change_may_be_refused():
    with pytest.raises(ConfigError, match=r"set levels\.schedule\.extension=follow to take it, rewarm or flat with"):
        schedule_changes(STATE, replace(BEFORE, total_tokens=2000, extension="refuse"))


def test_every_saved_rank_is_taken_over_once():
    stored = SimpleNamespace(rank_state=lambda rank: {"levels": rank})
    loaded = SimpleNamespace(
        same_world_size=False, stored=stored, manifest=SimpleNamespace(world_size=7), rank_state={"levels": "own"}
    )
    taken = [each["levels"] for rank in range(3) for each in saved_rank_states(loaded, rank, 3)]
    assert sorted(taken) == list(range(7))
    loaded.same_world_size = True
    assert saved_rank_states(loaded, 2, 7) == [{"levels": "own"}]


def test_seeds_differ_by_rank_and_position_and_decide_every_generator():
    assert len({rank_seed(seed, rank, tokens) for seed in (0, 1) for rank in (0, 1) for tokens in (0, 4096)}) == 8
    draws = []
    for _ in range(2):
        seed_all(rank_seed(3, 1))
        draws.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
