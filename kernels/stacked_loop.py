"""The blocks of `stacked` one after another, as one node of the autograd graph.

It takes the place of `chunk`'s loop over `block.BlockStep`. Letters as in `stacked`; B sequences, H heads, S slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.blocking import Blocking, RowMask
from kernels.ops import l2norm
from kernels.rule import MemoryRule
from kernels.stacked import (
    NUM_FULL,
    NUM_MEMORIES,
    STORAGE_ORDER,
    BlockInputs,
    Constants,
    Kept,
    Memories,
    constants,
)
from kernels.stacked_backward import Accumulators, InputGradients
from kernels.state import Initial, Weights


def pack(weights: Weights) -> Memories:
    """Stored weights [N, ...] in the order of `stacked`."""
    inputs = weights.w2.unflatten(1, (NUM_MEMORIES, -1)).flatten(2).unbind(1)
    outputs = weights.w1.flatten(2).unbind(1)
    order = STORAGE_ORDER
    body = torch.stack([*(inputs[i] for i in order), *(outputs[i] for i in order[:NUM_FULL])])
    return Memories(body, weights.g1.transpose(0, 1).contiguous())


def unpack(memories: Memories) -> Weights:
    """The inverse of `pack`."""
    num, h = memories.gate.shape[1:]
    parts = memories.body.unbind(0)
    order = range(NUM_MEMORIES)
    by_storage = sorted(order, key=lambda i: STORAGE_ORDER[i])
    w2 = torch.stack([parts[i].view(num, h, -1) for i in by_storage], 1).flatten(1, 2)
    full = [i for i in by_storage if i < NUM_FULL]
    w1 = torch.stack([parts[NUM_MEMORIES + i].view(num, -1, h) for i in full], 1)
    return Weights(w2, w1, memories.gate.transpose(0, 1))


class Event(NamedTuple):
    """What happens to the state around one block. Masks are [N] or one answer for all."""

    cut: bool  # the gradient through the state ends before the block
    resets: RowMask  # a document begins with the block
    taken: RowMask  # the next block begins a chunk: its snapshot is the state after this one


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the values of tensors, for one group of blocks."""

    constants: Callable[[Tensor, Memories], Constants]  # of the slow part of the gates and the initial weights
    events: tuple[Event, ...]
    spans: tuple[tuple[int, int], ...]  # first slot of each block and one past the last
    valid: Tensor | None  # [N, S]
    forward: Callable[..., Any]
    backward: Callable[..., Any]

    def inputs(self, i: int, tensors: Sequence[Tensor]) -> BlockInputs:
        """Those of block i; tensors: x, q, q_base and logits of the whole group."""
        begin, end = self.spans[i]
        valid = None if self.valid is None else self.valid[:, begin:end]
        x, q, q_base, logits = (t[:, begin:end] for t in tensors)
        return BlockInputs(x, q, q_base, logits, valid)

    def run(
        self, con: Constants, tensors: Sequence[Tensor], start: Memories, run: Memories, keep: Any
    ) -> tuple[Tensor, Memories, Memories]:
        """Outputs [N, S, d], start and run after the last block. keep: called with (snapshot, run, kept) per block."""
        outputs, snapshot, snapshot_of = [], start, None
        for i, event in enumerate(self.events):
            if event.resets is not False:
                same = start is run
                run = run.without(event.resets)
                start = run if same else start.without(event.resets)
            if snapshot_of is not start:
                snapshot, snapshot_of = start.add(con.base), start
            o, after, kept = self.forward(con, self.inputs(i, tensors), snapshot, run)
            if keep is not None:
                keep(snapshot, run, kept)
            outputs.append(o)
            run, start = after, after.where(event.taken, start)
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], start, run


