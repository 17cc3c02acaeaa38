"""The counter of dispatched operators, and the bounds on what the memories dispatch."""

from dataclasses import replace

import torch

from benchmarks._dispatched import chunk_counts, count, flops, micro_step_kernels
from benchmarks.launches import BOUNDS
from kernels import MemoryRule
from nltrain.model import build, preset


def test_views_and_allocations_are_operators_but_no_kernels() -> None:
    a = torch.randn(4, 3)
    assert count(lambda: a.t()) == (1, 0)
    assert count(lambda: torch.empty(3)) == (1, 0)
    assert count(lambda: a.t() @ a + 1) == (3, 2)


def test_products_are_counted_wherever_they_are_written() -> None:
    a, b, out = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.zeros(2, 3, 5)
    wanted = 2 * 2 * 3 * 4 * 5
    assert flops(lambda: torch.bmm(a, b)) == flops(lambda: torch.bmm(a, b, out=out)) == wanted
    assert flops(lambda: torch.baddbmm(out, a, b)) == flops(lambda: out.baddbmm_(a, b)) == wanted


def test_the_default_rule_stays_within_the_bounds_and_below_the_form_for_every_rule() -> None:
    found, general = chunk_counts(MemoryRule()), chunk_counts(MemoryRule(), general=True)
    for name, bound in BOUNDS.items():
        assert found[name] <= bound < general[name], name
    assert found["operators_forward"] < general["operators_forward"]


def test_every_layer_adds_the_same_to_a_micro_step() -> None:
    with torch.device("meta"):
        model = build(replace(preset("hope", "tiny"), num_layers=4))
        tokens = torch.zeros(1, 128, dtype=torch.long)
    whole = count(lambda: model.loss(tokens, tokens).backward())[1]
    assert micro_step_kernels("tiny", 1, 128, num_layers=4) == whole


def test_documents_and_recomputation_add_kernels() -> None:
    plain = micro_step_kernels("tiny", 2, 320)
    assert micro_step_kernels("tiny", 2, 320, 150) > plain
    assert micro_step_kernels("tiny", 2, 320, recompute="chunks") > plain
    assert micro_step_kernels("tiny", 2, 320, recompute="block") > plain
