"""The stacked form of the default rule against the form for every rule, and its gradient against finite differences."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._memory_cases import DEVICE, Case, Result, evaluate, make_case, relative
from kernels import MemoryRule, chunk
from kernels.stacked import BlockInputs, Kept, Memories, constants, forward_block, supports
from kernels.stacked_backward import Accumulators, backward_block
from kernels.stacked_loop import pack, unpack

RULES = {
    "defaults": {},
    "negative_eigenvalues": {"eta_max": 0.1, "lambda_d": 20.0},
    "erasure_by_head": {"eta_max": 0.1, "lambda_d": (20.0, 0.0)},
    "tight_bound": {"gradient_bound": 0.1},
    "raw_inputs": {"normalize_inputs": False, "eta_max": 0.02},
}


class _Form:
    """`chunk` with options."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def self_modify(self, *arguments: Any) -> Any:
        return chunk.self_modify(*arguments, **self.options)


def _same(got: Result, want: Result) -> None:
    assert relative(got.output, want.output) <= 1e-12
    assert torch.equal(got.state["position"], want.state["position"])
    for name, tensor in want.state.items():
        assert relative(got.state[name], tensor) <= 1e-12, name
    for name, gradient in want.gradients.items():
        assert relative(got.gradients[name], gradient) <= 1e-12, name


def _case(rule: dict, chunk_tokens: int, num_tokens: int, num_sequences: int = 2, documents: float = 0.0) -> Case:
    made = MemoryRule(**{"chunk_mem": chunk_tokens, "chunk_other": chunk_tokens, **rule})
    assert supports(made)
    return make_case(made, num_tokens, num_sequences, documents=documents)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"truncate_blocks": 2}], ids=str)
@pytest.mark.parametrize("chunk_tokens", [8, 48, 64, 200])
@pytest.mark.parametrize("name", RULES)
def test_both_forms_agree(name: str, chunk_tokens: int, options: dict) -> None:
    for num_tokens, num_sequences, documents in ((230, 2, 0.0), (130, 3, 0.03)):
        case = _case(RULES[name], chunk_tokens, num_tokens, num_sequences, documents)
        _same(evaluate(_Form(**options), case), evaluate(_Form(general=True, **options), case))


@pytest.mark.parametrize(("num_sequences", "num_heads"), [(1, 1), (3, 1), (1, 3)])
def test_both_forms_agree_for_one_sequence_and_for_one_head(num_sequences: int, num_heads: int) -> None:
    case = make_case(MemoryRule(chunk_mem=16, chunk_other=16), 50, num_sequences, num_heads=num_heads, documents=0.05)
    _same(evaluate(chunk, case), evaluate(_Form(general=True), case))


@pytest.mark.parametrize("chunk_tokens", [8, 100])
def test_both_forms_continue_a_state_in_the_middle_of_a_chunk(chunk_tokens: int) -> None:
    first, second = (_case({}, chunk_tokens, num_tokens, 2, 0.04) for num_tokens in (13, 70))
    _, state = chunk.self_modify(first.inputs, first.initial, first.rule, None, first.document_starts)
    case = second._replace(initial=first.initial, state=state.detach())
    _same(evaluate(chunk, case), evaluate(_Form(general=True), case))


def test_compiled_steps_give_the_same_gradients() -> None:
    torch.compiler.reset()
    case = _case({}, 16, 48, 2)
    _same(evaluate(_Form(compile_backend="aot_eager"), case), evaluate(chunk, case))
    torch.compiler.reset()


def test_a_second_derivative_is_refused() -> None:
    case = _case({}, 8, 20)
    k = case.inputs.k.requires_grad_()
    o, _ = chunk.self_modify(case.inputs, case.initial, case.rule)
    (first,) = torch.autograd.grad(o.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_is_not_the_default_rule_takes_the_other_form() -> None:
    for changes in (
        {"writes": False}, {"memory": "matrix"}, {"adaptive": ("k", "v")}, {"chunk_other": 32}, {"residual": False},
        {"activation": "gelu"}, {"read": "frozen"}, {"decay": "literal"}, {"lambda_d": 0.0}, {"layerwise_dgd": False},
        {"eta_gate": "hard"}, {"objective": "dot"}, {"target": "value"}, {"normalize_v": False},
        {"normalize_target": True}, {"momentum": True}, {"normalized_step": True}, {"gradient_bound": None},
    ):  # fmt: skip
        assert not supports(MemoryRule(**changes)), changes


def test_weights_are_packed_and_unpacked() -> None:
    weights = make_case(MemoryRule(), 1).initial.weights
    for got, want in zip(unpack(pack(weights)), weights, strict=True):
        assert torch.equal(got, want)


def test_one_block_without_gradients_keeps_what_the_backward_pass_needs() -> None:
    """`Kept` survives the way through one list of tensors, which is how autograd holds it."""
    *_, kept = _block(*_leaves(), valid=None)
    again = Kept.from_tensors(kept.tensors())
    assert all(a is b for a, b in zip(again.tensors(), kept.tensors(), strict=True)) and len(kept.tensors()) > 20


N, C, D, H = 2, 3, 4, 5


def _leaves() -> list[Tensor]:
    """x, q, q_base, logits, slow, and base, run and start of `Memories`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    tokens = [unit(4 * N, C, D), unit(N, C, D), normal(N, C, H), normal(2 * N, C, 1), normal(2 * N, D, 1)]
    return tokens + [t for _ in range(3) for t in (normal(8, N, H * D) * 0.3, normal(2, N, H) * 0.3)]


def _block(x: Tensor, q: Tensor, q_base: Tensor, logits: Tensor, slow: Tensor, *state: Tensor, valid: Any) -> Any:
    rule = MemoryRule(eta_max=0.1, lambda_d=20.0)
    base, run, start = Memories(*state[:2]), Memories(*state[2:4]), Memories(*state[4:])
    con, snapshot = constants(rule, rule.lambda_d, slow, base), start.add(base)
    inputs = BlockInputs(x, q, q_base, logits, valid)
    return con, inputs, snapshot, run, *forward_block(con, inputs, snapshot, run)


class _OneBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, valid: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        *ctx.block, o, after, kept = _block(*tensors, valid=valid)
        ctx.block.append(kept)
        return o, *after

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, *d_after: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        con, _, snapshot, *_ = ctx.block
        zeros = snapshot.zeros()
        read = torch.zeros(N, D, H, dtype=torch.float64, device=DEVICE)
        into = Accumulators(zeros, read, torch.zeros_like(con.slow))
        inputs, run = backward_block(*ctx.block, d_o, Memories(*d_after), into)
        base = zeros.body.clone()
        base[5] += read.flatten(1)
        return None, *inputs, into.slow, base, zeros.gate, *run, *zeros


@pytest.mark.parametrize("padded", [False, True])
def test_the_gradient_of_one_block_equals_finite_differences(padded: bool) -> None:
    valid = torch.tensor([[True] * C, [True, False, True]], device=DEVICE) if padded else None
    leaves = [t.requires_grad_() for t in _leaves()]
    assert torch.autograd.gradcheck(lambda *t: _OneBlock.apply(valid, *t), leaves, atol=1e-8, rtol=1e-6)
