"""Two sharded levels reduce in one order on all ranks, whatever order autograd finishes their gradients in."""

import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._level_toys import MLP, SEQ_LEN, VOCAB, WIDTH, batch, gathered, worst_error
from benchmarks._ranks import Ranks
from nltrain.levels.config import LevelConfig, LevelsConfig
from nltrain.levels.groups import Group
from nltrain.levels.layout import FlatLayout, RowLayout
from nltrain.levels.ledger import Ledger
from nltrain.levels.scheduler import LevelScheduler
from nltrain.levels.window import ReductionOrder, ShardedWindow

TRIALS = 40
LEVELS = {"a": [[3, 5], [4], [2, 2, 2]], "b": [[8], [6, 1]], "c": [[4], [4], [4]]}  # elements per parameter and group


def permuted(layout: type, ranks: Ranks) -> float:
    """Every rank hands gradients in by an order of its own and leaves some out; worst error of the sums."""
    device, ledger = torch.device("cpu"), Ledger()
    order = ReductionOrder()
    windows, everything = {}, []
    for place, (name, groups) in enumerate(LEVELS.items()):
        members = [
            Group.of([(f"{name}.{group}.{i}", nn.Parameter(torch.zeros(n))) for i, n in enumerate(numels)])
            for group, numels in enumerate(groups)
        ]
        if layout is FlatLayout:
            layouts = [FlatLayout(n, ranks.world_size, -(-sum(n) // ranks.world_size)) for n in groups]
        else:
            layouts = [RowLayout(n, ranks.world_size) for n in groups]
        # Interleaved as blocks are: a group of one level, then one of another.
        places = [3 * group + place for group in range(len(groups))]
        what = (name, members, layouts, torch.float32, device, ledger)
        windows[name] = ShardedWindow(*what, order=order, places=places)
        everything += [(name, g, i, n) for g, numels in enumerate(groups) for i, n in enumerate(numels)]
    own, shared, worst = random.Random(ranks.rank), random.Random(17), 0.0
    for _ in range(TRIALS):
        # What each rank contributes is known to all; in which order, to itself alone.
        value = {(r, *what): shared.randint(1, 99) for r in range(ranks.world_size) for what in everything}
        left_out = {key for key in value if shared.random() < 0.2}
        mine = [what for what in everything if (ranks.rank, *what) not in left_out]
        own.shuffle(mine)
        for name, group, index, numel in mine:
            gradient = torch.full((numel,), float(value[ranks.rank, name, group, index, numel]))
            windows[name]._accumulate(group, index, gradient)
        for window in windows.values():
            window.finish()
        order.complete()
        for name, group, index, numel in everything:
            keys = [(r, name, group, index, numel) for r in range(ranks.world_size)]
            expected = float(sum(value[key] for key in keys if key not in left_out))
            window = windows[name]
            for span in window.layouts[group].spans(ranks.rank):
                if span.parameter == index:
                    found = window.shards[group].narrow(0, span.offset, span.length)
                    worst = max(worst, (found - expected).abs().max().item())
        for window in windows.values():
            window.clear()
    total = torch.tensor(worst)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    ledger.close()
    return total.item()


class Branches(nn.Module):
    """Two parallel branches of one size, whose order in the graph depends on the rank."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
            self.left, self.right = MLP(), MLP()

    def loss(self, tokens: Tensor, targets: Tensor, swapped: bool) -> Tensor:
        x = self.embed(tokens)
        if swapped:
            right = self.right(x)
            left = self.left(x)
        else:
            left = self.left(x)
            right = self.right(x)
        logits = self.head(left + right)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def branches(ranks: Ranks) -> float:
    """A level per branch, both at ZeRO-2; every second rank runs the branches the other way round."""
    quantum = ranks.world_size * SEQ_LEN
    shared = {"period_tokens": quantum, "optimizer": "sgd", "lr": 0.3, "clip_norm": None, "zero_stage": 2}
    parts = [LevelConfig("base", ("rest",), **shared)]
    parts += [LevelConfig(side, (f"{side}.*",), **shared) for side in ("left", "right")]
    model = Branches()
    scheduler = LevelScheduler(model, LevelsConfig(tuple(parts), bucket_elements=1600), SEQ_LEN)
    for quantum_index in range(6):
        first = quantum_index * ranks.world_size + ranks.rank
        tokens, targets = batch(range(first, first + 1))
        scheduler.start_micro_step()
        loss = model.loss(tokens, targets, swapped=ranks.rank % 2 == 1)
        scheduler.backward(loss, int((targets != -100).sum()))
        scheduler.finish_quantum()
    weights = gathered(scheduler)
    scheduler.close()
    if ranks.rank:
        return 0.0
    reference = Branches()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3)
    for quantum_index in range(6):
        first = quantum_index * ranks.world_size
        tokens, targets = batch(range(first, first + ranks.world_size))
        optimizer.zero_grad()
        (reference.loss(tokens, targets, swapped=False) / (targets != -100).sum()).backward()
        optimizer.step()
    return worst_error(weights, reference.named_parameters())


LAYOUTS = {"flat": FlatLayout, "rows": RowLayout}
WORLD_SIZES = (2, 3, 4)
CASES = {
    world: {f"permuted-{name}": partial(permuted, layout) for name, layout in LAYOUTS.items()} | {"branches": branches}
    for world in WORLD_SIZES
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_right_in_any_order_of_completion_on_any_rank(case, world_size, layout):
    assert case(world_size, f"permuted-{layout}") == 0


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_that_run_two_levels_the_other_way_round_train_as_one(case, world_size):
    assert case(world_size, "branches") <= 1e-6
