"""Feed-forward parts: the continuum memory system (Eq. 70-74) and SwiGLU.

Each CMS level is a module under its level's name and has its own norm, so that a level is a set of whole modules.
"""

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from nltrain.model.config import ModelConfig
from nltrain.model.parts import LevelMix, RMSNorm


class Level(nn.Module):
    """One CMS level: a pre-normed SwiGLU or two-layer SiLU perceptron; the caller adds the residual."""

    def __init__(self, config: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.gate = nn.Linear(config.width, hidden, bias=False) if config.level_mlp == "swiglu" else None
        self.up = nn.Linear(config.width, hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D], without the residual."""
        n = self.norm(x)
        if self.gate is None:
            return self.down(F.silu(self.up(n)))
        return self.down(F.silu(self.gate(n)) * self.up(n))


class CMS(nn.ModuleDict):
    """All levels of a block, fast to slow: a chain with residuals, or a learned weighted sum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__({name: Level(config, hidden) for name, hidden in config.level_hidden().items()})
        self.level_names = config.levels
        if config.cms_variant == "independent":
            self["mix"] = LevelMix(len(config.levels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D], residuals included."""
        if "mix" in self:
            weights = self["mix"]()
            return x + sum(weights[i] * self[name](x) for i, name in enumerate(self.level_names))
        for name in self.level_names:
            x = x + self[name](x)
        return x


class SwiGLU(Level):
    """x + W_down(SiLU(W_gate n) * W_up n), n = RMSNorm(x): the feed-forward part of the Transformer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(replace(config, level_mlp="swiglu"), config.swiglu_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D], the residual included."""
        return x + super().forward(x)
