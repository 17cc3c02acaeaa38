"""FLOPs and bytes of the Triton kernels, counted in their own loops: Triton's interpreter runs one block of one head.

    TRITON_INTERPRET=1 python -m benchmarks._triton_counts WIDTH CHUNK

One JSON object: by kernel and launch, the FLOPs of its products (multiply-add = 2), the bytes of all its loads and
stores, and the bytes of the addresses that it reads and that it writes, each counted once per launch. The last are what
memory has to move where the cache holds what one launch touches. Masked elements are left out. The block is a full one
in the middle of a sequence, with bf16 inputs, initial weights and scratch memory, and fp32 state.
"""

import json
import os
import sys
from typing import Any

import numpy
import torch

from benchmarks._memory_cases import Case, evaluate, leaves, make_case, with_leaves
from kernels import MemoryRule, naive, triton_call


class Counter:
    """Counts by kernel while it is installed."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self._touched: dict[str, list[Any]] = {}

    def _touch(self, what: str, pointers: Any, mask: Any, itemsize: int) -> None:
        kept = pointers.data[mask.data.astype(bool)]
        self.launches[-1]["requested"] += kept.size * itemsize
        self._touched[what].append((kept, itemsize))

    def _finish(self) -> None:
        """Bytes of the different addresses of the launch that has ended."""
        for what, parts in self._touched.items():
            by_size: dict[int, list[Any]] = {}
            for kept, itemsize in parts:
                by_size.setdefault(itemsize, []).append(kept)
            self.launches[-1][what] = sum(s * numpy.unique(numpy.concatenate(p)).size for s, p in by_size.items())

    def install(self) -> None:
        """Wraps what starts a kernel, and the interpreter's products, loads and stores."""
        from triton.runtime import interpreter

        builder = interpreter.InterpreterBuilder
        dot, load, store, launch = (
            builder.create_dot, builder.create_masked_load, builder.create_masked_store, triton_call.launch
        )  # fmt: skip

        def counted_dot(own: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.launches[-1]["flops"] += 2 * a.data.size * b.data.shape[-1]
            return dot(own, a, b, *rest)

        def counted_load(own: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            found = load(own, pointers, mask, *rest)
            self._touch("read", pointers, mask, found.data.itemsize)
            return found

        def counted_store(own: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._touch("written", pointers, mask, value.data.itemsize)
            return store(own, pointers, value, mask, *rest)

        def counted_launch(name: str, *arguments: Any) -> None:
            self.launches.append({"kernel": name, "flops": 0, "requested": 0})
            self._touched = {"read": [], "written": []}
            launch(name, *arguments)
            self._finish()

        builder.create_dot, builder.create_masked_load = counted_dot, counted_load
        builder.create_masked_store = counted_store
        triton_call.launch = counted_launch


def one_block(width: int, chunk: int) -> Case:
    """A block that continues a sequence at a chunk boundary, bf16 inputs."""
    rule = MemoryRule(chunk_mem=chunk, chunk_other=chunk)
    shape = {"num_heads": 1, "head_dim": width, "hidden": width, "dtype": torch.float32, "w1_std": 0.02}
    case = make_case(rule, chunk, 1, **shape)  # type: ignore[arg-type]
    before = make_case(rule, chunk, 1, seed=5, **shape)  # type: ignore[arg-type]
    _, state = naive.self_modify(before.inputs, case.initial, rule)
    low = {n: t.bfloat16() if n.startswith(("inputs.", "initial.")) else t for n, t in leaves(case).items()}
    return with_leaves(case, low)._replace(state=state.detach())


def main() -> None:
    """Prints the counts of the forward pass and, after them, those of the backward pass (the replay included)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    width, chunk = (int(argument) for argument in sys.argv[1:3])
    from triton.runtime import interpreter

    interpreter.InterpretedFunction.__call__ = lambda self, *a, **named: self.rewrite()(*a, **named)
    case = one_block(width, chunk)
    counter = Counter()
    counter.install()
    triton_call.Plan.scratch = property(lambda plan: torch.bfloat16)  # as on a GPU
    evaluate(triton_call, case)
    print(json.dumps(counter.launches))


if __name__ == "__main__":
    main()
