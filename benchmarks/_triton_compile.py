"""Compiles the Triton kernels for a GPU that need not be here, and reads what they need from the compiled code.

The arguments are those of a real call: `triton_call.launch` is replaced while a block goes forward and backward, so
that what is compiled is what a call would launch.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks._memory_cases import Case, make_case
from kernels import MemoryRule, triton_call
from kernels.state import MemoryState


class Compiled(NamedTuple):
    """One kernel for one configuration."""

    kernel: str
    width: int
    chunk: int
    inputs: str
    arch: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    """Of each thread: its whole stack, which these kernels use for spilled registers alone."""


def small_case(width: int, chunk: int, dtype: torch.dtype, num_tokens: int) -> Case:
    """A case of one head that goes on from a state inside a chunk, so that every kernel is launched."""
    rule = MemoryRule(chunk_mem=chunk, chunk_other=chunk)
    make: dict[str, Any] = {"num_heads": 1, "head_dim": width, "hidden": width, "dtype": torch.float32}
    case = make_case(rule, num_tokens, 1, **make)
    inputs = type(case.inputs)(*(None if x is None else x.to(dtype).requires_grad_() for x in case.inputs))  # type: ignore[arg-type]
    weights = case.initial.weights.map(lambda w: w.to(dtype).requires_grad_())
    zeros = weights.map(lambda w: torch.zeros_like(w, dtype=torch.float32).unsqueeze(0))
    state = MemoryState(zeros, zeros, None, torch.tensor([chunk - 1]))
    return case._replace(inputs=inputs, initial=case.initial._replace(weights=weights), state=state)


class Launch(NamedTuple):
    """One call of `triton_call.launch`."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launches_of(case: Case) -> list[Launch]:
    """What a forward and backward pass would launch. Nothing is computed."""
    found: list[Launch] = []
    with mock.patch.object(triton_call, "launch", lambda *launch: found.append(Launch(*launch))):
        out, state = triton_call.self_modify(*case[1:3], case.rule, case.state, case.document_starts)
        (out.float().sum() + state.run.w2.sum()).backward()
    return found


def _signature(kernel: Any, launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, compile-time values and alignments by parameter."""
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    signature, values, aligned = {}, {}, {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            values[(parameter.num,)] = launch.options[parameter.name]
            continue
        value = launch.arguments[parameter.num]
        if isinstance(value, int) and value == 1:  # Triton makes a compile-time value of it
            signature[parameter.name] = "constexpr"
            values[(parameter.num,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = types[value.dtype]
            aligned[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return signature, values, aligned


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def compiled(
    width: int, chunk: int, dtype: torch.dtype, arch: int, only: tuple[str, ...] | None = None
) -> list[Compiled]:
    """Every kernel that a call with these sizes launches, each variant once. only: names of kernels, None for all."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows, seen = [], set()
    with mock.patch.object(triton_call, "interpreter_device", lambda device: False):
        launches = launches_of(small_case(width, chunk, dtype, chunk + 1))
    for launch in launches:
        kernel = triton_call.kernels()[launch.kernel]
        signature, values, aligned = _signature(kernel, launch)
        key = (launch.kernel, tuple(signature.values()), tuple(map(str, values.values())))
        if key in seen or (only is not None and launch.kernel not in only):
            continue
        seen.add(key)
        source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
        settings = {name: launch.options[name] for name in ("num_warps", "num_stages")}
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)
        registers, stack = _resources(made.asm["cubin"])
        name = launch.kernel.removesuffix("_kernel")
        variant = "".join(f" {n.lower()}={launch.options[n]}" for n in ("SAVE", "SIDE") if n in kernel.arg_names)
        kind = str(dtype).removeprefix("torch.")
        rows.append(Compiled(name + variant, width, chunk, kind, arch, made.metadata.shared, registers, stack))
    return rows
