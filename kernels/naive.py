"""Self-modifying memories, token by token: the definition every faster form is tested against.

Written to be read beside "Nested Learning" (arXiv 2512.24695), Eq. 83-93; one Python loop over tokens, any dtype,
autograd through every write. The inner gradient is the closed form of the objective with k and the target held
constant. A document start resets the row's memories, and chunks are counted from there, so that a packed document
equals the same document alone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.rule import MemoryRule
from kernels.state import Initial, Inputs, MemoryState, Weights, fresh_state

L2_EPS = 1e-6
# By memory: [W2, W1], each [B, H, ...] (initial weights: [H, ...]); W1 is None for a matrix memory.
Memories = dict[str, list[Any]]


def l2norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, finite at 0."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def activation(rule: MemoryRule, a: Tensor) -> Tensor:
    """The hidden activation."""
    return F.silu(a) if rule.activation == "silu" else F.gelu(a)


def activation_slope(rule: MemoryRule, a: Tensor) -> Tensor:
    """Its derivative."""
    if rule.activation == "silu":
        gate = a.sigmoid()
        return gate * (1 + a * (1 - gate))
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
        return self._output(z, y if self.w1 is None else activation(self.rule, y))

    def _output(self, z: Tensor, s: Tensor) -> Tensor:
        """M(z), given s = act(W2 z), or W2 z for a matrix."""
        y = s if self.w1 is None else _apply(self.w1, s)
        if self.slow is not None:
            return y + (self.slow * z).sum(-1, keepdim=True)
        return y + z if self.rule.residual else y

    def gradient(self, k: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradient of the inner objective at (k, target): of W2, of W1, and l2norm(act(W2 k)).

        The last two are None for a matrix.
        """
        a = _apply(self.w2, k)
        s = a if self.w1 is None else activation(self.rule, a)
        error = self._output(k, s) - target if self.rule.objective == "l2" else -target
        if self.w1 is None:
            return _outer(soft_bound(self.rule, error), k), None, None
        delta = _apply(self.w1.transpose(-1, -2), error) * activation_slope(self.rule, a)
        square = s.square().sum(-1, keepdim=True)
        if self.rule.normalized_step:
            error = error / (1 + square)
        length = (square + L2_EPS).sqrt()  # error s^T = (length error) (s / length)^T
        unit = s / length
        return _outer(soft_bound(self.rule, delta), k), _outer(soft_bound(self.rule, length * error), unit), unit


