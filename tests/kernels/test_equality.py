"""chunk == naive in float64: outputs, final states and gradients, for every option, in the stable range.

Stable range: eta_max <= min(0.5, 8 / C), lambda_d * eta_max <= 2, unit-norm memory inputs and v. The options that
leave these bounds out run with a smaller eta_max instead; `errors` asserts that every state stayed finite.
"""

from dataclasses import replace
from itertools import combinations
from types import ModuleType

import pytest
import torch

from benchmarks._memory_cases import DEVICE, Case, errors, evaluate, leaves, make_case, relative, with_leaves
from kernels import MemoryRule, chunk, naive
from kernels.blocking import build_blocking

FORWARD, BACKWARD = 1e-12, 1e-10

OPTIONS: dict[str, dict] = {
    "defaults": {},
    "frozen_read": {"read": "frozen"},
    "literal_decay": {"decay": "literal"},
    "no_erasure": {"lambda_d": 0.0},
    "negative_eigenvalues": {"eta_max": 0.1, "lambda_d": 20.0},
    "momentum": {"momentum": True},
    "matrix": {"memory": "matrix"},
    "no_residual": {"residual": False},
    "erasure_on_keys_alone": {"layerwise_dgd": False},
    "erasure_by_head": {"eta_max": 0.1, "lambda_d": (20.0, 0.0)},
    "erasure_by_head_with_momentum": {"eta_max": 0.1, "lambda_d": (0.0, 8.0), "momentum": True},
    "hard_gate": {"eta_gate": "hard"},
    "normalized_step": {"normalized_step": True},
    "normalized_step_erasure_on_keys_alone": {"layerwise_dgd": False, "normalized_step": True},
    "dot": {"objective": "dot"},
    "normalized_target": {"normalize_target": True},
    "unbounded_v": {"normalize_v": False, "eta_max": 0.02},
    "raw_inputs": {"normalize_inputs": False, "eta_max": 0.02},
    "adaptive_q": {"adaptive": ("k", "v", "q", "eta", "alpha")},
    "static_k": {"adaptive": ("v", "eta", "alpha")},
    "static_v": {"adaptive": ("k", "eta", "alpha")},
    "static_gates": {"adaptive": ("k", "v")},
    "one_gate": {"adaptive": ("k", "v", "alpha")},
    "static_all": {"adaptive": ()},
    "no_bound": {"gradient_bound": None},
    "tight_bound": {"gradient_bound": 0.1},
    "tight_bound_erasure_on_keys_alone": {"gradient_bound": 0.1, "layerwise_dgd": False},
    "value_target": {"target": "value"},
    "gelu": {"activation": "gelu"},
    "no_writes": {"writes": False},
}

# Factors of the pairwise cover: every pair of values of two different factors occurs in some rule.
FACTORS: dict[str, list[dict]] = {
    "memory": [{"memory": "mlp"}, {"memory": "matrix"}, {"layerwise_dgd": False}],
    "momentum": [{"momentum": False}, {"momentum": True}],
    "erasure": [{"lambda_d": 1.0}, {"lambda_d": 0.0}, {"lambda_d": 20.0}, {"lambda_d": (20.0, 0.0)}],
    "eta_gate": [{"eta_gate": "sigmoid"}, {"eta_gate": "hard"}],
    "v": [{"normalize_v": True}, {"normalize_v": False}],
    "normalized_target": [{"normalize_target": False}, {"normalize_target": True}],
    "bound": [{"gradient_bound": 2.0}, {"gradient_bound": None}],
    "target": [{"target": "self"}, {"target": "value"}],
    "objective": [{"objective": "l2"}, {"objective": "dot"}],
    "decay": [{"decay": "deviation"}, {"decay": "literal"}],
    "read": [{"read": "live"}, {"read": "frozen"}],
    "adaptive": [{"adaptive": ("k", "v", "eta", "alpha")}, {"adaptive": ("k", "v", "q", "eta", "alpha")},
                 {"adaptive": ()}],
    "schedule": [{"chunk_mem": 16, "chunk_other": 16}, {"chunk_mem": 32, "chunk_other": 8},
                 {"chunk_mem": 4, "chunk_other": 16}],
    "residual": [{"residual": True}, {"residual": False}],
    "inputs": [{"normalize_inputs": True}, {"normalize_inputs": False}],
}  # fmt: skip


