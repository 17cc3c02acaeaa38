"""One block of the default rule with all five memories stacked: the forward pass as 88 launches.

It computes what `block.BlockStep` computes, for the rules that `supports` accepts: the same products, but every memory
lies along the leading dimension, so that one batched product serves all of them. `stacked_backward` holds the gradient,
derived by hand. README.md beside this file names the equations.
N sequences x heads, c tokens, d head width, h hidden width. Order of the memories: mem, k, v, eta, alpha; 5N, 3N and
2N: all of them, those from d to d, and the gates, memory by memory. A block without padding has valid = None.
"""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.blocking import RowMask
from kernels.ops import L2_EPS, unit_lower_inverse_of_difference
from kernels.rule import MemoryRule

NUM_MEMORIES, NUM_FULL, NUM_GATES = 5, 3, 2
# Where each of them lies in the storage order k, v, mem, eta, alpha.
STORAGE_ORDER = (2, 0, 1, 3, 4)

silu_backward: Any = torch.ops.aten.silu_backward
log_sigmoid_forward: Any = torch.ops.aten.log_sigmoid_forward


def supports(rule: MemoryRule) -> bool:
    """Whether this file computes the rule; `block.BlockStep` computes all of them."""
    return (
        rule.writes
        and rule.memory == "mlp"
        and rule.adaptive == ("k", "v", "eta", "alpha")
        and rule.chunk_mem == rule.chunk_other
        and rule.residual
        and rule.activation == "silu"
        and rule.read == "live"
        and rule.decay == "deviation"
        and rule.erases_output_side
        and rule.eta_gate == "sigmoid"
        and rule.objective == "l2"
        and rule.target == "self"
        and rule.normalize_v
        and not rule.normalize_target
        and not rule.momentum
        and not rule.normalized_step
        and rule.gradient_bound is not None
    )


