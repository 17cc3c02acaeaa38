"""A state is a value: a flat dict of tensors and back, detached, and fresh where a document begins."""

import pytest
import torch

from benchmarks._memory_cases import make_case
from kernels import MemoryRule, MemoryState
from kernels.state import fresh_state, gate_bias, init_weights


@pytest.mark.parametrize("changes", [{}, {"momentum": True}, {"memory": "matrix"}, {"adaptive": ()}])
def test_a_state_survives_the_flat_dict(changes: dict) -> None:
    rule = MemoryRule(**changes)
    case = make_case(rule, 1)
    state = fresh_state(case.initial, rule, 3)
    back = MemoryState.from_tensors(state.to_tensors())
    assert back.to_tensors().keys() == state.to_tensors().keys()
    assert all(torch.equal(back.to_tensors()[name], tensor) for name, tensor in state.to_tensors().items())
    assert (back.velocity is None) == (not rule.momentum)
    assert back.position.tolist() == [0, 0, 0]


def test_a_fresh_state_holds_the_change_or_the_weights() -> None:
    case = make_case(MemoryRule(), 1)
    assert not fresh_state(case.initial, MemoryRule(), 2).run.w2.any()
    whole = fresh_state(case.initial, MemoryRule(decay="literal"), 2)
    assert torch.equal(whole.run.w2[1], case.initial.weights.w2)
    live = case.initial._replace(weights=case.initial.weights.map(lambda w: w.requires_grad_()))
    state = fresh_state(live, MemoryRule(decay="literal", momentum=True), 2)
    assert state.run.w2.requires_grad and not state.detach().run.w2.requires_grad
    assert state.detach().velocity is not None


@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
def test_the_gates_start_at_the_values_asked_for(gate: str) -> None:
    rule = MemoryRule(eta_gate=gate)
    eta, alpha = gate_bias(rule, 0.05, 0.9).sigmoid()
    share = eta if gate == "sigmoid" else 1.1 * eta - 0.05
    assert rule.eta_limit * share == pytest.approx(0.05) and alpha == pytest.approx(0.9)


def test_initial_weights_have_the_shapes_of_the_rule() -> None:
    rule = MemoryRule()
    initial = init_weights(rule, 3, 8, 5, generator=torch.Generator().manual_seed(0))
    assert initial.weights.w2.shape == (3, rule.num_rows(8, 5), 8) and initial.weights.w1.shape == (3, 3, 8, 5)
    assert initial.weights.g1.shape == (3, 2, 5) and initial.slow.shape == (2, 3, 8) and initial.bias.shape == (2, 3)
