"""One step of the chunk-parallel form: up to 64 tokens that share their snapshots.

All memories of a layer share k, eta and alpha, hence one Gram matrix and one triangular factor per block; their
input-side matrices are stacked, so that a block is a few large batched products. Decay ratios are formed in log space.
Batch N = sequences x heads, c tokens; other letters as in `state`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.blocking import RowMask
from kernels.ops import activate, activation_pair, l2norm, products, soft_bound, solve_systems, unit_and_length
from kernels.rule import GATES, MemoryRule
from kernels.state import Initial, Weights

NEVER = float("-inf")


class Decay(NamedTuple):
    """Products of alpha (and beta) over one block. The last three fields and `steps` only with momentum."""

    eta: Tensor  # [N, c]
    gamma: Tensor  # [N, c] product of alpha up to and including the token
    gamma_before: Tensor  # [N, c] the same without the token
    ratio: Tensor  # [N, c, c] gamma_t / gamma_i for i <= t, else 0
    ratio_before: Tensor  # [N, c, c] gamma_{t-1} / gamma_i for i < t, else 0
    last: Tensor  # [N, c] gamma_c / gamma_i
    steps: Any = None  # [N, c, c] weight of gradient i in M_t without erasure
    sigma: Any = None  # [N, c] weight of the incoming velocity in M_t
    last_velocity: Any = None  # [N, c] weight of gradient i in the outgoing velocity
    keep_velocity: Any = None  # [N] weight of the incoming velocity in the outgoing one


class Side(NamedTuple):
    """One side of m memories, and the factors of the gradients sum_i g_i key_i^T that one block writes to it."""

    keys: Tensor  # [N, m, c, key]
    gradients: Tensor  # [N, m, c, r]
    run: Tensor  # [N, m, r, key]
    velocity: Any  # the same, only with momentum
    erased: bool  # whether the rank-one erasure acts; keys have unit length then
    read: Any = None  # [N, m, c, r] keys run^T where it is already computed, else None


class Written(NamedTuple):
    """The writes of one block: M_t = gamma_t M_0 + sigma_t S_0 + sum_i (ratio_ti a_i + steps_ti b_i) key_i^T."""

    a: Any  # [N, m, c, r]; None where only momentum writes
    b: Any  # the same, only with momentum
    run: Tensor  # [N, m, r, key] M at the end of the block
    velocity: Any


def block_decay(rule: MemoryRule, logits: Tensor, beta_logit: Tensor | None, valid: Tensor | None) -> Decay:
    """Gate logits [N, c, 2] (eta, alpha) to decay products."""
    eta_logit, alpha_logit = logits.unbind(-1)
    share = torch.sigmoid(eta_logit)
    if rule.eta_gate == "hard":
        share = (1.1 * share - 0.05).clamp(0, 1)
    eta = rule.eta_limit * share
    log_alpha = F.logsigmoid(alpha_logit)
    if valid is not None:  # an empty slot neither decays nor writes
        eta, log_alpha = eta * valid, log_alpha * valid
    log_gamma = log_alpha.cumsum(-1)
    log_before = log_gamma - log_alpha
    last = (log_gamma[:, -1:] - log_gamma).exp()
    c = eta.shape[-1]
    later = torch.ones(c, c, dtype=torch.bool, device=eta.device).triu()
    ratio_before = (log_before.unsqueeze(-1) - log_gamma.unsqueeze(-2)).masked_fill(later, NEVER).exp()
    later = later.triu(1)
    ratio = (log_gamma.unsqueeze(-1) - log_gamma.unsqueeze(-2)).masked_fill(later, NEVER).exp()
    common = (eta, log_gamma.exp(), log_before.exp(), ratio, ratio_before, last)
    if beta_logit is None:
        return Decay(*common)
    log_beta = F.logsigmoid(beta_logit)
    adds = torch.ones_like(eta)
    if valid is not None:
        log_beta, adds = log_beta * valid, adds * valid
    log_b = log_beta.cumsum(-1)
    carried = (log_b.unsqueeze(-1) - log_b.unsqueeze(-2)).masked_fill(later, NEVER).exp()
    added = ratio * adds.unsqueeze(-2)
    steps = torch.bmm(added, carried) * eta.unsqueeze(-2)
    sigma = torch.bmm(added, log_b.exp().unsqueeze(-1)).squeeze(-1)
    return Decay(*common, steps, sigma, carried[:, -1] * eta, log_b[:, -1].exp())


def _column(x: Tensor) -> Tensor:
    """[N, c] to [N, 1, c, 1], to scale rows of [N, m, c, r]."""
    return x[:, None, :, None]


def _add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left^T right over two leading dims."""
    flat = (t.flatten(0, 1) for t in (base, left.mT, right))
    return torch.baddbmm(*flat).view(base.shape)


