"""What goes into and comes out of the memories: inputs, learned initial weights, and the state of a sequence.

The state is a value: it can be carried from piece to piece, detached, turned into a flat dict of tensors and back.
Shapes: B sequences, T tokens, H heads, d head width, h hidden width, F d -> d memories, G d -> 1 memories (gates),
R stacked rows of all input-side matrices (`MemoryRule.rows`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.rule import GATES, MemoryRule


class Inputs(NamedTuple):
    """Per-token inputs, each [B, T, H, d] unless said."""

    k: Tensor
    v: Tensor
    q: Tensor
    gate: Tensor
    beta_logit: Tensor | None = None  # [B, T, H], only with momentum


class Weights(NamedTuple):
    """All memories of a layer. Leading dims: [H, ...] for initial weights, [B, H, ...] for a state."""

    w2: Tensor  # [..., R, d] input side of every memory, stacked along the rows
    # None where there is no such side; typed Any, because the rule decides it, not each line that uses it.
    w1: Any = None  # [..., F, d, h] output side of the d -> d memories; None for matrix memories
    g1: Any = None  # [..., G, h] output side of the gates; None for matrix memories or without adaptive gates

    def map(self, function: Callable[[Tensor], Tensor]) -> "Weights":
        """The same with `function` applied to every tensor there is."""
        done: list[Any] = [None if w is None else function(w) for w in self]
        return Weights(*done)

    def zip(self, other: "Weights", function: Callable[[Tensor, Tensor], Tensor]) -> "Weights":
        """The same with `function` applied to corresponding tensors."""
        done: list[Any] = [None if w is None else function(w, o) for w, o in zip(self, other, strict=True)]
        return Weights(*done)


class Initial(NamedTuple):
    """The learned part: where the memories start, and the slow linear part of the gates."""

    weights: Weights
    slow: Tensor  # [2, H, d] slow linear part of the eta and alpha logits
    bias: Tensor  # [2, H]


class MemoryState(NamedTuple):
    """The memories in the middle of a sequence. With decay = "deviation" it holds W - W_initial, else W."""

    start: Weights  # snapshot at the last chunk boundary: generates k, v, gates, targets and gradients
    run: Weights  # the running weights M_t
    velocity: Weights | None  # S of the momentum
    position: Tensor  # [B] int64, tokens since the document began

    def detach(self) -> "MemoryState":
        """The same state outside the autograd graph (truncated backpropagation)."""
        velocity = self.velocity.map(torch.detach) if self.velocity else None
        return MemoryState(self.start.map(torch.detach), self.run.map(torch.detach), velocity, self.position)

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat dict of tensors, for saving."""
        out = {"position": self.position}
        for part in ("start", "run", "velocity"):
            weights = getattr(self, part)
            if weights is not None:
                out |= {f"{part}.{n}": w for n, w in zip(Weights._fields, weights, strict=True) if w is not None}
        return out

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "MemoryState":
        """The inverse of `to_tensors`."""
        parts: list[Any] = []
        for part in ("start", "run", "velocity"):
            found = [tensors.get(f"{part}.{name}") for name in Weights._fields]
            parts.append(None if found[0] is None else Weights(*found))  # type: ignore[arg-type]
        start, run, velocity = parts
        return cls(start, run, velocity, tensors["position"])


def fresh_state(initial: Initial, rule: MemoryRule, num_sequences: int) -> MemoryState:
    """The state before the first token of a document, differentiable in the initial weights where it holds them."""
    weights = initial.weights

    def start(w: Tensor) -> Tensor:
        whole = w.unsqueeze(0).expand(num_sequences, *w.shape)
        return torch.zeros_like(whole) if rule.decay == "deviation" else whole

    run = weights.map(start)
    velocity = run.map(torch.zeros_like) if rule.momentum else None
    position = torch.zeros(num_sequences, dtype=torch.long, device=weights.w2.device)
    return MemoryState(run, run, velocity, position)


def init_weights(
    rule: MemoryRule,
    num_heads: int,
    head_dim: int,
    hidden: int,
    *,
    w1_std: float = 0.02,
    eta_init: float | None = None,
    alpha_init: float = 0.99,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Initial:
    """Initial weights: W2 ~ N(0, 1/d), W1 ~ N(0, w1_std^2), eta at `eta_init` (default min(0.1, eta_max / 2))."""

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) * std

    mlp, gates = rule.memory == "mlp", len(rule.gate_names)
    rows = rule.num_rows(head_dim, hidden)
    w2 = normal(num_heads, rows, head_dim, std=head_dim**-0.5 if mlp else w1_std)
    w1 = normal(num_heads, len(rule.full_names), head_dim, hidden, std=w1_std) if mlp else None
    g1 = normal(num_heads, gates, hidden, std=w1_std) if mlp and gates else None
    slow = normal(len(GATES), num_heads, head_dim, std=0.02)
    bias = gate_bias(rule, eta_init, alpha_init).to(dtype)[:, None].repeat(1, num_heads)
    return Initial(Weights(w2, w1, g1), slow, bias)


def gate_bias(rule: MemoryRule, eta_init: float | None, alpha_init: float) -> Tensor:
    """[2] logits that make eta and alpha start at the given values."""
    limit = rule.eta_limit
    eta = min(0.1, limit / 2) if eta_init is None else eta_init
    share = eta / limit if rule.eta_gate == "sigmoid" else (eta / limit + 0.05) / 1.1
    return torch.logit(torch.tensor([share, alpha_init], dtype=torch.float64))
