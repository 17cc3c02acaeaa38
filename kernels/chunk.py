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

from kernels.block import BlockStep
from kernels.blocking import Blocking, build_blocking
from kernels.ops import l2norm
from kernels.rule import MemoryRule
from kernels.state import Initial, Inputs, MemoryState, Weights, fresh_state

# Start, run and velocity: the state between two blocks, folded to [N, ...]. The velocity is None without momentum.
Running = tuple[Weights, Weights, Weights | None]


@cache
def _compiled_call(backend: str) -> Callable[..., Any]:
    return torch.compile(BlockStep.__call__, dynamic=False, backend=backend)


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
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, d] and the state after the last token, as `naive.self_modify`.

    document_starts: [B, T] bool, None for none. blocking: the result of `build_blocking` for these arguments, so that
    several layers can share it. recompute: keep only every sqrt(blocks)-th state for the backward pass.
    compile_backend: run each block through torch.compile with this back end. truncate_blocks: detach the state every so
    many blocks. The outputs have the dtype of the inputs, the state has at least fp32.
    """
    num_sequences, num_tokens, num_heads, _ = inputs.k.shape
    dtype = torch.promote_types(inputs.k.dtype, torch.float32)
    if blocking is None:
        position = state.position if state is not None else torch.zeros(num_sequences, dtype=torch.long)
        blocking = build_blocking(rule, num_tokens, position.to(inputs.k.device), document_starts)
    step = BlockStep(rule, initial, num_sequences, dtype)
    fresh = fresh_state(initial, rule, num_sequences)
    begin = _fold(fresh.run, dtype)
    running: Running = (begin, begin, _fold(fresh.velocity, dtype) if fresh.velocity else None)
    if state is not None:
        moving = _fold(state.velocity, dtype) if state.velocity is not None else None
        running = (_fold(state.start, dtype), _fold(state.run, dtype), moving)
    x = _by_slot(inputs, rule, blocking, dtype)

    if rule.writes:
        valid = None if blocking.valid is None else blocking.valid.to(dtype).repeat_interleave(num_heads, 0)
        call = _compiled_call(compile_backend) if compile_backend else BlockStep.__call__
        loop = _BlockLoop(step, blocking, begin, _split(x, blocking), valid, call, truncate_blocks)
        o, running = loop.run_all(running, recompute)
    else:
        o = step.read_only(running[0], x["q"])

    o = o.unflatten(0, (num_sequences, num_heads)).transpose(1, 2)
    if blocking.slot is not None:
        o = o.gather(1, blocking.slot[..., None, None].expand(-1, -1, *o.shape[2:]))
    start, run, velocity = (
        None if w is None else w.map(lambda t: t.unflatten(0, (num_sequences, num_heads))) for w in running
    )
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
    if rule.normalize_inputs:
        x = {name: l2norm(value) for name, value in x.items()}
    if rule.momentum and rule.writes:
        assert inputs.beta_logit is not None
        x["beta_logit"] = arrange(inputs.beta_logit.unsqueeze(-1)).squeeze(-1)
    return x


def _split(x: dict[str, Tensor], blocking: Blocking) -> dict[str, tuple[Tensor, ...]]:
    """Each input cut into blocks. It is split at once, so that its backward is one concatenation."""
    lengths = [block.end - block.begin for block in blocking.blocks]
    return {name: value.split(lengths, 1) for name, value in x.items()}


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

    def run_all(self, running: Running, recompute: bool) -> tuple[Tensor, Running]:
        """Outputs [N, S, d] and the state after the last block; with `recompute` by groups that are run again."""
        num_blocks = len(self.blocking.blocks)
        group = isqrt(num_blocks - 1) + 1 if recompute and torch.is_grad_enabled() else num_blocks
        outputs = []
        for first in range(0, num_blocks, group):
            arguments = (*running, first, min(first + group, num_blocks))
            if group < num_blocks:
                out, *after = checkpoint(self.run_group, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out, *after = self.run_group(*arguments)
            running = tuple(after)  # type: ignore[assignment]
            outputs.append(out)
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], running

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
