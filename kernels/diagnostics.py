"""Figures of the memories along a sequence, one row per chunk, without gradients.

In a stable memory eta and alpha stay away from the ends of their ranges, |v|/|k| stays near 1 and |dW|/|W| does not
grow. Gates at the ends of their ranges follow from a memory that has grown too large, and appear just before NaN.
"""

import torch
from torch import Tensor

from kernels.block import BlockStep
from kernels.chunk import self_modify
from kernels.ops import l2norm
from kernels.rule import MemoryRule
from kernels.state import Initial, Inputs, MemoryState


def _length(weights: list[Tensor], batch_dims: int) -> Tensor:
    """Norm of several matrices together, per sequence and head."""
    return torch.stack([w.square().flatten(batch_dims).sum(batch_dims) for w in weights]).sum(0).sqrt()


@torch.no_grad()
def chunk_diagnostics(inputs: Inputs, initial: Initial, rule: MemoryRule) -> dict[str, Tensor]:
    """Figures per chunk of the longer schedule, each [chunks]; shapes as in `chunk.self_modify`, one document per row.

    eta_mean, eta_max, alpha_mean, alpha_min: the inner learning rate and the retention per token. v_over_k: mean
    |v|/|k|. change_over_weight: the largest |W - W_initial| / |W_initial| of any sequence and head, all memories
    together, after the chunk.
    """
    length = max(rule.chunk_mem, rule.chunk_other)
    dtype = torch.promote_types(inputs.k.dtype, torch.float32)
    step = BlockStep(rule, initial, inputs.k.shape[0], dtype)
    rows: dict[str, list[Tensor]] = {}
    state: MemoryState | None = None
    size = _length([w.to(dtype) for w in initial.weights if w is not None], 1)
    for begin in range(0, inputs.k.shape[1], length):
        part = Inputs(*(None if x is None else x[:, begin : begin + length] for x in inputs))  # type: ignore[arg-type]
        snap = step.base if state is None else step.whole(state.run.map(lambda w: w.to(dtype).flatten(0, 1)))

        def arrange(x: Tensor) -> Tensor:
            x = x.transpose(1, 2).flatten(0, 1).to(dtype)
            return l2norm(x) if rule.normalize_inputs else x

        k, v, logits = step.generated(snap, {"k": arrange(part.k), "v": arrange(part.v), "gate": arrange(part.gate)})
        eta, alpha = rule.eta_limit * logits[..., 0].sigmoid(), logits[..., 1].sigmoid()
        _, state = self_modify(part, initial, rule, state)
        moved = state.run
        if rule.decay == "literal":
            moved = moved.zip(initial.weights, lambda w, b: w - b)
        change = _length([w for w in moved if w is not None], 2) / size
        figures = {
            "eta_mean": eta.mean(),
            "eta_max": eta.max(),
            "alpha_mean": alpha.mean(),
            "alpha_min": alpha.min(),
            "v_over_k": (v.norm(dim=-1) / k.norm(dim=-1)).mean(),
            "change_over_weight": change.max(),
        }
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}
