"""Figures per chunk, against what the state and the gates of one call say."""

import pytest
import torch

from benchmarks._memory_cases import make_case, relative
from kernels import MemoryRule, naive
from kernels.diagnostics import chunk_diagnostics


@pytest.mark.parametrize("decay", ["deviation", "literal"])
def test_the_last_chunks_change_is_that_of_the_final_state(decay: str) -> None:
    rule = MemoryRule(chunk_mem=8, chunk_other=4, decay=decay)
    case = make_case(rule, 20, 2)
    figures = chunk_diagnostics(case.inputs, case.initial, rule)
    assert all(values.shape == (3,) for values in figures.values())
    _, state = naive.self_modify(case.inputs, case.initial, rule)
    initial = [w for w in case.initial.weights if w is not None]
    run = [w for w in state.run if w is not None]
    moved = [w - b if decay == "literal" else w for w, b in zip(run, initial, strict=True)]
    size = torch.stack([w.square().flatten(1).sum(1) for w in initial]).sum(0).sqrt()
    change = torch.stack([w.square().flatten(2).sum(2) for w in moved]).sum(0).sqrt() / size
    assert relative(figures["change_over_weight"][-1], change.max()) < 1e-12


def test_gates_stay_inside_their_ranges_and_v_has_unit_length() -> None:
    rule = MemoryRule(chunk_mem=8, chunk_other=8)
    case = make_case(rule, 24, 2)
    figures = chunk_diagnostics(case.inputs, case.initial, rule)
    assert (figures["eta_max"] <= rule.eta_limit).all() and (figures["eta_mean"] <= figures["eta_max"]).all()
    assert (figures["alpha_min"] > 0).all() and (figures["alpha_min"] <= figures["alpha_mean"]).all()
    torch.testing.assert_close(figures["v_over_k"], torch.ones_like(figures["v_over_k"]), rtol=1e-3, atol=0)
