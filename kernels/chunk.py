"""Self-modifying memories, chunk-parallel: equal to `naive` for every option, with one Python step per 64 tokens.

This file cuts the sequence into blocks and runs the steps one after another; `block` holds the mathematics of one step.
State, decays and the triangular inverse are at least fp32. README.md beside this file has the derivation.
B sequences, T tokens, H heads, d head width; N = B x H; S slots: the tokens, or their places in the padded order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import stacked, stacked_loop
from kernels.block import BlockStep, erasure_by_row
from kernels.blocking import Blocking, build_blocking
from kernels.ops import l2norm
from kernels.rule import MemoryRule
from kernels.stacked import forward_block
from kernels.stacked_backward import backward_block
from kernels.state import Initial, Inputs, MemoryState, Weights, fresh_state

# Start, run and velocity: the state between two blocks, folded to [N, ...]. The velocity is None without momentum.
Running = tuple[Weights, Weights, Weights | None]


@cache
def _compiled(function: Callable[..., Any], backend: str, whole: bool = False) -> Callable[..., Any]:
    """whole: what cannot be compiled as one graph is an error."""
    return torch.compile(function, dynamic=False, backend=backend, fullgraph=whole)


def self_modify(
    inputs: Inputs,
    initial: Initial,
    rule: MemoryRule,
    state: MemoryState | None = None,
    document_starts: Tensor | None = None,
    *,
    blocking: Blocking | None = None,
    recompute: bool = False,
    compile_backend: str | None = None,
    truncate_blocks: int | None = None,
    general: bool = False,
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, d] and the state after the last token, as `naive.self_modify`.

    document_starts: [B, T] bool, None for none. blocking: the result of `build_blocking` for these arguments, so that
    several layers can share it. recompute: keep only every sqrt(blocks)-th state for the backward pass.
    compile_backend: run each block through torch.compile with this back end. truncate_blocks: detach the state every so
    many blocks. general: use `block` for every rule, also for those that `stacked` computes in fewer launches. The
    outputs have the dtype of the inputs, the state has at least fp32.
    """
    num_sequences, num_tokens, num_heads, _ = inputs.k.shape
    dtype = torch.promote_types(inputs.k.dtype, torch.float32)
    if blocking is None:
        position = state.position if state is not None else torch.zeros(num_sequences, dtype=torch.long)
        blocking = build_blocking(rule, num_tokens, position.to(inputs.k.device), document_starts)
    if stacked.supports(rule) and not general:
        return _run_stacked(inputs, initial, rule, state, blocking, recompute, compile_backend, truncate_blocks)
    step = BlockStep(rule, initial, num_sequences, dtype)
    fresh = fresh_state(initial, rule, num_sequences)
    begin = _fold(fresh.run, dtype)
    running: Running = (begin, begin, _fold(fresh.velocity, dtype) if fresh.velocity else None)
    if state is not None:
        moving = _fold(state.velocity, dtype) if state.velocity is not None else None
        running = (_fold(state.start, dtype), _fold(state.run, dtype), moving)
    x = _by_slot(inputs, rule, blocking, dtype)
    if rule.normalize_inputs:
        x = {name: value if name == "beta_logit" else l2norm(value) for name, value in x.items()}

    if rule.writes:
        valid = None if blocking.valid is None else blocking.valid.to(dtype).repeat_interleave(num_heads, 0)
        call = _compiled(BlockStep.__call__, compile_backend) if compile_backend else BlockStep.__call__
        loop = _BlockLoop(step, blocking, begin, _split(x, blocking), valid, call, truncate_blocks)
        o, running = _run_all(loop.run_group, len(blocking.blocks), running, recompute)
    else:
        o = step.read_only(running[0], x["q"])

    return _finished(o, running, inputs, blocking)


