"""The memories alone on this machine's GPU: time beside a product of the same process, error against float64.

    python -m benchmarks.gpu_kernels [--json] [--quick] [--device cuda|cpu] [--budget-s S] [--out FILE]

Needs CUDA and torch, and triton for its kernels. For every implementation of the memories that can run: milliseconds of
forward and of forward + backward, and the share of an 8192^3 bf16 product that the formula's FLOPs make up (backward
counts twice the forward, replay not at all); then the root-mean-square error over that of the float64 token loop, for
bf16 inputs. The exit code is 1 where an error is above its bound. --device cpu --quick proves the machinery.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_model import MATMUL_PRECISION, Clock, gemm_flops_per_s, hardware
from kernels import Inputs, MemoryRule
from kernels.blocking import build_blocking
from kernels.cost import forward_flops_per_token
from kernels.dispatch import IMPLEMENTATIONS, Options, choose, refusal
from kernels.state import Initial, init_weights

# (head width = hidden width, chunk, sequences, tokens, heads): 32,768 tokens of 2,048 channels at most.
SHAPES = ((128, 64, 4, 2_048, 16), (128, 64, 1, 8_192, 16), (64, 64, 4, 2_048, 32), (128, 16, 4, 2_048, 16))
QUICK_SHAPES = ((16, 16, 1, 64, 2),)
# Of outputs and states; of gradients by inputs and weights; of those by whatever makes eta and alpha.
ERROR_BOUNDS = {"outputs": 5e-3, "gradients": 1e-2, "gates": 2e-2}
OF_THE_GATES = ("inputs.gate", "initial.g1", "slow", "bias")
# The share of the product at d = h = 128 and C = 64, forward and forward + backward, that is aimed at.
AIMS = (0.35, 0.25)
# A hundred times slower than any other: only for the errors.
DEFINITION = "naive"


@dataclass
class Row:
    """One implementation at one shape."""

    kernel: str
    width: int
    chunk: int
    sequences: int
    tokens: int
    heads: int
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_share: float | None = None
    both_share: float | None = None
    skipped: str | None = None


def arguments(row: Row, device: torch.device) -> tuple[Inputs, Initial, MemoryRule, Any]:
    """Random bf16 inputs, fp32 initial weights, the default rule at the row's chunk, and the blocks."""
    rule = MemoryRule(chunk_mem=row.chunk, chunk_other=row.chunk)
    generator = torch.Generator().manual_seed(0)
    shape = (row.sequences, row.tokens, row.heads, row.width)
    leaves = [torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for _ in range(4)]
    initial = init_weights(rule, row.heads, row.width, row.width, generator=generator)

    def leaf(x: Tensor) -> Tensor:
        return x.to(device).requires_grad_()

    initial = Initial(initial.weights.map(leaf), leaf(initial.slow), leaf(initial.bias))
    first = torch.zeros(row.sequences, dtype=torch.long)
    blocking = build_blocking(rule, row.tokens, first, None).moved(lambda x: x.to(device))
    return Inputs(*leaves), initial, rule, blocking


def time_row(row: Row, clock: Clock, gemm: float) -> None:
    """Fills the row with medians; raises what the kernels raise."""
    inputs, initial, rule, blocking = arguments(row, clock.device)
    call = choose(row.kernel, rule, Options(recompute=row.kernel == "chunk"), clock.device.type)
    cotangent = torch.randn_like(inputs.q)

    @torch.no_grad()
    def forward() -> None:
        call(inputs, initial, rule, None, None, blocking)

    def both() -> None:
        call(inputs, initial, rule, None, None, blocking)[0].backward(cotangent)

    flops = forward_flops_per_token(rule, row.width, row.width) * row.sequences * row.tokens * row.heads
    row.forward_ms = _median_ms(forward, clock)
    row.both_ms = _median_ms(both, clock)
    row.forward_share = flops / (row.forward_ms / 1e3) / gemm
    row.both_share = 3 * flops / (row.both_ms / 1e3) / gemm


