"""The launches of one call of the Triton kernels, forward and backward, and the function that autograd sees."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import triton_call
from kernels.triton_call import Plan

# As in `triton_parts` and `triton_backward`, which this file does not import: they need triton.
MEMORY_TILES, HEAD_TILES, BACKWARD_TILES, READ_TILES = 8, 3, 10, 7


class Arguments(NamedTuple):
    """Tensors of one call; inputs [B, T, H, d] contiguous; weights fp32 unless said."""

    k: Tensor
    v: Tensor
    q: Tensor
    gate: Tensor
    base: Tensor  # [H, size] flat initial weights, fp32 or bf16
    slow: Tensor  # [2, H, d]
    bias: Tensor  # [2, H]
    run: Tensor  # [N, size] flat state before the first token
    start: Tensor | None  # [N, size] snapshot, None where it is `run`


class Scratch(NamedTuple):
    """Buffers of one group of blocks, uninitialised."""

    ring: Tensor  # [group - 1, N, size] states between the blocks of the group
    heads: Tensor  # [group, N, HEAD_TILES, room]
    tiles: Tensor  # [group, N, memories, MEMORY_TILES, room]

    @classmethod
    def empty(cls, plan: Plan, like: Tensor) -> "Scratch":
        """Room for one group."""
        group = min(plan.group, len(plan.table))
        return cls(
            like.new_empty(group - 1, plan.rows, plan.size),
            like.new_empty(group, plan.rows, HEAD_TILES, plan.room, dtype=plan.scratch),
            like.new_empty(group, plan.rows, plan.memories, MEMORY_TILES, plan.room, dtype=plan.scratch),
        )


def write_group(
    plan: Plan, x: Arguments, scratch: Scratch, before: Tensor, after: Tensor, last_start: Tensor,
    group: tuple[int, int], save: bool,
) -> None:  # fmt: skip
    """Generates and writes the blocks of a group: from the state `before` [N, size] to `after`."""
    first, count = group
    run = before
    for i in range(count):
        table, heads, tiles = plan.table[first + i], scratch.heads[i], scratch.tiles[i]
        begins = first + i > 0 or x.start is None
        start = run if begins else x.start
        new = after if i == count - 1 else scratch.ring[i]
        triton_call.launch(
            "generate_kernel", (plan.rows, 3),
            (x.k, x.v, x.gate, start, x.base, x.slow, x.bias, table, heads, plan.num_tokens, plan.rule.eta_limit),
            plan.options(),
        )  # fmt: skip
        triton_call.launch(
            "predict_kernel", (plan.rows, plan.memories),
            (start, last_start, x.base, x.slow, table, heads, tiles), plan.options(),
        )  # fmt: skip
        triton_call.launch(
            "write_kernel", (plan.rows, plan.memories, 2),
            (run, new, plan.weights, table, heads, tiles, plan.inv_b2), plan.options(SAVE=save),
        )  # fmt: skip
        run = new


def forward(plan: Plan, x: Arguments, keep_states: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs [B, T, H, d], the state after the last token, the snapshot of rows that end inside a chunk (both
    [N, size]) and, with `keep_states`, the state before each group [groups, N, size]."""
    groups = plan.groups()
    states = x.run.new_empty(len(groups) if keep_states else 2, plan.rows, plan.size)
    scratch, out = Scratch.empty(plan, x.run), torch.empty_like(x.q)
    final, last_start = torch.empty_like(x.run), torch.empty_like(x.run)
    before = x.run
    if keep_states:
        states[0] = before
    for number, group in enumerate(groups):
        after = final if number == len(groups) - 1 else states[(number + 1) % len(states)]
        write_group(plan, x, scratch, before, after, last_start, group, False)
        triton_call.launch(
            "read_kernel", (plan.rows, group[1]),
            (x.q, out, before, scratch.ring, x.base, plan.table[group[0] :], scratch.heads, scratch.tiles,
             plan.num_tokens, plan.num_sequences),
            plan.options(),
        )  # fmt: skip
        before = after
    return out, final, last_start, states


class Gradients(NamedTuple):
    """Gradients of the loss that the backward pass carries and adds to."""

    k: Tensor
    v: Tensor
    q: Tensor
    gate: Tensor
    base: Tensor  # [N, size]
    slow: Tensor  # [N, 2, d]
    bias: Tensor  # [N, 2]
    carry: Tensor  # [N, size] by the state before the blocks that are done
    start: Tensor | None  # [N, size] by the snapshot, as `Arguments.start`

    @classmethod
    def begin(cls, plan: Plan, x: Arguments, by_final: Tensor) -> "Gradients":
        """Zero sums, and the carry after the last block."""
        k, v, q, gate = (torch.empty_like(t) for t in x[:4] if t is not None)
        zeros = x.run.new_zeros
        start = None if x.start is None else torch.zeros_like(x.run)
        sums = zeros(plan.rows, plan.size), zeros(plan.rows, 2, plan.head_dim), zeros(plan.rows, 2)
        return cls(k, v, q, gate, *sums, by_final.clone(memory_format=torch.contiguous_format), start)


