"""The accumulated gradient of one level since its last tick: sums over real targets, in fp32.

A window takes every gradient off its parameter as soon as autograd has finished it, before anything else sees it. Where
the guard left a rank out, or a rank has no targets, the rank adds exact zeros (selected, not multiplied: 0 x NaN is
NaN). `LocalWindow` keeps this rank's sums whole and reduces them at the tick or at a fold. `ShardedWindow`
reduce-scatters every micro-step and keeps 1/N. `NoWindow` belongs to a frozen level. A window saves and loads itself.
The groups of all sharded levels are reduced in one fixed order (`ReductionOrder`), whatever order autograd finishes
in, so that the ranks' collectives always match. Uses torch.distributed only, no deepspeed.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nltrain.fragment import Fragment
from nltrain.levels.config import LevelsConfig
from nltrain.levels.groups import Group
from nltrain.levels.layout import Layout, add_parameter, read_parameter
from nltrain.levels.ledger import FOLD, GRADIENTS, Ledger
from nltrain.levels.split import LevelPart

MAX_REDUCTIONS_IN_FLIGHT = 2  # bounds the memory of pending buffers while they overlap with backward


class GradientWindow(ABC):
    """Common part: hooks, the guard's verdict, and the reduced shards, one flat fp32 tensor per group."""

    def __init__(
        self,
        name: str,
        groups: Sequence[Group],
        layouts: Sequence[Layout],
        reduce_dtype: torch.dtype,
        device: torch.device,
        ledger: Ledger,
    ):
        self.name, self.groups, self.layouts = name, list(groups), list(layouts)
        self.reduce_dtype, self.device, self.ledger = reduce_dtype, device, ledger
        self.has_reduced = False  # shards hold part of the window; equal on all ranks
        self.shards = [torch.zeros(layout.shard_numel, dtype=torch.float32, device=device) for layout in layouts]
        self._left_out = torch.zeros((), dtype=torch.bool, device=device)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._take, which, index))
            for which, group in enumerate(groups)
            for index, parameter in enumerate(group.parameters)
        ]

    def begin(self, admitted: Tensor) -> None:
        """Before backward: whether this rank's part of the micro-step counts (bool on the device)."""
        self._left_out = ~admitted

    def _take(self, group: int, index: int, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            with torch.no_grad():
                self._accumulate(group, index, gradient.masked_fill_(self._left_out, 0))

    @abstractmethod
    def _accumulate(self, group: int, index: int, gradient: Tensor) -> None:
        """Adds the gradient of parameter `index` of `group` to the window."""

    @abstractmethod
    def finish(self) -> None:
        """Marks, after a backward, that the window holds something."""

    def fold(self) -> None:  # noqa: B027 - nothing to move where every micro-step is reduced
        """Moves unreduced sums into the shards. A collective."""

    def clear(self) -> None:
        """Starts the next window."""
        for shard in self.shards:
            shard.zero_()
        self.has_reduced = False

    def reduce(self) -> list[Tensor]:
        """This rank's shard per group of the sums over all ranks and the whole window; valid until `clear`."""
        return self.shards

    def close(self) -> None:
        """Removes the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    @property
    def unreduced_bytes(self) -> int:
        """Bytes of this rank's sums that `fold` would move into shards; equal on all ranks."""
        return 0

    def fragments(self, rank: int) -> Iterator[tuple[str, Fragment]]:
        """("NAME.window", slice) of the shards of `rank`, where they hold something; views, filled in place to load."""
        if self.has_reduced:
            for group, layout, shard in zip(self.groups, self.layouts, self.shards, strict=True):
                yield from group.fragments("window", layout, rank, shard)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, equal on all ranks: whether shards and whether local sums hold something."""
        return {"reduced_window": self.has_reduced, "local_window": False}

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's unreduced sums, {parameter: flat fp32}; copies."""
        return {}

    def prepare_to_load(self, state: Mapping[str, Any]) -> None:
        """Empties the window and makes `fragments` list what was saved with `state`."""
        self.clear()
        self.has_reduced = state["reduced_window"]

    def load(self, state: Mapping[str, Any], rank_states: Sequence[Mapping[str, Tensor]]) -> None:
        """After the fragments were filled: adds the unreduced sums of the saved ranks that this rank takes over.

        A collective where this window is sharded.
        """
        if not state["local_window"]:
            return
        for which, group in enumerate(self.groups):
            for index, name in enumerate(group.names):
                for saved in rank_states:
                    if name in saved:
                        self._accumulate(which, index, saved[name].to(self.device))
        self._finish_loading()

    def _finish_loading(self) -> None:
        """After the last saved sum was added, on every rank."""
        self.finish()

    def _scatter(
        self, buffer: Tensor, layout: Layout, purpose: str, process_group: dist.ProcessGroup | None = None
    ) -> tuple[Tensor, dist.Work | None]:
        """Starts the sum over ranks of `buffer` [world * shard]; the shard is ready when the work is."""
        if layout.world_size == 1:
            return buffer, None
        # A fold stays part of the window: every later save and every other world size would inherit its rounding.
        dtype = torch.float32 if purpose == FOLD else self.reduce_dtype
        buffer = buffer.to(dtype)
        shard = torch.empty(layout.shard_numel, dtype=dtype, device=self.device)
        with self.ledger.row(self.name, purpose):
            return shard, dist.reduce_scatter_single(shard, buffer, group=process_group, async_op=True)


class LocalWindow(GradientWindow):
    """Sums stay on this rank (4 bytes per parameter) until the tick or a fold: no traffic in between."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sums = [
            torch.zeros(layout.world_size * layout.shard_numel, dtype=torch.float32, device=self.device)
            for layout in self.layouts
        ]
        self.has_local = False  # sums hold something; equal on all ranks

    def _accumulate(self, group: int, index: int, gradient: Tensor) -> None:
        add_parameter(self.layouts[group], self.sums[group], index, gradient)

    def finish(self) -> None:
        """Marks that the local sums hold something."""
        self.has_local = True

    def _reduce_sums(self, purpose: str) -> list[Tensor]:
        started = [self._scatter(s, layout, purpose) for s, layout in zip(self.sums, self.layouts, strict=True)]
        for _, work in started:
            if work is not None:
                work.wait()
        return [shard.float() for shard, _ in started]

    def fold(self) -> None:
        """Adds the local sums of all ranks to the shards and empties them. A collective."""
        if not self.has_local:
            return
        for shard, reduced, sums in zip(self.shards, self._reduce_sums(FOLD), self.sums, strict=True):
            shard.add_(reduced)
            sums.zero_()
        self.has_local, self.has_reduced = False, True

    def reduce(self) -> list[Tensor]:
        """Shards plus the local sums of all ranks, in new tensors where there are local sums. A collective."""
        if not self.has_local:
            return self.shards
        reduced = self._reduce_sums(GRADIENTS)
        if self.has_reduced:
            for total, shard in zip(reduced, self.shards, strict=True):
                total.add_(shard)
        return reduced

    def clear(self) -> None:
        """Empties shards and local sums."""
        super().clear()
        for sums in self.sums:
            sums.zero_()
        self.has_local = False

    @property
    def unreduced_bytes(self) -> int:
        """Bytes of the local sums, where they hold something."""
        return sum(sums.numel() * sums.element_size() for sums in self.sums) if self.has_local else 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, equal on all ranks: whether shards and whether local sums hold something."""
        return {"reduced_window": self.has_reduced, "local_window": self.has_local}

    def rank_state(self) -> dict[str, Tensor]:
        """The local sums of each whole parameter, where they hold something."""
        if not self.has_local:
            return {}
        return {
            name: read_parameter(layout, sums, index)
            for group, layout, sums in zip(self.groups, self.layouts, self.sums, strict=True)
            for index, name in enumerate(group.names)
        }


class ReductionOrder:
    """The one order in which the groups of all sharded levels are reduced, the same on every rank.

    A group waits for its turn, last parameter of the model first, which is about the order in which autograd finishes
    them. Without this order each rank would start collectives in the order in which its own graph finishes groups. On a
    rank whose batch takes another way through the model (padding, packed documents), one group would be summed into
    another.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self._turns: list[tuple[int, ShardedWindow, int]] = []  # place in the model, window, group
        self._next = 0
        self._in_flight: deque[tuple[ShardedWindow, int, Tensor, dist.Work | None, Tensor]] = deque()

    def join(self, window: "ShardedWindow", places: Sequence[int]) -> None:
        """Adds the groups of `window`; `places`: of the first parameter of each group among those of the model."""
        self._turns += [(place, window, group) for group, place in enumerate(places)]
        self._turns.sort(key=lambda turn: turn[0], reverse=True)

    def advance(self) -> None:
        """Starts the reductions whose turn has come and whose group is complete."""
        while self._next < len(self._turns) and self._turns[self._next][1].is_complete(self._turns[self._next][2]):
            self._start(self._next)
            self._next += 1

    def complete(self) -> None:
        """After backward, on every rank: starts the remaining reductions and waits for all."""
        for turn in range(self._next, len(self._turns)):
            self._start(turn)
        # A parameter used inside and outside a reentrant checkpoint has a second gradient after its group was reduced.
        for turn, (_, window, group) in enumerate(self._turns):
            if window.has_part(group):
                self._start(turn)
        while self._in_flight:
            self._land()
        self._next = 0
        for _, window, _ in self._turns:
            window.start_again()

    def _start(self, turn: int) -> None:
        _, window, group = self._turns[turn]
        buffer = window.hand_over(group)
        while len(self._in_flight) >= MAX_REDUCTIONS_IN_FLIGHT:
            self._land()
        shard, work = window._scatter(buffer, window.layouts[group], GRADIENTS, self.process_group)
        self._in_flight.append((window, group, shard, work, buffer))

    def _land(self) -> None:
        window, group, shard, work, _ = self._in_flight.popleft()
        if work is not None:
            work.wait()
        window.shards[group].add_(shard)


class ShardedWindow(GradientWindow):
    """Every micro-step is reduce-scattered group by group during backward; 4 bytes per parameter / world size."""

    def __init__(self, *args: Any, order: ReductionOrder, places: Sequence[int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._buffers: list[Tensor | None] = [None] * len(self.layouts)
        self._seen: list[set[int]] = [set() for _ in self.layouts]
        self._order = order
        order.join(self, places)

    def _accumulate(self, group: int, index: int, gradient: Tensor) -> None:
        buffer = self._buffers[group]
        if buffer is None:
            buffer = self._buffers[group] = self._empty(group)
        add_parameter(self.layouts[group], buffer, index, gradient)
        self._seen[group].add(index)
        self._order.advance()

    def _empty(self, group: int) -> Tensor:
        layout = self.layouts[group]
        return torch.zeros(layout.world_size * layout.shard_numel, dtype=self.reduce_dtype, device=self.device)

    def is_complete(self, group: int) -> bool:
        """Whether every parameter of the group has handed in its gradient in this backward."""
        return len(self._seen[group]) == len(self.layouts[group].numels)

    def has_part(self, group: int) -> bool:
        """Whether a gradient of the group waits to be reduced."""
        return self._buffers[group] is not None

    def hand_over(self, group: int) -> Tensor:
        """The group's sums of this backward; zeros where only the graphs of other ranks may have used it."""
        buffer, self._buffers[group] = self._buffers[group], None
        return self._empty(group) if buffer is None else buffer

    def start_again(self) -> None:
        """After every reduction of a backward has landed."""
        for seen in self._seen:
            seen.clear()

    def finish(self) -> None:
        """Marks that the shards hold something."""
        self.has_reduced = True

    def _finish_loading(self) -> None:
        self.finish()
        self._order.complete()


class NoWindow(GradientWindow):
    """The window of a frozen level: without groups, and so without hooks, tensors and state."""

    def _accumulate(self, group: int, index: int, gradient: Tensor) -> None:
        raise AssertionError(f"level {self.name!r} is frozen and takes no gradient")

    def finish(self) -> None:
        """Nothing to mark."""

    def prepare_to_load(self, state: Mapping[str, Any]) -> None:
        """Ignores what the level accumulated before it was frozen."""

    def load(self, state: Mapping[str, Any], rank_states: Sequence[Mapping[str, Tensor]]) -> None:
        """Ignores what the level accumulated before it was frozen."""


def open_window(
    part: LevelPart,
    groups: Sequence[Group],
    layouts: Sequence[Layout],
    levels: LevelsConfig,
    device: torch.device,
    ledger: Ledger,
    order: ReductionOrder,
) -> GradientWindow:
    """The window of a level over these groups; a sharded one joins `order`."""
    dtype = torch.bfloat16 if levels.reduce_dtype_of(part.config) == "bf16" else torch.float32
    name = part.config.name
    if part.config.frozen:
        return NoWindow(name, [], [], dtype, device, ledger)
    if part.config.mode == "local":
        return LocalWindow(name, groups, layouts, dtype, device, ledger)
    places = [part.places[group.names[0]] for group in groups]
    return ShardedWindow(name, groups, layouts, dtype, device, ledger, order=order, places=places)