def _median_ms(function: Any, clock: Clock) -> float:
    """Of up to 20 calls within two seconds, after one that compiles."""
    function()
    times = [clock.time_s(function)]
    while len(times) < 20 and sum(times) < 2 and times[-1] < clock.left_s():
        times.append(clock.time_s(function))
    return 1e3 * sorted(times)[len(times) // 2]


def sweep(clock: Clock, quick: bool, gemm: float) -> list[Row]:
    """Every implementation but the definition at every shape, until the budget is spent."""
    rows = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        for kernel in IMPLEMENTATIONS:
            if kernel == DEFINITION:
                continue
            row = Row(kernel, *shape)
            rows.append(row)
            rule = MemoryRule(chunk_mem=row.chunk, chunk_other=row.chunk)
            row.skipped = refusal(kernel, rule, Options(), clock.device.type)
            if clock.left_s() < 5:
                row.skipped = "no time left"
            if row.skipped is None:
                try:
                    time_row(row, clock, gemm)
                except Exception as error:  # one kernel that fails must not hide the others
                    row.skipped = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
            print(describe(row), flush=True)
    return rows


def describe(row: Row) -> str:
    """One line of the table."""
    name = f"{row.kernel:7} d = h = {row.width:3} C = {row.chunk:2} {row.sequences} x {row.tokens:,} x {row.heads}"
    if row.skipped or row.forward_ms is None or row.both_ms is None:
        return f"{name:45} skipped: {row.skipped}"
    aims = AIMS if (row.width, row.chunk) == (128, 64) else ("-", "-")
    return (
        f"{name:45} forward {row.forward_ms:8.2f} ms, {row.forward_share:6.1%} of the product (aim {aims[0]}); "
        f"with backward {row.both_ms:8.2f} ms, {row.both_share:6.1%} (aim {aims[1]})"
    )


def errors_of(kernel: str, width: int, chunk: int, num_tokens: int) -> dict[str, float]:
    """{group of ERROR_BOUNDS: largest error} against the float64 token loop, which gets the same bf16 inputs."""
    from benchmarks._memory_cases import evaluate, leaves, make_case, relative, with_leaves  # reads its device
    from kernels import naive

    rule = MemoryRule(chunk_mem=chunk, chunk_other=chunk)
    case = make_case(rule, num_tokens, 1, head_dim=width, hidden=width, w1_std=0.05)
    low = {n: t.bfloat16() if n.startswith("inputs.") else t.float() for n, t in leaves(case).items()}
    exact = with_leaves(case, {n: t.double() for n, t in low.items()})

    def run(inputs: Any, initial: Any, rule: Any, state: Any, starts: Any) -> Any:
        return choose(kernel, rule, Options(), inputs.k.device.type)(inputs, initial, rule, state, starts, None)

    want, got = evaluate(naive, exact), evaluate(SimpleNamespace(self_modify=run), with_leaves(case, low))
    found = dict.fromkeys(ERROR_BOUNDS, 0.0)
    found["outputs"] = relative(got.output, want.output)
    for name, tensor in want.state.items():
        if tensor.is_floating_point():
            found["outputs"] = max(found["outputs"], relative(got.state[name], tensor))
    for name, gradient in want.gradients.items():
        group = "gates" if name in OF_THE_GATES else "gradients"
        found[group] = max(found[group], relative(got.gradients[name], gradient))
    return found


def errors(device: torch.device, quick: bool) -> dict[str, dict[str, Any]]:
    """{kernel and shape: errors, whether they are within the bounds, or why there are none}."""
    found: dict[str, dict[str, Any]] = {}
    for width, chunk in ((16, 16),) if quick else ((128, 64), (64, 64), (128, 16)):
        for kernel in IMPLEMENTATIONS:
            rule = MemoryRule(chunk_mem=chunk, chunk_other=chunk)
            if kernel == DEFINITION or refusal(kernel, rule, Options(), device.type):
                continue
            name = f"{kernel} d = h = {width} C = {chunk}"
            try:
                each: dict[str, Any] = errors_of(kernel, width, chunk, 2 * chunk + 1)
                each["within"] = all(each[group] <= bound for group, bound in ERROR_BOUNDS.items())
            except Exception as error:
                each = {"within": False, "failed": f"{type(error).__name__}: {error}"[:300]}
            found[name] = each
            print(f"{name:25} {each}", flush=True)
    return found


def main() -> int:
    """Times and errors; 1 where an error is above its bound, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only proves the machinery")
    parser.add_argument("--budget-s", type=float, default=60, help="seconds for the times")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device here (torch {torch.__version__}): nothing was measured")
        return 2
    os.environ["NLTRAIN_TEST_DEVICE"] = args.device
    device = torch.device(args.device)
    torch.set_float32_matmul_precision(MATMUL_PRECISION)
    clock = Clock(device, args.budget_s)
    gemm = gemm_flops_per_s(clock, 512 if args.device == "cpu" else 8192)
    found = errors(device, args.quick)
    results = {
        "hardware": hardware(device),
        "gemm_tflop_per_s": gemm / 1e12,
        "error_bounds": ERROR_BOUNDS,
        "errors": found,
        "rows": [asdict(row) for row in sweep(clock, args.quick, gemm)],
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    if args.json:
        print(json.dumps(results))
    return 0 if all(each["within"] for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
