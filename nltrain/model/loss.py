"""Cross entropy of tied logits, with a bound on the memory of the logits.

`summed_loss` equals `F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")`. A long batch is taken in
pieces of rows: each piece's logits are made, turned into their gradient in place, multiplied into the gradients of x
and of the matrix, and dropped. So the forward pass does the work of the backward pass, which only scales.
torch's `F.linear_cross_entropy` does the same, but (2.13) it returns the sum in the dtype of x, in bf16 off by one part
in a thousand, and adds to the matrix's gradient in an order that a GPU does not repeat. N rows, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100
FP32_BYTES = 4
# Pieces are a multiple of this many rows, so that products stay on the fast path.
ROWS = 128


def rows_per_piece(vocab_size: int, logits_bytes: int) -> int:
    """Rows whose fp32 logits take at most `logits_bytes`, but no fewer than ROWS."""
    return max(1, logits_bytes // (FP32_BYTES * vocab_size * ROWS)) * ROWS


def summed_loss(x: Tensor, weight: Tensor, targets: Tensor, logits_bytes: int) -> Tensor:
    """fp32 scalar: the loss in nats of x [N, D] and `weight` [V, D], summed over the targets [N] other than -100.

    Where the fp32 logits of all rows take at most `logits_bytes`, torch's own functions compute it.
    """
    rows = rows_per_piece(weight.shape[0], logits_bytes)
    if len(x) <= rows:
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=IGNORED, reduction="sum")
    return _InPieces.apply(x, weight, targets, rows, torch.is_grad_enabled())  # type: ignore[no-any-return]


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, grad: bool) -> Tensor:
        wanted = grad and any(ctx.needs_input_grad[:2])
        total = x.new_zeros((), dtype=torch.float32)
        d_x = torch.empty_like(x) if wanted else None
        # Summed over pieces in fp32, then rounded once, as one product over all rows would be.
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if wanted else None
        for begin in range(0, len(x), rows):
            part, target = x[begin : begin + rows], targets[begin : begin + rows]
            logits = F.linear(part, weight).float()
            norm = logits.logsumexp(-1)
            counts = target != IGNORED
            at = target.where(counts, 0).unsqueeze(1)
            total += (norm - logits.gather(1, at).squeeze(1)).where(counts, 0.0).sum()
            if d_x is None or d_weight is None:
                continue
            # Softmax minus one at the target; rows that are ignored give exact zeros, NaN or not.
            gradient = logits.sub_(norm.unsqueeze(1)).exp_()
            gradient.scatter_(1, at, gradient.gather(1, at) - 1).masked_fill_(~counts.unsqueeze(1), 0)
            narrow = gradient.to(x.dtype)
            torch.mm(narrow, weight, out=d_x[begin : begin + rows])
            d_weight += torch.mm(narrow.mT, part)
        if d_x is not None and d_weight is not None:
            ctx.save_for_backward(d_x, d_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_x, d_weight = ctx.saved_tensors
        return d_x * d_total.to(d_x.dtype), d_weight * d_total.to(d_weight.dtype), None, None, None
