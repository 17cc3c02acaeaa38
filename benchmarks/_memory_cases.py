"""Random cases for the kernels, and the comparison of two forms on outputs, final states and gradients."""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import Initial, Inputs, MemoryRule, MemoryState, Weights, chunk, naive
from kernels.state import init_weights

# Where the cases run; random numbers are always drawn on the CPU.
DEVICE = os.environ.get("NLTRAIN_TEST_DEVICE", "cpu")


class Case(NamedTuple):
    """The arguments of one call."""

    rule: MemoryRule
    inputs: Inputs
    initial: Initial
    document_starts: Tensor | None
    state: MemoryState | None = None


class Result(NamedTuple):
    """What one call gave, and its gradients by the leaves of the case."""

    output: Tensor
    state: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def make_case(
    rule: MemoryRule,
    num_tokens: int,
    num_sequences: int = 2,
    *,
    num_heads: int = 2,
    head_dim: int = 4,
    hidden: int = 5,
    documents: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    w1_std: float = 0.3,
) -> Case:
    """documents: share of the tokens that begin a document."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    shape = (num_sequences, num_tokens, num_heads)
    inputs = Inputs(*(normal(*shape, head_dim) for _ in range(4)), normal(*shape) if rule.momentum else None)
    initial = init_weights(rule, num_heads, head_dim, hidden, generator=generator, dtype=dtype, w1_std=w1_std)
    initial = Initial(initial.weights.map(lambda w: w.to(DEVICE)), initial.slow.to(DEVICE), initial.bias.to(DEVICE))
    starts = torch.rand(num_sequences, num_tokens, generator=generator) < documents if documents else None
    starts = None if starts is None else starts.to(DEVICE)
    return Case(rule, inputs, initial, starts)


def leaves(case: Case) -> dict[str, Tensor]:
    """Every differentiable tensor of a case, by name."""
    named: dict[str, Any] = {f"inputs.{n}": t for n, t in case.inputs._asdict().items()}
    named |= {f"initial.{n}": t for n, t in case.initial.weights._asdict().items()}
    named |= {"slow": case.initial.slow, "bias": case.initial.bias}
    return {n: t for n, t in named.items() if t is not None}


def with_leaves(case: Case, named: dict[str, Tensor]) -> Case:
    """The case with other tensors, by the names of `leaves`."""
    inputs = Inputs(*(named.get(f"inputs.{n}") for n in Inputs._fields))  # type: ignore[arg-type]
    weights = Weights(*(named.get(f"initial.{n}") for n in Weights._fields))  # type: ignore[arg-type]
    return case._replace(inputs=inputs, initial=Initial(weights, named["slow"], named["bias"]))


def evaluate(form: Any, case: Case, seed: int = 7, *, gradients: bool = True) -> Result:
    """Runs one form and differentiates a random functional of its outputs and its final state.

    gradients: False runs the forward alone; the result holds no gradient.
    """
    if not gradients:
        with torch.no_grad():
            output, state = form.self_modify(case.inputs, case.initial, case.rule, case.state, case.document_starts)
        return Result(output, state.to_tensors(), {})
    named = {n: t.detach().clone().requires_grad_() for n, t in leaves(case).items()}
    live = with_leaves(case, named)
    output, state = form.self_modify(live.inputs, live.initial, live.rule, live.state, live.document_starts)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: t for n, t in state.to_tensors().items() if t.is_floating_point()}
    total = output.new_zeros(())
    for tensor in (output, *tensors.values()):
        weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(DEVICE, tensor.dtype)
        total = total + (tensor * weight).sum()
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return Result(output.detach(), state.to_tensors(), dict(zip(named, found, strict=True)))


def relative(got: Tensor | None, want: Tensor | None) -> float:
    """|got - want| / |want|; a missing gradient counts as zero."""
    if got is None and want is None:
        return 0.0
    got = torch.zeros_like(want) if got is None else got.detach().double()
    want = torch.zeros_like(got) if want is None else want.detach().double()
    scale = want.norm()
    return float((got - want).norm() / scale) if scale > 0 else float((got - want).norm())


def errors(case: Case) -> tuple[float, float]:
    """Worst relative error of chunk against naive: of outputs and final states, and of gradients."""
    want, got = evaluate(naive, case), evaluate(chunk, case)
    assert torch.equal(got.state["position"], want.state["position"])
    forward = [relative(got.output, want.output)]
    forward += [relative(got.state[n], t) for n, t in want.state.items() if t.is_floating_point()]
    assert all(torch.isfinite(t).all() for t in want.state.values()), "the case left the stable range"
    backward = [relative(got.gradients[n], g) for n, g in want.gradients.items()]
    return max(forward), max(backward)
