"""The Triton kernels without a GPU: exactness, what they compile to, launches, FLOPs, bytes, and a predicted time.

    python -m benchmarks.kernels [--json] [--quick]

Exactness is that of Triton's interpreter against the float64 token loop. Compiled are all kernels of every shipped
width and chunk (--quick: width 128, chunk 64) for sm_90, and the default configuration for sm_100. FLOPs and bytes are
those of the kernels' own loops, divided by the formulas of kernels/triton_cost.py. The prediction is for one micro-step
of 2 x 4,096 tokens of the 1.3B model on an H100: launches x 2.5 us + bytes / 3.0 TB/s + FLOPs / (0.3 x 790 TFLOP/s) for
the memories, and for the dense products their FLOPs / (0.53 x 790 TFLOP/s). Nothing of it was measured on a GPU.
--json prints one JSON object as the last line; the exit code is 1 when a bound is missed.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import _triton_compile
from kernels import MemoryRule, MemoryState, triton_call
from kernels.blocking import build_blocking
from kernels.triton_cost import training_cost
from nltrain.model import LanguageModel, build, preset
from nltrain.model import mixers as model_mixers

WIDTH, CHUNK, SEQUENCES, TOKENS = 128, 64, 2, 4096
SHIPPED = [(width, chunk) for width in (128, 64, 32) for chunk in (64, 16)]
SHARED_LIMIT, STACK_LIMIT = 232_448, 2_048
LAUNCH_S, BYTES_PER_S, FLOPS_PER_S, DENSE_FLOPS_PER_S = 2.5e-6, 3.0e12, 0.3 * 790e12, 0.53 * 790e12
BOUNDS: dict[str, Callable[[float], bool]] = {
    "interpreter_max_rel_err": lambda x: x <= 1e-5,
    "interpreter_max_grad_rel_err": lambda x: x <= 1e-5,
    "max_shared_bytes": lambda x: x <= SHARED_LIMIT,
    "max_spill_bytes": lambda x: x <= STACK_LIMIT,
    "launches_forward": lambda x: x <= 6,
    "launches_forward_backward": lambda x: x <= 20,
    "kernels_per_micro_step_1p3b": lambda x: x <= 40_000,
    "flops_over_formula": lambda x: abs(x - 1) <= 0.05,
    "hbm_bytes_over_formula": lambda x: abs(x - 1) <= 0.05,
    "predicted_memories_s": lambda x: x <= 0.35,
    "predicted_micro_step_s": lambda x: x <= 0.35,
    "predicted_tokens_per_s_h100": lambda x: x >= 23_000,
}


def _interpreted(*command: str) -> list[str]:
    """Output lines of a module that runs in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NLTRAIN_TEST_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()


def exactness(quick: bool) -> dict[str, float]:
    """Worst errors of the fp32 cases and, apart, of bf16 inputs, whose products have operands rounded to bf16."""
    rows = [json.loads(line) for line in _interpreted("benchmarks._triton_cases", *([] if quick else ["--full"]))]
    for row in rows:
        print(f"  {row['name']:45} outputs, states {row['forward']:.1e}   gradients {row['gradient']:.1e}")
    exact = [row for row in rows if not row["name"].startswith("bf16")]
    low = [row for row in rows if row["name"].startswith("bf16")]
    return {
        "interpreter_max_rel_err": max(row["forward"] for row in exact),
        "interpreter_max_grad_rel_err": max(row["gradient"] for row in exact),
        "interpreter_bf16_rel_err": max(row["forward"] for row in low),
        "interpreter_bf16_grad_rel_err": max(row["gradient"] for row in low),
    }


def compilation(quick: bool) -> dict[str, float]:
    """Compiles every shipped configuration and prints a table."""
    wanted = [(*SHIPPED[0], torch.bfloat16, 90)]
    if not quick:
        kinds = (torch.bfloat16, torch.float32)
        wanted = [(width, chunk, kind, 90) for width, chunk in SHIPPED for kind in kinds]
        wanted.append((*SHIPPED[0], torch.bfloat16, 100))
    rows = []
    print("  kernel                   d = h   C   inputs   sm   shared  regs  stack per thread")
    for width, chunk, kind, arch in wanted:
        for row in _triton_compile.compiled(width, chunk, kind, arch):
            rows.append(row)
            print(
                f"  {row.kernel:24} {row.width:5} {row.chunk:3} {row.inputs:>8} {row.arch:4} {row.shared_bytes:8} "
                f"{row.registers:5} {row.spill_bytes:17}",
                flush=True,
            )
    return {
        "compiled_configs": len(wanted),
        "compiled_kernels": len(rows),
        "max_shared_bytes": max(row.shared_bytes for row in rows),
        "max_spill_bytes": max(row.spill_bytes for row in rows),
    }


