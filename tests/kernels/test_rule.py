"""What a rule derives: where each memory lies in the stack, the cap of eta, and the proven limit of a change."""

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest

from kernels import MemoryRule, MemoryRuleError
from kernels.rule import largest_change


@pytest.mark.parametrize("changes", [{}, {"memory": "matrix"}, {"adaptive": ("v", "alpha")}, {"adaptive": ()}])
def test_the_rows_of_all_memories_fill_the_stack_without_overlap(changes: dict) -> None:
    rule = MemoryRule(**changes)
    rows = [rule.rows(name, 8, 5) for name in rule.full_names + rule.gate_names]
    assert rows[0].start == 0 and rows[-1].stop == rule.num_rows(8, 5)
    assert all(before.stop == after.start for before, after in pairwise(rows))


def test_a_rule_survives_json_and_refuses_unknown_names() -> None:
    rule = MemoryRule(lambda_d=(1.0, 0.0), adaptive=("k",))
    assert MemoryRule.from_dict(json.loads(json.dumps(asdict(rule)))) == rule
    with pytest.raises(MemoryRuleError, match="speed"):
        MemoryRule.from_dict({"speed": 3})


def test_the_limit_of_a_change_grows_with_the_root_of_the_length_where_everything_is_erased() -> None:
    rule = MemoryRule()
    assert largest_change(rule, 40_000) == pytest.approx(2 * largest_change(rule, 10_000))
    without = MemoryRule(lambda_d=0.0)
    assert largest_change(without, 20_000) == pytest.approx(2 * largest_change(without, 10_000))
    assert largest_change(MemoryRule(layerwise_dgd=False), 100) == largest_change(without, 100)


@pytest.mark.parametrize("changes", [{"gradient_bound": None}, {"momentum": True}, {"decay": "literal"},
                                     {"eta_max": 1.0, "lambda_d": 1.0}])  # fmt: skip
def test_outside_the_proof_the_limit_is_infinite(changes: dict) -> None:
    assert largest_change(MemoryRule(**changes), 10) == math.inf


def test_named_rules_change_only_what_they_say() -> None:
    letter = MemoryRule.paper_letter(chunk_mem=32, chunk_other=32)
    assert (letter.chunk_mem, letter.read, letter.decay, letter.eta_max) == (32, "frozen", "literal", 1.0)
    assert MemoryRule.one_sided().layerwise_dgd is False and MemoryRule.one_sided().erases_output_side is False
