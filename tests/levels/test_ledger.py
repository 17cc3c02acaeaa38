"""The ledger counts what crosses the wire: a level that is not due moves nothing, the rest is what the formula says."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks._level_cases import MODES, count
from benchmarks._level_toys import SEQ_LEN, Toy, levels, relative_error, train
from benchmarks._ranks import Ranks
from nltrain.levels.config import LevelConfig, LevelsConfig
from nltrain.levels.ledger import FOLD, OTHER, Ledger
from nltrain.levels.scheduler import LevelScheduler


def collectives(ranks: Ranks) -> dict[str, float]:
    """Known tensors through every collective the engines use."""
    ledger, n = Ledger(), 60
    x, world = torch.ones(n), ranks.world_size
    calls = {
        "all_reduce": lambda: dist.all_reduce(x.clone()),
        "reduce_scatter": lambda: dist.reduce_scatter_single(torch.empty(n // world), x),
        "all_gather": lambda: dist.all_gather_single(torch.empty(n), x[: n // world].clone()),
        "all_gather_list": lambda: dist.all_gather([torch.empty(n // world) for _ in range(world)], x[: n // world]),
        "broadcast": lambda: dist.broadcast(x.clone(), 0),
        "reduce": lambda: dist.reduce(x.clone(), 0),
        "gather": lambda: dist.gather(x, [torch.empty(n) for _ in range(world)] if ranks.rank == 0 else None),
    }
    found = {}
    for name, call in calls.items():
        with ledger.row("known", name):
            call()
        found[name] = ledger.charged("known", name)
    dist.all_reduce(x.clone())
    found["unclaimed"] = ledger.rows[OTHER].num_bytes
    ledger.close()
    dist.all_reduce(x.clone())
    found["after_close"] = ledger.rows[OTHER].num_bytes
    return found


def folding(ranks: Ranks) -> dict:
    """Folds have a row of their own and do not count as payload of a level."""
    quantum = ranks.world_size * SEQ_LEN
    config = levels(
        quantum, (1, 2, 4, 8), shared={"optimizer": "sgd", "phase_tokens": 0}, fold_every_tokens=3 * quantum
    )
    model = Toy()
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    train(model, scheduler, ranks.rank, ranks.world_size, range(3), 1)
    ledger = scheduler.ledger
    share = (ranks.world_size - 1) / ranks.world_size
    result = {
        name: (ledger.charged(name, FOLD), 4 * share * engine.num_parameters, ledger.payload(name))
        for name, engine in scheduler.engines.items()
    }
    scheduler.close()
    return result


class External(nn.Module):
    """Reads its child's weight without calling the child, as functional code does."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.child.weight, self.child.bias)


def external(ranks: Ranks) -> float:
    """ZeRO-3 gathers a parameter that its owner's parent reads; one SGD step against plain autograd."""
    torch.manual_seed(0)
    model = External()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"optimizer": "sgd", "lr": 0.1, "clip_norm": None, "zero_stage": 3}
    config = LevelsConfig((LevelConfig("base", ("*",), ranks.world_size, **settings),))
    scheduler = LevelScheduler(model, config, seq_len=1)
    x = torch.arange(6.0) / 8  # small enough that three steps do not run away
    worst = 0.0
    for _ in range(3):
        scheduler.start_micro_step()
        scheduler.backward(model(x).square().sum(), 1)
        scheduler.finish_quantum()
    weights = {name: value.clone() for name, value in scheduler.weights()}
    scheduler.close()
    if ranks.rank:
        return 0.0
    plain = {name: p.clone().requires_grad_() for name, p in start.items()}
    for _ in range(3):
        loss = torch.nn.functional.linear(x, plain["child.weight"], plain["child.bias"]).square().sum()
        gradients = torch.autograd.grad(loss, list(plain.values()))
        plain = {n: (p - 0.1 * g).detach().requires_grad_() for (n, p), g in zip(plain.items(), gradients, strict=True)}
    for name, value in plain.items():
        worst = max(worst, relative_error(weights[name], value.detach()))
    return worst


COUNTS = [(m, "fp32", "fp32", a) for m in MODES for a in (1, 4)]
COUNTS += [("local", "bf16", "bf16", 4), ("sharded", "bf16", "bf16", 1), ("gathered", "bf16", "fp32", 1)]
CASES = {
    2: {f"count-{'-'.join(map(str, key))}": partial(count, *key) for key in COUNTS}
    | {"collectives": collectives, "folding": folding, "external": external},
    4: {f"count-{mode}-fp32-fp32-4": partial(count, mode, "fp32", "fp32", 4) for mode in MODES}
    | {"collectives": collectives},
}


@pytest.mark.parametrize("world_size", [2, 4])
def test_known_collectives_count_what_they_send(case, world_size):
    found, full, share = case(world_size, "collectives"), 240, (world_size - 1) / world_size
    assert found == {
        "all_reduce": 2 * share * full,
        "reduce_scatter": share * full,
        "all_gather": share * full,
        "all_gather_list": share * full,
        "broadcast": share * full,
        "reduce": share * full,
        "gather": share * full,
        "unclaimed": 2 * share * full,
        "after_close": 2 * share * full,
    }


@pytest.mark.parametrize("key", [(2, *key) for key in COUNTS] + [(4, mode, "fp32", "fp32", 4) for mode in MODES])
def test_measured_bytes_are_what_the_formula_says(case, key):
    world_size, mode = key[:2]
    result = case(world_size, "count-" + "-".join(map(str, key[1:])))
    assert all(0.98 <= ratio <= 1.02 for ratio in result["ratios"].values()), result["ratios"]
    assert result["offbeat_elements"] == 0 and result["due_elements"] > 0
    assert result["control"] > 0 and result["other"] == 0
    if mode == "local":
        assert result["offbeat_bytes"] == 0


def test_folds_have_a_row_of_their_own(case):
    result = case(2, "folding")
    for name, (folded, expected, payload) in result.items():
        if name == "base":  # ticked in the same quantum: nothing left to fold
            assert folded == 0 and payload > 0
        else:
            assert folded == pytest.approx(expected, rel=0.01)
    assert result["slow"][2] == 0


def test_zero3_gathers_parameters_that_a_parent_reads_directly(case):
    assert case(2, "external") < 1e-6
