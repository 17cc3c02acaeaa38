"""Self-modifying memories on one CPU thread: exactness, speed over the token loop, dispatched ops, FLOPs, bytes.

    python -m benchmarks.smt [--json] [--quick]

FLOPs are counted in a real run and divided by the formula of kernels/cost.py; torch's counter does not know the
triangular solve and gets a formula for it. Ops are all dispatcher calls of a forward pass, views included. Times are
CPU seconds of this process, the best of several, because other work on the machine changes them less than wall time.
--json prints one JSON object as the last line; the exit code is 1 when a bound is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks._dispatched import count, flops
from benchmarks._memory_cases import Case, errors, evaluate, leaves, make_case, relative, with_leaves
from kernels import MemoryRule, chunk, naive
from kernels.cost import forward_flops_per_token, inverse_flops, published_flops_per_token, saved_bytes_per_block
from nltrain.model import build, preset

HEAD_DIM, HIDDEN, NUM_TOKENS = 32, 64, 256
BOUNDS: dict[str, Callable[[float], bool]] = {
    "max_rel_err_fp64": lambda x: x <= 1e-12,
    "max_grad_rel_err_fp64": lambda x: x <= 1e-10,
    "max_rel_err_fp32": lambda x: x <= 1e-5,
    "speedup_vs_naive": lambda x: x >= 20,
    "ops_per_token": lambda x: x <= 5.5,  # the erasure on the output side included
    "flops_over_formula": lambda x: abs(x - 1) <= 0.01,
    "letter_flops_over_formula": lambda x: abs(x - 1) <= 0.01,
    "saved_bytes_over_formula": lambda x: abs(x - 1) <= 0.1,
    "tokens_per_s_over_transformer": lambda x: x >= 0.4,
}
RULES = {
    "defaults": MemoryRule(),
    "frozen, literal decay, chunk 16": MemoryRule(chunk_mem=16, chunk_other=16, read="frozen", decay="literal"),
    "negative eigenvalues": MemoryRule(chunk_mem=16, chunk_other=16, eta_max=0.1, lambda_d=20.0),
    "momentum": MemoryRule(momentum=True),
    "matrix": MemoryRule(memory="matrix"),
}


def _big_case(rule: MemoryRule, num_heads: int = 1) -> Case:
    return make_case(
        rule, NUM_TOKENS, 1, num_heads=num_heads, head_dim=HEAD_DIM, hidden=HIDDEN, dtype=torch.float32, w1_std=0.02
    )


def _run(form: Any, case: Case) -> Tensor:
    return form.self_modify(case.inputs, case.initial, case.rule, case.state, case.document_starts)[0]


def exactness(quick: bool) -> dict[str, float]:
    """Worst relative errors of chunk against the float64 token loop."""
    forward, backward, single = [], [], []
    for rule in RULES.values():
        case = make_case(rule, 130 if quick else 400, 2, head_dim=8, hidden=12, documents=0.01)
        f, b = errors(case)
        forward.append(f)
        backward.append(b)
        want = evaluate(naive, case).output
        single.append(relative(_run(chunk, with_leaves(case, {n: t.float() for n, t in leaves(case).items()})), want))
    return {
        "max_rel_err_fp64": max(forward),
        "max_grad_rel_err_fp64": max(backward),
        "max_rel_err_fp32": max(single),
    }


def _cpu_s(function: Callable[[], Any], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        function()
        best = min(best, time.process_time() - began)
    return best


def speed(quick: bool) -> dict[str, float]:
    """CPU time of the token loop over that of the chunk form, forward and backward; and forward alone."""
    case = _big_case(MemoryRule())
    out = {}
    for name, step in (("speedup_vs_naive", lambda form: evaluate(form, case)),
                       ("forward_speedup_vs_naive", lambda form: _run(form, case))):  # fmt: skip
        step(chunk)
        slow = _cpu_s(lambda step=step: step(naive), 1 if quick else 3)
        fast = _cpu_s(lambda step=step: step(chunk), 5 if quick else 20)
        out[name] = slow / fast
    return out


def counts() -> dict[str, float]:
    """Dispatched ops, FLOPs and saved bytes of one call, at the defaults and at the paper's letter."""
    out: dict[str, float] = {}
    for prefix, rule in (("", MemoryRule()), ("letter_", MemoryRule(read="frozen", decay="literal"))):
        case = _big_case(rule)
        counted = flops(lambda case=case: _run(chunk, case))
        formula = forward_flops_per_token(rule, HEAD_DIM, HIDDEN) * NUM_TOKENS
        out[f"{prefix}flops_over_formula"] = counted / formula
        published = published_flops_per_token(rule, HEAD_DIM, HIDDEN) * NUM_TOKENS
        out[f"{prefix}flops_over_published"] = counted / published
    assert inverse_flops(16) == 16**3

    case = _big_case(MemoryRule())
    out["ops_per_token"] = count(lambda: _run(chunk, case))[0] / NUM_TOKENS
    named = {n: t.clone().requires_grad_() for n, t in leaves(case).items()}
    live = with_leaves(case, named)
    out["ops_per_token_with_backward"] = count(lambda: _run(chunk, live).sum().backward())[0] / NUM_TOKENS

    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _run(chunk, live)
    blocks = NUM_TOKENS // MemoryRule().block_tokens
    out["saved_bytes_over_formula"] = sum(storages.values()) / (
        blocks * saved_bytes_per_block(MemoryRule().block_tokens, HEAD_DIM, HIDDEN)
    )
    return out


def against_transformer(quick: bool) -> dict[str, float]:
    """Training tokens per CPU second of tiny Hope over tiny Transformer++ (equal parameters), T = 256, chunk 64."""
    torch.manual_seed(0)
    configs = {"hope": preset("hope", "tiny"), "transformer": preset("transformer", "tiny")}
    models = {name: build(config) for name, config in configs.items()}
    tokens = torch.randint(0, configs["hope"].vocab_size, (4, 256))
    best = dict.fromkeys(models, float("inf"))
    for _ in range(3 if quick else 12):
        for name, model in models.items():
            best[name] = min(best[name], _cpu_s(lambda model=model: model.loss(tokens, tokens).backward(), 1))
    return {
        "hope_tokens_per_s": tokens.numel() / best["hope"],
        "transformer_tokens_per_s": tokens.numel() / best["transformer"],
        "tokens_per_s_over_transformer": best["transformer"] / best["hope"],
    }


def main() -> int:
    """Runs the benchmark and prints what it found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="shorter sequences and fewer repeats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = exactness(args.quick) | speed(args.quick) | counts() | against_transformer(args.quick)
    missed = [name for name, holds in BOUNDS.items() if not holds(results[name])]
    for name, value in results.items():
        print(f"{name:34} {value:12.4g}{'   MISSED' if name in missed else ''}")
    if args.json:
        print(json.dumps(results | {"missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
