"""A resumed run is the run: bit for bit at the same world size, up to summation at others and other stages."""

import json
from functools import partial

import pytest
import torch

from benchmarks._level_toys import SEQ_LEN, Toy, gathered, levels, relative_error, train
from benchmarks._ranks import Ranks
from nltrain.fragment import Fragment
from nltrain.levels.scheduler import LevelScheduler

SEQUENCES, MICRO_BATCH = 12, 2
SAVED_AT, END = 5, 12  # quanta: every slow window (periods 2, 4, 8) is open at the save
FOLD_EVERY = 5  # quanta
STAGES = {"zero1": (1, 1, 1, 1), "zero2": (2, 2, 2, 2), "zero3": (3, 3, 3, 3), "mix": (3, 2, 1, 1)}


def scheduler_of(stages: str, dtype: str, fold: bool, optimizer: str = "adamw") -> tuple[Toy, LevelScheduler]:
    quantum = SEQUENCES * SEQ_LEN
    shared = {"optimizer": optimizer, "lr": 1e-2 if optimizer == "adamw" else 0.3, "weight_decay": 0.1}
    shared |= {"momentum": 0.9} if optimizer == "sgd" else {}
    config = levels(
        quantum,
        periods=(1, 2, 4, 8),
        stages=STAGES[stages],
        shared=shared,
        per_level={"slow": {"offload": True}},
        dtype=dtype,
        fold_every_tokens=FOLD_EVERY * quantum if fold else None,
        bucket_elements=2000,
    )
    model = Toy()
    return model, LevelScheduler(model, config, SEQ_LEN)


def save(scheduler: LevelScheduler, ranks: Ranks, name: str) -> None:
    """What a checkpoint keeps: fragments of every rank, one JSON state, one state per rank."""
    folder = ranks.folder / name
    folder.mkdir(exist_ok=True)
    fragments = {k: (f.tensor.clone(), f.start, f.total) for k, f in scheduler.fragments().items()}
    torch.save((fragments, scheduler.rank_state(), ranks.world_size), folder / f"{ranks.rank}.pt")
    (folder / f"{ranks.rank}.json").write_text(json.dumps(scheduler.state_dict()))
    torch.distributed.barrier()


def fill(mine: dict[str, Fragment], saved: list[dict[str, tuple[torch.Tensor, int, int]]]) -> None:
    """Fills this rank's slices from the saved slices that overlap them; every element must be found."""
    for name, fragment in mine.items():
        found = torch.zeros(fragment.tensor.numel(), dtype=torch.bool)
        fragment.tensor.fill_(float("nan"))
        for pieces in saved:
            if name not in pieces:
                continue
            values, start, total = pieces[name]
            assert total == fragment.total
            low = max(start, fragment.start)
            high = min(start + values.numel(), fragment.start + fragment.tensor.numel())
            if low < high:
                here = slice(low - fragment.start, high - fragment.start)
                fragment.tensor[here].copy_(values[low - start : high - start])
                found[here] = True
        assert found.all(), f"{name}: not all elements were saved"


def restore(scheduler: LevelScheduler, ranks: Ranks, name: str) -> None:
    folder = ranks.folder / name
    paths = sorted(folder.glob("*.pt"))
    loaded = [torch.load(path) for path in paths]
    states = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    assert all(state == states[0] for state in states)  # equal on all ranks
    scheduler.prepare_to_load(states[0])
    fill(scheduler.fragments(), [fragments for fragments, _, _ in loaded])
    taken = [rank_state for rank, (_, rank_state, _) in enumerate(loaded) if rank % ranks.world_size == ranks.rank]
    scheduler.load(states[0], taken)


