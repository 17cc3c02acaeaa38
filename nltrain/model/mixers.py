"""Token mixers: self-modifying memories (Hope, Titans, matrix) and softmax attention, with one interface.

`forward(u, packing, state)` maps pre-normed u [B, T, D] to [B, T, D] and returns the state after the last token.
B sequences, T tokens, D width, H heads, d head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import Inputs, MemoryState
from kernels.diagnostics import chunk_diagnostics
from kernels.dispatch import choose
from nltrain.model.attention import attend
from nltrain.model.config import ModelConfig
from nltrain.model.packing import Packing
from nltrain.model.parts import CausalConv, HeadNorm, MemoryHolder


class MemoryMixerState(NamedTuple):
    """A memory block in the middle of a sequence."""

    history: Tensor  # [B, taps - 1, D] last inputs of the convolution
    memory: MemoryState


class AttentionState(NamedTuple):
    """Keys and values seen so far, [B, T_past, H, d], and the convolution's last inputs."""

    history: Tensor
    k: Tensor
    v: Tensor


class _ShortConv(nn.Module):
    """The convolution of the q, k, v paths (q alone if `paths` is 1); the identity when conv_width is 0."""

    def __init__(self, config: ModelConfig, paths: int) -> None:
        super().__init__()
        self.taps, self.num_paths = config.conv_width, paths
        self.conv = CausalConv(config.width, config.conv_width, paths) if config.conv_width else None

    def forward(self, u: Tensor, packing: Packing, history: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.conv is None:
            return u.expand(self.num_paths, *u.shape), u[:, :0]
        if history is None:
            history = u.new_zeros(u.shape[0], self.taps - 1, u.shape[-1])
        paths = self.conv(u, history, packing.taps_seen(self.taps - 1, u.dtype))
        return paths, torch.cat([history, u], 1)[:, -(self.taps - 1) :] if self.taps > 1 else u[:, :0]


class MemoryMixer(nn.Module):
    """Self-modifying memories: o = M_mem(q), normed per head and gated (Eq. 83-93 and Eq. 94)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.config, self.rule = config, config.rule
        # Without writes, k and v are never read.
        self.short_conv = _ShortConv(config, paths=3 if self.rule.writes else 1)
        self.q, self.gate, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.k, self.v = (nn.Linear(width, width, bias=False) if self.rule.writes else None for _ in range(2))
        self.beta = nn.Linear(width, config.num_heads) if self.rule.momentum and self.rule.writes else None
        self.memories = MemoryHolder(
            self.rule, config.num_heads, config.head_dim, config.memory_hidden, config.w1_std, config.w2_scale,
            config.eta_init, config.alpha_init,
        )  # fmt: skip
        self.norm = HeadNorm(config.num_heads, config.head_dim, config.norm_eps)

    def _inputs(self, u: Tensor, packing: Packing, history: Tensor | None) -> tuple[Inputs, Tensor]:
        paths, history = self.short_conv(u, packing, history)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.config.num_heads, self.config.head_dim))

        q = heads(self.q(paths[0]))
        if self.k is None or self.v is None:
            return Inputs(q, q, q, q), history
        beta = self.beta(u) if self.beta is not None else None
        return Inputs(heads(self.k(paths[1])), heads(self.v(paths[2])), q, heads(u), beta), history

    def diagnostics(self, u: Tensor, packing: Packing) -> dict[str, Tensor]:
        """`kernels.diagnostics.chunk_diagnostics` of this block for pre-normed u [B, T, D]."""
        return chunk_diagnostics(self._inputs(u, packing, None)[0], MemoryHolder.pack(self.memories()), self.rule)

    def forward(self, u: Tensor, packing: Packing, state: MemoryMixerState | None) -> tuple[Tensor, MemoryMixerState]:
        """[B, T, D] to [B, T, D], and the state after the last token; state None: at the start of a document."""
        inputs, history = self._inputs(u, packing, state.history if state else None)
        self_modify = choose(self.config.kernel, self.rule, self.config.kernel_options, u.device.type)
        o, memory = self_modify(
            inputs,
            MemoryHolder.pack(self.memories()),
            self.rule,
            state.memory if state else None,
            packing.starts,
            packing.blocking(self.rule),
        )
        return self.out(self.norm(o) * F.silu(self.gate(u))), MemoryMixerState(history, memory)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, counted from the document's start."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.short_conv = _ShortConv(config, paths=3)
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width, bias=False) for _ in range(4))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, H, d], positions [B or 1, T]."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = (positions.unsqueeze(-1) * frequency).unsqueeze(2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, u: Tensor, packing: Packing, state: AttentionState | None) -> tuple[Tensor, AttentionState]:
        """[B, T, D] to [B, T, D], and the state after the last token; state None: at the start of a document."""
        paths, history = self.short_conv(u, packing, state.history if state else None)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.config.num_heads, self.config.head_dim))

        q, k, v = heads(self.q(paths[0])), heads(self.k(paths[1])), heads(self.v(paths[2]))
        q, k = self._rotate(q, packing.positions), self._rotate(k, packing.positions)
        if state is not None:
            k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        return self.out(attend(q, k, v, packing).flatten(2)), AttentionState(history, k, v)
