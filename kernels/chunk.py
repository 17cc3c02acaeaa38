"""Self-modifying memories, chunk-parallel: equal to `naive` for every option, with one Python step per 64 tokens.

All memories of a layer share k, eta and alpha, hence one Gram matrix and one triangular factor per block; their
input-side matrices are stacked, so that a block is a few large batched products. Decay ratios are formed in log space.
State, decays and the triangular inverse are at least fp32. README.md beside this file has the derivation.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import Layout, RowMask, build_layout
from kernels.naive import l2norm
from kernels.ops import activation_pair, triangular_inverse_times
from kernels.rule import MemoryRule
from kernels.state import Initial, Inputs, MemoryState, Weights, fresh_state

# Below this a chunk's decay product cannot be told from zero in float64; keeps log ratios finite.
NEVER = float("-inf")


class Decay(NamedTuple):
    """Log-space products of one block, batch N, c tokens. With momentum also its coefficients."""

    eta: Tensor  # [N, c]
    gamma: Tensor  # [N, c] product of alpha up to and including the token
    gamma_before: Tensor  # [N, c] the same without the token
    ratio: Tensor  # [N, c, c] gamma_t / gamma_i for i <= t, else 0
    ratio_before: Tensor  # [N, c, c] gamma_{t-1} / gamma_i for i < t, else 0
    steps: Tensor | None = None  # [N, c, c] weight of gradient i in M_t without erasure (momentum)
    sigma: Tensor | None = None  # [N, c] weight of the incoming velocity in M_t
    last_velocity: Tensor | None = None  # [N, c] weight of gradient i in the outgoing velocity
    keep_velocity: Tensor | None = None  # [N] weight of the incoming velocity in the outgoing one


class Written(NamedTuple):
    """The writes of one block: M_t = gamma_t M_0 + sigma_t S_0 + sum_i (ratio_ti a_i + steps_ti b_i) key_i^T."""

    a: Tensor  # [..., c, r]
    b: Tensor | None
    run: Tensor  # [..., r, key] M at the end of the block
    velocity: Tensor | None


def _decay(rule: MemoryRule, logits: Tensor, beta_logit: Tensor | None, valid: Tensor | None) -> Decay:
    eta = rule.eta_limit * torch.sigmoid(logits[..., 0])
    log_alpha = F.logsigmoid(logits[..., 1])
    if valid is not None:  # an empty slot neither decays nor writes
        eta, log_alpha = eta * valid, log_alpha * valid
    log_gamma = log_alpha.cumsum(-1)
    gamma = log_gamma.exp()
    c = eta.shape[-1]
    later = torch.ones(c, c, dtype=torch.bool, device=eta.device).triu(1)
    ratio = (log_gamma.unsqueeze(-1) - log_gamma.unsqueeze(-2)).masked_fill(later, NEVER).exp()
    ratio_before = F.pad(ratio[:, :-1], (0, 0, 1, 0))
    gamma_before = F.pad(gamma[:, :-1], (1, 0), value=1.0)
    if beta_logit is None:
        return Decay(eta, gamma, gamma_before, ratio, ratio_before)
    log_beta = F.logsigmoid(beta_logit)
    adds = torch.ones_like(eta)
    if valid is not None:
        log_beta, adds = log_beta * valid, adds * valid
    log_b = log_beta.cumsum(-1)
    carried = (log_b.unsqueeze(-1) - log_b.unsqueeze(-2)).masked_fill(later, NEVER).exp()
    added = ratio * adds.unsqueeze(-2)
    steps = added @ carried * eta.unsqueeze(-2)
    sigma = (added @ log_b.exp().unsqueeze(-1)).squeeze(-1)
    return Decay(eta, gamma, gamma_before, ratio, ratio_before, steps, sigma, carried[:, -1] * eta, log_b[:, -1].exp())


def _wide(x: Tensor, like: Tensor, dims: int) -> Tensor:
    """x [N, ...] with ones inserted after N, to broadcast against `like`, whose last `dims` dims are per-token."""
    return x.reshape(x.shape[0], *(1,) * (like.dim() - x.dim() - dims), *x.shape[1:], *(1,) * dims)


def _write(
    rule: MemoryRule,
    decay: Decay,
    keys: Tensor,
    gradients: Tensor,
    run: Tensor,
    velocity: Tensor | None,
    erase: tuple[Tensor, Tensor] | None,
) -> Written:
    """One block of writes with keys [..., c, key] and gradient factors [..., c, r] on run [..., r, key].

    erase: (Gram matrix of the keys, keys @ run^T) where the rank-one erasure acts, else None.
    """
    eta = _wide(decay.eta, gradients, 1)
    gamma_last = _wide(decay.gamma[:, -1], run, 2)
    if velocity is None:
        if erase is None:
            a = -eta * gradients
        else:
            gram, read = erase
            before = _wide(rule.lambda_d * decay.gamma_before, gradients, 1)
            lower = _wide((rule.lambda_d * decay.eta).unsqueeze(-1) * decay.ratio_before, gram, 0) * gram
            a = triangular_inverse_times(lower, -eta * torch.addcmul(gradients, before, read))
        last = _wide(decay.ratio[:, -1], a, 1)
        return Written(a, None, gamma_last * run + (last * a).mT @ keys, None)

    assert decay.steps is not None and decay.sigma is not None
    assert decay.last_velocity is not None and decay.keep_velocity is not None
    b = -gradients
    new_velocity = _wide(decay.keep_velocity, velocity, 2) * velocity
    new_velocity = new_velocity + (_wide(decay.last_velocity, b, 1) * b).mT @ keys
    new_run = gamma_last * run + _wide(decay.sigma[:, -1], run, 2) * velocity
    rest = _wide(decay.steps[:, -1], b, 1) * b
    a = torch.zeros_like(b)
    if erase is not None:
        gram, read = erase
        sigma_before = F.pad(decay.sigma[:, :-1], (1, 0))
        steps_before = F.pad(decay.steps[:, :-1], (0, 0, 1, 0))
        seen = _wide(decay.gamma_before, gradients, 1) * read
        seen = (
            seen + _wide(sigma_before, gradients, 1) * (keys @ velocity.mT) + (_wide(steps_before, gram, 0) * gram) @ b
        )
        lower = _wide((rule.lambda_d * decay.eta).unsqueeze(-1) * decay.ratio_before, gram, 0) * gram
        a = triangular_inverse_times(lower, -rule.lambda_d * eta * seen)
        rest = rest + _wide(decay.ratio[:, -1], a, 1) * a
    return Written(a, b, new_run + rest.mT @ keys, new_velocity)


def _read_written(decay: Decay, gram: Tensor, written: Written) -> Tensor:
    """What the block's own writes up to and including each token add to a read; gram: queries @ keys^T [N, c, c]."""
    seen = (decay.ratio * gram) @ written.a
    if written.b is not None:
        seen = seen + (decay.steps * gram) @ written.b
    return seen


