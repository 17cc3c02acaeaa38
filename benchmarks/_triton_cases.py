"""Triton kernels against the float64 token loop on the CPU, in Triton's interpreter: outputs, states, every gradient.

    TRITON_INTERPRET=1 python -m benchmarks._triton_cases [--full]

One JSON object per case and line. The variable has to be set before anything imports triton, hence a process of its
own. Buffers are full of NaN before a kernel writes them. The interpreter runs a program per head, memory and block in
Python, about 0.1 s each: the cases are small and few, --full adds the rest of the grid, wide heads and long sequences.
"""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks._memory_cases import Case, Result, evaluate, leaves, make_case, relative, with_leaves
from kernels import Inputs, MemoryRule, MemoryState, naive, triton_call


class Sizes(NamedTuple):
    """What one case is made of."""

    tokens: int
    sequences: int = 1
    heads: int = 1
    width: int = 16  # d = h
    chunk: int = 64
    documents: float = 0.0  # share of the tokens that begin one
    carried: int = 0  # tokens before, whose state goes in
    group: int = triton_call.GROUP_BLOCKS
    bfloat16: bool = False
    equal_keys: bool = False
    rule: dict[str, Any] = {}  # noqa: RUF012


# Every path of the kernels once; the tests run these.
CASES = {
    "one token": Sizes(1),
    "65 tokens, two heads, width 32": Sizes(65, heads=2, width=32),
    "documents, three sequences, chunk 16": Sizes(18, 3, chunk=16, documents=0.05),
    "a state from inside a chunk of 16, documents": Sizes(20, 2, chunk=16, documents=0.06, carried=29),
    "groups of two blocks, chunk 16": Sizes(70, chunk=16, group=2),
    "erasure by head": Sizes(20, heads=2, chunk=16, rule={"lambda_d": (5.0, 0.0), "eta_max": 0.1}),
    "erasure on keys alone, no bound": Sizes(20, chunk=16, rule={"layerwise_dgd": False, "gradient_bound": None}),
    "equal keys, the strongest erasure": Sizes(64, equal_keys=True, rule={"lambda_d": 5.0, "eta_max": 0.1}),
    "bf16 inputs": Sizes(20, chunk=16, bfloat16=True),
}
FULL = {
    "63 tokens": Sizes(63),
    "64 tokens": Sizes(64),
    "200 tokens": Sizes(200),
    "documents, two sequences": Sizes(70, 2, documents=0.02),
    "a state from inside a chunk": Sizes(52, 2, carried=13),
    "no erasure": Sizes(20, chunk=16, rule={"lambda_d": 0.0}),
    "tight bound": Sizes(20, chunk=16, rule={"gradient_bound": 0.1}),
    "width 64": Sizes(130, 2, 2, 64, documents=0.01),
    "width 128": Sizes(130, 1, 2, 128),
    "width 128, chunk 16": Sizes(70, 1, 1, 128, 16, documents=0.02),
    "1,000 tokens, three sequences, documents": Sizes(1000, 3, documents=0.004),
    "200 tokens, three sequences": Sizes(200, 3, 2, 32),
}


def build(sizes: Sizes) -> Case:
    """The case with fp32 leaves (bf16 inputs where asked) and a carried state of the token loop."""
    rule = MemoryRule(**{"chunk_mem": sizes.chunk, "chunk_other": sizes.chunk, **sizes.rule})
    shape = {"num_heads": sizes.heads, "head_dim": sizes.width, "hidden": sizes.width}
    make = {**shape, "documents": sizes.documents, "dtype": torch.float32}
    case = make_case(rule, sizes.tokens, sizes.sequences, **make)  # type: ignore[arg-type]
    if sizes.equal_keys:
        case.inputs.k[:] = case.inputs.k[:, :1]
    if sizes.carried:
        before = make_case(rule, sizes.carried, sizes.sequences, seed=5, **make)  # type: ignore[arg-type]
        _, state = naive.self_modify(before.inputs, case.initial, rule, None, before.document_starts)
        case = case._replace(state=state.detach())
    if sizes.bfloat16:
        case = with_leaves(case, {n: t.bfloat16() if n in ("inputs.k", "inputs.v", "inputs.q", "inputs.gate") else t
                                  for n, t in leaves(case).items()})  # fmt: skip
    return case


def _wide(case: Case) -> Case:
    """The same in float64."""
    wide = with_leaves(case, {n: t.double() for n, t in leaves(case).items()})
    if case.state is None:
        return wide
    start, run = (w.map(torch.Tensor.double) for w in (case.state.start, case.state.run))
    return wide._replace(state=MemoryState(start, run, None, case.state.position))


def _poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def full(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return full


class _Form(NamedTuple):
    """The kernels as a form that `evaluate` takes."""

    group: int

    def self_modify(self, *arguments: Any) -> tuple[Tensor, MemoryState]:
        return triton_call.self_modify(*arguments, group_blocks=self.group)


def _worst(got: Result, want: Result) -> tuple[float, float]:
    """Largest relative errors of outputs and states, and of gradients."""
    assert torch.equal(got.state["position"], want.state["position"])
    states = [relative(got.state[n], t) for n, t in want.state.items() if t.is_floating_point()]
    gradients = [relative(got.gradients[n], g) for n, g in want.gradients.items()]
    errors = (relative(got.output, want.output), *states), gradients
    # max() passes NaN over where it does not come first.
    return tuple(float(torch.tensor(part).nan_to_num(nan=torch.inf).max()) for part in errors)  # type: ignore[return-value]


def compare(sizes: Sizes) -> dict[str, Any]:
    """Worst errors against the float64 token loop: of outputs and states, and of gradients."""
    case = build(sizes)
    form = _Form(sizes.group)
    with mock.patch.object(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)), \
            mock.patch.object(torch, "empty_like", _poisoned(torch.empty_like)):  # fmt: skip
        got = evaluate(form, case)
    forward, gradient = _worst(got, evaluate(naive, _wide(case)))
    return {"forward": forward, "gradient": gradient}


def pieces(chunk: int) -> dict[str, Any]:
    """A sequence in pieces, its state carried from one to the next, against the whole."""
    case = build(Sizes(60, 2, chunk=chunk, documents=0.03))
    want, final = triton_call.self_modify(case.inputs, case.initial, case.rule, None, case.document_starts)
    state, outputs, begin = None, [], 0
    assert case.document_starts is not None
    for end in (1, 16, 27, 60):
        inputs = Inputs(*(None if x is None else x[:, begin:end] for x in case.inputs))  # type: ignore[arg-type]
        starts = case.document_starts[:, begin:end]
        out, state = triton_call.self_modify(inputs, case.initial, case.rule, state, starts)
        outputs.append(out)
        begin = end
    assert state is not None
    found, wanted = state.to_tensors(), final.to_tensors()
    errors = [relative(torch.cat(outputs, 1), want)] + [relative(found[n], t) for n, t in wanted.items()]
    return {"forward": max(errors), "gradient": 0.0}


def main() -> None:
    """Prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the whole grid, wide heads and long sequences as well")
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from triton.runtime import interpreter

    # Without patching triton.language at every call of a function: the kernel that calls it has done so. Twice as fast.
    interpreter.InterpretedFunction.__call__ = lambda self, *a, **named: self.rewrite()(*a, **named)
    for name, sizes in (CASES | FULL if options.full else CASES).items():
        print(json.dumps({"name": name, **compare(sizes)}), flush=True)
    with torch.no_grad():
        print(json.dumps({"name": "pieces of a sequence", **pieces(16)}), flush=True)


if __name__ == "__main__":
    main()
