"""Every parameter is in exactly one level; a split that cannot work is refused with the parameter's name."""

import pytest
from torch import nn

from nltrain.levels.config import LevelConfig, LevelsError
from nltrain.levels.split import split_levels


def level(name: str = "base", parameters=("rest",), period_tokens: int = 64, **settings) -> LevelConfig:
    return LevelConfig(name, parameters, period_tokens, **settings)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.init.ones_(nn.Linear(1, 4).bias))
        self.slow, self.fast = nn.Linear(4, 4), nn.Linear(4, 4)


def refused(model: nn.Module, *levels: LevelConfig) -> str:
    with pytest.raises(LevelsError) as error:
        split_levels(model, levels)
    return str(error.value)


def test_every_parameter_is_in_exactly_one_level():
    parts = split_levels(Block(), (level(), level("slow", ("slow.*",)), level("fast", ("fast.*",))))
    assert {part.config.name: [name for name, _ in part.parameters] for part in parts} == {
        "base": ["scale"],
        "slow": ["slow.weight", "slow.bias"],
        "fast": ["fast.weight", "fast.bias"],
    }


def test_an_unmatched_parameter_is_named():
    assert "scale" in refused(Block(), level("slow", ("slow.*", "fast.*")))


def test_a_doubly_matched_parameter_is_named_with_both_levels():
    text = refused(Block(), level(), level("a", ("slow.*",)), level("b", ("slow.weight",)))
    assert "slow.weight" in text and "'a'" in text and "'b'" in text


def test_a_pattern_without_a_parameter_is_named():
    assert "'glow.*'" in refused(Block(), level(), level("slow", ("glow.*",)))


def test_a_leaf_module_in_two_levels_is_named():
    text = refused(Block(), level(), level("slow", ("slow.weight",)))
    assert "module slow (Linear)" in text and "weight" in text and "bias" in text


def test_at_zero3_a_bare_parameter_beside_other_levels_is_named():
    text = refused(Block(), level(zero_stage=3), level("slow", ("slow.*",)))
    assert "scale" in text and "'base'" in text and "ZeRO-3" in text and "module of its own" in text
    split_levels(Block(), (level(zero_stage=3), level("slow", ("slow.*", "scale"), zero_stage=1)))


def test_a_superfluous_rest_is_refused():
    assert "remove it" in refused(Block(), level(), level("all", ("*",)))


def test_tied_weights_belong_to_one_level_and_count_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False), "mlp": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    parts = split_levels(model, (level(), level("slow", ("mlp.*",))))
    assert parts[0].num_parameters == 20 and [name for name, _ in parts[0].parameters] == ["embed.weight"]
    text = refused(model, level(), level("a", ("embed.*",)), level("b", ("head.*",)))
    assert "embed.weight" in text and "head.weight" in text


def test_a_parameter_without_a_dimension_is_refused():
    model = Block()
    model.gain = nn.Parameter(model.scale.detach()[0].clone())
    assert "parameter gain has no dimension" in refused(model, level()) and "(1,)" in refused(model, level())


def test_parameters_that_need_no_gradient_are_left_alone():
    model = Block()
    model.slow.requires_grad_(False)
    assert [name for name, _ in split_levels(model, (level(),))[0].parameters] == ["scale", "fast.weight", "fast.bias"]
