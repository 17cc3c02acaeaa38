"""Leaf modules: each owns parameters, has no children, and reads its parameters only inside its own forward.

A sharded engine relies on this: it gathers the parameters of a module when the module is called and releases them when
the forward returns. Modules that only hold parameters therefore return copies.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.rule import GATES, MemoryRule
from kernels.state import Initial, Weights, gate_bias
from nltrain.model.convolution import convolve_in_documents
from nltrain.model.loss import summed_loss


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of each head, with its own weight."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, d] to [B, T, H * d]."""
        return (F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight).flatten(-2)


class CausalConv(nn.Module):
    """SiLU of a depthwise causal convolution; `paths` of them share one input."""

    def __init__(self, width: int, taps: int, paths: int) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(taps, paths, width))
        with torch.no_grad():
            nn.init.normal_(self.weight, std=taps**-0.5)

    def forward(self, u: Tensor, history: Tensor, taps_seen: Tensor | None) -> Tensor:
        """u [B, T, D] to [paths, B, T, D].

        history: the inputs just before the first token, [B, taps - 1, D]. taps_seen: [B, T, taps - 1], 1 where that
        earlier input belongs to the token's own document, else 0; None where all of them do or are zero.
        """
        paths = self.weight.shape[1]
        num_tokens = u.shape[1]
        padded = torch.cat([history, u], 1)
        if taps_seen is not None and u.device.type != "cpu":
            return F.silu(convolve_in_documents(padded, self.weight, taps_seen))
        windows = [padded[:, self.taps - 1 - j : self.taps - 1 - j + num_tokens] for j in range(self.taps)]
        if taps_seen is not None:
            windows[1:] = [w * taps_seen[..., j, None] for j, w in enumerate(windows[1:])]
        if taps_seen is None and u.device.type != "cpu":
            weight = self.weight.permute(2, 1, 0).flip(-1).flatten(0, 1).unsqueeze(1)  # [D * paths, 1, taps]
            y = F.conv1d(padded.mT, weight, groups=u.shape[-1])
            return F.silu(y.unflatten(1, (-1, paths)).permute(2, 0, 3, 1))
        outputs = []
        for p in range(paths):
            y = windows[0] * self.weight[0, p]
            for j in range(1, self.taps):
                y = torch.addcmul(y, windows[j], self.weight[j, p])
            outputs.append(y)
        return F.silu(torch.stack(outputs))


class MemoryHolder(nn.Module):
    """The learned initial state of all memories of a block, one parameter per memory and side."""

    def __init__(
        self, rule: MemoryRule, num_heads: int, head_dim: int, hidden: int, w1_std: float, w2_scale: float,
        eta_init: float | None, alpha_init: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rule = rule
        mlp = rule.memory == "mlp"
        for name in rule.full_names + rule.gate_names:
            out = head_dim if name in rule.full_names else 1
            rows = hidden if mlp else out
            self.register_parameter(f"{name}_w2", nn.Parameter(torch.empty(num_heads, rows, head_dim)))
            nn.init.normal_(getattr(self, f"{name}_w2"), std=w2_scale * head_dim**-0.5 if mlp else w1_std)
            if mlp:
                self.register_parameter(f"{name}_w1", nn.Parameter(torch.empty(num_heads, out, hidden)))
                nn.init.normal_(getattr(self, f"{name}_w1"), std=w1_std)
        if not rule.writes:  # the gates are never read
            return
        for name in GATES:
            self.register_parameter(f"{name}_slow", nn.Parameter(torch.empty(num_heads, head_dim)))
            nn.init.normal_(getattr(self, f"{name}_slow"), std=0.02)
        self.gate_bias = nn.Parameter(gate_bias(rule, eta_init, alpha_init).float()[:, None].repeat(1, num_heads))

    def forward(self) -> tuple[Tensor, ...]:
        """Stacked copies in at least fp32, in the order that `pack` expects."""
        rule, mlp = self.rule, self.rule.memory == "mlp"

        def get(name: str) -> Tensor:
            p = getattr(self, name)
            return p.to(torch.promote_types(p.dtype, torch.float32))

        w2 = torch.cat([get(f"{name}_w2") for name in rule.full_names + rule.gate_names], 1)
        if rule.writes:
            slow, bias = torch.stack([get(f"{name}_slow") for name in GATES]), get("gate_bias") * 1.0
        else:
            num_heads, _, head_dim = w2.shape
            slow, bias = w2.new_zeros(len(GATES), num_heads, head_dim), w2.new_zeros(len(GATES), num_heads)
        out = [w2, slow, bias]
        if mlp:
            out.append(torch.stack([get(f"{name}_w1") for name in rule.full_names], 1))
        if mlp and rule.gate_names:
            out.append(torch.cat([get(f"{name}_w1") for name in rule.gate_names], 1))
        return tuple(out)

    @staticmethod
    def pack(tensors: tuple[Tensor, ...]) -> Initial:
        """The result of `forward` as the kernels take it."""
        w2, slow, bias, *rest = tensors
        w1, g1 = (*rest, None, None)[:2]
        return Initial(Weights(w2, w1, g1), slow, bias)


class TiedEmbedding(nn.Module):
    """One matrix for both ends of the model: from tokens to vectors, and from vectors to logits or to the loss."""

    def __init__(self, vocab_size: int, width: int, logits_bytes: int) -> None:
        super().__init__()
        self.logits_bytes = logits_bytes
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """int64 x [..] to vectors [.., D]; float x [.., D] to logits [.., V].

        With targets [..], float x to the fp32 loss, summed over targets other than -100, with at most about
        `logits_bytes` of fp32 logits at once.
        """
        if not x.is_floating_point():
            return F.embedding(x, self.weight)
        if targets is None:
            return F.linear(x, self.weight)
        return summed_loss(x.flatten(0, -2), self.weight, targets.flatten(), self.logits_bytes)


class LevelMix(nn.Module):
    """Learned weights of the independent CMS variant, [k]."""

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_levels))

    def forward(self) -> Tensor:
        """A copy of the weights, [k]."""
        return self.weight * 1.0