class _Group(torch.autograd.Function):
    """Some blocks in order. The state goes in and out as deviations from the initial weights."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, same: bool, *tensors: Tensor) -> tuple[Any, ...]:
        """tensors: x, q, q_base, logits, slow, base (2), run (2) and, unless it is the same, start (2)."""
        *per_token, slow = tensors[:5]
        base, run = Memories(*tensors[5:7]), Memories(*tensors[7:9])
        start = run if same else Memories(*tensors[9:])
        con = plan.constants(slow, base)
        saved: list[Tensor] = []

        def keep(*block: Any) -> None:
            snapshot, begin, kept = block
            saved.extend([*snapshot, *begin, *kept.tensors()])

        o, start, run = plan.run(con, per_token, start, run, keep)
        ctx.plan, ctx.same, ctx.same_after = plan, same, start is run
        ctx.save_for_backward(*tensors, *saved)
        return (o, *run) if start is run else (o, *run, *start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, *d_state: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Blocks in the opposite order."""
        plan: _Plan = ctx.plan
        num = 9 if ctx.same else 11
        everything = ctx.saved_tensors  # may be read once only
        tensors, saved = everything[:num], everything[num:]
        con = plan.constants(tensors[4], Memories(*tensors[5:7]))
        d_run, d_start = (Memories(*(t.contiguous() for t in pair)) for pair in (d_state[:2], d_state[-2:]))
        state = _StateGradient(d_run, None if ctx.same_after else d_start, con)
        per_block = len(saved) // len(plan.events)
        found: list[InputGradients] = []
        for i in reversed(range(len(plan.events))):
            event, (begin, end) = plan.events[i], plan.spans[i]
            mine = saved[i * per_block : (i + 1) * per_block]
            snapshot, run, kept = Memories(*mine[:2]), Memories(*mine[2:4]), Kept.from_tensors(mine[4:])
            state.take(event.taken)
            arguments = (con, plan.inputs(i, tensors[:4]), snapshot, run, kept)
            gradients, state.run = plan.backward(*arguments, d_o[:, begin:end], state.run, state.into)
            found.append(gradients)
            state.forget(True if event.cut else event.resets)
        d_tokens = [torch.cat(parts[::-1], 1) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)]
        last = state.end(ctx.same)
        return None, None, *d_tokens, state.into.slow, *state.base_gradient(), *state.run, *last


class _StateGradient:
    """Gradients of the state and of the initial weights between two blocks, from the last block to the first."""

    def __init__(self, d_run: Memories, d_start: Memories | None, con: Constants) -> None:
        # d_start: by the deviations that the snapshot was made of, beside what comes through the snapshot itself.
        self.run, self.start, self.base = d_run, d_start, con.base.zeros()
        h = con.base.gate.shape[-1]
        first = con.base.sides(h)[1][: con.base.gate.shape[1]]
        self.into = Accumulators(con.base.zeros(), torch.zeros_like(first), torch.zeros_like(con.slow))

    def take(self, rows: RowMask) -> None:
        """The opposite of start := run in these rows."""
        if rows is False:
            return
        moved = self.into.snapshot if self.start is None else self.into.snapshot.add(self.start)
        self.run = self.run.add(moved if rows is True else moved.without(~rows))
        self.drop_snapshot(rows)

    def drop_snapshot(self, rows: RowMask) -> None:
        """The snapshot of these rows has all its gradient."""
        if rows is True:
            self.base.add_(self.into.snapshot)
            self.into.snapshot.zero_()
            self.start = None
        elif rows is not False:
            self.base.add_(self.into.snapshot.without(~rows))
            self.into = self.into._replace(snapshot=self.into.snapshot.without(rows))
            self.start = self.start and self.start.without(rows)

    def forget(self, rows: RowMask) -> None:
        """What comes before has no part in the state of these rows."""
        if rows is not False:
            self.run = self.run.without(rows)
            self.drop_snapshot(rows)

    def end(self, same: bool) -> tuple[Tensor, ...]:
        """Settles the snapshot of the first block; returns the gradient of `start` unless it is `run`."""
        start = self.into.snapshot if self.start is None else self.into.snapshot.add(self.start)
        self.base.add_(self.into.snapshot)
        if not same:
            return tuple(start)
        self.run = self.run.add(start)
        return ()

    def base_gradient(self) -> Memories:
        """By the initial weights."""
        self.base.body[NUM_MEMORIES].add_(self.into.base_w1.flatten(1))
        return self.base


