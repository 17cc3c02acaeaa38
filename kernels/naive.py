"""Self-modifying memories, token by token: the definition every faster form is tested against.

Written to be read beside "Nested Learning" (arXiv 2512.24695), Eq. 83-93; one Python loop over tokens, any dtype,
autograd through every write. The inner gradient is the closed form of the objective with k and the target held
constant. A document start resets the row's memories, and chunks are counted from there, so that a packed document
equals the same document alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.rule import MemoryRule
from kernels.state import Initial, Inputs, MemoryState, Weights, fresh_state

L2_EPS = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, finite at 0."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def activation(rule: MemoryRule, a: Tensor) -> Tensor:
    """The hidden activation."""
    return F.silu(a) if rule.activation == "silu" else F.gelu(a)


def activation_slope(rule: MemoryRule, a: Tensor) -> Tensor:
    """Its derivative."""
    if rule.activation == "silu":
        return a.sigmoid() * (1 + a * (1 - a.sigmoid()))
    return 0.5 * (1 + torch.erf(a * 0.5**0.5)) + a * torch.exp(-0.5 * a * a) * (0.5 / torch.pi) ** 0.5


def soft_bound(rule: MemoryRule, g: Tensor) -> Tensor:
    """g / sqrt(1 + |g|^2 / b^2), b = rule.gradient_bound: the length of one write before eta."""
    if rule.gradient_bound is None:
        return g
    return g * torch.rsqrt(1 + g.square().sum(-1, keepdim=True) / rule.gradient_bound**2)


def eta_share(rule: MemoryRule, logit: Tensor) -> Tensor:
    """eta / eta_max in [0, 1]."""
    share = logit.sigmoid()
    return share if rule.eta_gate == "sigmoid" else (1.1 * share - 0.05).clamp(0, 1)


class Memory:
    """One memory's weights, [B, H, ...]: W2 [r, d] (the only matrix of a matrix memory), W1 [d or 1, h], slow w [d]."""

    def __init__(self, rule: MemoryRule, w2: Tensor, w1: Tensor | None, slow: Tensor | None) -> None:
        self.rule, self.w2, self.w1, self.slow = rule, w2, w1, slow

    def __call__(self, z: Tensor) -> Tensor:
        """M(z) of Eq. 89, [B, H, d] -> [B, H, d], or [B, H, 1] for a gate: w.z + W1 act(W2 z)."""
        y = _apply(self.w2, z)
        if self.w1 is not None:
            y = _apply(self.w1, activation(self.rule, y))
        if self.slow is not None:
            return y + (self.slow * z).sum(-1, keepdim=True)
        return y + z if self.rule.residual else y

    def gradient(self, k: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradient of the inner objective at (k, target): of W2, of W1, and act(W2 k) (None twice for a matrix)."""
        error = self(k) - target if self.rule.objective == "l2" else -target
        if self.w1 is None:
            return _outer(soft_bound(self.rule, error), k), None, None
        a = _apply(self.w2, k)
        s = activation(self.rule, a)
        delta = _apply(self.w1.transpose(-1, -2), error) * activation_slope(self.rule, a)
        if self.rule.normalized_step:
            error = error / (1 + s.square().sum(-1, keepdim=True))
        length = (s.square().sum(-1, keepdim=True) + L2_EPS).sqrt()  # error s^T = (length error) (s / length)^T
        return _outer(soft_bound(self.rule, delta), k), _outer(soft_bound(self.rule, length * error), s / length), s


def _apply(w: Tensor, z: Tensor) -> Tensor:
    return (w @ z.unsqueeze(-1)).squeeze(-1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _rows(mask_B: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask_B.reshape(-1, *(1,) * (old.dim() - 1)), new, old)


def _unpack(rule: MemoryRule, packed: Weights, head_dim: int, hidden: int) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for name in rule.full_names + rule.gate_names:
        w2 = packed.w2[..., rule.rows(name, head_dim, hidden), :]
        w1 = None
        if rule.memory == "mlp" and name in rule.full_names:
            w1 = packed.w1[..., rule.full_names.index(name), :, :]
        elif rule.memory == "mlp":
            w1 = packed.g1[..., rule.gate_names.index(name), None, :]
        out[name] = [w2, w1]
    return out


def _pack(rule: MemoryRule, weights: dict[str, list[Any]]) -> Weights:
    w2 = torch.cat([weights[name][0] for name in rule.full_names + rule.gate_names], -2)
    if rule.memory == "matrix":
        return Weights(w2, None, None)
    w1 = torch.stack([weights[name][1] for name in rule.full_names], -3)
    g1 = torch.cat([weights[name][1] for name in rule.gate_names], -2) if rule.gate_names else None
    return Weights(w2, w1, g1)


def self_modify(
    inputs: Inputs,
    initial: Initial,
    rule: MemoryRule,
    state: MemoryState | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, d] and the state after the last token. document_starts: [B, T] bool, None for none."""
    num_sequences, num_tokens, _, head_dim = inputs.k.shape
    hidden = initial.weights.w1.shape[-1] if initial.weights.w1 is not None else 0
    names = rule.full_names + rule.gate_names
    fresh = fresh_state(initial, rule, num_sequences)
    state = fresh if state is None else state

    def unpack(weights: Weights) -> dict[str, list[Any]]:
        return _unpack(rule, weights, head_dim, hidden)

    begin, base = unpack(fresh.run), unpack(initial.weights)
    start, run = unpack(state.start), unpack(state.run)
    velocity = unpack(state.velocity) if state.velocity is not None else None
    beta_logit: Any = inputs.beta_logit
    position = state.position
    slow = {"eta": initial.slow[0], "alpha": initial.slow[1]}

    def memory(weights: dict[str, list[Any]], name: str) -> Memory:
        w2, w1 = weights[name]
        if rule.decay == "deviation":
            w2, w1 = (None if w is None else w + b for w, b in zip((w2, w1), base[name], strict=True))
        return Memory(rule, w2, w1, slow.get(name))  # type: ignore[arg-type]

    def replaced(mask_B: Tensor, new: dict, old: dict, only: tuple[str, ...] = names) -> dict:
        """`new` in the rows of the mask and for the memories in `only`, `old` elsewhere."""
        if not bool(mask_B.any()):
            return old
        mixed = dict(old)
        for name in only:
            pairs = zip(new[name], old[name], strict=True)
            mixed[name] = [o if o is None else _rows(mask_B, w, o) for w, o in pairs]
        return mixed

    def snapshot(start: dict, run: dict, position: Tensor) -> dict:
        """start := run for the memories whose chunk begins at `position`."""
        start = replaced(position % rule.chunk_mem == 0, run, start, ("mem",))
        return replaced(position % rule.chunk_other == 0, run, start, tuple(n for n in names if n != "mem"))

    normal = l2norm if rule.normalize_inputs else lambda x: x
    rule.check_heads(initial.bias.shape[1])
    lambda_d = initial.bias.new_tensor(rule.erasures).view(1, -1, 1, 1)  # [1, H or 1, 1, 1]
    outputs = []
    for t in range(num_tokens):
        if document_starts is not None:
            resets = document_starts[:, t]
            run = replaced(resets, begin, run)
            if velocity is not None:
                velocity = replaced(resets, {n: [w if w is None else w * 0 for w in begin[n]] for n in names}, velocity)
            position = torch.where(resets, 0, position)
        start = snapshot(start, run, position)

        # Eq. 83: everything is generated by the snapshot.
        x = {name: normal(getattr(inputs, name)[:, t]) for name in ("k", "v", "q", "gate")}
        made = {n: memory(start, n)(x[n]) if n in rule.adaptive else x[n] for n in ("k", "v", "q")}
        k, q = l2norm(made["k"]), l2norm(made["q"])
        v = l2norm(made["v"]) if rule.normalize_v else made["v"]
        logit = {
            n: (memory(start, n)(x["gate"]) if n in rule.adaptive else (slow[n] * x["gate"]).sum(-1, keepdim=True))
            + initial.bias[i, :, None] for i, n in enumerate(("eta", "alpha"))
        }  # fmt: skip
        eta = rule.eta_limit * eta_share(rule, logit["eta"]).unsqueeze(-1)  # [B, H, 1, 1]
        alpha = logit["alpha"].sigmoid().unsqueeze(-1)

        # Eq. 84-88: own target, gradient at the snapshot, decay and erasure on the running weights.
        written: dict[str, list[Any]] = {}
        for name in names:
            target = memory(start, name)(v)
            if rule.target == "value":
                target = v if name in rule.full_names else memory(start, name)(k)
            if rule.normalize_target and name in rule.full_names:
                target = l2norm(target)
            g2, g1, s = memory(start, name).gradient(k, target)
            keys: list[Any] = [k, l2norm(s) if s is not None and rule.erases_output_side else None]
            written[name] = []
            for i, gradient in enumerate((g2, g1)):
                w = run[name][i]
                if w is None or gradient is None:
                    written[name].append(None)
                    continue
                step = -eta * gradient
                if velocity is not None:
                    beta = beta_logit[:, t].sigmoid()[..., None, None]
                    step = velocity[name][i] = beta * velocity[name][i] + step
                erased = alpha * w
                if keys[i] is not None and rule.erases:
                    erased = erased - lambda_d * eta * _outer(_apply(w, keys[i]), keys[i])
                written[name].append(erased + step)
        run = written if rule.writes else run
        position = position + 1

        # Eq. 90 reads the snapshot; the live read sees this token's own write.
        outputs.append(memory(run if rule.read == "live" else start, "mem")(q))
    start = snapshot(start, run, position)
    packed = _pack(rule, velocity) if velocity is not None else None
    return torch.stack(outputs, 1), MemoryState(_pack(rule, start), _pack(rule, run), packed, position)
