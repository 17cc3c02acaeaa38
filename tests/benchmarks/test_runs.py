"""A kept result is read where nothing that it depends on has changed, and refused where something has."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks._runs import BenchmarkError, Run, run_all, settings_of
from kernels import MemoryRule
from nltrain.model import ModelConfig, preset

# What the kept results hold of a model. A new field belongs here only if it changes the numbers.
MODEL_FIELDS = {
    "family", "vocab_size", "width", "num_layers", "head_dim", "memory_hidden", "rule", "levels", "cms_variant",
    "level_mlp", "cms_hidden", "ffn_hidden", "down_init", "conv_width", "rope_theta", "norm_eps", "w1_std", "w2_scale",
    "eta_init", "alpha_init", "recompute", "truncate_chunks", "eta_limit",
}  # fmt: skip
HOPE = preset("hope", "tiny")


def _keep(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "a.json").write_text(json.dumps({"settings": settings, "result": {"loss": 1.5}}))


def _read(folder: Path, config: ModelConfig) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        raise AssertionError("the result is there")

    return run_all(folder, [Run("a", {"model": settings_of(config), "seed": 0}, work)])[0]


def test_settings_are_those_that_kept_results_hold() -> None:
    assert set(settings_of(HOPE)) == MODEL_FIELDS


def test_other_code_for_the_same_numbers_does_not_invalidate_a_result(tmp_path: Path) -> None:
    _keep(tmp_path, {"model": settings_of(HOPE), "seed": 0})
    for changes in ({"kernel": "chunk"}, {"compile": "steps"}, {"compile": "blocks", "compile_backend": "aot_eager"}):
        assert _read(tmp_path, replace(HOPE, **changes)) == {"loss": 1.5}


def test_a_result_older_than_a_field_is_read_at_the_value_in_effect_then(tmp_path: Path) -> None:
    rule = MemoryRule(gradient_bound=None)
    then = settings_of(replace(HOPE, level_mlp="silu", down_init="small", rule=rule))
    then = {name: value for name, value in then.items() if name not in ("level_mlp", "down_init")}
    then["rule"] = {name: value for name, value in then["rule"].items() if name != "gradient_bound"}
    _keep(tmp_path, {"model": then, "seed": 0})
    assert _read(tmp_path, replace(HOPE, level_mlp="silu", down_init="small", rule=rule)) == {"loss": 1.5}
    with pytest.raises(BenchmarkError, match="other settings"):
        _read(tmp_path, HOPE)


@pytest.mark.parametrize("changes", [{"recompute": "chunks"}, {"rule": MemoryRule(eta_max=0.1)}, {"width": 256}])
def test_another_model_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    _keep(tmp_path, {"model": settings_of(HOPE), "seed": 0})
    with pytest.raises(BenchmarkError, match="other settings"):
        _read(tmp_path, replace(HOPE, **changes))


def test_a_result_with_a_field_unknown_here_is_refused(tmp_path: Path) -> None:
    _keep(tmp_path, {"model": settings_of(HOPE) | {"depth": 3}, "seed": 0})
    with pytest.raises(BenchmarkError, match="other settings"):
        _read(tmp_path, HOPE)
