"""Configs: presets are as large as their names say, levels partition the CMS, wrong values are refused by name."""

import json
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch

import pytest

from kernels import MemoryRule, MemoryRuleError
from nltrain.errors import ConfigError
from nltrain.model import FAMILIES, SIZES, ModelConfig, build, preset
from nltrain.model.__main__ import count_parameters
from tests.model.configs import ALL_CONFIGS, small

NAMED = {"160m": 160e6, "340m": 340e6, "760m": 760e6, "1p3b": 1.3e9}


@pytest.mark.parametrize("name", SIZES)
def test_presets_are_as_large_as_named_and_as_their_rival(name: str) -> None:
    hope, transformer = (sum(count_parameters(family, name).values()) for family in ("hope", "transformer"))
    assert abs(hope / transformer - 1) < 0.02
    if name in NAMED:
        assert abs(hope / NAMED[name] - 1) < 0.02 and abs(transformer / NAMED[name] - 1) < 0.02
        config = preset("hope", name)
        assert config.head_dim == config.memory_hidden == 128 and config.vocab_size == 32_000
        widths = [*config.level_hidden().values(), preset("transformer", name).swiglu_hidden, config.width]
        assert all(width % 128 == 0 for width in widths), widths  # bf16 products stay on the fast path
        assert abs(3 * sum(config.level_hidden().values()) / (8 * config.width) - 1) < 0.02
    else:
        widths = [*preset("hope", name).level_hidden().values(), preset("transformer", name).swiglu_hidden]
        assert all(width % 64 == 0 for width in widths), widths


def test_the_table_prints() -> None:
    out = subprocess.run([sys.executable, "-m", "nltrain.model", "--json"], capture_output=True, text=True, check=True)
    assert set(json.loads(out.stdout)) == set(SIZES)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_level_patterns_match_whole_levels_and_nothing_twice(name: str) -> None:
    config = ALL_CONFIGS[name]
    model, patterns = build(config), config.level_patterns()
    names = [n for n, _ in model.named_parameters()]
    for parameter_name in names:
        owners = [level for level, ps in patterns.items() if any(fnmatch(parameter_name, p) for p in ps)]
        assert len(owners) == (1 if any(f".cms.{level}." in parameter_name for level in patterns) else 0)
    for level in patterns:
        per_level = 4 if config.level_mlp == "swiglu" else 3  # norm, gate, up, down
        assert sum(f".cms.{level}." in n for n in names) == per_level * config.num_layers


def test_levels_go_from_fast_to_slow_in_the_chain() -> None:
    config = small("hope")
    assert list(config.level_patterns()) == ["fast", "mid", "slow"]
    assert list(build(config).blocks[0].cms) == ["fast", "mid", "slow"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_json(family: str) -> None:
    config = small(family)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_saved_before_a_field_existed_gives_the_model_of_then() -> None:
    rule = MemoryRule(gradient_bound=None)
    saved = small("hope", level_mlp="silu", down_init="small", rule=rule).to_dict()
    then = ModelConfig.from_dict(saved)
    del saved["level_mlp"], saved["down_init"], saved["rule"]["gradient_bound"]
    assert ModelConfig.from_saved(saved) == then
    assert ModelConfig.from_dict(saved).level_mlp == "swiglu"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "lstm"),
        ("head_dim", 7),
        ("levels", ("fast", "fast")),
        ("levels", ("mix",)),
        ("cms_variant", "nested"),
        ("recompute", "all"),
        ("truncate_chunks", 0),
        ("conv_width", -1),
        ("num_layers", 0),
        ("level_mlp", "gelu"),
        ("down_init", "large"),
    ],
)
def test_a_wrong_model_option_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(small("hope"), **{field: value})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("memory", {"memory": "tensor"}),
        ("chunk_mem", {"chunk_mem": 48, "chunk_other": 36}),
        ("chunk_other", {"chunk_other": 0}),
        ("lambda_d", {"lambda_d": 20.0, "eta_max": 0.2}),
        ("eta_max", {"eta_max": 0.0}),
        ("adaptive", {"adaptive": ("k", "k")}),
        ("layerwise_dgd", {"memory": "matrix", "layerwise_dgd": True}),
        ("read", {"read": "late"}),
        ("eta_gate", {"eta_gate": "soft"}),
        ("lambda_d", {"lambda_d": (1.0, -1.0)}),
        ("lambda_d", {"lambda_d": ()}),
    ],
)
def test_a_wrong_memory_option_is_refused_by_name(field: str, changes: dict) -> None:
    with pytest.raises(MemoryRuleError, match=field):
        MemoryRule(**changes)


def test_a_weight_per_head_must_fit_the_heads() -> None:
    with pytest.raises(MemoryRuleError, match=r"lambda_d .* 3 values, the layer has 2 heads"):
        small("hope", rule=MemoryRule(lambda_d=(1.0, 0.0, 1.0)))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="depth"):
        ModelConfig.from_dict({"depth": 3})
    with pytest.raises(MemoryRuleError, match="eta"):
        ModelConfig.from_dict({"rule": {"eta": 3}})
    with pytest.raises(ConfigError, match="2b"):
        preset("hope", "2b")


def test_eta_max_follows_the_longer_chunk_and_momentum() -> None:
    assert MemoryRule().eta_limit == 8 / 64
    assert MemoryRule(chunk_mem=256, chunk_other=16).eta_limit == 8 / 256
    assert MemoryRule(chunk_mem=16, chunk_other=16).eta_limit == 2 / 16
    assert MemoryRule(chunk_mem=8, chunk_other=8).eta_limit == 2 / 8
    assert replace(MemoryRule(), chunk_mem=4, chunk_other=4).eta_limit == 0.5
    assert MemoryRule(momentum=True).eta_limit == 2 / 64
    assert MemoryRule(momentum=True, eta_max=0.1).eta_limit == 0.1


def test_model_and_kernels_need_torch_alone() -> None:
    code = (
        "import sys, nltrain.model, nltrain.model.__main__, kernels.naive, kernels.chunk, kernels.diagnostics; "
        "print([m for m in ('ray', 'deepspeed', 'wandb', 'boto3', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
