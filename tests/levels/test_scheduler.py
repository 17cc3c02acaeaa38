"""Schedules, frozen levels, caps, evaluation between quanta, activation checkpointing, and the numbers of a tick."""

import json
import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks._level_toys import NAMES, SEQ_LEN, Toy, batch, gathered, levels, train, train_dense, worst_error
from benchmarks._ranks import Ranks
from nltrain.levels.config import LevelsError, ScheduleConfig
from nltrain.levels.scheduler import LevelScheduler

MIX = (3, 2, 1, 1)


def start_of(name: str) -> torch.Tensor:
    return dict(Toy().named_parameters())[name].detach()


def scheduled(ranks: Ranks) -> dict:
    """A warm-up and a cosine over T: slow levels take their lr from T as well."""
    quantum = 2 * ranks.world_size * SEQ_LEN
    schedule = ScheduleConfig("cosine", warmup_tokens=5 * quantum, total_tokens=20 * quantum, min_lr_fraction=0.1)
    shared = {"optimizer": "sgd", "lr": 0.3, "weight_decay": 0.05}
    config = levels(quantum, (1, 2, 4, 8), MIX, shared, schedule=schedule)
    model = Toy()
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(16), 2)
    weights = gathered(scheduler)
    described = scheduler.describe()
    scheduler.close()
    reference = Toy()
    train_dense(reference, config, range(16), 2, ranks.world_size)
    moved = sum((p - q).detach().square().sum() for p, q in _base(reference, Toy())) ** 0.5
    size = sum(q.detach().square().sum() for _, q in _base(reference, Toy())) ** 0.5
    return {
        "error": worst_error(weights, reference.named_parameters()) if ranks.rank == 0 else 0.0,
        "lrs": [(tick.tokens, tick.lr / 0.3, schedule.factor(tick.tokens)) for tick in ticks],
        "drift": ([tick.drift for tick in ticks if tick.name == "base"][-1], (moved / size).item()),
        "described": json.dumps(described),
    }


def _base(a: Toy, b: Toy):
    return [(p, q) for (n, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True) if "cms" not in n]


def frozen(stage: int, ranks: Ranks) -> dict:
    """A frozen level keeps its weights, is never due, and is saved with the rest."""
    quantum = ranks.world_size * SEQ_LEN
    config = levels(quantum, (1, 2, 4, 8), (1, 1, stage, 1), per_level={"mid": {"frozen": True}}, dtype="bf16")
    model = Toy()
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(8), 1)
    weights, fragments = gathered(scheduler), scheduler.fragments()
    counts = scheduler.counts["mid"]
    saved = sum(fragments[n].tensor.numel() for n in fragments if n.startswith("cms.mid") and n.endswith(".master"))
    kinds = {n.rsplit(".", 1)[1] for n in fragments if n.startswith("cms.mid")}
    scheduler.close()
    total = torch.tensor(saved)
    torch.distributed.all_reduce(total)
    return {
        "same": ranks.rank != 0
        or all(torch.equal(weights[n], start_of(n)) for n in weights if n.startswith("cms.mid")),
        "ticked": "mid" in {tick.name for tick in ticks},
        "counts": counts,
        "saved": int(total) == sum(p.numel() for p in Toy().cms["mid"].parameters()),
        "kinds": kinds,
    }


def capped(stage: int, ranks: Ranks) -> dict:
    """||dW|| / ||W|| of every tick stays below the cap, and the model computes with the capped weights."""
    quantum, cap = ranks.world_size * SEQ_LEN, 1e-3
    config = levels(quantum, (1, 2, 4, 8), (stage,) * 4, {"optimizer": "sgd", "lr": 5.0, "max_relative_change": cap})
    model = Toy()
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(1), 1)
    first = gathered(scheduler)
    base = {n: v for n, v in first.items() if "cms" not in n}
    change = math.sqrt(sum((v - start_of(n)).square().sum().item() for n, v in base.items())) if ranks.rank == 0 else 0
    size = math.sqrt(sum(start_of(n).square().sum().item() for n in base)) if ranks.rank == 0 else 1
    tokens, targets = batch(range(2))
    with torch.no_grad():
        loss = model.loss(tokens, targets).item()
    copy = Toy()
    if ranks.rank == 0:
        copy.load_state_dict(first)
    expected = copy.loss(tokens, targets).item() if ranks.rank == 0 else loss
    ticks += train(model, scheduler, ranks.rank, ranks.world_size, range(1, 8), 1)
    scheduler.close()
    return {
        "ratios": [tick.update_ratio for tick in ticks],
        "change": change / size,
        "loss": (loss, expected),
        "cap": cap,
    }