def write(decay: Decay, lambda_d: Any, sides: list[Side]) -> list[Written]:
    """One block of writes to all sides; lambda_d: a number, or [N, 1] where heads differ.

    Every erased memory side has a triangular system of its own; all of them are inverted together.
    """
    momentum = decay.steps is not None
    erased = [side for side in sides if side.erased]
    solved: Any = iter(())
    if erased:
        weight = lambda_d * decay.eta
        scale = (weight.unsqueeze(-1) * decay.ratio_before).unsqueeze(1)
        grams = [products(side.keys, side.keys.mT) for side in erased]
        lower = scale * (torch.cat(grams, 1) if len(grams) > 1 else grams[0])
        # What the erasure removes: of the matrices at the start of the block, and of the momentum's writes since then.
        seen = _column(lambda_d * decay.gamma_before)
        found = [seen * (products(s.keys, s.run.mT) if s.read is None else s.read) for s in erased]
        if momentum:
            sigma = _column(lambda_d * F.pad(decay.sigma[:, :-1], (1, 0)))
            steps = (F.pad(decay.steps[:, :-1], (0, 0, 1, 0)) * _per_head(lambda_d)).unsqueeze(1)
            rights = [
                f + sigma * products(side.keys, side.velocity.mT) - products(steps * gram, side.gradients)
                for f, side, gram in zip(found, erased, grams, strict=True)
            ]
        else:
            rights = [f + side.gradients for f, side in zip(found, erased, strict=True)]
        minus_eta = _column(-decay.eta)
        solved = iter(solve_systems(lower, [minus_eta * right for right in rights]))
    last, kept_share = _column(decay.last), decay.gamma[:, -1].view(-1, 1, 1, 1)
    written = []
    for side in sides:
        kept = kept_share * side.run
        if not momentum:
            a = next(solved) if side.erased else _column(-decay.eta) * side.gradients
            written.append(Written(a, None, _add_product(kept, last * a, side.keys), None))
            continue
        b, a = -side.gradients, next(solved) if side.erased else None
        velocity = decay.keep_velocity.view(-1, 1, 1, 1) * side.velocity
        velocity = _add_product(velocity, _column(decay.last_velocity) * b, side.keys)
        kept = kept + decay.sigma[:, -1].view(-1, 1, 1, 1) * side.velocity
        added = _column(decay.steps[:, -1]) * b
        added = added if a is None else added + last * a
        written.append(Written(a, b, _add_product(kept, added, side.keys), velocity))
    return written


def _per_head(lambda_d: Any) -> Any:
    """lambda_d to broadcast against [N, c, c]."""
    return lambda_d.unsqueeze(-1) if isinstance(lambda_d, Tensor) else lambda_d


def erasure_by_row(rule: MemoryRule, num_sequences: int, num_heads: int, like: Tensor) -> Any:
    """The weight of the erasure: a number, or [N, 1] of the dtype of `like` where heads differ.

    Raises MemoryRuleError if a per-head option does not fit `num_heads`. N runs over sequences, then heads.
    """
    rule.check_heads(num_heads)
    if not isinstance(rule.lambda_d, tuple):
        return rule.lambda_d
    return like.new_tensor(rule.lambda_d).repeat(num_sequences).unsqueeze(1)