def _pairwise() -> list[dict]:
    """A greedy cover: each rule takes, factor by factor, the value that covers most pairs not yet covered."""
    names = list(FACTORS)
    open_pairs = {
        (a, i, b, j) for a, b in combinations(names, 2) for i in range(len(FACTORS[a])) for j in range(len(FACTORS[b]))
    }
    rules = []
    while open_pairs:
        a, i, b, j = min(open_pairs)
        chosen = {a: i, b: j}
        for name in names:
            if name not in chosen:
                gain = [
                    len(open_pairs & {p for m, i in chosen.items() for p in ((m, i, name, n), (name, n, m, i))})
                    for n in range(len(FACTORS[name]))
                ]
                chosen[name] = gain.index(max(gain))
        open_pairs -= {(m, chosen[m], n, chosen[n]) for m in names for n in names}
        rule: dict = {"eta_max": 0.02 if chosen["v"] or chosen["inputs"] else 0.1}
        for name in names:
            rule |= FACTORS[name][chosen[name]]
        rules.append(rule)
    return rules


PAIRWISE = _pairwise()

NAMED: dict[str, MemoryRule] = {
    "defaults": MemoryRule(),
    "paper_letter": MemoryRule.paper_letter(normalize_v=True, normalize_inputs=True, eta_max=0.1),
    "state_tracking": MemoryRule(chunk_mem=16, chunk_other=16, eta_max=0.1, lambda_d=20.0),
    "titans": MemoryRule(adaptive=(), target="value", lambda_d=0.0, momentum=True, eta_max=0.05),
    "two_schedules": MemoryRule(chunk_mem=256, chunk_other=16),
    "one_sided": MemoryRule.one_sided(),
    "states_and_counts": MemoryRule(eta_max=0.1, lambda_d=(20.0, 0.0), eta_gate="hard", chunk_mem=16, chunk_other=16),
}


def _rule(option: dict, chunk: int) -> MemoryRule:
    return MemoryRule(**{"chunk_mem": chunk, "chunk_other": chunk, **option})


def _check(case: Case) -> None:
    forward, backward = errors(case)
    assert forward <= FORWARD, forward
    assert backward <= BACKWARD, backward


@pytest.mark.parametrize("chunk_tokens", [1, 16, 64])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_equals_the_token_loop(option: str, chunk_tokens: int) -> None:
    rule = _rule(OPTIONS[option], chunk_tokens)
    for num_tokens, num_sequences, documents in ((1, 1, 0.0), (63, 2, 0.0), (64, 3, 0.08)):
        _check(make_case(rule, num_tokens, num_sequences, documents=documents))


@pytest.mark.parametrize("changes", PAIRWISE, ids=lambda c: "-".join(str(v) for v in c.values())[:60])
def test_every_pair_of_options_equals_the_token_loop(changes: dict) -> None:
    _check(make_case(MemoryRule(**changes), 37, 2, documents=0.06, seed=3))


@pytest.mark.parametrize("name", NAMED)
def test_a_thousand_tokens_equal_the_token_loop(name: str) -> None:
    case = make_case(NAMED[name], 1000, 2, num_heads=len(NAMED[name].erasures), documents=0.01)
    assert case.document_starts is not None
    case.document_starts[0] = False  # one row without a document start, one packed
    _check(case)


def test_a_chunk_longer_than_a_block_is_cut_exactly() -> None:
    for tokens in (100, 128):
        _check(make_case(MemoryRule(chunk_mem=tokens, chunk_other=tokens), 300, 2, num_heads=1, documents=0.01))


@pytest.mark.parametrize("form", [naive, chunk])
def test_a_saved_state_continues_the_sequence(form: ModuleType) -> None:
    for rule in (MemoryRule(chunk_mem=8, chunk_other=4), MemoryRule(chunk_mem=8, chunk_other=8, momentum=True)):
        case = make_case(rule, 30, 2, documents=0.1)
        want, final = form.self_modify(case.inputs, case.initial, rule, None, case.document_starts)
        state, outputs, begin = None, [], 0
        for end in (1, 8, 11, 27, 30):
            inputs = type(case.inputs)(*(None if x is None else x[:, begin:end] for x in case.inputs))
            out, state = form.self_modify(inputs, case.initial, rule, state, case.document_starts[:, begin:end])
            state = type(state).from_tensors({n: t.clone() for n, t in state.detach().to_tensors().items()})
            outputs.append(out)
            begin = end
        assert relative(torch.cat(outputs, 1), want) <= FORWARD
        for name, tensor in final.to_tensors().items():
            assert relative(state.to_tensors()[name], tensor) <= FORWARD, name


def test_a_state_in_the_middle_of_a_chunk_equals_the_token_loop() -> None:
    rule = MemoryRule(chunk_mem=16, chunk_other=8)
    first, second = make_case(rule, 13, 3, documents=0.1), make_case(rule, 40, 3, documents=0.05, seed=5)
    _, state = naive.self_modify(first.inputs, first.initial, rule, None, first.document_starts)
    _check(second._replace(initial=first.initial, state=state.detach()))


