"""Self-modifying memories, chunk-parallel: equal to `naive` for every option, with one Python step per 64 tokens.

Here the sequence is cut and the steps are strung together; `block` holds the mathematics of one step.
State, decays and the triangular inverse are at least fp32. README.md beside this file has the derivation.
"""

from functools import cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.block import BlockStep
from kernels.layout import Layout, build_layout
from kernels.ops import l2norm
from kernels.rule import MemoryRule
from kernels.state import Initial, Inputs, MemoryState, Weights, fresh_state


@cache
def _compiled_call(backend: str) -> Any:
    return torch.compile(BlockStep.__call__, dynamic=False, backend=backend)


def self_modify(
    inputs: Inputs,
    initial: Initial,
    rule: MemoryRule,
    state: MemoryState | None = None,
    document_starts: Tensor | None = None,
    *,
    layout: Layout | None = None,
    recompute: bool = False,
    compile_backend: str | None = None,
    truncate_blocks: int | None = None,
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, d] and the state after the last token, as `naive.self_modify`.

    document_starts: [B, T] bool, None for none. layout: what `build_layout` gives for these arguments, to share it
    between layers. recompute: keep only every sqrt(blocks)-th state for the backward pass. truncate_blocks: detach the
    state every so many blocks of the loop.
    compile_backend: run each block through torch.compile. The outputs have the dtype of the inputs.
    """
    num_sequences, num_tokens, num_heads, _ = inputs.k.shape
    in_dtype = inputs.k.dtype
    dtype = torch.promote_types(in_dtype, torch.float32)
    if layout is None:
        position = state.position if state is not None else torch.zeros(num_sequences, dtype=torch.long)
        layout = build_layout(rule, num_tokens, position.to(inputs.k.device), document_starts)
    step = BlockStep(rule, initial, num_sequences, dtype)

    def fold(weights: Weights) -> Weights:
        return weights.map(lambda w: w.to(dtype).flatten(0, 1))

    def unfold(weights: Weights) -> Weights:
        return weights.map(lambda w: w.unflatten(0, (num_sequences, num_heads)))

    def arrange(x: Tensor) -> Tensor:
        """[B, T, H, ...] to [N, slots, ...]."""
        if layout.source is not None:
            index = layout.source.view(*layout.source.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
            x = x.gather(1, index)
        return x.transpose(1, 2).flatten(0, 1).to(dtype)

    fresh = fresh_state(initial, rule, num_sequences)
    begin = fold(fresh.run)
    start, run, velocity = begin, begin, fold(fresh.velocity) if fresh.velocity else None
    if state is not None:
        start, run = fold(state.start), fold(state.run)
        velocity = fold(state.velocity) if state.velocity is not None else None

    names = ("k", "v", "q", "gate") if rule.writes else ("q",)
    x = {name: arrange(getattr(inputs, name)) for name in names}
    if rule.normalize_inputs:
        x = {name: l2norm(value) for name, value in x.items()}
    if rule.momentum and rule.writes:
        assert inputs.beta_logit is not None
        x["beta_logit"] = arrange(inputs.beta_logit.unsqueeze(-1)).squeeze(-1)

    if not rule.writes:
        o = step.read_only(start, x["q"])
    else:
        valid = None if layout.valid is None else layout.valid.to(dtype).repeat_interleave(num_heads, 0)
        # One split per input: its backward is one concatenation.
        lengths = [block.end - block.begin for block in layout.blocks]
        pieces = {name: value.split(lengths, 1) for name, value in x.items()}

        num_blocks = len(layout.blocks)
        call = _compiled_call(compile_backend) if compile_backend else BlockStep.__call__

        def run_group(start: Weights, run: Weights, velocity: Any, first: int, last: int) -> tuple:
            outputs = []
            for i in range(first, last):
                block = layout.blocks[i]
                if truncate_blocks is not None and i and i % truncate_blocks == 0:
                    start, run = start.map(torch.detach), run.map(torch.detach)
                    velocity = velocity.map(torch.detach) if velocity else None
                if block.resets is not False and run is not begin:
                    run, start = step.masked(block.resets, begin, run), step.masked(block.resets, begin, start)
                    velocity = velocity and step.masked(block.resets, velocity.map(torch.zeros_like), velocity)
                own_valid = None if valid is None else valid[:, block.begin : block.end]
                own = {name: parts[i] for name, parts in pieces.items()}
                out, run, velocity = call(step, start, run, velocity, own, own_valid)
                outputs.append(out)
                # Snapshot now what the next block needs, so that a group boundary carries one set of weights.
                after = layout.blocks[i + 1] if i + 1 < num_blocks else None
                begins = (after.begins_mem, after.begins_other) if after else (layout.ends_mem, layout.ends_other)
                start = step.snapshot(start, run, *begins)
            return torch.cat(outputs, 1), start, run, velocity

        group = isqrt(num_blocks - 1) + 1 if recompute and torch.is_grad_enabled() else num_blocks
        outputs = []
        for first in range(0, num_blocks, group):
            arguments = (start, run, velocity, first, min(first + group, num_blocks))
            if group < num_blocks:
                out, start, run, velocity = checkpoint(run_group, *arguments, use_reentrant=False)
            else:
                out, start, run, velocity = run_group(*arguments)
            outputs.append(out)
        o = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]

    o = o.unflatten(0, (num_sequences, num_heads)).transpose(1, 2)
    if layout.slot is not None:
        o = o.gather(1, layout.slot[..., None, None].expand(-1, -1, *o.shape[2:]))
    final = MemoryState(unfold(start), unfold(run), unfold(velocity) if velocity else None, layout.position)
    return o.to(in_dtype), final
