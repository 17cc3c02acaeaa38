"""Triton == the token loop, in Triton's interpreter; what the kernels do not support is refused with the reason."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import _triton_cases
from benchmarks._memory_cases import DEVICE, evaluate, make_case
from kernels import MemoryRule, dispatch, triton_call
from kernels.blocking import build_blocking
from kernels.dispatch import KernelError, Options, choose, refusal
from kernels.triton_call import block_table, refused_inputs
from kernels.triton_cost import training_cost

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
UNSUPPORTED = {
    "memory": "matrix", "chunk_mem": 32, "chunk_other": 16, "adaptive": ("k", "v", "q", "eta", "alpha"),
    "residual": False, "activation": "gelu", "read": "frozen", "decay": "literal", "eta_gate": "hard",
    "objective": "dot", "target": "value", "normalize_inputs": False, "normalize_v": False, "normalize_target": True,
    "momentum": True, "writes": False, "normalized_step": True,
}  # fmt: skip


def interpreted(*command: str) -> list[str]:
    """Output lines of a module in a process in which Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NLTRAIN_TEST_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """The errors of every case, from one process in which Triton interprets."""
    lines = [json.loads(line) for line in interpreted("benchmarks._triton_cases")]
    return {line.pop("name"): line for line in lines}


@needs_triton
@pytest.mark.parametrize("name", [*_triton_cases.CASES, "pieces of a sequence"])
def test_outputs_states_and_gradients_equal_those_of_the_token_loop(name: str, found: dict) -> None:
    # bf16 inputs: what bf16 operands and scratch memory give.
    forward, gradient = (5e-3, 2e-2) if name == "bf16 inputs" else (1e-5, 1e-5)
    assert found[name]["forward"] <= forward and found[name]["gradient"] <= gradient, found[name]


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_every_unsupported_option_is_refused_with_the_reason(field: str) -> None:
    rule = MemoryRule(**{field: UNSUPPORTED[field]})
    reason = refusal("triton", rule, Options())
    assert reason is not None and field in reason and "choose kernel = 'chunk'" in reason
    with pytest.raises(KernelError, match="kernel = 'triton': the Triton kernels need"):
        choose("triton", rule, Options(), "cuda")
    assert choose("auto", rule, Options(), "cuda") is not None


def test_every_field_of_a_rule_is_supported_or_refused() -> None:
    free = {"lambda_d", "eta_max", "gradient_bound", "layerwise_dgd"}
    assert set(UNSUPPORTED) | free == set(MemoryRule.__dataclass_fields__)
    for field, value in {"lambda_d": 0.5, "eta_max": 0.05, "gradient_bound": None, "layerwise_dgd": False}.items():
        assert refusal("triton", MemoryRule(**{field: value}), Options()) is None
    assert "lambda_d * eta_max" in str(refusal("triton", MemoryRule(eta_max=0.1, lambda_d=20.0), Options()))
    for tokens in triton_call.CHUNKS:
        assert refusal("triton", MemoryRule(chunk_mem=tokens, chunk_other=tokens), Options()) is None


def test_options_devices_dtypes_and_widths_that_the_kernels_do_not_have_are_refused() -> None:
    assert "no compile_backend" in str(refusal("triton", MemoryRule(), Options(compile_backend="inductor")))
    assert "no truncate_blocks" in str(refusal("triton", MemoryRule(), Options(truncate_blocks=4)))
    assert refusal("triton", MemoryRule(), Options(recompute=True)) is None
    assert "CUDA device" in str(refusal("triton", MemoryRule(), Options(), "cpu")) or not importlib.util.find_spec(
        "triton"
    )
    fits = [refused_inputs(torch.float32, n, n) is None for n in (16, 32, 48, 64, 128, 256)]
    assert fits == [True, True, False, True, True, False]
    assert refused_inputs(torch.float32, 64, 128) is not None and refused_inputs(torch.bfloat16, 64, 64) is None
    assert "fp32 at most" in str(refused_inputs(torch.float64, 64, 64))
    case = make_case(MemoryRule(), 3, 1)
    with pytest.raises(KernelError, match="kernel = 'triton': the Triton kernels compute in fp32 at most"):
        dispatch.IMPLEMENTATIONS["triton"].run(
            case.inputs, case.initial, MemoryRule(), None, None, None, options=Options()
        )


def test_without_the_package_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "find_spec", lambda name: None)
    assert "triton is not installed" in str(triton_call.refusal(MemoryRule(), "cuda"))
    assert triton_call.refusal(MemoryRule(), None) is None