def test_recomputed_chunks_give_the_same_gradients() -> None:
    case = make_case(MemoryRule(chunk_mem=8, chunk_other=8, momentum=True), 60, 2, documents=0.05)
    named = {n: t.clone().requires_grad_() for n, t in leaves(case).items()}
    live = with_leaves(case, named)
    gradients = []
    for recompute in (False, True):
        arguments = (live.inputs, live.initial, live.rule, None, live.document_starts)
        out, _ = chunk.self_modify(*arguments, recompute=recompute)
        gradients.append(torch.autograd.grad(out.square().sum(), list(named.values())))
    for a, b in zip(*gradients, strict=True):
        assert relative(b, a) <= FORWARD


def test_rows_cut_alike_and_rows_cut_apart_agree() -> None:
    """The padded order and plain slices are two ways to the same numbers."""
    rule = MemoryRule(chunk_mem=8, chunk_other=8)
    case = make_case(rule, 40, 2)
    starts = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    starts[0, 13] = True
    assert build_blocking(rule, 40, torch.zeros(2, dtype=torch.long), starts).source is not None
    apart = evaluate(chunk, case._replace(document_starts=starts)).output
    assert build_blocking(rule, 40, torch.zeros(2, dtype=torch.long), None).source is None
    alone = evaluate(chunk, case).output
    assert relative(apart[1], alone[1]) <= FORWARD and relative(apart[0], alone[0]) > 1e-3


@pytest.mark.parametrize("name", NAMED)
def test_float32_stays_close_to_float64(name: str) -> None:
    case = make_case(NAMED[name], 300, 2, head_dim=16, hidden=24, documents=0.01)
    want = evaluate(naive, case, gradients=False)
    named = {n: t.float() for n, t in leaves(case).items()}
    got = evaluate(chunk, with_leaves(case, named))
    assert got.output.dtype == torch.float32
    assert relative(got.output, want.output) <= 1e-5
    for state_name, tensor in want.state.items():
        if tensor.is_floating_point():
            assert relative(got.state[state_name], tensor) <= 1e-5, state_name


@pytest.mark.parametrize("name", NAMED)
def test_bfloat16_inputs_keep_an_fp32_state(name: str) -> None:
    case = make_case(NAMED[name], 300, 2, head_dim=16, hidden=24)
    named = leaves(case)
    rounded = {n: t.bfloat16() if n.startswith("inputs.") else t.float() for n, t in named.items()}
    got = evaluate(chunk, with_leaves(case, rounded))
    want = evaluate(naive, with_leaves(case, {n: t.double() for n, t in rounded.items()}), gradients=False)
    assert got.output.dtype == torch.bfloat16
    assert relative(got.output, want.output) <= 5e-3
    for state_name, tensor in want.state.items():
        if tensor.is_floating_point():
            assert got.state[state_name].dtype == torch.float32
            assert relative(got.state[state_name], tensor) <= 5e-3, state_name


def test_the_inner_gradient_is_that_of_the_printed_objective() -> None:
    """Against autograd of 1/2 |M(k) - target|^2 with k and target constant."""
    rule = replace(MemoryRule(), adaptive=(), gradient_bound=None)
    case = make_case(rule, 1, 1, num_heads=1)
    w2, w1 = case.initial.weights.w2[None], case.initial.weights.w1[None, :, 0]
    k, target = torch.randn(2, 1, 1, 4, dtype=torch.float64, device=DEVICE)
    memory = naive.Memory(rule, w2.requires_grad_(), w1.requires_grad_(), None)
    g2, g1, _ = memory.gradient(k, target)
    want = torch.autograd.grad(0.5 * (memory(k) - target).square().sum(), [w2, w1])
    assert relative(g2, want[0]) <= FORWARD and relative(g1, want[1]) <= FORWARD


def test_finite_differences_agree_with_the_outer_gradient() -> None:
    for rule in (MemoryRule(chunk_mem=4, chunk_other=2), MemoryRule(chunk_mem=4, chunk_other=4, momentum=True)):
        case = make_case(rule, 9, 1, num_heads=1, head_dim=3, hidden=2)
        named = {n: t.clone().requires_grad_() for n, t in leaves(case).items()}
        names = list(named)

        def outputs(*tensors: torch.Tensor, case: Case = case, names: list[str] = names) -> torch.Tensor:
            live = with_leaves(case, dict(zip(names, tensors, strict=True)))
            return chunk.self_modify(live.inputs, live.initial, live.rule)[0]

        assert torch.autograd.gradcheck(outputs, tuple(named.values()), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("t", [1, 7, 8, 20, 31])
def test_no_output_before_a_changed_token_changes(t: int) -> None:
    rule = MemoryRule(chunk_mem=8, chunk_other=8)
    case = make_case(rule, 32, 2, documents=0.1)
    changed = type(case.inputs)(*(None if x is None else x.clone() for x in case.inputs))
    for x in changed:
        if x is not None:
            x[:, t] += 1
    a, b = evaluate(chunk, case).output, evaluate(chunk, case._replace(inputs=changed)).output
    assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t], b[:, t])