def run(stages: str, dtype: str, fold: bool, optimizer: str, ranks: Ranks) -> dict:
    """Uninterrupted to the end, with a save on the way; then resumed in a fresh scheduler from that save."""
    name = f"{stages}-{dtype}-{fold}-{optimizer}"
    model, scheduler = scheduler_of(stages, dtype, fold, optimizer)
    train(model, scheduler, ranks.rank, ranks.world_size, range(SAVED_AT), MICRO_BATCH)
    save(scheduler, ranks, name)
    empty = not scheduler.rank_state()
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(SAVED_AT, END), MICRO_BATCH)
    whole, counts = gathered(scheduler), scheduler.counts
    last = scheduler.state_dict()
    scheduler.close()
    resumed = resume(stages, dtype, fold, optimizer, name, ranks)
    return {
        "whole": whole,
        "resumed": resumed["weights"],
        "ticks": [ticks, resumed["ticks"]],
        "counts": [counts, resumed["counts"]],
        "states": [last, resumed["state"]],
        "rank_state_empty": empty,
    }


def resume(stages: str, dtype: str, fold: bool, optimizer: str, name: str, ranks: Ranks) -> dict:
    model, scheduler = scheduler_of(stages, dtype, fold, optimizer)
    train(model, scheduler, ranks.rank, ranks.world_size, range(1), MICRO_BATCH)  # every value is overwritten
    restore(scheduler, ranks, name)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(SAVED_AT, END), MICRO_BATCH)
    result = {
        "weights": gathered(scheduler),
        "ticks": ticks,
        "counts": scheduler.counts,
        "state": scheduler.state_dict(),
    }
    scheduler.close()
    return result


SAME = [(s, "fp32", fold, "adamw") for s in STAGES for fold in (True, False)]
SAME += [("mix", "bf16", True, "adamw"), ("zero1", "bf16", False, "adamw"), ("mix", "fp32", True, "sgd")]
# (saved at stages, resumed at stages, fold)
OTHER = [("mix", "mix", True), ("mix", "mix", False), ("zero1", "zero3", False), ("zero3", "zero1", True)]
OTHER += [("zero1", "zero2", True), ("zero2", "mix", False)]


def _same(key: tuple) -> str:
    return "resume-" + "-".join(map(str, key))


def _other(saved: str, stages: str, fold: bool) -> str:
    return f"resume-{saved}-as-{stages}-{fold}"


CASES = {2: {_same(key): partial(run, *key) for key in SAME}}
for _world_size in (1, 3):
    CASES[_world_size] = {
        _other(saved, stages, fold): partial(resume, stages, "fp32", fold, "adamw", f"{saved}-fp32-{fold}-adamw")
        for saved, stages, fold in OTHER
    }


@pytest.mark.parametrize("key", SAME, ids=_same)
def test_resume_at_the_same_world_size_is_bit_for_bit(case, key):
    result = case(2, _same(key))
    for name, value in result["whole"].items():
        assert torch.equal(result["resumed"][name], value), name
    before, after = result["ticks"]
    assert [(t.name, t.tokens, t.window_tokens, t.updates, t.lr, t.grad_norm, t.drift) for t in before] == [
        (t.name, t.tokens, t.window_tokens, t.updates, t.lr, t.grad_norm, t.drift) for t in after
    ]
    assert result["counts"][0] == result["counts"][1]
    whole, resumed = result["states"]
    assert {**whole, "micro_steps": 0} == {**resumed, "micro_steps": 0}


def test_a_save_at_a_fold_needs_no_state_per_rank(case):
    assert case(2, _same(("zero1", "fp32", True, "adamw")))["rank_state_empty"]
    assert not case(2, _same(("zero1", "fp32", False, "adamw")))["rank_state_empty"]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(("saved", "stages", "fold"), OTHER)
def test_resume_at_another_world_size_and_stage_continues_the_same_run(case, world_size, saved, stages, fold):
    whole = case(2, _same((saved, "fp32", fold, "adamw")))
    resumed = case(world_size, _other(saved, stages, fold))
    assert resumed["counts"] == whole["counts"][0]
    worst = max(relative_error(resumed["weights"][name], value) for name, value in whole["whole"].items())
    assert worst <= 1e-4  # AdamW turns summation noise in nearly zero gradients into small steps
