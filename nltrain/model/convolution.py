"""The causal depthwise convolution inside documents, with a backward pass written by hand.

y[p, t] = sum over taps j of seen[t, j] x[t - j] w[j, p], seen 1 where that input belongs to the document of token t.
autograd takes 112 operations for the backward pass of three paths and four taps, this takes about 30.
B sequences, T tokens, D width, P paths.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def convolve_in_documents(padded: Tensor, weight: Tensor, seen: Tensor) -> Tensor:
    """padded [B, taps - 1 + T, D], weight [taps, P, D] and seen [B, T, taps - 1] to [P, B, T, D]."""
    return _Convolve.apply(padded, weight, seen)  # type: ignore[no-any-return]


def _windows(padded: Tensor, taps: int, seen: Tensor) -> list[Tensor]:
    """For each tap j the inputs [B, T, D] of j tokens earlier, zero where they belong to another document."""
    num_tokens = padded.shape[1] - taps + 1
    shifted = [padded[:, taps - 1 - j : taps - 1 - j + num_tokens] for j in range(taps)]
    return [shifted[0], *(x * seen[..., j, None] for j, x in enumerate(shifted[1:]))]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, seen: Tensor) -> Tensor:
        windows = _windows(padded, len(weight), seen)
        out = windows[0] * weight[0][:, None, None]
        for window, w in zip(windows[1:], weight[1:], strict=True):
            out.addcmul_(window.unsqueeze(0), w[:, None, None])
        ctx.save_for_backward(padded, weight, seen)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        padded, weight, seen = ctx.saved_tensors
        taps, num_tokens = len(weight), d_out.shape[2]
        d_padded, d_weight = torch.zeros_like(padded), []
        for j, window in enumerate(_windows(padded, taps, seen)):
            d_weight.append((d_out * window).sum((1, 2)))
            d_window = (d_out * weight[j][:, None, None]).sum(0)
            into = d_padded[:, taps - 1 - j : taps - 1 - j + num_tokens]
            if j:
                into.addcmul_(d_window, seen[..., j - 1, None])
            else:
                into.add_(d_window)
        return d_padded, torch.stack(d_weight), None