def _run_stacked(
    inputs: Inputs, initial: Initial, rule: MemoryRule, state: MemoryState | None, blocking: Blocking,
    recompute: bool, compile_backend: str | None, truncate_blocks: int | None,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """`self_modify` for the rules that `stacked` computes."""
    num_sequences, _, num_heads, _ = inputs.k.shape
    dtype = torch.promote_types(inputs.k.dtype, torch.float32)
    x = _by_slot(inputs, rule, blocking, dtype)
    calls: Any = (forward_block, backward_block)
    if compile_backend:
        calls = tuple(_compiled(function, compile_backend, whole=True) for function in calls)
    lambda_d = erasure_by_row(rule, num_sequences, num_heads, x["q"])
    loop = stacked_loop.build_loop(rule, initial, num_sequences, x, blocking, lambda_d, calls, truncate_blocks)
    start = run = loop.base.zeros()
    if state is not None:
        start, run = (stacked_loop.pack(_fold(weights, dtype)) for weights in (state.start, state.run))
    o, after = _run_all(loop.run_group, len(blocking.blocks), (start, run, None), recompute)
    run_after = stacked_loop.unpack(after[1])
    start_after = run_after if after[0] is after[1] else stacked_loop.unpack(after[0])
    return _finished(o, (start_after, run_after, None), inputs, blocking)


def _finished(o: Tensor, running: Running, inputs: Inputs, blocking: Blocking) -> tuple[Tensor, MemoryState]:
    """The result of a call: outputs by token and in the dtype of the inputs, and the state by sequence and head."""
    shape = (inputs.k.shape[0], inputs.k.shape[2])
    o = o.unflatten(0, shape).transpose(1, 2)
    if blocking.slot is not None:
        o = o.gather(1, blocking.slot[..., None, None].expand(-1, -1, *o.shape[2:]))
    start, run, velocity = (None if w is None else w.map(lambda t: t.unflatten(0, shape)) for w in running)
    assert start is not None and run is not None
    return o.to(inputs.k.dtype), MemoryState(start, run, velocity, blocking.position)


def _fold(weights: Weights, dtype: torch.dtype) -> Weights:
    """[B, H, ...] to [N, ...]."""
    return weights.map(lambda w: w.to(dtype).flatten(0, 1))


def _by_slot(inputs: Inputs, rule: MemoryRule, blocking: Blocking, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs that the rule reads, [N, S, d], and with momentum "beta_logit" [N, S]."""

    def arrange(x: Tensor) -> Tensor:
        """[B, T, H, ...] to [N, S, ...]."""
        if blocking.source is not None:
            index = blocking.source.view(*blocking.source.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
            x = x.gather(1, index)
        return x.transpose(1, 2).flatten(0, 1).to(dtype)

    names = ("k", "v", "q", "gate") if rule.writes else ("q",)
    x = {name: arrange(getattr(inputs, name)) for name in names}
    if rule.momentum and rule.writes:
        assert inputs.beta_logit is not None
        x["beta_logit"] = arrange(inputs.beta_logit.unsqueeze(-1)).squeeze(-1)
    return x


def _split(x: dict[str, Tensor], blocking: Blocking) -> dict[str, tuple[Tensor, ...]]:
    """Each input cut into blocks. It is split at once, so that its backward is one concatenation."""
    lengths = [block.end - block.begin for block in blocking.blocks]
    return {name: value.split(lengths, 1) for name, value in x.items()}


def _run_all(run_group: Callable[..., Any], num_blocks: int, running: Any, recompute: bool) -> tuple[Tensor, Any]:
    """Outputs [N, S, d] and the state after the last block; with `recompute` by groups that are run again.

    run_group: (start, run, velocity, first block, one past the last) to outputs and the state after them.
    """
    group = isqrt(num_blocks - 1) + 1 if recompute and torch.is_grad_enabled() else num_blocks
    outputs = []
    for first in range(0, num_blocks, group):
        arguments = (*running, first, min(first + group, num_blocks))
        if group < num_blocks:
            out, *running = checkpoint(run_group, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out, *running = run_group(*arguments)
        outputs.append(out)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], tuple(running)


@dataclass(frozen=True)
class _BlockLoop:
    """The steps of one call, in order, with what they share."""

    step: BlockStep
    blocking: Blocking
    begin: Weights  # [N, ...] the state at the start of a document
    pieces: dict[str, tuple[Tensor, ...]]  # by input, one [N, c, d] per block
    valid: Tensor | None  # [N, S] 1 where a slot holds a token; None: every slot does
    call: Callable[..., Any]  # BlockStep.__call__, or the same compiled
    truncate_blocks: int | None

    def run_group(
        self, start: Weights, run: Weights, velocity: Any, first: int, last: int
    ) -> tuple[Tensor, Weights, Weights, Any]:
        """Blocks `first` to `last` - 1: their outputs, and the state after them."""
        step, blocks, outputs = self.step, self.blocking.blocks, []
        for i in range(first, last):
            block = blocks[i]
            if self.truncate_blocks is not None and i and i % self.truncate_blocks == 0:
                start, run = start.map(torch.detach), run.map(torch.detach)
                velocity = velocity.map(torch.detach) if velocity else None
            if block.resets is not False and run is not self.begin:
                run, start = step.masked(block.resets, self.begin, run), step.masked(block.resets, self.begin, start)
                velocity = velocity and step.masked(block.resets, velocity.map(torch.zeros_like), velocity)
            own_valid = None if self.valid is None else self.valid[:, block.begin : block.end]
            own = {name: parts[i] for name, parts in self.pieces.items()}
            out, run, velocity = self.call(step, start, run, velocity, own, own_valid)
            outputs.append(out)
            # Take the next block's snapshot here, so that a group boundary carries one set of weights.
            after, end = (blocks[i + 1] if i + 1 < len(blocks) else None), self.blocking
            begins = (after.begins_mem, after.begins_other) if after else (end.ends_mem, end.ends_other)
            start = step.snapshot(start, run, *begins)
        return torch.cat(outputs, 1), start, run, velocity
