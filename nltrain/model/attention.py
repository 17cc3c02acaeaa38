"""Softmax attention of each token over its own document, in several ways that agree within rounding.

No way but "mask" holds an array of T x T entries. What cannot run is refused with the reason; "auto" takes the first of
AUTOMATIC that can. B sequences, T tokens, H heads, d head width.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

AUTO = "auto"
# "varlen": one launch for all documents, of torch.nn.attention.varlen. "documents": one call of
# F.scaled_dot_product_attention per document. "mask": one call for the batch with a dense mask.
AUTOMATIC = ("varlen", "documents", "mask")
ATTENTIONS = (AUTO, *AUTOMATIC)
# torch's flash attention needs this compute capability (Ampere) and supports heads up to this width.
OLDEST_CAPABILITY, WIDEST_HEAD = (8, 0), 256


class Documents(Protocol):
    """What attention needs to know of a batch; see `nltrain.model.packing.Packing`."""

    @property
    def attention(self) -> str:
        """The way to compute it."""

    @property
    def starts(self) -> Tensor | None:
        """[B, T] bool; None where no document begins inside the batch."""

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Tokens of each document, row after row."""

    @property
    def ends(self) -> Tensor | None:
        """Where each of them ends, int32, on the device."""

    def attention_mask(self, num_past: int) -> Tensor | None:
        """[B, 1, T, num_past + T] bool."""


class AttentionError(ValueError):
    """A way of attention that cannot run; the message names it and says why and what to do."""


def refusal(name: str, head_dim: int, compiled: bool, device: torch.device | None, dtype: torch.dtype) -> str | None:
    """Why attention cannot be computed by `name`, or None. compiled: whether whole blocks are.

    device None: before it is known, which checks only what does not depend on it. The meta device, which is used to
    count what a GPU would do, counts as one.
    """
    if name not in ATTENTIONS:
        return f"choose one of {', '.join(ATTENTIONS)}"
    if name == "documents" and compiled:
        return "every batch has other documents and would be compiled anew; choose auto, varlen or mask"
    if name != "varlen":
        return None
    if head_dim % 8 or head_dim > WIDEST_HEAD:
        return f"heads of {head_dim} do not fit the kernel (multiples of 8 up to {WIDEST_HEAD}); choose auto"
    if device is None:
        return None
    if device.type not in ("cuda", "meta"):
        return f"it needs a GPU, the model is on {device.type}; choose auto"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, the model is in {dtype}; choose auto, or levels.dtype=bf16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "this GPU is older than Ampere; choose auto"
    return None


def chosen(name: str, head_dim: int, compiled: bool, device: torch.device, dtype: torch.dtype) -> str:
    """The way that computes `name` here. Raises AttentionError where it cannot run."""
    reason = refusal(name, head_dim, compiled, device, dtype)
    if reason is not None:
        raise AttentionError(f"attention = {name!r}: {reason}")
    if name != AUTO:
        return name
    return next(way for way in AUTOMATIC if refusal(way, head_dim, compiled, device, dtype) is None)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """q [B, T, H, d], k and v [B, T_past + T, H, d] to [B, T, H, d], by the way that `documents` names.

    Pieces of a longer sequence always take a mask: it has one row per new token.
    """
    num_past = k.shape[1] - q.shape[1]
    if documents.starts is None and not num_past:
        return _whole(q, k, v, None)
    if documents.attention == "varlen" and documents.ends is not None:
        return _varlen(q, k, v, documents.ends)
    if documents.attention == "documents" and documents.lengths is not None:
        return _by_document(q, k, v, documents.lengths)
    return _whole(q, k, v, documents.attention_mask(num_past))


def _whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = q.shape[1]  # a bound known to the host; the kernel reads the lengths themselves on the device
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(flat_q, flat_k, flat_v, ends, ends, longest, longest, window_size=(-1, 0))  # (-1, 0): causal
    assert isinstance(out, Tensor)
    return out.unflatten(0, q.shape[:2])


def _by_document(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Documents one after another; rows do not matter, because a document never crosses the end of one."""
    parts = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            q_part.transpose(0, 1), k_part.transpose(0, 1), v_part.transpose(0, 1), is_causal=True
        ).transpose(0, 1)
        for q_part, k_part, v_part in parts
    ]
    return torch.cat(outputs).unflatten(0, q.shape[:2])
