"""Bad data never reaches a level: what is left out is left out on all ranks, at every stage and dtype, and counted."""

from functools import partial

import pytest
import torch
from torch import Tensor

from nltrain.levels.guard import HISTORY, LossGuard
from nltrain.levels.ledger import Ledger
from nltrain.levels.scheduler import LevelScheduler, TrainingStopped
from tests.levels.ranks import Ranks
from tests.levels.toys import NAMES, SEQ_LEN, Toy, batch, gathered, levels, train

STAGES = {"zero1": (1, 1, 1, 1), "zero2": (2, 2, 2, 2), "zero3": (3, 3, 3, 3), "mix": (3, 2, 1, 1)}
MICRO_BATCH, QUANTA = 2, 12  # two micro-steps per quantum
BAD_QUANTUM, BAD_STEP = 4, 1


def build(stages: str, dtype: str, ranks: Ranks, **config) -> tuple[Toy, LevelScheduler]:
    quantum = 2 * MICRO_BATCH * ranks.world_size * SEQ_LEN
    shared = {"optimizer": "sgd", "lr": 0.3, "clip_norm": None, "phase_tokens": 0}
    model = Toy()
    made = levels(quantum, (1, 2, 4, 8), STAGES[stages], shared, dtype=dtype, bucket_elements=2000, **config)
    return model, LevelScheduler(model, made, SEQ_LEN)


def bad_loss(kind: str, quantum: int, step: int, rank: int, loss: Tensor) -> Tensor:
    """Spoils the loss of the last rank only, so that its gradients are NaN too."""
    last = torch.distributed.get_world_size() - 1
    if (quantum, step, rank) != (BAD_QUANTUM, BAD_STEP, last):
        return loss
    return loss * float(kind)


def planted_loss(stages: str, dtype: str, kind: str, ranks: Ranks) -> dict:
    """One bad micro-step on one rank, against the run in which that micro-step has no target on any rank."""
    model, scheduler = build(stages, dtype, ranks)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(QUANTA), MICRO_BATCH, partial(bad_loss, kind))
    weights, counts = gathered(scheduler), scheduler.counts
    result = {"tokens": scheduler.tokens, "left_out": scheduler.skipped_micro_steps, "counts": counts}
    result["skipped"] = [tick for tick in ticks if tick.skipped]
    scheduler.close()

    model, scheduler = build(stages, dtype, ranks)
    for quantum in range(QUANTA):
        for step in range(2):
            first = (quantum * 2 + step) * MICRO_BATCH * ranks.world_size + ranks.rank * MICRO_BATCH
            tokens, targets = batch(range(first, first + MICRO_BATCH))
            if (quantum, step) == (BAD_QUANTUM, BAD_STEP):
                targets = torch.full_like(targets, -100)
            scheduler.start_micro_step()
            scheduler.backward(model.loss(tokens, targets), int((targets != -100).sum()))
        scheduler.finish_quantum()
    clean = gathered(scheduler)
    scheduler.close()
    result["equal"] = all(torch.equal(weights[name], clean[name]) for name in clean)
    result["finite"] = all(bool(value.isfinite().all()) for value in weights.values())
    return result