def test_auto_passes_to_chunk_what_does_not_fit_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    case = make_case(MemoryRule(), 3, 1)
    call = choose("auto", MemoryRule(), Options(), "cpu")
    want, _ = choose("chunk", MemoryRule(), Options(), "cpu")(case.inputs, case.initial, case.rule, None, None, None)
    got, _ = call(case.inputs, case.initial, case.rule, None, None, None)
    assert torch.equal(got, want)
    caplog.clear()
    dispatch._say_passed_over.cache_clear()
    for _ in range(2):
        dispatch._say_passed_over("triton", "widths")
    assert [record.getMessage() for record in caplog.records] == ["kernel = 'auto' does not take 'triton': widths"]


def test_the_table_of_blocks_says_where_documents_begin_and_which_rows_end_inside_a_chunk() -> None:
    rule = MemoryRule(chunk_mem=16, chunk_other=16)
    starts = torch.zeros(2, 32, dtype=torch.bool)
    starts[0, 20] = True
    blocking = build_blocking(rule, 32, torch.tensor([0, 0]), starts)
    table = block_table(blocking, 2, torch.device("cpu"))
    rows = [[row for row in table[:, b].tolist() if row[1]] for b in range(2)]
    # first token, tokens, state kept, last of a row that ends inside a chunk
    assert rows[0] == [[0, 16, 0, 0], [16, 4, 1, 0], [20, 12, 0, 1]]
    assert rows[1] == [[0, 16, 0, 0], [16, 16, 1, 0]]
    assert block_table(blocking, 2, torch.device("cpu")) is table
    alike = block_table(build_blocking(rule, 20, torch.tensor([5, 5]), None), 2, torch.device("cpu"))
    assert alike[:, 0].tolist() == alike[:, 1].tolist() == [[0, 11, 1, 0], [11, 9, 1, 1]]


@needs_triton
def test_flops_and_bytes_are_those_of_the_formulas() -> None:
    rule = MemoryRule(chunk_mem=16, chunk_other=16)
    rows = json.loads(interpreted("benchmarks._triton_counts", "32", "16")[-1])
    formula = training_cost(rule, 32, 32)
    assert sum(row["flops"] for row in rows) == formula.flops
    moved = sum(row["read"] + row["written"] for row in rows)
    assert abs(moved / formula.bytes_moved - 1) <= 0.05


@needs_triton
def test_a_kernel_compiles_for_a_gpu_that_is_not_there_without_spills() -> None:
    from benchmarks._triton_compile import compiled

    (row,) = compiled(32, 16, torch.bfloat16, 90, only=("generate_kernel",))
    assert row.shared_bytes <= 232_448 and row.spill_bytes == 0 and 16 <= row.registers <= 255


def test_launches_of_a_call_do_not_depend_on_sizes_and_stay_few() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    from benchmarks._triton_compile import launches_of, small_case

    case = small_case(16, 16, torch.float32, 16 * 16)._replace(state=None)
    names = [launch.kernel for launch in launches_of(case)]
    blocks, groups = 16, 2
    assert len(names) == blocks * (3 + 3 + 4) + groups * (1 + 2)
    assert len(names) / blocks <= 20


on_gpu = pytest.mark.skipif(torch.device(DEVICE).type != "cuda", reason="needs a CUDA device as NLTRAIN_TEST_DEVICE")
GPU_CASES = {
    "fp32, width 64": _triton_cases.Sizes(200, 2, 2, 64, documents=0.01),
    "fp32, width 128": _triton_cases.Sizes(200, 1, 2, 128),
    "bf16, width 32, chunk 16": _triton_cases.Sizes(100, 2, 2, 32, chunk=16, documents=0.02, bfloat16=True),
    "bf16, width 64": _triton_cases.Sizes(200, 2, 2, 64, documents=0.01, carried=30, bfloat16=True),
    "bf16, width 128": _triton_cases.Sizes(700, 2, 4, 128, documents=0.004, bfloat16=True),
}


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_a_gpu_the_kernels_stay_close_to_the_float64_token_loop(name: str) -> None:
    errors = _triton_cases.compare(GPU_CASES[name])
    assert errors["forward"] <= 5e-3 and errors["gradient"] <= 2e-2, errors


@on_gpu
@pytest.mark.gpu
def test_on_a_gpu_two_runs_give_the_same_bits() -> None:
    case = _triton_cases.build(GPU_CASES["bf16, width 128"])
    first, second = evaluate(triton_call, case), evaluate(triton_call, case)
    assert torch.equal(first.output, second.output)
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    assert all(torch.equal(a, b) for a, b in zip(first.gradients.values(), second.gradients.values(), strict=True))
