"""A sleeping level leaves device memory and training does not notice."""

from functools import partial

import pytest
import torch

from benchmarks._level_toys import SEQ_LEN, Toy, gathered, levels, train
from benchmarks._ranks import Ranks
from nltrain.levels.scheduler import LevelScheduler

STAGES = {"zero1": (1, 1, 1, 1), "zero2": (2, 2, 2, 2), "zero3": (3, 3, 3, 3)}


def run(stages: str, dtype: str, optimizer: str, cap: float | None, ranks: Ranks) -> dict:
    quantum = 2 * ranks.world_size * SEQ_LEN
    shared = {"optimizer": optimizer, "lr": 1e-2, "max_relative_change": cap} | (
        {"momentum": 0.9} if optimizer == "sgd" else {}
    )
    result: dict = {"weights": [], "live": [], "ticks": []}
    for offload in (False, True):
        config = levels(
            quantum, (1, 2, 4, 8), STAGES[stages], shared, {"mid": {"offload": offload}, "slow": {"offload": offload}},
            dtype=dtype, bucket_elements=2000,
        )  # fmt: skip
        model = Toy()
        scheduler = LevelScheduler(model, config, SEQ_LEN)
        result["ticks"].append(train(model, scheduler, ranks.rank, ranks.world_size, range(10), 1))
        result["weights"].append(gathered(scheduler))
        result["live"].append({name: engine.device_state_elements() for name, engine in scheduler.engines.items()})
        result["fragments"] = {name: f.tensor.isfinite().all().item() for name, f in scheduler.fragments().items()}
        scheduler.close()
    return result


KEYS = [(s, "fp32", "adamw", None) for s in STAGES]
KEYS += [("zero1", "bf16", "sgd", None), ("zero3", "bf16", "adamw", None)]
KEYS += [("zero1", "fp32", "adamw", 1e-4), ("zero3", "fp32", "adamw", 1e-4)]  # so low that every tick is capped


def name_of(key: tuple) -> str:
    return "offload-" + "-".join(map(str, key))


CASES = {2: {name_of(key): partial(run, *key) for key in KEYS}}


@pytest.mark.parametrize("key", KEYS)
def test_training_is_bit_for_bit_the_same_with_and_without_offload(case, key):
    plain, offloaded = case(2, name_of(key))["weights"]
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)


@pytest.mark.parametrize("key", KEYS)
def test_a_sleeping_level_holds_no_masters_and_no_optimizer_state_on_the_device(case, key):
    result = case(2, name_of(key))
    resident, sleeping = result["live"]
    assert sleeping["mid"] == sleeping["slow"] == 0 < resident["slow"]
    assert sleeping["base"] == resident["base"] and sleeping["fast"] == resident["fast"]
    assert all(result["fragments"].values())
    assert f"cms.slow.up.weight.{'momentum_buffer' if key[2] == 'sgd' else 'exp_avg'}" in result["fragments"]