class _Step:
    """The constants of one call: rule, sizes, initial weights folded over batch and heads (N = B * H)."""

    def __init__(self, rule: MemoryRule, initial: Initial, num_sequences: int, dtype: torch.dtype) -> None:
        self.rule = rule
        w2, w1 = initial.weights.w2, initial.weights.w1
        self.num_heads, self.head_dim = w2.shape[0], w2.shape[-1]
        self.hidden = w1.shape[-1] if w1 is not None else 0
        self.mlp = rule.memory == "mlp"
        self.num_full, self.num_gates = len(rule.full_names), len(rule.gate_names)
        self.full_rows = self.num_full * (self.hidden if self.mlp else self.head_dim)

        def fold(w: Tensor) -> Tensor:
            return w.to(dtype).unsqueeze(0).expand(num_sequences, *w.shape).flatten(0, 1)

        self.base = Weights(*(None if w is None else fold(w) for w in initial.weights))  # type: ignore[arg-type]
        self.slow = fold(initial.slow.transpose(0, 1))  # [N, 2, d]
        self.bias = fold(initial.bias.transpose(0, 1))  # [N, 2]
        self.gate_columns = [("eta", "alpha").index(name) for name in rule.gate_names]
        # Rows and matrices that belong to the main memory's schedule.
        rows = torch.zeros(w2.shape[-2], dtype=torch.bool, device=w2.device)
        rows[self.rows("mem")] = True
        full = torch.zeros(self.num_full, dtype=torch.bool, device=w2.device)
        full[-1] = True
        self.mem_rows, self.mem_full = rows[:, None], full[:, None, None]

    def rows(self, name: str) -> slice:
        return self.rule.rows(name, self.head_dim, self.hidden)

    def masked(self, mask: RowMask, new: Weights, old: Weights) -> Weights:
        """Rows of the batch in `mask` from `new`, others from `old`."""
        if isinstance(mask, bool):
            return new if mask else old
        rows = mask.repeat_interleave(self.num_heads)
        return Weights(
            *(None if o is None else torch.where(rows.view(-1, *(1,) * (o.dim() - 1)), n, o)
              for n, o in zip(new, old, strict=True))  # type: ignore[arg-type]
        )  # fmt: skip

    def snapshot(self, start: Weights, run: Weights, mem: RowMask, other: RowMask) -> Weights:
        """start := run where a chunk begins; the main memory has its own chunk length."""
        if mem is other or (isinstance(mem, Tensor) and isinstance(other, Tensor) and torch.equal(mem, other)):
            return self.masked(mem, run, start)
        for_mem, for_other = self.masked(mem, run, start), self.masked(other, run, start)
        w1 = None if start.w1 is None else torch.where(self.mem_full, for_mem.w1, for_other.w1)
        return Weights(torch.where(self.mem_rows, for_mem.w2, for_other.w2), w1, for_other.g1)

    def whole(self, weights: Weights) -> Weights:
        """The weights themselves, given what the state holds of them."""
        if self.rule.decay == "literal":
            return weights
        return Weights(*(None if w is None else w + b for w, b in zip(weights, self.base, strict=True)))  # type: ignore[arg-type]

    def generate(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        """M_name(x) for a d -> d memory, x [N, c, d]."""
        y = x @ weights.w2[:, self.rows(name)].mT
        if self.mlp:
            hidden = activation_pair(self.rule.activation, y)[0]
            y = hidden @ weights.w1[:, self.rule.full_names.index(name)].mT  # type: ignore[index]
        return x + y if self.rule.residual else y

    def gate_output(self, weights: Weights, rows: Tensor) -> Tensor:
        """Adaptive part of the gates [N, c, G] from their hidden rows (act applied) [N, c, G * h]."""
        if not self.mlp:
            return rows
        hidden = rows.unflatten(-1, (self.num_gates, self.hidden))
        return (hidden * weights.g1.unsqueeze(1)).sum(-1)  # type: ignore[union-attr]

    def gates(self, weights: Weights, x: Tensor) -> Tensor:
        """Logits of eta and alpha [N, c, 2] from the snapshot."""
        logits = torch.baddbmm(self.bias.unsqueeze(1), x, self.slow.mT)
        if not self.num_gates:
            return logits
        y = x @ weights.w2[:, self.full_rows :].mT
        out = self.gate_output(weights, activation_pair(self.rule.activation, y)[0] if self.mlp else y)
        if self.num_gates == 2:
            return logits + out
        return logits + F.pad(out, (1, 0) if self.gate_columns == [1] else (0, 1))

    def errors(
        self, weights: Weights, k: Tensor, v: Tensor, at_k: Tensor, at_v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient of the inner objective with respect to the outputs: [N, F, c, d] and, for the gates, [N, c, G].

        at_k, at_v: what the output side reads, [N, c, R] (hidden activations, or matrix outputs), at k and at v.
        """
        rule = self.rule
        width = self.hidden if self.mlp else self.head_dim

        def full(x: Tensor) -> Tensor:
            x = x[..., : self.full_rows].unflatten(-1, (self.num_full, width)).transpose(1, 2)
            return x @ weights.w1.mT if self.mlp else x  # type: ignore[union-attr]

        residual = 1.0 if rule.residual else 0.0
        if rule.target == "self" and rule.objective == "l2" and not rule.normalize_target:
            # The target is made by the same weights, so one product serves both.
            error = full(at_k - at_v) + residual * (k - v).unsqueeze(1)
        else:
            target = v.unsqueeze(1).expand(-1, self.num_full, -1, -1)
            if rule.target == "self":
                target = full(at_v) + residual * v.unsqueeze(1)
            if rule.normalize_target:
                target = l2norm(target)
            error = full(at_k) + residual * k.unsqueeze(1) - target if rule.objective == "l2" else -target
        if not self.num_gates:
            return error, None
        slow = self.slow if self.num_gates == 2 else self.slow[:, self.gate_columns]
        gate_at_k, gate_at_v = at_k[..., self.full_rows :], at_v[..., self.full_rows :]
        if rule.objective == "dot":
            z, rows = (-v, -gate_at_v) if rule.target == "self" else (-k, -gate_at_k)
        elif rule.target == "value":
            return error, torch.zeros_like(gate_at_k[..., : self.num_gates])
        else:
            z, rows = k - v, gate_at_k - gate_at_v
        return error, z @ slow.mT + self.gate_output(weights, rows)

    def __call__(
        self, start: Weights, run: Weights, velocity: Weights | None, x: dict[str, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Weights, Weights | None]:
        """One block: x holds [N, c, d] inputs; returns outputs [N, c, d], the running weights and the velocity."""
        rule, adaptive = self.rule, self.rule.adaptive
        snap = self.whole(start)
        k = l2norm(self.generate(snap, "k", x["k"]) if "k" in adaptive else x["k"])
        v = self.generate(snap, "v", x["v"]) if "v" in adaptive else x["v"]
        v = l2norm(v) if rule.normalize_v else v
        q = l2norm(self.generate(snap, "q", x["q"]) if "q" in adaptive else x["q"])
        decay = _decay(rule, self.gates(snap, x["gate"]), x.get("beta_logit"), valid)

        c = k.shape[1]
        grams = torch.cat([k, q], 1) @ k.mT if rule.read == "live" else k @ k.mT
        pre = torch.cat([k, v], 1) @ snap.w2.mT
        read_k = pre[:, :c] if run is start and rule.decay == "literal" else k @ run.w2.mT if rule.lambda_d else None
        if self.mlp:
            hidden, slope = activation_pair(rule.activation, pre)
            slope_k = slope[:, :c]
        else:
            hidden = pre
        at_k = hidden[:, :c]
        error, gate_error = self.errors(snap, k, v, at_k, hidden[:, c:])

        if self.mlp:
            parts = [(error @ snap.w1).transpose(1, 2).flatten(2)]  # type: ignore[operator]
            if gate_error is not None:
                parts.append((gate_error.unsqueeze(-1) * snap.g1.unsqueeze(1)).flatten(2))  # type: ignore[union-attr]
            gradient = torch.cat(parts, -1) * slope_k
        else:
            gradient = error.transpose(1, 2).flatten(2)
            if gate_error is not None:
                gradient = torch.cat([gradient, gate_error], -1)
        erase = (grams[:, :c], read_k) if rule.lambda_d else None
        wrote2 = _write(rule, decay, k, gradient, run.w2, velocity.w2 if velocity else None, erase)  # type: ignore[arg-type]
        wrote1 = wrote_gate = None
        if self.mlp:
            s = at_k[..., : self.full_rows].unflatten(-1, (self.num_full, self.hidden)).transpose(1, 2)
            wrote1, keys1 = self._write_output_side(decay, s, error, run.w1, velocity.w1 if velocity else None)
            if gate_error is not None:
                s = at_k[..., self.full_rows :].unflatten(-1, (self.num_gates, self.hidden)).transpose(1, 2)
                e = gate_error.transpose(1, 2).unsqueeze(-1)
                g_velocity = velocity.g1.unsqueeze(2) if velocity else None  # type: ignore[union-attr]
                wrote_gate, _ = self._write_output_side(decay, s, e, run.g1.unsqueeze(2), g_velocity)  # type: ignore[union-attr]
        new_run = Weights(wrote2.run, wrote1.run if wrote1 else None, wrote_gate.run.squeeze(2) if wrote_gate else None)
        new_velocity = None
        if velocity is not None:
            new_velocity = Weights(
                wrote2.velocity,  # type: ignore[arg-type]
                wrote1.velocity if wrote1 else None,
                wrote_gate.velocity.squeeze(2) if wrote_gate else None,  # type: ignore[union-attr]
            )
        if rule.read == "frozen":
            return self.generate(snap, "mem", q), new_run, new_velocity
        out = self._read(decay, q, grams[:, c:], self.rows("mem"), run.w2, velocity.w2 if velocity else None,
                         wrote2, self.base.w2)  # fmt: skip
        if self.mlp:
            s = activation_pair(rule.activation, out)[0]
            mem = Written(*(None if w is None else w[:, -1] for w in wrote1))  # type: ignore[union-attr, arg-type]
            keys = keys1[:, -1]
            out = self._read(
                decay,
                s,
                s @ keys.mT,
                slice(None),
                run.w1[:, -1],  # type: ignore[index]
                velocity.w1[:, -1] if velocity else None,
                mem,
                self.base.w1[:, -1],
            )  # type: ignore[index]
        return q + out if rule.residual else out, new_run, new_velocity

    def _write_output_side(
        self, decay: Decay, s: Tensor, error: Tensor, run: Tensor, velocity: Tensor | None
    ) -> tuple[Written, Tensor]:
        """Writes W1 [N, F, d, h] with hidden activations s [N, F, c, h]; returns the keys it used."""
        if not self.rule.layerwise_dgd or not self.rule.lambda_d:
            return _write(self.rule, decay, s, error, run, velocity, None), s
        unit = l2norm(s)
        # error s^T = (error |s|) unit^T; |s| as used by l2norm keeps the two equal to rounding.
        length = (s * unit).sum(-1, keepdim=True) / unit.square().sum(-1, keepdim=True).clamp_min(1e-30)
        erase = (unit @ unit.mT, unit @ run.mT)
        return _write(self.rule, decay, unit, error * length, run, velocity, erase), unit

    def _read(
        self, decay: Decay, q: Tensor, gram: Tensor, rows: slice, run: Tensor, velocity: Tensor | None,
        written: Written, base: Tensor,
    ) -> Tensor:  # fmt: skip
        """W_t q_t for every token t of the block, W_t the running matrix after the token's own write."""
        out = decay.gamma.unsqueeze(-1) * (q @ run[:, rows].mT)
        if self.rule.decay == "deviation":
            out = out + q @ base[:, rows].mT
        if velocity is not None:
            out = out + decay.sigma.unsqueeze(-1) * (q @ velocity[:, rows].mT)  # type: ignore[union-attr]
        part = Written(written.a[..., rows], None if written.b is None else written.b[..., rows], run, None)
        return out + _read_written(decay, gram, part)


def self_modify(
    inputs: Inputs,
    initial: Initial,
    rule: MemoryRule,
    state: MemoryState | None = None,
    document_starts: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, d] and the state after the last token.

    document_starts: [B, T] bool, None for none. layout: what `build_layout` gives for these arguments, to share it
    between layers. The outputs have the dtype of the inputs; inside, everything is at least fp32.
    """
    num_sequences, num_tokens, num_heads, _ = inputs.k.shape
    in_dtype = inputs.k.dtype
    dtype = torch.promote_types(in_dtype, torch.float32)
    if layout is None:
        position = state.position if state is not None else torch.zeros(num_sequences, dtype=torch.long)
        layout = build_layout(rule, num_tokens, position.to(inputs.k.device), document_starts)
    step = _Step(rule, initial, num_sequences, dtype)

    def fold(weights: Weights) -> Weights:
        return Weights(*(None if w is None else w.to(dtype).flatten(0, 1) for w in weights))  # type: ignore[arg-type]

    fresh = fresh_state(initial, rule, num_sequences)
    begin = fold(fresh.run)
    start, run, velocity = begin, begin, fold(fresh.velocity) if fresh.velocity else None
    if state is not None:
        start, run = fold(state.start), fold(state.run)
        velocity = fold(state.velocity) if state.velocity is not None else None

    def arrange(x: Tensor) -> Tensor:
        """[B, T, H, ...] to [N, slots, ...]."""
        if layout.source is not None:
            index = layout.source.view(*layout.source.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
            x = x.gather(1, index)
        return x.transpose(1, 2).flatten(0, 1).to(dtype)

    x = {name: arrange(getattr(inputs, name)) for name in ("k", "v", "q", "gate")}
    if rule.normalize_inputs:
        x = {name: l2norm(value) for name, value in x.items()}
    if rule.momentum:
        x["beta_logit"] = arrange(inputs.beta_logit.unsqueeze(-1)).squeeze(-1)  # type: ignore[union-attr]
    valid = None
    if layout.valid is not None:
        valid = layout.valid.to(dtype).repeat_interleave(num_heads, 0)

    outputs = []
    for block in layout.blocks:
        if block.resets is not False and run is not begin:
            run, start = step.masked(block.resets, begin, run), step.masked(block.resets, begin, start)
            if velocity is not None:
                zero = Weights(*(None if w is None else torch.zeros_like(w) for w in velocity))  # type: ignore[arg-type]
                velocity = step.masked(block.resets, zero, velocity)
        start = step.snapshot(start, run, block.begins_mem, block.begins_other)
        span = slice(block.begin, block.end)
        out, run, velocity = step(
            start,
            run,
            velocity,
            {n: value[:, span] for n, value in x.items()},
            None if valid is None else valid[:, span],
        )
        outputs.append(out)
    start = step.snapshot(start, run, layout.ends_mem, layout.ends_other)

    o = torch.cat(outputs, 1).unflatten(0, (num_sequences, num_heads)).transpose(1, 2)
    if layout.slot is not None:
        o = o.gather(1, layout.slot[..., None, None].expand(-1, -1, *o.shape[2:]))

    def unfold(weights: Weights) -> Weights:
        return Weights(*(None if w is None else w.unflatten(0, (num_sequences, num_heads)) for w in weights))  # type: ignore[arg-type]

    final = MemoryState(unfold(start), unfold(run), unfold(velocity) if velocity is not None else None, layout.position)
    return o.to(in_dtype), final