@dataclass(frozen=True)
class StackedLoop:
    """The blocks of one call, in groups; the counterpart of the loop over `BlockStep` in `chunk`."""

    rule: MemoryRule
    lambda_d: Any  # a number, or [N, 1] where heads differ
    num_heads: int
    blocking: Blocking
    base: Memories
    slow: Tensor  # [2N, d, 1]
    bias: Tensor  # [2N, 1, 1]
    x: Tensor  # [4N, S, d]
    q: Tensor  # [N, S, d]
    valid: Tensor | None  # [N, S] bool
    calls: tuple[Callable[..., Any], Callable[..., Any]]  # forward and backward of one block
    truncate_blocks: int | None

    def event(self, i: int) -> Event:
        """What happens around block i."""
        blocks, truncate = self.blocking.blocks, self.truncate_blocks
        taken = blocks[i + 1].begins_mem if i + 1 < len(blocks) else self.blocking.ends_mem
        return Event(bool(truncate and i and i % truncate == 0), self._rows(blocks[i].resets), self._rows(taken))

    def _rows(self, mask: RowMask) -> RowMask:
        return mask if isinstance(mask, bool) else mask.repeat_interleave(self.num_heads)

    def run_group(
        self, start: Memories, run: Memories, velocity: None, first: int, last: int
    ) -> tuple[Tensor, Memories, Memories, None]:
        """Blocks `first` to `last` - 1: their outputs, and the state after them."""
        blocks = self.blocking.blocks[first:last]
        offset = blocks[0].begin
        spans = tuple((block.begin - offset, block.end - offset) for block in blocks)
        events = tuple(self.event(i) for i in range(first, last))
        at = slice(offset, blocks[-1].end)
        valid = None if self.valid is None else self.valid[:, at]

        def make(slow: Tensor, base: Memories) -> Constants:
            return constants(self.rule, self.lambda_d, slow, base)

        plan = _Plan(make, events, spans, valid, *self.calls)
        x, q = self.x[:, at], self.q[:, at]
        n, h = self.base.gate.shape[1:]
        # What is the same in every block, for all of them at once.
        q_base = torch.bmm(q, self.base.sides(h)[0][:n].mT)
        logits = torch.baddbmm(self.bias, x[2 * n :], self.slow)
        tensors = (x, q, q_base, logits, self.slow, *self.base, *run)
        if not torch.is_grad_enabled():
            con = make(self.slow, self.base)
            return *plan.run(con, tensors[:4], start, run, None), None
        same = start is run
        o, *state = _Group.apply(plan, same, *tensors, *(() if same else start))
        run = Memories(*state[:2])
        return o, Memories(*state[2:]) if len(state) > 2 else run, run, None


def build_loop(
    rule: MemoryRule, initial: Initial, num_sequences: int, x: dict[str, Tensor], blocking: Blocking, lambda_d: Any,
    calls: tuple[Callable[..., Any], Callable[..., Any]], truncate_blocks: int | None,
) -> StackedLoop:  # fmt: skip
    """The loop over the blocks of inputs x, [N, S, d] each."""
    num_heads, dtype = initial.bias.shape[1], x["q"].dtype

    def fold(t: Tensor) -> Tensor:
        """[M, H, ...] to [M, N, ...]."""
        return t.to(dtype).unsqueeze(1).expand(-1, num_sequences, *t.shape[1:]).flatten(1, 2).contiguous()

    base, read = pack(initial.weights), torch.cat([x["k"], x["v"], x["gate"], x["gate"]])
    normal = l2norm if rule.normalize_inputs else lambda t: t
    valid = None if blocking.valid is None else blocking.valid.repeat_interleave(num_heads, 0)
    return StackedLoop(
        rule, lambda_d, num_heads, blocking, Memories(*(fold(t) for t in base)),
        fold(initial.slow).flatten(0, 1).unsqueeze(-1), fold(initial.bias).view(-1, 1, 1),
        normal(read), l2norm(normal(x["q"])), valid, calls, truncate_blocks,
    )  # fmt: skip
