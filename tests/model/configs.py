"""Small configs of every family and of the options that change the module tree."""

from dataclasses import replace

from kernels import MemoryRule
from nltrain.model import FAMILIES, ModelConfig, preset


def small(family: str, **changes: object) -> ModelConfig:
    """Two layers of two heads, chunks of 8 tokens."""
    config = preset(family, "tiny")
    rule = replace(config.rule, chunk_mem=8, chunk_other=8, eta_max=None if family != "matrix" else 1.0)
    base = {
        "vocab_size": 23, "width": 16, "num_layers": 2, "head_dim": 8, "memory_hidden": 6, "cms_hidden": 48,
        "rule": rule,
    }  # fmt: skip
    return replace(config, **{**base, **changes})  # type: ignore[arg-type]


ALL_CONFIGS: dict[str, ModelConfig] = {family: small(family) for family in FAMILIES} | {
    "hope_momentum": small("hope", rule=MemoryRule(chunk_mem=8, chunk_other=8, momentum=True)),
    "hope_two_schedules": small("hope", rule=MemoryRule(chunk_mem=16, chunk_other=8)),
    "hope_frozen_literal": small("hope", rule=MemoryRule(chunk_mem=8, chunk_other=8, read="frozen", decay="literal")),
    "hope_matrix": small("hope", rule=MemoryRule(chunk_mem=8, chunk_other=8, memory="matrix")),
    "hope_adaptive_q": small(
        "hope", rule=MemoryRule(chunk_mem=8, chunk_other=8, adaptive=("k", "v", "q", "eta", "alpha"))
    ),
    "hope_independent_cms": small("hope", cms_variant="independent"),
    "hope_silu_levels": small("hope", level_mlp="silu"),
    "hope_writes_off": small("hope", rule=MemoryRule(chunk_mem=8, chunk_other=8, writes=False)),
    "hope_erasure_by_head": small(
        "hope", rule=MemoryRule(chunk_mem=8, chunk_other=8, eta_max=0.1, lambda_d=(20.0, 0.0), eta_gate="hard")
    ),
    "hope_no_conv": small("hope", conv_width=0),
    "transformer_conv": small("transformer", conv_width=4),
}