class _Kernels(TorchDispatchMode):
    """Counts dispatched ops that are no views: about the kernels of eager PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches() -> dict[str, float]:
    """Launches per block and layer, and kernels of one layer's call and of all of the model's but the memories."""
    with mock.patch.object(triton_call, "launch"), _Kernels() as around:
        case = _triton_compile.small_case(16, CHUNK, torch.float32, TOKENS)._replace(state=None)
        # All layers share the blocking and its table.
        blocking = build_blocking(case.rule, TOKENS, torch.zeros(1, dtype=torch.long), None)
        triton_call.block_table(blocking, 1, torch.device("cpu"))
        around.count = 0
        out, _ = triton_call.self_modify(*case[1:3], case.rule, blocking=blocking)
        out.sum().backward()
    found = _triton_compile.launches_of(case)
    blocks = TOKENS / CHUNK
    forward = sum(not name.kernel.endswith("backward_kernel") for name in found) / blocks
    again = (forward - 1 / triton_call.GROUP_BLOCKS) / 2  # what is not the live read runs twice
    return {
        "launches_forward": again + 1 / triton_call.GROUP_BLOCKS,
        "launches_forward_backward": len(found) / blocks,
        "kernels_per_layer_call": len(found) + around.count,
    }


def _without_memories(inputs: Any, *_: Any) -> tuple[Any, Any]:
    zero = torch.zeros((), dtype=torch.long)
    return inputs.q + inputs.k + inputs.v + inputs.gate, MemoryState(None, None, None, zero)  # type: ignore[arg-type]


def rest_of_the_model() -> tuple[int, int, int]:
    """Layers, kernels of a forward and backward pass without the memories, and parameters in dense products, at 1.3B.

    The kernels are counted in a model of the same depth and small widths, eager.
    """
    config = preset("hope", "1p3b")
    with torch.device("meta"):
        model = LanguageModel(config)
    dense = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "memories" not in name)
    small = replace(config, width=32, head_dim=16, memory_hidden=16, cms_hidden=32, vocab_size=64)
    tokens = torch.randint(0, 64, (SEQUENCES, CHUNK))
    with mock.patch.object(model_mixers, "choose", lambda *_: _without_memories):
        tiny = build(small)
        with _Kernels() as counted:
            tiny.loss(tokens, tokens).backward()
    return config.num_layers, counted.count, dense


def counts() -> dict[str, float]:
    """FLOPs and bytes of one block, counted in the kernels and by the formulas."""
    formula = training_cost(MemoryRule(chunk_mem=CHUNK, chunk_other=CHUNK), WIDTH, WIDTH)
    found = json.loads(_interpreted("benchmarks._triton_counts", str(WIDTH), str(CHUNK))[-1])
    for row in found:
        print(f"  {row['kernel']:26} {row['flops'] / 1e6:7.1f} MFLOP {(row['read'] + row['written']) / 1e3:7.0f} kB")
    flops, moved = (sum(row[name] for row in found) for name in ("flops", "read"))
    moved += sum(row["written"] for row in found)
    return {
        "flops_per_block": flops,
        "hbm_bytes_per_block": moved,
        "requested_bytes_per_block": sum(row["requested"] for row in found),
        "flops_over_formula": flops / formula.flops,
        "hbm_bytes_over_formula": moved / formula.bytes_moved,
    }


def prediction(figures: dict[str, float]) -> dict[str, float]:
    """Time of a micro-step at 1.3B from the counts, part by part."""
    layers, rest, dense = rest_of_the_model()
    config = preset("hope", "1p3b")
    blocks = layers * SEQUENCES * (config.width // config.head_dim) * TOKENS // CHUNK
    cost = training_cost(config.rule, WIDTH, WIDTH)
    kernels = layers * figures["kernels_per_layer_call"] + rest
    parts = {
        "predicted_launch_s": kernels * LAUNCH_S,
        "predicted_bytes_s": blocks * cost.bytes_moved * figures["hbm_bytes_over_formula"] / BYTES_PER_S,
        "predicted_flops_s": blocks * cost.flops * figures["flops_over_formula"] / FLOPS_PER_S,
        "predicted_dense_s": 6 * dense * SEQUENCES * TOKENS / DENSE_FLOPS_PER_S,
    }
    total = sum(parts.values())
    memories = total - parts["predicted_dense_s"]
    return {
        "kernels_per_micro_step_1p3b": kernels, **parts, "predicted_memories_s": memories,
        "predicted_micro_step_s": total, "predicted_tokens_per_s_h100": SEQUENCES * TOKENS / total,
    }  # fmt: skip


def main() -> int:
    """Prints every figure; returns 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="small cases, one compiled configuration")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.error("needs the package triton (pip install 'nltrain[gpu]')")
    torch.set_num_threads(1)
    figures: dict[str, float] = {**exactness(options.quick), **compilation(options.quick), **launches(), **counts()}
    figures |= prediction(figures)
    for name, value in figures.items():
        bound = "" if name not in BOUNDS else "" if BOUNDS[name](value) else "   MISSES ITS BOUND"
        print(f"{name:32} {value:.6g}{bound}")
    if options.json:
        print(json.dumps(figures))
    return 0 if all(bound(figures[name]) for name, bound in BOUNDS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
