"""What the memories dispatch, counted: kernels per block and layer of `chunk`, and per micro-step of the 1.3B model.

    python -m benchmarks.launches [--json] [--quick]

Counts, no times: they need no GPU and are the same on every machine. Every operator that is neither a view nor an
allocation counts as one kernel. Recomputation is not part of forward + backward; the micro-step of 2 x 4,096 tokens
is counted with `model.recompute` none, chunks and block; --quick leaves it out. --json prints one JSON object as the
last line; the exit code is 1 when a bound is missed.
"""

import argparse
import json
import sys

import torch

from benchmarks._dispatched import chunk_counts, micro_step_kernels
from kernels import MemoryRule

BOUNDS = {"launches_forward": 100.0, "launches_forward_backward": 300.0}


def measured(quick: bool) -> dict[str, float]:
    """All figures; those of the form for every rule begin with general_."""
    rule = MemoryRule()
    out = chunk_counts(rule)
    out |= {f"general_{name}": value for name, value in chunk_counts(rule, general=True).items()}
    if quick:
        return out
    out["kernels_per_micro_step_1p3b"] = micro_step_kernels()
    out["kernels_per_micro_step_1p3b_documents_of_500"] = micro_step_kernels(document_tokens=500)
    for recompute in ("chunks", "block"):
        out[f"kernels_per_micro_step_1p3b_recompute_{recompute}"] = micro_step_kernels(recompute=recompute)
    return out


def main() -> int:
    """Prints the counts. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="leave out the micro-step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measured(args.quick)
    missed = [name for name, bound in BOUNDS.items() if results[name] > bound]
    for name, value in results.items():
        print(f"{name:46} {value:12,.0f}{'   MISSED' if name in missed else ''}")
    if args.json:
        print(json.dumps(results | {"missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
