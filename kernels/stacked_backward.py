"""The gradient of one block of `stacked`, derived by hand, as 156 launches.

`d_x` is the gradient of the loss by x. Gradients by ratios of the decay are kept times the ratios, that is, by their
logarithms. Letters and order of the memories as in `stacked`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.stacked import (
    BlockInputs,
    Constants,
    Kept,
    Memories,
    erasure_factors,
    expand_memories,
    into,
    silu_backward,
    weighted_units,
)

log_sigmoid_backward: Any = torch.ops.aten.log_sigmoid_backward
sigmoid_backward: Any = torch.ops.aten.sigmoid_backward


class InputGradients(NamedTuple):
    """Gradients of the fields of `BlockInputs`."""

    x: Tensor
    q: Tensor
    q_base: Tensor
    logits: Tensor


class Accumulators(NamedTuple):
    """Gradients that all blocks add to, in place."""

    snapshot: Memories
    base_w1: Tensor  # [N, d, h] of the main memory's output side, by the live read
    slow: Tensor  # [2N, d, 1]


def backward_block(
    con: Constants, inputs: BlockInputs, snapshot: Memories, run: Memories, kept: Kept,
    d_o: Tensor, d_after: Memories, into: Accumulators,
) -> tuple[InputGradients, Memories]:  # fmt: skip
    """Gradients of the inputs and of `run`, given those of the outputs and of the matrices after the block."""
    step = _Backward(con, inputs, snapshot, run, kept, into)
    step.read(d_o)
    step.update(d_o, d_after)
    step.solve()
    step.bounded_gradients()
    step.errors()
    step.units()
    step.keys()
    d_logits = step.decays()
    d_x = step.generated(d_logits)
    return InputGradients(d_x, step.d_q, step.d_pre_q, d_logits), step.d_run


class _Backward:
    """The parts of one backward pass, in order; each leaves gradients as attributes for the later ones."""

    def __init__(
        self, con: Constants, inputs: BlockInputs, snapshot: Memories, run: Memories, kept: Kept, into: Accumulators
    ) -> None:
        self.con, self.inputs, self.into, self.run = con, inputs, into, run
        self.made, self.inner, self.wrote, self.kept_read = kept
        (self.n, self.c, self.d), self.h = inputs.q.shape, inputs.q_base.shape[-1]
        self.full = 3 * self.n
        self.w2, self.w1, self.wg = snapshot.sides(self.h)
        self.d_w2, self.d_w1, self.d_wg = into.snapshot.sides(self.h)
        self.x2, self.x1, self.xg = run.sides(self.h)
        self.k = self.made.keys[:, 2 * self.c : 3 * self.c]
        self.all_keys = expand_memories(self.made.keys)
        self.unit_keys = weighted_units(self.inner.unit, self.made.weights)
        # Gradients of the keys and unit keys times their weights, and of k and v, summed up from part to part.
        self.d_weighted = self.all_keys.new_empty(2, 5 * self.n, self.c, self.d)
        self.d_unit_keys = torch.empty_like(self.unit_keys)
        self.d_made = self.all_keys.new_empty(5 * self.n, 2 * self.c, self.d)

    def read(self, d_o: Tensor) -> None:
        """The live read."""
        n, q, kept, wrote = self.n, self.inputs.q, self.kept_read, self.wrote
        gamma, decay = self.made.gamma[:, 1:].unsqueeze(-1), self.made.decay[:, 1:]
        d_masked = torch.empty_like(kept.masked)
        into(d_masked[1], torch.bmm, d_o, wrote.y1[:n].mT)
        d_act_scaled = torch.bmm(d_o, self.x1[:n])
        d_act = torch.bmm(d_o, self.con.base.sides(self.h)[1][:n]).addcmul_(gamma, d_act_scaled)
        self.into.base_w1.baddbmm_(d_o.mT, kept.act_q)
        self.d_gram_act = d_masked[1] * decay
        d_act.baddbmm_(self.d_gram_act, self.inner.unit[:n])
        self.d_pre_q = silu_backward(d_act, kept.pre_q)
        into(d_masked[0], torch.bmm, self.d_pre_q, wrote.y2[:n].mT)
        self.d_gram_q = d_masked[0] * decay
        d_q_scaled = torch.bmm(self.d_pre_q, self.x2[:n])
        self.d_q = torch.addcmul(d_o, gamma, d_q_scaled).baddbmm_(self.d_gram_q, self.k)
        self.d_gamma = (d_act_scaled * kept.act_q).sum(-1).add_((d_q_scaled * q).sum(-1))
        self.d_log_decay_read = torch.mul(d_masked[0], kept.masked[0]).addcmul_(d_masked[1], kept.masked[1])

    def update(self, d_o: Tensor, d_after: Memories) -> None:
        """The matrices after the block; and what the read gives to the solutions and to the matrices before it."""
        n, c, full, wrote, kept = self.n, self.c, self.full, self.wrote, self.kept_read
        gamma = self.made.gamma[:, 1:].unsqueeze(-1)
        self.d_run = d_after.scaled(self.made.gamma[:, c])
        d_body = torch.bmm(d_after.body.view(8 * n, 1, -1), self.run.body.view(8 * n, -1, 1)).view(8, n).sum(0)
        self.d_kept = (d_after.gate * self.run.gate).sum((0, 2)).add_(d_body)
        d_after2, d_after1, d_after_gate = d_after.sides(self.h)
        self.d_y2 = torch.bmm(self.all_keys[:, c : 2 * c], d_after2.mT)
        into(self.d_weighted[1], torch.bmm, wrote.y2, d_after2)
        self.d_y1 = torch.bmm(self.unit_keys[1, :full], d_after1.mT)
        into(self.d_unit_keys[1, :full], torch.bmm, wrote.y1, d_after1)
        self.d_y_gate = torch.bmm(self.unit_keys[1, full:], d_after_gate.mT)
        into(self.d_unit_keys[1, full:], torch.mul, wrote.y_gate, d_after_gate)
        self.d_y2[:n].baddbmm_(kept.masked[0].mT, self.d_pre_q)
        self.d_y1[:n].baddbmm_(kept.masked[1].mT, d_o)
        d_run2, d_run1, _ = self.d_run.sides(self.h)
        d_run2[:n].baddbmm_(self.d_pre_q.mT, self.inputs.q * gamma)
        d_run1[:n].baddbmm_(d_o.mT, kept.act_q * gamma)

    def solve(self) -> None:
        """The triangular systems and their right-hand sides."""
        n, c, full, wrote = self.n, self.c, self.full, self.wrote
        self.d_grad2 = torch.bmm(expand_memories(wrote.inverse[:n]).mT, self.d_y2)
        self.d_grad1 = torch.bmm(wrote.inverse[n : 4 * n].mT, self.d_y1)
        self.d_grad_gate = torch.bmm(wrote.inverse[4 * n :].mT, self.d_y_gate)
        d_systems = wrote.systems.new_empty(6, n, c, c)
        into(d_systems[0], torch.sum, torch.bmm(self.d_grad2, wrote.y2.mT).view(5, n, c, c), 0)
        into(d_systems[1:4].flatten(0, 1), torch.bmm, self.d_grad1, wrote.y1.mT)
        into(d_systems[4:].flatten(0, 1), torch.bmm, self.d_grad_gate, wrote.y_gate.mT)
        self.d_log_decay_solve = (d_systems * wrote.systems.view_as(d_systems)).sum(0)
        d_grams = d_systems.mul_(erasure_factors(self.con, self.made.decay))
        both = d_grams + d_grams.mT
        self.d_k = torch.bmm(both[0], self.k).baddbmm_(self.d_gram_q.mT, self.inputs.q)
        self.d_unit = torch.bmm(both[1:].flatten(0, 1), self.inner.unit)
        self.d_unit[:n].baddbmm_(self.d_gram_act.mT, self.kept_read.act_q)

        d_run2, d_run1, d_run_gate = self.d_run.sides(self.h)
        into(self.d_weighted[0], torch.bmm, self.d_grad2, self.x2)
        d_run2.baddbmm_(self.d_grad2.mT, self.all_keys[:, :c])
        into(self.d_unit_keys[0, :full], torch.bmm, self.d_grad1, self.x1)
        d_run1.baddbmm_(self.d_grad1.mT, self.unit_keys[0, :full])
        into(self.d_unit_keys[0, full:], torch.mul, self.d_grad_gate, self.xg)
        d_run_gate.baddbmm_(self.d_grad_gate.mT, self.unit_keys[0, full:])

    def bounded_gradients(self) -> None:
        """The soft bound, the slope of the activation and the length of the output side's keys."""
        n, c, full, inner = self.n, self.c, self.full, self.inner
        scale = -(self.con.bound**-2)
        dot = torch.empty_like(inner.shrink)
        into(dot[: 5 * n], torch.sum, inner.grad2 * self.d_grad2, -1, keepdim=True)
        into(dot[5 * n : 8 * n], torch.sum, inner.grad1 * self.d_grad1, -1, keepdim=True)
        into(dot[8 * n :], torch.mul, inner.grad_gate, self.d_grad_gate)
        d_slope = torch.addcmul(self.d_grad2, inner.grad2, dot[: 5 * n], value=scale).mul_(inner.shrink[: 5 * n])
        shrink, dot = inner.shrink[5 * n :], dot[5 * n :]
        factor = shrink * inner.unit_length
        self.d_error = torch.addcmul(self.d_grad1, inner.grad1, dot[:full], value=scale).mul_(factor[:full])
        self.d_error_gate = torch.addcmul(self.d_grad_gate, inner.grad_gate, dot[full:], value=scale)
        self.d_error_gate.mul_(factor[full:])
        self.d_length = (dot * shrink).mul_(shrink).div_(inner.unit_length)

        # act'' = gate (1 - gate) (2 + a - 2 act) for silu.
        pre, act = inner.pre[:, :c], inner.act[:, :c]
        self.d_back = silu_backward(d_slope, pre)
        bend = torch.sub(pre, act, alpha=2).add_(2).mul_(d_slope.mul_(inner.back))
        self.d_pre_k = sigmoid_backward(bend, pre.sigmoid())

    def errors(self) -> None:
        """The errors of the memories: the difference of their outputs at k and at v."""
        c, full, inner = self.c, self.full, self.inner
        self.d_error.baddbmm_(self.d_back[:full], self.w1.mT)
        self.d_w1.baddbmm_(inner.error.mT, self.d_back[:full])
        self.d_error_gate.baddbmm_(self.d_back[full:], self.wg.mT)
        self.d_wg.baddbmm_(inner.error_gate.mT, self.d_back[full:])
        difference = inner.act[:, :c] - inner.act[:, c:]
        self.d_difference = torch.empty_like(difference)
        into(self.d_difference[:full], torch.bmm, self.d_error, self.w1)
        into(self.d_difference[full:], torch.mul, self.d_error_gate, self.wg)
        self.d_w1.baddbmm_(self.d_error.mT, difference[:full])
        self.d_wg.baddbmm_(self.d_error_gate.mT, difference[full:])
        # k - v of every memory, whose gradients begin those of k and v.
        d_difference = self.d_made[:, :c]
        d_difference[:full].copy_(self.d_error)
        into(d_difference[full:], torch.mul, self.d_error_gate, self.con.slow.mT)
        into(self.d_made[:, c:], torch.neg, d_difference)
        z = self.all_keys[full:, 2 * c : 3 * c] - self.all_keys[full:, 3 * c :]
        self.into.slow.baddbmm_(z.mT, self.d_error_gate)

    def units(self) -> None:
        """The unit keys of the output sides, then W2 k and W2 v."""
        n, c, h, inner = self.n, self.c, self.h, self.inner
        parts, weights = self.d_unit_keys.view(2, 5, n, c, h), self.made.weights[:, None, :, :, None]
        self.d_unit.view(5, n, c, h).addcmul_(parts[0], weights[0]).addcmul_(parts[1], weights[1])
        self.d_weights = (parts * inner.unit.view(5, n, c, h)).sum((1, 4))
        along = (self.d_unit * inner.unit).sum(-1, keepdim=True)
        along = torch.addcdiv(self.d_length, along, inner.unit_length, value=-1)
        self.d_unit.div_(inner.unit_length).addcmul_(inner.unit, along)
        d_act = torch.empty_like(inner.act)
        into(d_act[:, :c], torch.add, self.d_unit, self.d_difference)
        into(d_act[:, c:], torch.neg, self.d_difference)
        d_pre = silu_backward(d_act, inner.pre)
        d_pre[:, :c].add_(self.d_pre_k)
        self.d_made.baddbmm_(d_pre, self.w2)
        self.d_w2.baddbmm_(d_pre.mT, self.all_keys[:, 2 * c :])

    def keys(self) -> None:
        """The keys of the input side; then k and v before they were brought to unit length."""
        n, c, d, made = self.n, self.c, self.d, self.made
        d_weighted = self.d_weighted.view(2, 5, n, c, d).sum(1)
        d_made = self.d_made.view(5, n, 2, c, d).sum(0)
        weights = made.weights.unsqueeze(-1)
        self.d_weights.add_((d_weighted * self.k).sum(-1))
        d_made[:, 0].add_(self.d_k).addcmul_(d_weighted[0], weights[0]).addcmul_(d_weighted[1], weights[1])
        unit, d_unit = made.keys.view(n, 4, c, d)[:, 2:].transpose(0, 1), d_made.transpose(0, 1)
        along = (unit * d_unit).sum(-1, keepdim=True)
        d_unit = torch.addcmul(d_unit, unit, along, value=-1)
        self.d_x = torch.empty_like(self.inputs.x)
        self.d_raw = self.d_x[: 2 * n]
        into(self.d_raw.view(2, n, c, d), torch.div, d_unit, made.length.view(2, n, c, 1))

    def decays(self) -> Tensor:
        """The logits of eta and alpha [2N, c, 1]."""
        n, c, made, valid = self.n, self.c, self.made, self.inputs.valid
        by_weight = self.d_weights * made.weights
        d_log_decay = F.pad(self.d_log_decay_read, (0, 0, 1, 0))
        d_log_decay[:, :c].add_(self.d_log_decay_solve)
        d_log_decay[:, c].add_(by_weight[1])
        d_log_share = d_log_decay.sum(1)
        d_log_gamma = d_log_decay[:, 1:].sum(2).sub_(d_log_share).addcmul_(self.d_gamma, made.gamma[:, 1:])
        d_log_gamma[:, :-1].add_(by_weight[0, :, 1:])
        d_log_gamma[:, -1].addcmul_(self.d_kept, made.gamma[:, c])
        d_log_alpha = d_log_gamma.flip(-1).cumsum(-1).flip(-1)
        if valid is not None:
            d_log_alpha.masked_fill_(~valid, 0)
        d_logs = torch.stack([d_log_share, d_log_alpha])
        return log_sigmoid_backward(d_logs, made.logits, made.logits_buffer).view(2 * n, c, 1)  # type: ignore[no-any-return]

    def generated(self, d_logits: Tensor) -> Tensor:
        """The inputs of the generating memories [4N, c, d]."""
        n, full, made = self.n, self.full, self.made
        d_act = torch.empty_like(made.act_x)
        into(d_act[: 2 * n], torch.bmm, self.d_raw, self.w1[n:])
        into(d_act[2 * n :], torch.mul, d_logits, self.wg)
        self.d_w1[n:].baddbmm_(self.d_raw.mT, made.act_x[: 2 * n])
        self.d_wg.baddbmm_(d_logits.mT, made.act_x[2 * n :])
        d_pre = silu_backward(d_act, made.pre_x)
        self.d_raw.baddbmm_(d_pre[: 2 * n], self.w2[n:full])
        into(self.d_x[2 * n :], torch.bmm, d_pre[2 * n :], self.w2[full:])
        self.d_w2[n:].baddbmm_(d_pre.mT, self.inputs.x)
        return self.d_x
