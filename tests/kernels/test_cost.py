"""The cost formulas of kernels/cost.py against counted runs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks._dispatched import flops
from benchmarks._memory_cases import leaves, make_case, with_leaves
from kernels import MemoryRule, Weights, chunk
from kernels.cost import forward_flops_per_token


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"read": "frozen", "decay": "literal"},
        {"lambda_d": 0.0},
        {"layerwise_dgd": False},
        {"adaptive": ("k", "alpha")},
        {"memory": "matrix"},
        {"objective": "dot"},
        {"normalize_target": True},
        {"target": "value", "adaptive": ()},
        {"adaptive": ("k", "v", "q", "eta")},
        {"chunk_mem": 16, "chunk_other": 16},
    ],
    ids=str,
)
def test_counted_flops_equal_the_formula(changes: dict) -> None:
    rule = MemoryRule(**changes)
    case = make_case(rule, 128, 1, num_heads=1, head_dim=16, hidden=24)
    for general in (False, True):
        counted = flops(lambda general=general: chunk.self_modify(case.inputs, case.initial, rule, general=general))
        assert counted / 128 == pytest.approx(forward_flops_per_token(rule, 16, 24), rel=0.01)


def test_recomputing_keeps_states_that_grow_with_the_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = MemoryRule(chunk_mem=16, chunk_other=16)
    kept: list[int] = []

    def counted(function: Any, start: Weights, run: Weights, *rest: Any, **options: Any) -> Any:
        kept[-1] += sum({w.untyped_storage().data_ptr(): w.nbytes for w in (*start, *run) if w is not None}.values())
        return checkpoint(function, start, run, *rest, **options)

    monkeypatch.setattr(chunk, "checkpoint", counted)
    for num_blocks in (16, 64):
        kept.append(0)
        case = make_case(rule, num_blocks * 16, 1, num_heads=1, head_dim=16, hidden=16)
        live = with_leaves(case, {n: t.clone().requires_grad_() for n, t in leaves(case).items()})
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            chunk.self_modify(live.inputs, live.initial, rule, recompute=True)
        # Nothing but per-token inputs and outputs is kept beside the states at the group boundaries.
        assert not any(t.shape[-2:] in ((16, 16), (80, 16)) and t.shape[0] == 1 and t.dim() == 3 for t in saved)
    assert kept[1] == 2 * kept[0] > 0
