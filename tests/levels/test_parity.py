"""Every ZeRO stage, alone and mixed, equals dense training: one plain optimizer per level, fed the window's mean."""

from collections.abc import Callable
from functools import partial

import pytest

from benchmarks._level_cases import CLIPS, STAGES, parity
from benchmarks._level_toys import Toy, hope_tiny


def _case(stages: str, optimizer: str, clip: str, dtype: str, accumulate: int = 1, make: Callable = Toy):
    return partial(parity, make, stages, optimizer, clip, dtype, 2, accumulate)


FP32 = [(s, o, c) for s in STAGES for o in ("sgd", "adamw") for c in CLIPS] + [("mix3211", "momentum", "clip")]
HOPE = [("mix3211", "sgd"), ("zero3", "adamw")]
BF16 = [(s, o, "clip") for s in STAGES if s != "mix1231" for o in ("sgd", "adamw")]
FOUR = [("zero1", "sgd"), ("zero2", "sgd"), ("zero3", "sgd"), ("mix3211", "adamw")]
CASES = {
    2: {f"parity-{s}-{o}-{c}-fp32": _case(s, o, c, "fp32") for s, o, c in FP32}
    | {f"parity-{s}-{o}-{c}-bf16": _case(s, o, c, "bf16") for s, o, c in BF16}
    | {f"hope-{s}-{o}": _case(s, o, "clip", "fp32", make=hope_tiny) for s, o in HOPE},
    4: {f"parity-{s}-{o}-clip-fp32": _case(s, o, "clip", "fp32", 4) for s, o in FOUR},
    1: {f"parity-{s}-sgd-clip-fp32": _case(s, "sgd", "clip", "fp32") for s in ("zero1", "zero2", "zero3")},
}

# SGD is linear in the gradient: only the order of summation differs. AdamW divides by the root of the second moment,
# so an element whose true gradient is near zero turns rounding noise of relative size 1e-7 into a step of up to lr;
# such elements are few, and each moves by at most lr x ticks = 0.064 against a tensor norm of at
# least 0.01 sqrt(numel).
SGD_BOUND, ADAMW_BOUND = 1e-6, 5e-6
# bf16 computes every gradient with a unit roundoff of 2^-9: the change of the weights, not the weights, is off by that.
BF16_BOUND = {"sgd": 2**-6, "adamw": 2**-3}


@pytest.mark.parametrize(("stages", "optimizer", "clip"), FP32)
def test_two_ranks_equal_dense_training_over_64_micro_steps(case, stages, optimizer, clip):
    result = case(2, f"parity-{stages}-{optimizer}-{clip}-fp32")
    assert (result["due_base"], result["due_fast"], result["due_mid"], result["due_slow"]) == (64, 32, 8, 2)
    assert result["error"] <= (ADAMW_BOUND if optimizer == "adamw" else SGD_BOUND)


@pytest.mark.parametrize(("stages", "optimizer"), FOUR)
def test_four_ranks_with_accumulation_equal_dense_training(case, stages, optimizer):
    result = case(4, f"parity-{stages}-{optimizer}-clip-fp32")
    assert result["due_base"] == 16
    assert result["error"] <= (ADAMW_BOUND if optimizer == "adamw" else SGD_BOUND)


@pytest.mark.parametrize("stages", ["zero1", "zero2", "zero3"])
def test_one_rank_equals_dense_training(case, stages):
    assert case(1, f"parity-{stages}-sgd-clip-fp32")["error"] <= SGD_BOUND


@pytest.mark.parametrize(("stages", "optimizer", "clip"), BF16)
def test_bf16_changes_weights_as_fp32_does_up_to_its_rounding(case, stages, optimizer, clip):
    result = case(2, f"parity-{stages}-{optimizer}-{clip}-bf16")
    assert result["relative_to_change"] <= BF16_BOUND[optimizer]


@pytest.mark.parametrize(("stages", "optimizer"), HOPE)
def test_hope_tiny_on_two_ranks_equals_dense_training_over_64_micro_steps(case, stages, optimizer):
    result = case(2, f"hope-{stages}-{optimizer}")
    assert (result["due_base"], result["due_slow"]) == (64, 2)
    # AdamW amplifies: dense training that starts half a unit in the last place away ends this far from itself.
    assert result["error"] <= (result["twin_error"] if optimizer == "adamw" else SGD_BOUND)
