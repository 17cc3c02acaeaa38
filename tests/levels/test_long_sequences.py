"""128 sequences of 4,096 tokens on a number of ranks that does not divide them: a rank without a sequence pads.

63 ranks do not fit a test machine. One process plays them one after another with the parts that a run uses: the cut of
the quantum, the batch of padding, the guard's verdict on all ranks and the window. Another test runs three real ranks.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks._level_toys import VOCAB, Toy, gathered, levels, relative_error
from benchmarks._ranks import Ranks
from nltrain.data import Batch
from nltrain.levels.groups import Group
from nltrain.levels.guard import COUNTS, judge_ranks
from nltrain.levels.layout import FlatLayout
from nltrain.levels.ledger import Ledger
from nltrain.levels.quantum import cut_quantum
from nltrain.levels.scheduler import LevelScheduler
from nltrain.levels.window import LocalWindow
from nltrain.model import build, preset

SEQ_LEN, SEQUENCES, MICRO_BATCH = 4096, 128, 2


def text(indices: range) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, T] of these global sequences."""
    drawn = [torch.randint(VOCAB, (SEQ_LEN + 1,), generator=torch.Generator().manual_seed(i)) for i in indices]
    rows = torch.stack(drawn)
    return rows[:, :-1], rows[:, 1:].clone()


class Overflow(torch.autograd.Function):
    """As where a text overflows a memory: the loss of ignored targets is still 0, every gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, torch.nan)


def batch_of(indices: range) -> tuple[Tensor, Tensor, int]:
    if not indices:
        padding = Batch.padding(SEQ_LEN, VOCAB)
        return padding.tokens, padding.targets, 0
    tokens, targets = text(indices)
    return tokens, targets, targets.numel()


@cache
def one_after_another(num_ranks: int) -> tuple[Tensor, int, int]:
    """Gradient sums of the quantum over all ranks, its targets, and how many parts were padding."""
    model = Toy()
    parameters = list(model.parameters())
    numel = sum(p.numel() for p in parameters)
    layout = FlatLayout([p.numel() for p in parameters], 1, numel)
    ledger = Ledger()
    window = LocalWindow(
        "all", [Group.of(list(model.named_parameters()))], [layout], torch.float32, torch.device("cpu"), ledger
    )
    num_targets = padded = 0
    for step in cut_quantum(SEQUENCES, MICRO_BATCH, num_ranks):
        batches = [batch_of(indices) for indices in step]
        # The guard sees the losses of all ranks before any backward; a loss of ignored targets alone is 0.
        losses = [model.loss(tokens, targets) if count else None for tokens, targets, count in batches]
        table = [
            [loss.item() if loss is not None else 0.0, count, 0]
            for loss, (*_, count) in zip(losses, batches, strict=True)
        ]
        verdicts = judge_ranks(torch.tensor(table, dtype=torch.float64), None)
        for loss, verdict, (tokens, targets, count) in zip(losses, verdicts, batches, strict=True):
            window.begin((verdict == COUNTS) & (count > 0))
            (loss if loss is not None else Overflow.apply(model.loss(tokens, targets))).backward()
            window.finish()
            num_targets += count
            padded += not count
    sums = window.sums[0].clone()
    window.close()
    ledger.close()
    return sums, num_targets, padded


@pytest.mark.parametrize(("num_ranks", "num_padded"), [(3, 1), (43, 1), (48, 16), (56, 40), (63, 61)])
def test_every_number_of_ranks_sums_the_same_gradients_though_the_padding_of_some_is_nan(num_ranks, num_padded):
    expected, targets, padded = one_after_another(1)
    assert (targets, padded) == (SEQUENCES * SEQ_LEN, 0)
    got, targets, padded = one_after_another(num_ranks)
    assert (targets, padded) == (SEQUENCES * SEQ_LEN, num_padded)
    assert relative_error(got, expected) <= 1e-5


class Broken(nn.Module):
    """A one-layer Hope whose loss and gradients on padding are NaN."""

    def __init__(self) -> None:
        super().__init__()
        config = replace(
            preset("hope", "tiny"), vocab_size=VOCAB, width=32, num_layers=1, head_dim=16, memory_hidden=16
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hope = build(config)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.hope.loss(tokens, targets)
        return loss if (targets >= 0).any() else Overflow.apply(loss) * torch.nan


def hope_on(sequences: int, ranks: Ranks) -> dict:
    """One quantum of `sequences`, every level due, at ZeRO 3, 2, 1 and 1."""
    config = levels(sequences * SEQ_LEN, (1, 1, 1, 1), (3, 2, 1, 1), {"optimizer": "sgd", "lr": 0.3})
    model = Broken()
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    for step in cut_quantum(sequences, MICRO_BATCH, ranks.world_size):
        tokens, targets, count = batch_of(step[ranks.rank])
        scheduler.start_micro_step()
        scheduler.backward(model.loss(tokens, targets), count)
    ticks = scheduler.finish_quantum()
    found = {
        "skipped": [tick.name for tick in ticks if tick.skipped],
        "left_out": scheduler.left_out_tokens,
        "norms": [tick.grad_norm for tick in ticks],
        "weights": gathered(scheduler),
    }
    scheduler.close()
    return found


QUANTUM = 8  # sequences: six and then two on three ranks, so that the third one pads
CASES = {world: {"hope-4096": partial(hope_on, QUANTUM)} for world in (1, 3)}


def test_hope_on_three_ranks_at_4096_tokens_equals_one_rank_though_the_third_has_nothing_but_nan(case):
    one, three = case(1, "hope-4096"), case(3, "hope-4096")
    assert three["skipped"] == one["skipped"] == [] and three["left_out"] == 0
    assert torch.allclose(torch.tensor(three["norms"]), torch.tensor(one["norms"]), rtol=1e-4)
    assert max(relative_error(three["weights"][name], value) for name, value in one["weights"].items()) <= 1e-5


def test_hope_stays_finite_on_padding():
    model, padding = Broken().hope, Batch.padding(SEQ_LEN, VOCAB)
    for name, parameter in model.named_parameters():
        if name.endswith("gate_bias"):
            parameter.data.add_(6.0)  # inner learning rate and retention near their caps
    loss = model.loss(padding.tokens, padding.tokens, padding.document_starts)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