class Memories(NamedTuple):
    """The matrices of all memories: weights, what the state holds of them, or gradients."""

    body: Tensor  # [8, N, h d]: five input sides [h, d], then three output sides [d, h]
    gate: Tensor  # [2, N, h]: output sides of the gates

    def sides(self, h: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views: input sides [5N, h, d], output sides [3N, d, h] and those of the gates [2N, 1, h]."""
        n = self.body.shape[1]
        w2, w1 = self.body.view(8 * n, h, -1)[: 5 * n], self.body.view(8 * n, -1, h)[5 * n :]
        return w2, w1, self.gate.view(2 * n, 1, h)

    def add(self, other: "Memories") -> "Memories":
        """The sum."""
        return Memories(self.body + other.body, self.gate + other.gate)

    def add_(self, other: "Memories") -> None:
        """Adds `other` in place."""
        self.body.add_(other.body)
        self.gate.add_(other.gate)

    def zeros(self) -> "Memories":
        """Zeros of the same shapes."""
        return Memories(torch.zeros_like(self.body), torch.zeros_like(self.gate))

    def zero_(self) -> None:
        """Makes all of it zero."""
        self.body.zero_()
        self.gate.zero_()

    def without(self, rows: RowMask) -> "Memories":
        """Zero in the sequences and heads of `rows` [N]."""
        if isinstance(rows, bool):
            return self.zeros() if rows else self
        at = rows.view(1, -1, 1)
        return Memories(self.body.masked_fill(at, 0), self.gate.masked_fill(at, 0))

    def where(self, rows: RowMask, other: "Memories") -> "Memories":
        """Itself in the sequences and heads of `rows` [N], `other` elsewhere."""
        if isinstance(rows, bool):
            return self if rows else other
        at = rows.view(1, -1, 1)
        return Memories(*(torch.where(at, mine, its) for mine, its in zip(self, other, strict=True)))

    def scaled(self, factor_N: Tensor) -> "Memories":
        """Each sequence and head times its own number."""
        factor = factor_N.view(1, -1, 1)
        return Memories(self.body * factor, self.gate * factor)


class Constants(NamedTuple):
    """What all blocks of a call share."""

    log_eta_limit: float
    bound: float
    minus_lambda: Any  # minus the weight of the erasure: a number, or [N, 1] where heads differ
    slow: Tensor  # [2N, d, 1] slow linear part of the gates
    base: Memories  # learned initial weights
    one: Tensor  # 1 and sqrt(L2_EPS), as tensors of no dimension
    root_eps: Tensor


class BlockInputs(NamedTuple):
    """Per-token inputs of one block."""

    x: Tensor  # [4N, c, d] what the memories of k and v read, then twice what the gates read
    q: Tensor  # [N, c, d] unit length
    q_base: Tensor  # [N, c, h] q times the initial input side of the main memory
    logits: Tensor  # [2N, c, 1] slow part of the gates' logits
    valid: Tensor | None  # [N, c] whether the slot holds a token


class Generated(NamedTuple):
    """What the snapshot makes of the block's tokens."""

    pre_x: Tensor  # [4N, c, h] W2 x and its activation
    act_x: Tensor
    keys: Tensor  # [N, 4c, d] the erasure's keys, the writes' keys, k, v
    length: Tensor  # [2N, c, 1] by which k and v were divided
    logits: Tensor  # [2, N, c] of eta and alpha, and what log-sigmoid keeps
    logits_buffer: Tensor
    decay: Tensor  # [N, c + 1, c] eta_i gamma_t / gamma_i for 0 < i <= t, else 0
    gamma: Tensor  # [N, c + 1]
    weights: Tensor  # [2, N, c] factors of the erasure's and of the writes' keys


class Gradients(NamedTuple):
    """The inner gradients and what they are made of."""

    pre: Tensor  # [5N, 2c, h] W2 k and W2 v, and their activations
    act: Tensor
    error: Tensor  # [3N, c, d]
    error_gate: Tensor  # [2N, c, 1]
    back: Tensor  # [5N, c, h] W1^T error
    unit: Tensor  # [5N, c, h] act(W2 k) of unit length
    unit_length: Tensor  # [5N, c, 1]
    shrink: Tensor  # [10N, c, 1] minus the factor of the soft bound: input sides, output sides, gates
    grad2: Tensor  # [5N, c, h] minus the bounded gradients
    grad1: Tensor  # [3N, c, d]
    grad_gate: Tensor  # [2N, c, 1]


class Writes(NamedTuple):
    """The triangular systems and their solutions."""

    systems: Tensor  # [6N, c, c] minus their strictly lower parts: of k, and of the five output sides
    inverse: Tensor  # [6N, c, c]
    y2: Tensor  # [5N, c, h] solutions: writes before eta and the decay
    y1: Tensor  # [3N, c, d]
    y_gate: Tensor  # [2N, c, 1]


class Read(NamedTuple):
    """What the live read is made of."""

    masked: Tensor  # [2, N, c, c] masked products of the input side and of the output side
    pre_q: Tensor  # [N, c, h] W2_t q and its activation
    act_q: Tensor


class Kept(NamedTuple):
    """What the backward pass of one block needs besides its inputs and matrices."""

    made: Generated
    inner: Gradients
    wrote: Writes
    read: Read

    def tensors(self) -> list[Tensor]:
        """All of them, in one list."""
        return [tensor for part in self for tensor in part]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "Kept":
        """The inverse of `tensors`."""
        rest = iter(tensors)
        parts: list[Any] = [part(*islice(rest, len(part._fields))) for part in (Generated, Gradients, Writes, Read)]
        return cls(*parts)


def constants(rule: MemoryRule, lambda_d: Any, slow: Tensor, base: Memories) -> Constants:
    """lambda_d: a number, or [N, 1] where heads differ; slow: [2N, d, 1]."""
    assert rule.gradient_bound is not None
    one, root_eps = slow.new_ones(()), slow.new_full((), math.sqrt(L2_EPS))
    return Constants(math.log(rule.eta_limit), rule.gradient_bound, -lambda_d, slow, base, one, root_eps)


def _length(x: Tensor, con: Constants) -> Tensor:
    """sqrt(|x|^2 + eps) over the last dimension."""
    return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), con.root_eps)