class BlockStep:
    """The constants of one call: rule, sizes, initial weights folded over sequences and heads; called per block."""

    def __init__(self, rule: MemoryRule, initial: Initial, num_sequences: int, dtype: torch.dtype) -> None:
        self.rule = rule
        w2, w1 = initial.weights.w2, initial.weights.w1
        self.num_heads, num_rows, head_dim = w2.shape
        self.mlp = rule.memory == "mlp"
        hidden = w1.shape[-1] if self.mlp else 0
        # Rows per d -> d memory and per gate in the stacked input side.
        self.width, self.gate_width = (hidden, hidden) if self.mlp else (head_dim, 1)
        self.num_full, self.num_gates = len(rule.full_names), len(rule.gate_names)
        self.full_rows = self.num_full * self.width
        self.gate_rows = num_rows - self.full_rows

        def fold(w: Tensor) -> Tensor:
            return w.to(dtype).unsqueeze(0).expand(num_sequences, *w.shape).flatten(0, 1)

        self.base = initial.weights.map(fold)
        self.slow = fold(initial.slow.transpose(0, 1))  # [N, 2, d]
        self.bias = fold(initial.bias.transpose(0, 1)).unsqueeze(1)  # [N, 1, 2]
        self.lambda_d = erasure_by_row(rule, num_sequences, self.num_heads, self.slow)
        self.gate_columns = [GATES.index(name) for name in rule.gate_names]
        self.adaptive_slow = self.slow if self.num_gates == len(GATES) else self.slow[:, self.gate_columns]
        # What belongs to the main memory's schedule.
        rows = torch.zeros(num_rows, 1, dtype=torch.bool, device=w2.device)
        rows[rule.rows("mem", head_dim, hidden)] = True
        full = torch.zeros(self.num_full, 1, 1, dtype=torch.bool, device=w2.device)
        full[-1] = True
        self.of_mem = Weights(rows, full, torch.zeros_like(rows[:1]))

    def split(self, stacked: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The parts of the d -> d memories, in storage order ("mem" at `num_full - 1`), then that of all gates."""
        return stacked.split([self.width] * self.num_full + ([self.gate_rows] if self.num_gates else []), dim)

    def masked(self, mask: RowMask, new: Weights, old: Weights) -> Weights:
        """Rows of the batch in `mask` from `new`, others from `old`."""
        if isinstance(mask, bool):
            return new if mask else old
        rows = mask.repeat_interleave(self.num_heads)
        return new.zip(old, lambda n, o: torch.where(rows.view(-1, *(1,) * (o.dim() - 1)), n, o))

    def snapshot(self, start: Weights, run: Weights, mem: RowMask, other: RowMask) -> Weights:
        """start := run where a chunk begins; the main memory has its own chunk length."""
        if self.rule.chunk_mem == self.rule.chunk_other:
            return self.masked(mem, run, start)
        if mem is other:
            return run if mem else start
        for_mem, for_other = self.masked(mem, run, start), self.masked(other, run, start)
        both = zip(self.of_mem, for_mem, for_other, strict=True)
        mixed: list[Any] = [None if o is None else torch.where(at, m, o) for at, m, o in both]
        return Weights(*mixed)

    def whole(self, weights: Weights) -> Weights:
        """The weights themselves, given what the state holds of them."""
        return weights if self.rule.decay == "literal" else weights.zip(self.base, torch.add)

    def output(self, hidden: Tensor, w1: Tensor | None, x: Tensor) -> Tensor:
        """M(x) of a d -> d memory from W2 x."""
        if w1 is not None:
            hidden = activate(self.rule.activation, hidden)
            return torch.baddbmm(x, hidden, w1.mT) if self.rule.residual else torch.bmm(hidden, w1.mT)
        return x + hidden if self.rule.residual else hidden

    def read_only(self, start: Weights, q: Tensor) -> Tensor:
        """Outputs of memories that never write, for any number of tokens."""
        snap = self.whole(start)
        return self._made(snap, "mem", l2norm(self._made(snap, "q", q)))

    def _w1(self, snap: Weights) -> Any:
        return snap.w1.unbind(1) if self.mlp else [None] * self.num_full

    def _gate_error(self, g1: Any, z: Tensor, rows: Tensor) -> Any:
        if not self.num_gates:
            return None
        return torch.bmm(z, self.adaptive_slow.mT) + self._gate_output(g1, rows)

    def _gate_output(self, g1: Any, rows: Tensor) -> Tensor:
        """Adaptive part of the gates [N, c, G] from their hidden rows (act applied)."""
        if not self.mlp:
            return rows
        return (rows.unflatten(-1, (self.num_gates, self.width)) * g1.unsqueeze(1)).sum(-1)

    def gates(self, w2: Any, g1: Any, x: Tensor) -> Tensor:
        """Logits of eta and alpha [N, c, 2] from the snapshot; w2: the gates' rows, None if none is adaptive."""
        logits = torch.baddbmm(self.bias, x, self.slow.mT)
        if w2 is None:
            return logits
        y = torch.bmm(x, w2.mT)
        out = self._gate_output(g1, activate(self.rule.activation, y) if self.mlp else y)
        if self.num_gates == len(GATES):
            return logits + out
        return logits + F.pad(out, (1, 0) if self.gate_columns == [1] else (0, 1))

    def errors(self, snap: Weights, k: Tensor, v: Tensor, at_k: Tensor, at_v: Any) -> tuple[Tensor, Any]:
        """Gradient of the inner objective by the outputs: [N, F, c, d] and, if any gate is adaptive, [N, c, G].

        at_k, at_v: what the output side reads, [N, c, R] (hidden activations, or matrix outputs), at k and at v.
        """
        rule = self.rule

        def full(x: Tensor) -> Tensor:
            x = x.unflatten(-1, (self.num_full, self.width)).transpose(1, 2)
            return products(x, snap.w1.mT) if self.mlp else x

        sizes, residual = [self.full_rows, self.gate_rows], 1.0 if rule.residual else 0.0
        if rule.target == "self" and rule.objective == "l2" and not rule.normalize_target:
            # The target is made by the same weights, so one product serves both.
            z, (difference, rows) = k - v, (at_k - at_v).split(sizes, -1)
            error = full(difference)
            error = error + z.unsqueeze(1) if rule.residual else error
        else:
            (full_k, gate_k), (full_v, gate_v) = (
                at_k.split(sizes, -1),
                (at_k if at_v is None else at_v).split(sizes, -1),
            )
            target = v.unsqueeze(1).expand(-1, self.num_full, -1, -1)
            if rule.target == "self":
                target = full(full_v) + residual * v.unsqueeze(1)
            if rule.normalize_target:
                target = l2norm(target)
            error = full(full_k) + residual * k.unsqueeze(1) - target if rule.objective == "l2" else -target
            if self.num_gates and rule.target == "value" and rule.objective == "l2":
                return error, torch.zeros_like(gate_k[..., : self.num_gates])
            z, rows = (k - v, gate_k - gate_v) if rule.objective == "l2" else (-v, -gate_v)
            if rule.target == "value":
                z, rows = -k, -gate_k
        return error, self._gate_error(snap.g1, z, rows)

    def gradients(self, snap: Weights, error: Tensor, gate_error: Any, slope: Any) -> Tensor:
        """Gradient of the inner objective by W2 k, [N, c, R], bounded; keys have unit length."""
        bound = self.rule.gradient_bound
        if not self.mlp:
            parts = [error.transpose(1, 2)] + ([] if gate_error is None else [gate_error.unsqueeze(-1)])
            return torch.cat([soft_bound(part, bound).flatten(2) for part in parts], -1)
        parts = [products(error, snap.w1).transpose(1, 2)]
        if gate_error is not None:
            parts.append(gate_error.unsqueeze(-1) * snap.g1.unsqueeze(1))
        rows = torch.cat(parts, 2) if len(parts) > 1 else parts[0]  # [N, c, F + G, h]
        gradient = rows * slope.unflatten(-1, (-1, self.width))
        return soft_bound(gradient, bound).flatten(2)

    def _made(self, snap: Weights, name: str, x: Tensor) -> Tensor:
        """M_name(x), or x where that memory does not exist."""
        if name not in self.rule.full_names:
            return x
        index = self.rule.full_names.index(name)
        return self.output(torch.bmm(x, self.split(snap.w2, 1)[index].mT), self._w1(snap)[index], x)

    def generated(self, snap: Weights, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [N, c, d] and the logits of eta and alpha [N, c, 2] made by the snapshot (Eq. 83)."""
        k, v = l2norm(self._made(snap, "k", x["k"])), self._made(snap, "v", x["v"])
        gates = self.split(snap.w2, 1)[-1] if self.num_gates else None
        return k, l2norm(v) if self.rule.normalize_v else v, self.gates(gates, snap.g1, x["gate"])

    def __call__(
        self, start: Weights, run: Weights, velocity: Weights | None, x: dict[str, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Weights, Weights | None]:
        """One block: x holds [N, c, d] inputs; returns outputs [N, c, d], the running weights and the velocity."""
        rule, speed = self.rule, velocity or Weights(None, None, None)  # type: ignore[arg-type]
        snap = self.whole(start)
        k, v, logits = self.generated(snap, x)
        mem2, mem1 = self.split(snap.w2, 1)[self.num_full - 1], self._w1(snap)[-1]
        q = l2norm(self._made(snap, "q", x["q"]))
        decay = block_decay(rule, logits, x.get("beta_logit"), valid)

        # Eq. 84-88: gradients at the snapshot, then all writes of the block at once.
        at_k = pre_k = torch.bmm(k, snap.w2.mT)
        at_v = torch.bmm(v, snap.w2.mT) if rule.target == "self" else None
        slope = None
        if self.mlp:
            at_k, slope = activation_pair(rule.activation, pre_k)
            at_v = None if at_v is None else activate(rule.activation, at_v)
        error, gate_error = self.errors(snap, k, v, at_k, at_v)
        gradient = self.gradients(snap, error, gate_error, slope)

        def side(keys: Tensor, gradients: Tensor, name: str, erased: bool) -> Side:
            """Of the weights `name`, seen as [N, m, r, key]."""
            shape = (-1, gradients.shape[1], gradients.shape[-1], keys.shape[-1])
            matrix, moving = getattr(run, name), None if velocity is None else getattr(velocity, name).view(shape)
            return Side(keys, gradients, matrix.view(shape), moving, erased)

        sides = [side(k.unsqueeze(1), gradient.unsqueeze(1), "w2", rule.erases)]
        if run is start and rule.decay == "literal":  # the snapshot is what is erased
            sides[0] = sides[0]._replace(read=pre_k.unsqueeze(1))
        if self.mlp:
            sides += [side(*s, rule.erases_output_side) for s in self._output_sides(at_k, error, gate_error)]
        wrote = write(decay, self.lambda_d, sides)
        shapes = [w for w in run if w is not None]
        new = Weights(*(w.run.view(old.shape) for w, old in zip(wrote, shapes, strict=True)))
        new_velocity = None
        if velocity is not None:
            new_velocity = Weights(*(w.velocity.view(old.shape) for w, old in zip(wrote, shapes, strict=True)))
        if rule.read == "frozen":
            return self.output(torch.bmm(q, mem2.mT), mem1, q), new, new_velocity

        # The live read: W_t q_t is what the block began with plus a masked product with its own writes.
        def mem(stacked: Any, dim: int) -> Any:
            return None if stacked is None else self.split(stacked, dim)[self.num_full - 1]

        a, b = (None if t is None else mem(t.squeeze(1), -1) for t in (wrote[0].a, wrote[0].b))
        part = Written(a, b, mem(run.w2, 1), mem(speed.w2, 1))
        out = self._read(decay, q, torch.bmm(q, k.mT), part, mem(self.base.w2, 1))
        if self.mlp:
            last = self.num_full - 1
            part = Written(*(None if t is None else t[:, last] for t in (wrote[1].a, wrote[1].b, run.w1, speed.w1)))  # type: ignore[arg-type]
            s = activate(rule.activation, out)
            out = self._read(decay, s, torch.bmm(s, sides[1].keys[:, last].mT), part, self.base.w1[:, last])
        return q + out if rule.residual else out, new, new_velocity

    def _output_sides(self, at_k: Tensor, error: Tensor, gate_error: Any) -> list[tuple[Tensor, Tensor, str]]:
        """Keys and gradient factors of W1: of the d -> d memories, and of the gates if any is adaptive.

        at_k: hidden activations s [N, c, R]. The gradient is error s^T; keys are s / |s| if they must be unit vectors.
        """
        rule = self.rule
        s = at_k.unflatten(-1, (-1, self.width)).transpose(1, 2)  # [N, F + G, c, h]
        scale: Any = None
        if rule.normalized_step:
            scale = 1 / (1 + s.square().sum(-1, keepdim=True))
        if rule.erases_output_side or rule.gradient_bound is not None:
            s, length = unit_and_length(s)
            scale = length if scale is None else length * scale

        def factor(error: Tensor, memories: slice) -> Tensor:
            return soft_bound(error if scale is None else error * scale[:, memories], rule.gradient_bound)

        full, gates = slice(0, self.num_full), slice(self.num_full, None)
        parts = [(s[:, full], factor(error, full), "w1")]
        if gate_error is not None:
            parts.append((s[:, gates], factor(gate_error.mT.unsqueeze(-1), gates), "g1"))  # [N, G, c, 1]
        return parts

    def _read(self, decay: Decay, q: Tensor, gram: Tensor, before: Written, base: Tensor) -> Tensor:
        """W_t q_t for every token t, W_t the matrix after its own write; `before` holds W_0 and S_0."""
        out = decay.gamma.unsqueeze(-1) * (torch.bmm(q, before.run.mT))
        if self.rule.decay == "deviation":
            out = torch.baddbmm(out, q, base.mT)
        if before.velocity is not None:
            out = out + decay.sigma.unsqueeze(-1) * (torch.bmm(q, before.velocity.mT))
        if before.a is not None:
            out = torch.baddbmm(out, decay.ratio * gram, before.a)
        return out if before.b is None else torch.baddbmm(out, decay.steps * gram, before.b)