def backward_group(
    plan: Plan, x: Arguments, scratch: Scratch, bars: tuple[Tensor, Tensor], before: Tensor, by_out: Tensor,
    by_last: Tensor, sums: Gradients, group: tuple[int, int],
) -> None:  # fmt: skip
    """One group of blocks in reverse. bars: scratch of the backward pass by memory and of the reads."""
    first, count = group
    by_memory, reads = bars
    options = plan.options()
    for side in (1, 2):
        triton_call.launch(
            "read_backward_kernel", (plan.rows, count),
            (x.q, by_out, sums.q, before, scratch.ring, x.base, plan.table[first:], scratch.heads, scratch.tiles, reads,
             plan.num_tokens, plan.num_sequences),
            plan.options(SIDE=side),
        )  # fmt: skip
    for i in reversed(range(count)):
        table, heads, tiles, read = plan.table[first + i], scratch.heads[i], scratch.tiles[i], reads[i]
        run = before if i == 0 else scratch.ring[i - 1]
        apart = first + i == 0 and x.start is not None
        start, snap_bar = (x.start, sums.start) if apart else (run, sums.carry)
        triton_call.launch(
            "side_backward_kernel", (plan.rows, plan.memories, 2),
            (run, sums.carry, plan.weights, x.q, by_out, table, heads, tiles, by_memory, read, plan.num_tokens,
             plan.inv_b2),
            options,
        )  # fmt: skip
        triton_call.launch(
            "error_backward_kernel", (plan.rows, plan.memories),
            (start, snap_bar, by_last, x.base, sums.base, by_out, table, tiles, by_memory, read, plan.num_tokens),
            options,
        )  # fmt: skip
        triton_call.launch(
            "hidden_backward_kernel", (plan.rows, plan.memories),
            (start, snap_bar, by_last, x.base, sums.base, x.slow, sums.slow, x.q, table, heads, by_memory, read,
             plan.num_tokens),
            options,
        )  # fmt: skip
        triton_call.launch(
            "generate_backward_kernel", (plan.rows, 3),
            (x.k, x.v, x.gate, sums.k, sums.v, sums.gate, start, snap_bar, x.base, sums.base, x.slow, sums.slow,
             sums.bias, table, heads, by_memory, read, plan.num_tokens),
            options,
        )  # fmt: skip


def backward(plan: Plan, x: Arguments, states: Tensor, by_out: Tensor, by_final: Tensor, by_last: Tensor) -> Gradients:
    """Every gradient of one call, from those by outputs, final state and last snapshot."""
    scratch, sums = Scratch.empty(plan, x.run), Gradients.begin(plan, x, by_final)
    group = len(scratch.heads)
    bars = (
        x.run.new_empty(plan.rows, plan.memories, BACKWARD_TILES, plan.room, dtype=plan.scratch),
        x.run.new_empty(group, plan.rows, READ_TILES, plan.room, dtype=plan.scratch),
    )
    unused = torch.empty_like(x.run), torch.empty_like(x.run)
    groups = plan.groups()
    for number in reversed(range(len(groups))):
        write_group(plan, x, scratch, states[number], *unused, groups[number], True)
        backward_group(plan, x, scratch, bars, states[number], by_out, by_last, sums, groups[number])
    return sums


class MemoriesFunction(torch.autograd.Function):
    """(inputs, flat weights and state) -> outputs, final state, last snapshot."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """tensors: the fields of `Arguments`."""
        x = Arguments(*tensors)
        keep = plan.differentiable and any(ctx.needs_input_grad)
        out, final, last_start, states = forward(plan, x, keep)
        if keep:
            ctx.plan = plan
            ctx.save_for_backward(*x, states)
        return out, final, last_start

    @staticmethod
    def backward(ctx: Any, *by: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """Gradients by the arguments of `forward`, the initial weights summed over sequences."""
        plan: Plan = ctx.plan
        *tensors, states = ctx.saved_tensors
        by_out, by_final, by_last = (t.contiguous() for t in by)
        g = backward(plan, Arguments(*tensors), states, by_out, by_final, by_last)
        base, slow, bias = (
            t.unflatten(0, (plan.num_sequences, plan.num_heads)).sum(0) for t in (g.base, g.slow, g.bias)
        )
        return None, *g[:4], base, slow.transpose(0, 1), bias.T, g.carry, g.start
