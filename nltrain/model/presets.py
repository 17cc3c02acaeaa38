"""Named sizes. Hope and Transformer++ of one name have the same parameters within 2 %.

From 160m on: head width and memory width 128, dense q, k, v, gate, out (5 D^2), all CMS levels together 8 D^2, every
width a multiple of 128, tied embeddings of 32,000 tokens. `tiny` is for laptops and tests: heads of 32, wider levels.
"""

from dataclasses import replace

from kernels import MemoryRule
from nltrain.errors import ConfigError
from nltrain.model.config import FAMILIES, ModelConfig

# name: (vocabulary, width, layers, head width, memory hidden width, CMS hidden width or None for 8 D^2)
# Sizes count V D + L (13 D^2 + 8 D h + small).
SIZES = {
    "tiny": (4_096, 128, 2, 32, 32, 832),
    "160m": (32_000, 768, 16, 128, 128, None),
    "340m": (32_000, 1024, 21, 128, 128, None),
    "760m": (32_000, 1536, 22, 128, 128, None),
    "1p3b": (32_000, 2048, 22, 128, 128, None),
}

# Titans: projections are static, one memory, plain gradient descent with momentum towards v itself. Nothing is erased,
# so eta_max is half the default for momentum: at that default one of three small_lm seeds ended in NaN.
TITANS = MemoryRule(adaptive=(), target="value", lambda_d=0.0, momentum=True, eta_max=1 / 64)
# Gated delta rule: S <- S (alpha I - eta k k^T) + eta v k^T, exact at any chunk length, from small weights.
# Its gradient is v itself, of unit length: there is nothing to bound.
MATRIX = MemoryRule(
    memory="matrix", adaptive=(), target="value", objective="dot", residual=False, eta_max=1.0, gradient_bound=None
)


def preset(family: str, name: str) -> ModelConfig:
    """The config of one size of one family: tiny, 160m, 340m, 760m, 1p3b."""
    if name not in SIZES:
        raise ConfigError(f"preset {name!r}: choose one of {', '.join(SIZES)}")
    if family not in FAMILIES:
        raise ConfigError(f"preset family {family!r}: choose one of {', '.join(FAMILIES)}")
    vocab_size, width, num_layers, head_dim, hidden, cms_hidden = SIZES[name]
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        head_dim=head_dim,
        memory_hidden=hidden,
        cms_hidden=cms_hidden,
    )
    if family == "titans":
        return replace(config, rule=TITANS, levels=("ffn",))
    if family == "matrix":
        return replace(config, rule=MATRIX, levels=("ffn",))
    if family == "transformer":
        return replace(config, conv_width=0)
    return config


def as_trained(family: str, name: str) -> ModelConfig:
    """The preset as jobs on GPUs run it: what is measured is what they train.

    Keeping all activations takes about 100 GB per sequence of 4,096 tokens at 1p3b (`python -m benchmarks.memory`).
    """
    return replace(preset(family, name), recompute="block")
