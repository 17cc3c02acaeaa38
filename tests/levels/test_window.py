"""A window saves and loads itself: what a fresh one took back reduces to the same sums."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nltrain.levels.groups import Group
from nltrain.levels.layout import FlatLayout
from nltrain.levels.ledger import Ledger
from nltrain.levels.window import GradientWindow, LocalWindow, NoWindow, ReductionOrder, ShardedWindow

CPU = torch.device("cpu")


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    made.close()


class Parts(nn.Module):
    """Two groups of parameters, each of which takes part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))
        self.groups = [Group.of([("a", self.a)]), Group.of([("b", self.b)])]

    def backward(self, window: GradientWindow, scale: float, admitted: bool = True) -> None:
        window.begin(torch.tensor(admitted))
        (scale * self.a.sum() + 2 * scale * self.b.sum()).backward()
        window.finish()


def window_of(kind: str, parts: Parts, ledger: Ledger) -> tuple[GradientWindow, ReductionOrder]:
    layouts, order = [FlatLayout(group.numels, 1, sum(group.numels)) for group in parts.groups], ReductionOrder()
    what = ("level", parts.groups, layouts, torch.float32, CPU, ledger)
    return LocalWindow(*what) if kind == "local" else ShardedWindow(*what, order=order, places=[0, 1]), order


def saved(window: GradientWindow) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """State, this rank's sums and the fragments by name, as a checkpoint would keep them."""
    return window.state_dict(), window.rank_state(), {n: f.tensor.clone() for n, f in window.fragments(0)}


@pytest.mark.parametrize("kind", ["local", "sharded"])
@pytest.mark.parametrize("fold_after", [None, 1, 2])
def test_what_a_fresh_window_took_back_reduces_to_the_same_sums(kind, fold_after, ledger):
    parts = Parts()
    window, order = window_of(kind, parts, ledger)
    for step in (1, 2):
        parts.backward(window, float(step))
        order.complete()
        if step == fold_after:
            window.fold()
    state, rank_state, fragments = saved(window)
    assert state == {
        "reduced_window": kind == "sharded" or fold_after is not None,
        "local_window": kind == "local" and fold_after != 2,
    }
    assert set(fragments) == ({"a.window", "b.window"} if state["reduced_window"] else set())
    assert set(rank_state) == ({"a", "b"} if state["local_window"] else set())
    assert window.unreduced_bytes == (40 if state["local_window"] else 0)
    window.close()

    again, order = window_of(kind, parts, ledger)
    parts.backward(again, 5.0)  # is overwritten
    order.complete()
    again.prepare_to_load(state)
    for name, fragment in again.fragments(0):
        fragment.tensor.copy_(fragments[name])
    again.load(state, [rank_state])
    assert [shard.tolist() for shard in again.reduce()] == [[3.0] * 6, [6.0] * 4]
    again.clear()
    assert saved(again)[0] == {"reduced_window": False, "local_window": False} and not again.unreduced_bytes


@pytest.mark.parametrize("kind", ["local", "sharded"])
def test_the_sums_of_several_saved_ranks_add_up(kind, ledger):
    window, _ = window_of(kind, Parts(), ledger)
    state = {"reduced_window": False, "local_window": True}
    window.prepare_to_load(state)
    window.load(state, [{"a": torch.full((6,), 1.0), "b": torch.ones(4)}, {"a": torch.full((6,), 2.0)}])
    assert [shard.tolist() for shard in window.reduce()] == [[3.0] * 6, [1.0] * 4]
    window.close()


def test_a_rank_that_is_left_out_adds_exact_zeros_whatever_its_gradient(ledger):
    parts = Parts()
    window, _ = window_of("local", parts, ledger)
    parts.backward(window, float("nan"), admitted=False)
    assert parts.a.grad is None and all(not shard.any() for shard in window.reduce())
    window.close()


def test_a_frozen_level_has_nothing_to_save_and_ignores_what_it_accumulated_before(ledger):
    window = NoWindow("level", [], [], torch.float32, CPU, ledger)
    state = {"reduced_window": True, "local_window": True}
    window.prepare_to_load(state)
    window.load(state, [{"a": torch.ones(6)}])
    window.finish()
    assert saved(window) == ({"reduced_window": False, "local_window": False}, {}, {})