class Poison(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def planted_gradient(stages: str, dtype: str, ranks: Ranks) -> dict:
    """A finite loss with a NaN gradient that reaches `embed` and `fast` only, in one micro-step on rank 0."""
    model, scheduler = build(stages, dtype, ranks)
    ticks = []
    for quantum in range(QUANTA):
        handle = None
        if quantum == BAD_QUANTUM and ranks.rank == 0:
            handle = model.cms["fast"].register_forward_hook(lambda module, args, output: Poison.apply(output))
        ticks += train(model, scheduler, ranks.rank, ranks.world_size, range(quantum, quantum + 1), MICRO_BATCH)
        if handle is not None:
            handle.remove()
    result = {
        "skipped": [
            (tick.name, tick.tokens // scheduler.config.quantum, tick.skipped) for tick in ticks if tick.skipped
        ],
        "counts": scheduler.counts,
        "due": {name: sum(tick.name == name for tick in ticks) for name in NAMES},
        "left_out": scheduler.skipped_micro_steps,
        "finite": all(bool(value.isfinite().all()) for value in gathered(scheduler).values()),
    }
    verdicts = torch.tensor([count["skipped"] for count in scheduler.counts.values()])
    everyone = [torch.zeros_like(verdicts) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(everyone, verdicts)
    result["alike"] = all(torch.equal(one, verdicts) for one in everyone)
    scheduler.close()
    return result


def stuck(where: str, ranks: Ranks) -> str:
    """What a run says that sees nothing but bad micro-steps, or nothing but bad gradients."""
    model, scheduler = build("mix", "fp32", ranks, max_consecutive_skips=6)
    if where == "gradient":
        model.embed.register_forward_hook(lambda module, args, output: Poison.apply(output))

    def spoil(quantum: int, step: int, rank: int, loss: Tensor) -> Tensor:
        return loss * float("nan") if where == "loss" and rank == 0 else loss

    try:
        train(model, scheduler, ranks.rank, ranks.world_size, range(20), MICRO_BATCH, spoil)
    except TrainingStopped as error:
        return f"T={scheduler.tokens // scheduler.config.quantum} {error}"
    finally:
        scheduler.close()
    return "went on"


def spike(ranks: Ranks) -> dict:
    """The guard alone: noisy losses, one far away, one micro-step without a target."""
    device, ledger = torch.device("cpu"), Ledger()
    guard = LossGuard(6.0, device, ledger)
    generator = torch.Generator().manual_seed(0)
    targets = 10

    def judge(mean: float, count: int = targets) -> bool:
        return bool(guard.judge(torch.tensor(mean * count), count).admitted)

    noise = (3 + 0.1 * torch.randn(2 * HISTORY, generator=generator)).tolist()
    early = judge(50.0)  # nothing to compare with yet
    admitted = [judge(value) for value in noise]
    result = {"early": early, "noise": all(admitted), "spike": judge(3 + 0.1 * 8), "after": judge(3.1)}
    result["high_on_one_rank"] = judge(3 + 0.1 * 14 if ranks.rank == 0 else 3.0)
    result["low"] = judge(0.0)
    result["no_targets"] = judge(0.0, 0)
    restored = LossGuard(6.0, device, ledger)
    restored.load_state_dict(guard.state_dict())
    result["same_state"] = restored.state_dict() == guard.state_dict()
    result["host_state"] = guard.host_state()
    off = LossGuard(None, device, ledger)
    result["off"] = all(bool(off.judge(torch.tensor(value), 1).admitted) for value in (*noise, 1e9))
    result["off_nan"] = bool(off.judge(torch.tensor(float("nan")), 1).admitted)
    ledger.close()
    return result


LOSSES = [(s, d, "nan") for s in STAGES for d in ("fp32", "bf16")] + [("mix", "fp32", "inf"), ("zero1", "bf16", "-inf")]
CASES = {
    2: {f"loss-{s}-{d}-{k}": partial(planted_loss, s, d, k) for s, d, k in LOSSES}
    | {f"gradient-{s}-{d}": partial(planted_gradient, s, d) for s in STAGES for d in ("fp32", "bf16")}
    | {f"stuck-{where}": partial(stuck, where) for where in ("loss", "gradient")}
    | {"spike": spike}
}


@pytest.mark.parametrize(("stages", "dtype", "kind"), LOSSES)
def test_a_bad_loss_on_one_rank_touches_no_level_on_any_rank(case, stages, dtype, kind):
    result = case(2, f"loss-{stages}-{dtype}-{kind}")
    assert result["equal"] and result["finite"]
    assert result["left_out"] == 1 and result["skipped"] == []
    assert result["tokens"] == QUANTA * 2 * MICRO_BATCH * 2 * SEQ_LEN
    assert all(count["done"] == count["due"] for count in result["counts"].values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stages", STAGES)
def test_a_bad_gradient_discards_exactly_the_windows_that_took_it_in(case, stages, dtype):
    result = case(2, f"gradient-{stages}-{dtype}")
    # The poison enters behind `fast`, before `mid`: base holds the embedding, so base and fast take it in.
    assert result["skipped"] == [("base", 5, "gradient not finite"), ("fast", 6, "gradient not finite")]
    assert result["finite"] and result["alike"] and result["left_out"] == 0
    for name, count in result["counts"].items():
        assert count["done"] + count["skipped"] == count["due"] == result["due"][name]


def test_many_bad_micro_steps_in_a_row_stop_the_run_with_a_message(case):
    text = case(2, "stuck-loss")
    assert text.startswith("T=3 6 micro-steps in a row") and "max_consecutive_skips = 6" in text


def test_many_discarded_ticks_in_a_row_stop_the_run_with_the_level(case):
    text = case(2, "stuck-gradient")
    assert text.startswith("T=6 level 'base' left out 6 ticks in a row")


def test_a_spike_is_left_out_and_does_not_enter_the_statistics(case):
    result = case(2, "spike")
    assert result["early"] and result["noise"] and result["after"] and result["low"] and result["no_targets"]
    assert not result["spike"] and not result["high_on_one_rank"]
    assert result["host_state"] == (2, 0) and result["same_state"]
    assert result["off"] and not result["off_nan"]
