"""Counts what a call dispatches to torch: operators, kernels and FLOPs. The counts do not depend on the machine.

Every operator that is neither a view nor an allocation is counted as one kernel. On a GPU a few are more than one
(triangular solves, sums of large tensors); compiled parts are fewer.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import Initial, Inputs, MemoryRule, chunk
from kernels.blocking import build_blocking
from kernels.state import init_weights
from nltrain.model import arrange, build, preset

# Metadata and allocation; views say so themselves.
NO_KERNEL = {"_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Dispatched(TorchDispatchMode):
    """Operators by name, inside its context."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operators[name] += 1
        if not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def count(function: Callable[[], Any]) -> tuple[int, int]:
    """Operators and kernels of one call."""
    with Dispatched() as found:
        function()
    return found.operators.total(), found.kernels.total()


def _solve_flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    return torch.Size(a[:-2]).numel() * a[-1] ** 2 * b[-1]


def _added_product_flops(_: Any, a: tuple[int, ...], b: tuple[int, ...], **__: Any) -> int:
    return 2 * torch.Size(a).numel() * b[-1]


def flops(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and triangular solves of one call."""
    own = {torch.ops.aten.linalg_solve_triangular: _solve_flops, torch.ops.aten.baddbmm_: _added_product_flops}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        function()
    return int(counter.get_total_flops())


def chunk_counts(rule: MemoryRule, size: str = "1p3b", num_sequences: int = 2, **options: Any) -> dict[str, float]:
    """What one block of one layer dispatches, on the meta device: the difference between 8 and 4 blocks.

    options: of `chunk.self_modify`.
    """
    config = preset("hope", size)
    heads, d, h = config.num_heads, config.head_dim, config.memory_hidden

    def run(num_blocks: int, train: bool) -> tuple[int, int]:
        num_tokens = num_blocks * rule.block_tokens
        blocking = build_blocking(rule, num_tokens, torch.zeros(num_sequences, dtype=torch.long), None)

        def meta(t: Tensor) -> Tensor:
            return t.to("meta").requires_grad_(train)

        shape = (num_sequences, num_tokens, heads)
        x = [meta(torch.empty(*shape, d, device="meta")) for _ in range(4)]
        inputs = Inputs(*x, meta(torch.empty(shape, device="meta")) if rule.momentum else None)
        drawn = init_weights(rule, heads, d, h)
        initial = Initial(drawn.weights.map(meta), meta(drawn.slow), meta(drawn.bias))

        def step() -> None:
            o, _ = chunk.self_modify(inputs, initial, rule, blocking=blocking, **options)
            if train:
                o.sum().backward()

        return count(step)

    out: dict[str, float] = {}
    for name, train in (("forward", False), ("forward_backward", True)):
        few, many = run(4, train), run(8, train)
        out[f"operators_{name}"], out[f"launches_{name}"] = ((b - a) / 4 for a, b in zip(few, many, strict=True))
    return out


def micro_step_kernels(
    size: str = "1p3b", num_sequences: int = 2, num_tokens: int = 4096, document_tokens: int | None = None,
    **changes: Any,
) -> int:  # fmt: skip
    """Kernels of one micro-step of a preset of Hope on the meta device: loss and gradients, no optimizer.

    document_tokens: length of the documents of every sequence, which begin at different places; None: one document.
    changes: fields of the model's config. Every layer adds the same, so the run is of one layer and of two.
    """
    config = replace(preset("hope", size), **changes)
    documents = None
    if document_tokens is not None:
        begins = torch.arange(num_tokens) + 37 * torch.arange(num_sequences).unsqueeze(1)
        documents = arrange(config, begins % document_tokens == 0).to("meta")
    tokens = torch.zeros(num_sequences, num_tokens, dtype=torch.long, device="meta")
    totals = []
    for num_layers in (1, 2):
        with torch.device("meta"):
            model = build(replace(config, num_layers=num_layers))
        totals.append(count(lambda model=model: model.loss(tokens, tokens, documents).backward())[1])
    return totals[0] + (config.num_layers - 1) * (totals[1] - totals[0])