def _decays(con: Constants, logits: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
    """Logits [2, N, c] to the fields `decay`, `gamma` and `weights` of `Generated`, and log-sigmoid's buffer."""
    _, n, c = logits.shape
    (log_share, log_alpha), buffer = log_sigmoid_forward(logits)
    if valid is not None:  # an empty slot neither decays nor writes
        log_alpha = log_alpha.masked_fill(~valid, 0)
        log_share = log_share.masked_fill(~valid, -math.inf)
    log_gamma = log_alpha.new_zeros(n, c + 1)
    into(log_gamma[:, 1:], torch.cumsum, log_alpha, -1)
    written = torch.sub(log_gamma[:, 1:], log_share).sub_(con.log_eta_limit)
    decay = torch.sub(log_gamma.unsqueeze(2), written.unsqueeze(1)).exp_().tril_(-1)
    gamma = log_gamma.exp()
    return decay, gamma, torch.stack([gamma[:, :c] * con.minus_lambda, decay[:, c]]), buffer


def into(out: Tensor, function: Any, *arguments: Any, **options: Any) -> Tensor:
    """function(*arguments, **options), written into `out`."""
    if torch.compiler.is_compiling():  # the compiler gives `out` the strides of the result
        return out.copy_(function(*arguments, **options))
    return function(*arguments, **options, out=out)  # type: ignore[no-any-return]


def expand_memories(x: Tensor) -> Tensor:
    """[N, ...] to [5N, ...]: the same for every memory."""
    return x.expand(NUM_MEMORIES, *x.shape).flatten(0, 1)


def weighted_units(unit: Tensor, weights: Tensor) -> Tensor:
    """The erasure's and the writes' keys of the output sides, [2, 5N, c, h]."""
    return (unit.unflatten(0, (NUM_MEMORIES, -1)) * weights[:, None, :, :, None]).flatten(1, 2)


def erasure_factors(con: Constants, decay: Tensor) -> Tensor:
    """Minus what multiplies the Gram matrices in the triangular systems, [N, c, c], strictly lower."""
    weight = con.minus_lambda
    return decay[:, :-1] * (weight.unsqueeze(-1) if isinstance(weight, Tensor) else weight)


def forward_block(
    con: Constants, inputs: BlockInputs, snapshot: Memories, run: Memories
) -> tuple[Tensor, Memories, Kept]:
    """Outputs [N, c, d], the matrices after the block, and what the backward pass needs.

    snapshot: the whole weights that generate and that gradients are taken at. run: the deviations the writes act on.
    """
    made = _generated(con, inputs, snapshot)
    all_keys = expand_memories(made.keys)
    inner = _inner_gradients(con, snapshot, all_keys)
    wrote, after = _written(con, made, inner, all_keys, run)
    o, read = _read(con, inputs, made, inner, wrote, run)
    return o, after, Kept(made, inner, wrote, read)


def _generated(con: Constants, inputs: BlockInputs, snapshot: Memories) -> Generated:
    """Eq. 83: k, v, eta and alpha."""
    x, n, c = inputs.x, inputs.q.shape[0], inputs.q.shape[1]
    w2, w1, wg = snapshot.sides(inputs.q_base.shape[-1])
    pre = torch.bmm(x, w2[n:].mT)
    act = F.silu(pre)
    raw = torch.baddbmm(x[: 2 * n], act[: 2 * n], w1[n:].mT)
    logits = torch.baddbmm(inputs.logits, act[2 * n :], wg.mT).view(2, n, c)
    length = _length(raw, con)
    keys = raw.new_empty(n, 4, c, raw.shape[-1])
    by_token = (2, n, c, -1)
    into(keys[:, 2:].transpose(0, 1), torch.div, raw.view(by_token), length.view(by_token))
    decay, gamma, weights, buffer = _decays(con, logits, inputs.valid)
    into(keys[:, :2], torch.mul, keys[:, 2:3], weights.transpose(0, 1).unsqueeze(-1))
    return Generated(pre, act, keys.flatten(1, 2), length, logits, buffer, decay, gamma, weights)


def _written(
    con: Constants, made: Generated, inner: Gradients, all_keys: Tensor, run: Memories
) -> tuple[Writes, Memories]:
    """Eq. 88: all writes at once, and the matrices after them."""
    (n, c), h = made.decay.shape[::2], run.gate.shape[-1]
    x2, x1, xg = run.sides(h)
    unit_keys = weighted_units(inner.unit, made.weights)
    k = made.keys[:, 2 * c : 3 * c]
    systems = k.new_empty(6, n, c, c)
    into(systems[0], torch.bmm, k, k.mT)
    into(systems[1:].flatten(0, 1), torch.bmm, inner.unit, inner.unit.mT)
    systems = systems.mul_(erasure_factors(con, made.decay)).flatten(0, 1)
    inverse = unit_lower_inverse_of_difference(systems)
    y2 = torch.bmm(expand_memories(inverse[:n]), torch.baddbmm(inner.grad2, all_keys[:, :c], x2.mT))
    y1 = torch.bmm(inverse[n : 4 * n], torch.baddbmm(inner.grad1, unit_keys[0, : 3 * n], x1.mT))
    y_gate = torch.bmm(inverse[4 * n :], torch.baddbmm(inner.grad_gate, unit_keys[0, 3 * n :], xg.mT))
    after = run.scaled(made.gamma[:, c])
    a2, a1, ag = after.sides(h)
    a2.baddbmm_(y2.mT, all_keys[:, c : 2 * c])
    a1.baddbmm_(y1.mT, unit_keys[1, : 3 * n])
    ag.baddbmm_(y_gate.mT, unit_keys[1, 3 * n :])
    return Writes(systems, inverse, y2, y1, y_gate), after


def _read(
    con: Constants, inputs: BlockInputs, made: Generated, inner: Gradients, wrote: Writes, run: Memories
) -> tuple[Tensor, Read]:
    """The live read: what the block began with, and a masked product with the writes up to each token."""
    q, (n, c), h = inputs.q, made.decay.shape[::2], run.gate.shape[-1]
    x2, x1, _ = run.sides(h)
    gamma, decay = made.gamma[:, 1:].unsqueeze(-1), made.decay[:, 1:]
    masked = q.new_empty(2, n, c, c)
    into(masked[0], torch.bmm, q, made.keys[:, 2 * c : 3 * c].mT).mul_(decay)
    pre = torch.baddbmm(inputs.q_base, q * gamma, x2[:n].mT).baddbmm_(masked[0], wrote.y2[:n])
    act = F.silu(pre)
    into(masked[1], torch.bmm, act, inner.unit[:n].mT).mul_(decay)
    o = torch.baddbmm(q, act, con.base.sides(h)[1][:n].mT)
    o.baddbmm_(act * gamma, x1[:n].mT).baddbmm_(masked[1], wrote.y1[:n])
    return o, Read(masked, pre, act)


def _inner_gradients(con: Constants, snapshot: Memories, all_keys: Tensor) -> Gradients:
    """Eq. 84-87: gradients at the snapshot, bounded, with a minus sign; all_keys: [5N, 4c, d]."""
    c, h = all_keys.shape[1] // 4, snapshot.gate.shape[-1]
    w2, w1, wg = snapshot.sides(h)
    n = wg.shape[0] // 2
    full = 3 * n
    pre = torch.bmm(all_keys[:, 2 * c :], w2.mT)
    act = F.silu(pre)
    difference = act[:, :c] - act[:, c:]
    z = all_keys[:, 2 * c : 3 * c] - all_keys[:, 3 * c :]
    error = torch.baddbmm(z[:full], difference[:full], w1.mT)
    error_gate = torch.bmm(z[full:], con.slow).baddbmm_(difference[full:], wg.mT)
    back = torch.empty_like(difference)
    into(back[:full], torch.bmm, error, w1)
    into(back[full:], torch.mul, error_gate, wg)
    unit_length = _length(act[:, :c], con)
    unit = act[:, :c] / unit_length

    # The output side's gradient is (|s| e) u^T; every factor is shortened by the soft bound.
    grad2, grad1 = silu_backward(back, pre[:, :c]), error * unit_length[:full]
    size = pre.new_empty(10 * n, c, 1)
    into(size[: 5 * n], torch.linalg.vector_norm, grad2, dim=-1, keepdim=True)
    into(size[5 * n : 8 * n], torch.linalg.vector_norm, grad1, dim=-1, keepdim=True)
    grad_gate = into(size[8 * n :], torch.mul, error_gate, unit_length[full:])
    shrink = torch.addcmul(con.one, size, size, value=con.bound**-2).rsqrt_().neg_()
    grad2.mul_(shrink[: 5 * n])
    grad1.mul_(shrink[5 * n : 8 * n])
    grad_gate = grad_gate * shrink[8 * n :]
    return Gradients(pre, act, error, error_gate, back, unit, unit_length, shrink, grad2, grad1, grad_gate)
