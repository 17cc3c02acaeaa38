"""Bad data never reaches a level: the bad rank alone is left out, at every stage and dtype, its tokens are counted."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks._level_toys import NAMES, SEQ_LEN, Toy, batch, gathered, levels, train
from benchmarks._ranks import Ranks
from nltrain.levels.guard import COUNTS, HISTORY, NOT_FINITE, SPIKE, LossGuard, judge_ranks
from nltrain.levels.ledger import Ledger
from nltrain.levels.scheduler import LevelScheduler, TrainingStopped

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
    """One bad micro-step on one rank, against the run in which that rank has no target there."""
    model, scheduler = build(stages, dtype, ranks)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(QUANTA), MICRO_BATCH, partial(bad_loss, kind))
    weights, counts = gathered(scheduler), scheduler.counts
    result = {"tokens": scheduler.tokens, "left_out": scheduler.skipped_micro_steps, "counts": counts}
    result["left_out_tokens"] = scheduler.left_out_tokens
    result["skipped"] = [tick for tick in ticks if tick.skipped]
    scheduler.close()

    model, scheduler = build(stages, dtype, ranks)
    for quantum in range(QUANTA):
        for step in range(2):
            first = (quantum * 2 + step) * MICRO_BATCH * ranks.world_size + ranks.rank * MICRO_BATCH
            tokens, targets = batch(range(first, first + MICRO_BATCH))
            if (quantum, step) == (BAD_QUANTUM, BAD_STEP) and ranks.rank == ranks.world_size - 1:
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


def padded(stages: str, forward: str, ranks: Ranks) -> dict:
    """Three ranks, four sequences: two ranks pad. Whatever a padding forward gives, the weights are the same."""
    found = {}
    for kind in ("honest", forward):
        model = Toy()
        shared = {"optimizer": "adamw", "lr": 1e-2, "phase_tokens": 0}
        made = levels(4 * SEQ_LEN, (1, 2, 4, 8), STAGES[stages], shared, bucket_elements=2000)
        scheduler = LevelScheduler(model, made, SEQ_LEN)

        def spoil(quantum: int, step: int, rank: int, loss: Tensor, kind: str = kind) -> Tensor:
            # A padding rank's loss is exactly 0.
            padding = not loss.detach().item()
            if kind == "honest" or not padding:
                return loss
            return Poison.apply(loss) if kind == "nan gradients" else loss * float("nan")

        ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(8), 1, spoil)
        # The windows that a save would write are finite too.
        open_windows = [f.tensor for name, f in scheduler.fragments().items() if name.endswith(".window")]
        found[kind] = (gathered(scheduler), [tick.skipped for tick in ticks], scheduler.skipped_micro_steps)
        finite = all(bool(window.isfinite().all()) for window in open_windows)
        local = all(bool(value.isfinite().all()) for value in scheduler.rank_state().values())
        assert finite and local
        scheduler.close()
    (weights, skipped, left_out), (expected, *_) = found[forward], found["honest"]
    return {
        "equal": all(torch.equal(weights[name], expected[name]) for name in expected),
        "skipped": [text for text in skipped if text],
        "left_out": left_out,
    }


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
        return int(guard.judge(torch.tensor(mean * count), count).verdict) == COUNTS

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
    result["off"] = all(int(off.judge(torch.tensor(value), 1).verdict) == COUNTS for value in (*noise, 1e9))
    result["off_nan"] = int(off.judge(torch.tensor(float("nan")), 1).verdict)
    ledger.close()
    return result


LOSSES = [(s, d, "nan") for s in STAGES for d in ("fp32", "bf16")] + [("mix", "fp32", "inf"), ("zero1", "bf16", "-inf")]
PADDED = [(stages, "nan loss") for stages in STAGES] + [("mix", "nan gradients"), ("zero2", "nan gradients")]
CASES = {
    3: {f"padded-{s}-{f}": partial(padded, s, f) for s, f in PADDED},
    2: {f"loss-{s}-{d}-{k}": partial(planted_loss, s, d, k) for s, d, k in LOSSES}
    | {f"gradient-{s}-{d}": partial(planted_gradient, s, d) for s in STAGES for d in ("fp32", "bf16")}
    | {f"stuck-{where}": partial(stuck, where) for where in ("loss", "gradient")}
    | {"spike": spike},
}


@pytest.mark.parametrize(("stages", "dtype", "kind"), LOSSES)
def test_a_bad_loss_leaves_out_its_own_rank_and_no_other(case, stages, dtype, kind):
    result = case(2, f"loss-{stages}-{dtype}-{kind}")
    assert result["equal"] and result["finite"]
    assert result["left_out"] == 1 and result["skipped"] == []
    first = ((BAD_QUANTUM * 2 + BAD_STEP) * 2 + 1) * MICRO_BATCH
    assert result["left_out_tokens"] == int((batch(range(first, first + MICRO_BATCH))[1] != -100).sum())
    assert result["tokens"] == QUANTA * 2 * MICRO_BATCH * 2 * SEQ_LEN
    assert all(count["done"] == count["due"] for count in result["counts"].values())


@pytest.mark.parametrize(("stages", "forward"), PADDED)
def test_a_rank_without_targets_contributes_exact_zeros_whatever_its_forward_gives(case, stages, forward):
    assert case(3, f"padded-{stages}-{forward}") == {"equal": True, "skipped": [], "left_out": 0}


def rows(*means: float, targets: int = 10) -> Tensor:
    """What 64 ranks of that mean hand in, the first ones as given, the others at 3.0."""
    losses = torch.full((64,), 3.0, dtype=torch.float64)
    losses[: len(means)] = torch.tensor(means, dtype=torch.float64)
    finite = losses.isfinite()
    return torch.stack([losses.nan_to_num(0) * targets, torch.full_like(losses, targets), (~finite).double()], 1)


def test_a_spike_leaves_out_the_ranks_that_make_it_and_all_where_a_few_do_not_explain_it():
    limit = torch.tensor(3.1, dtype=torch.float64)
    left_out = lambda table: {int(r): int(v) for r, v in enumerate(judge_ranks(table, limit)) if v}  # noqa: E731
    assert left_out(rows(3.3)) == {}  # high, but the mean of all is not
    assert left_out(rows(3.0, 20.0)) == {1: SPIKE}
    assert left_out(rows(float("nan"), 20.0, 3.0, 30.0)) == {0: NOT_FINITE, 1: SPIKE, 3: SPIKE}
    assert left_out(rows(*[9.0] * 10)) == dict.fromkeys(range(10), SPIKE)
    assert left_out(rows(*[9.0] * 20)) == dict.fromkeys(range(64), SPIKE)
    table = rows(20.0, float("nan"))
    table[1:60, 1] = table[1:60, 0] = 0  # no targets there: nothing to leave out, not finite or not
    assert left_out(table) == {0: SPIKE}
    assert left_out(torch.zeros(64, 3, dtype=torch.float64)) == {}
    assert not judge_ranks(rows(1e9), torch.tensor(torch.inf, dtype=torch.float64)).any()


def test_the_verdict_reads_nothing_on_the_host():
    with FakeTensorMode():  # raises where a value would have to be known
        assert judge_ranks(torch.zeros(64, 3, dtype=torch.float64), torch.ones((), dtype=torch.float64)).shape == (64,)


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
    assert result["host_state"] == (2, 0, 2 * 2 * 10) and result["same_state"]
    assert result["off"] and result["off_nan"] == NOT_FINITE