def _apply(w: Tensor, z: Tensor) -> Tensor:
    # For the small matrices of a token, a product and a sum take less time than a batched matmul.
    return (w * z.unsqueeze(-2)).sum(-1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _rows(mask_B: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask_B.reshape(-1, *(1,) * (old.dim() - 1)), new, old)


def _unpack(rule: MemoryRule, packed: Weights, head_dim: int, hidden: int) -> Memories:
    out: Memories = {}
    for name in rule.full_names + rule.gate_names:
        w2 = packed.w2[..., rule.rows(name, head_dim, hidden), :]
        w1 = None
        if rule.memory == "mlp" and name in rule.full_names:
            w1 = packed.w1[..., rule.full_names.index(name), :, :]
        elif rule.memory == "mlp":
            w1 = packed.g1[..., rule.gate_names.index(name), None, :]
        out[name] = [w2, w1]
    return out


def _pack(rule: MemoryRule, weights: Memories) -> Weights:
    w2 = torch.cat([weights[name][0] for name in rule.full_names + rule.gate_names], -2)
    if rule.memory == "matrix":
        return Weights(w2, None, None)
    w1 = torch.stack([weights[name][1] for name in rule.full_names], -3)
    g1 = torch.cat([weights[name][1] for name in rule.gate_names], -2) if rule.gate_names else None
    return Weights(w2, w1, g1)


class Generated(NamedTuple):
    """What the snapshot makes of one token."""

    k: Tensor  # [B, H, d], unit length
    v: Tensor  # [B, H, d]
    q: Tensor  # [B, H, d], unit length
    eta: Tensor  # [B, H, 1, 1] inner learning rate
    alpha: Tensor  # [B, H, 1, 1] retention


class _Layer:
    """What one call keeps constant (rule, inputs, initial weights), and the parts of one token's step."""

    def __init__(self, inputs: Inputs, initial: Initial, rule: MemoryRule, fresh: MemoryState) -> None:
        self.rule = rule
        normal = l2norm if rule.normalize_inputs else lambda x: x
        # By name, one [B, H, d] per token: cut at once, so that the backward joins the tokens in one operation.
        self.x = {name: normal(getattr(inputs, name)).unbind(1) for name in ("k", "v", "q", "gate")}
        self.beta: Any = None  # one [B, H, 1, 1] per token, only with momentum
        if inputs.beta_logit is not None:
            self.beta = inputs.beta_logit.sigmoid()[..., None, None].unbind(1)
        self.bias = initial.bias.unsqueeze(-1).unbind(0)  # [H, 1] of the eta and alpha logits
        self.head_dim = inputs.k.shape[-1]
        self.hidden = initial.weights.w1.shape[-1] if initial.weights.w1 is not None else 0
        self.names = rule.full_names + rule.gate_names
        self.begin, self.base = self.unpack(fresh.run), self.unpack(initial.weights)
        self.slow = {"eta": initial.slow[0], "alpha": initial.slow[1]}
        rule.check_heads(initial.bias.shape[1])
        self.lambda_d = initial.bias.new_tensor(rule.erasures).view(1, -1, 1, 1)  # [1, H or 1, 1, 1]

    def unpack(self, weights: Weights) -> Memories:
        """The stacked weights by memory."""
        return _unpack(self.rule, weights, self.head_dim, self.hidden)

    def memories(self, weights: Memories) -> dict[str, Memory]:
        """Every memory, by name, with its whole weights."""
        return {name: self.memory(weights, name) for name in self.names}

    def memory(self, weights: Memories, name: str) -> Memory:
        """The memory `name` with its whole weights, given what the state holds of them."""
        w2, w1 = weights[name]
        if self.rule.decay == "deviation":
            w2, w1 = (None if w is None else w + b for w, b in zip((w2, w1), self.base[name], strict=True))
        return Memory(self.rule, w2, w1, self.slow.get(name))  # type: ignore[arg-type]

    def replaced(self, mask_B: Tensor, new: Memories, old: Memories, only: tuple[str, ...] | None = None) -> Memories:
        """`new` in the rows of the mask and for the memories in `only` (None: all), `old` elsewhere."""
        if not bool(mask_B.any()):
            return old
        whole = bool(mask_B.all())
        mixed = dict(old)
        for name in self.names if only is None else only:
            pairs = zip(new[name], old[name], strict=True)
            mixed[name] = new[name] if whole else [o if o is None else _rows(mask_B, w, o) for w, o in pairs]
        return mixed

    def snapshot(self, start: Memories, run: Memories, position: Tensor) -> Memories:
        """start := run for the memories whose chunk begins at `position`."""
        start = self.replaced(position % self.rule.chunk_mem == 0, run, start, ("mem",))
        others = tuple(name for name in self.names if name != "mem")
        return self.replaced(position % self.rule.chunk_other == 0, run, start, others)

    def generated(self, start: dict[str, Memory], t: int) -> Generated:
        """Eq. 83: the snapshot generates everything that token t writes and reads with."""
        rule, x = self.rule, {name: tokens[t] for name, tokens in self.x.items()}
        made = {n: start[n](x[n]) if n in rule.adaptive else x[n] for n in ("k", "v", "q")}
        k, q = l2norm(made["k"]), l2norm(made["q"])
        v = l2norm(made["v"]) if rule.normalize_v else made["v"]

        def logit(name: str, index: int) -> Tensor:
            if name in rule.adaptive:
                return start[name](x["gate"]) + self.bias[index]
            return (self.slow[name] * x["gate"]).sum(-1, keepdim=True) + self.bias[index]

        eta_logit, alpha_logit = logit("eta", 0), logit("alpha", 1)
        eta = rule.eta_limit * eta_share(rule, eta_logit).unsqueeze(-1)
        return Generated(k, v, q, eta, alpha_logit.sigmoid().unsqueeze(-1))

    def target(self, name: str, memory: Memory, k: Tensor, v: Tensor) -> Tensor:
        """Eq. 84: what memory `name` should map k to."""
        rule, full = self.rule, name in self.rule.full_names
        value = rule.target == "value"
        target = v if value and full else memory(k if value else v)
        return l2norm(target) if rule.normalize_target and full else target

    def written(
        self, start: dict[str, Memory], run: Memories, velocity: Memories | None, made: Generated, t: int
    ) -> tuple[Memories, Memories | None]:
        """Eq. 85-88: gradient at the snapshot, decay and erasure on the running weights; the new run and velocity."""
        new: Memories = {}
        moved: Memories | None = None if velocity is None else {}
        minus_eta, erasure = -made.eta, self.lambda_d * made.eta
        for name in self.names:
            target = self.target(name, start[name], made.k, made.v)
            g2, g1, unit = start[name].gradient(made.k, target)
            keys: list[Any] = [made.k, unit if self.rule.erases_output_side else None]
            new[name], speeds = [], list[Any]()
            for i, gradient in enumerate((g2, g1)):
                w = run[name][i]
                if w is None or gradient is None:
                    new[name].append(None)
                    speeds.append(None)
                    continue
                step = minus_eta * gradient
                if velocity is not None:
                    step = self.beta[t] * velocity[name][i] + step
                speeds.append(step)
                erased = made.alpha * w
                if keys[i] is not None and self.rule.erases:
                    erased = erased - _outer(erasure.squeeze(-1) * _apply(w, keys[i]), keys[i])
                new[name].append(erased + step)
            if moved is not None:
                moved[name] = speeds
        return new, moved


def self_modify(
    inputs: Inputs,
    initial: Initial,
    rule: MemoryRule,
    state: MemoryState | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, d] and the state after the last token. document_starts: [B, T] bool, None for none."""
    fresh = fresh_state(initial, rule, inputs.k.shape[0])
    state = fresh if state is None else state
    layer = _Layer(inputs, initial, rule, fresh)
    start, run, position = layer.unpack(state.start), layer.unpack(state.run), state.position
    velocity = layer.unpack(state.velocity) if state.velocity is not None else None
    still = layer.unpack(fresh.velocity) if fresh.velocity is not None else {}
    memories, outputs = layer.memories(start), []
    for t in range(inputs.k.shape[1]):
        if document_starts is not None:
            resets = document_starts[:, t]
            run = layer.replaced(resets, layer.begin, run)
            if velocity is not None:
                velocity = layer.replaced(resets, still, velocity)
            position = torch.where(resets, 0, position)
        begun = layer.snapshot(start, run, position)
        if begun is not start:
            start, memories = begun, layer.memories(begun)
        made = layer.generated(memories, t)
        if rule.writes:
            run, velocity = layer.written(memories, run, velocity, made, t)
        position = position + 1
        # Eq. 90 reads the snapshot; the live read sees this token's own write.
        memory = layer.memory(run, "mem") if rule.read == "live" else memories["mem"]
        outputs.append(memory(made.q))
    start = layer.snapshot(start, run, position)
    packed = _pack(rule, velocity) if velocity is not None else None
    return torch.stack(outputs, 1), MemoryState(_pack(rule, start), _pack(rule, run), packed, position)