def evaluated(stage: int, ranks: Ranks) -> dict:
    """Evaluation between quanta, of another length than training, changes nothing."""
    quantum, found = 2 * ranks.world_size * SEQ_LEN, []
    for evaluate in (False, True):
        config = levels(quantum, (1, 2, 4, 8), (stage,) * 4, {"optimizer": "sgd", "lr": 0.3})
        model = Toy()
        scheduler = LevelScheduler(model, config, SEQ_LEN)
        for quantum_index in range(6):
            train(model, scheduler, ranks.rank, ranks.world_size, range(quantum_index, quantum_index + 1), 2)
            if evaluate:
                with torch.no_grad():
                    for _ in range(1 + quantum_index % 3):
                        model.loss(*batch(range(3)))
        found.append(gathered(scheduler))
        scheduler.close()
    return {"equal": all(torch.equal(found[0][name], found[1][name]) for name in found[0])}


class Checkpointed(Toy):
    """Recomputes its memory levels in backward; one of them runs again outside the checkpoint."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for level in self.cms.values():
            x = level(x) if self.reentrant is None else checkpoint(level, x, use_reentrant=self.reentrant)
        return self.head(self.norm(self.cms["fast"](x)))


def checkpointed(stage: int, ranks: Ranks) -> dict:
    """Activation checkpointing of both kinds against none."""
    quantum, found = 2 * ranks.world_size * SEQ_LEN, {}
    for reentrant in (None, False, True):
        config = levels(quantum, (1, 2, 4, 8), (stage,) * 4, {"optimizer": "sgd", "lr": 0.3}, bucket_elements=2000)
        model = Checkpointed(reentrant)
        scheduler = LevelScheduler(model, config, SEQ_LEN)
        train(model, scheduler, ranks.rank, ranks.world_size, range(8), 1)
        found[reentrant] = gathered(scheduler)
        scheduler.close()
    if ranks.rank:
        return {}
    return {kind: worst_error(found[kind], found[None].items()) for kind in (False, True)}


def misfits(ranks: Ranks) -> dict[str, str]:
    """States that do not belong to this plan."""
    quantum = 4 * ranks.world_size * SEQ_LEN
    scheduler = LevelScheduler(Toy(), levels(quantum), SEQ_LEN)
    state = scheduler.state_dict()
    messages = {}
    for name, wrong in {
        "levels": {**state, "levels": {"base": state["levels"]["base"]}},
        "quantum": {**state, "tokens": quantum // 2, "quantum_tokens": quantum // 2},
    }.items():
        try:
            scheduler.prepare_to_load(wrong)
            messages[name] = "accepted"
        except LevelsError as error:
            messages[name] = str(error)
    scheduler.close()
    try:
        LevelScheduler(Toy(), levels(SEQ_LEN), SEQ_LEN)
        messages["small"] = "accepted"
    except LevelsError as error:
        messages["small"] = str(error)
    return messages


CASES = {
    2: {f"frozen-{stage}": partial(frozen, stage) for stage in (1, 3)}
    | {f"capped-{stage}": partial(capped, stage) for stage in (1, 2, 3)}
    | {f"evaluated-{stage}": partial(evaluated, stage) for stage in (1, 3)}
    | {f"checkpointed-{stage}": partial(checkpointed, stage) for stage in (1, 2, 3)}
    | {"scheduled": scheduled, "misfits": misfits}
}


def test_schedules_follow_tokens_and_the_numbers_of_a_tick_are_true(case):
    result = case(2, "scheduled")
    assert result["error"] <= 1e-6
    assert all(fraction == pytest.approx(factor) for _, fraction, factor in result["lrs"])
    reported, computed = result["drift"]
    assert reported == pytest.approx(computed, rel=1e-5)
    assert [row["name"] for row in json.loads(result["described"])] == list(NAMES)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_frozen_level_stays_as_it_is_and_is_saved(case, stage):
    result = case(2, f"frozen-{stage}")
    assert result["same"] and not result["ticked"] and result["saved"]
    assert result["counts"] == {"done": 0, "skipped": 0, "due": 0} and result["kinds"] == {"master"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_relative_change_of_a_tick_is_capped(case, stage):
    result = case(2, f"capped-{stage}")
    assert max(result["ratios"]) <= result["cap"] * (1 + 1e-6)
    assert result["change"] == pytest.approx(result["cap"], rel=1e-3)
    loss, expected = result["loss"]
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_between_quanta_changes_nothing(case, stage):
    assert case(2, f"evaluated-{stage}")["equal"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_activation_checkpointing_of_both_kinds_changes_only_rounding(case, stage):
    assert all(error <= 1e-6 for error in case(2, f"checkpointed-{stage}").values())


def test_a_state_of_another_plan_is_refused(case):
    messages = case(2, "misfits")
    assert "['base']" in messages["levels"] and "'slow'" in messages["levels"]
    assert "not a multiple of quantum_tokens" in messages["quantum"]
    assert "fewer than 2 ranks. Raise it to at least 16" in messages["small"]
