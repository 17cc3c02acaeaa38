"""Chooses the implementation of the memories. No other file knows which implementations exist.

Every implementation computes the same function as `naive` and says for itself where it cannot run. An implementation
that cannot run is refused with the reason. "auto" takes the first of AUTOMATIC that can run and, on a GPU, logs once
why it passed over a faster one. To add an implementation, add an entry to IMPLEMENTATIONS and, where "auto" may take
it, to AUTOMATIC.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels import chunk, compiler, naive, triton_call
from kernels.blocking import Blocking
from kernels.rule import MemoryRule
from kernels.state import Initial, Inputs, MemoryState

AUTO = "auto"
LOG = logging.getLogger(__name__)


class KernelError(ValueError):
    """An implementation that cannot run; the message names it and says why and what to do."""


class Options(NamedTuple):
    """How a call computes. The first two change results within rounding only."""

    recompute: bool = False
    """Keep few states for the backward pass and compute the others again."""
    compile_backend: str | None = None
    """Back end of torch.compile for each step of the chunk loop; None: no compilation."""
    truncate_blocks: int | None = None
    """Cut the gradient through the state every so many blocks; None: never."""


class SelfModify(Protocol):
    """One call of the memories, whatever computes it."""

    def __call__(
        self,
        inputs: Inputs,
        initial: Initial,
        rule: MemoryRule,
        state: MemoryState | None,
        document_starts: Tensor | None,
        blocking: Blocking | None,
    ) -> tuple[Tensor, MemoryState]:
        """Outputs [B, T, H, d] in the dtype of the inputs, and the state after the last token in at least fp32.

        document_starts: [B, T] bool, None for none. blocking: what `build_blocking` gives for these, or None.
        """


class Implementation(NamedTuple):
    """One way to compute the memories."""

    run: Callable[..., tuple[Tensor, MemoryState]]
    """The arguments of `SelfModify`, and `options`."""
    refusal: Callable[[MemoryRule, Options, str | None], str | None]
    """(rule, options, device type) -> why it cannot run, or None. Device type None: asked before a device is known."""
    refused_inputs: Callable[[torch.dtype, int, int], str | None] = lambda dtype, head_dim, hidden: None
    """(dtype of the inputs, head width, hidden width) -> why it cannot run with these, or None. They are known when it
    is called."""


def _run_chunk(
    inputs: Inputs, initial: Initial, rule: MemoryRule, state: MemoryState | None, document_starts: Tensor | None,
    blocking: Blocking | None, *, options: Options,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    return chunk.self_modify(inputs, initial, rule, state, document_starts, blocking=blocking, **options._asdict())


def _refuse_chunk(rule: MemoryRule, options: Options, device_type: str | None) -> str | None:
    if options.compile_backend is None or device_type is None:
        return None
    return compiler.refusal(options.compile_backend, device_type)


def _run_naive(
    inputs: Inputs, initial: Initial, rule: MemoryRule, state: MemoryState | None, document_starts: Tensor | None,
    blocking: Blocking | None, *, options: Options,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """The token loop in at least fp32, as all implementations."""
    dtype = torch.promote_types(inputs.k.dtype, torch.float32)
    wide: list[Tensor | None] = [None if x is None else x.to(dtype) for x in inputs]
    o, state = naive.self_modify(Inputs(*wide), initial, rule, state, document_starts)  # type: ignore[arg-type]
    return o.to(inputs.k.dtype), state


def _refuse_naive(rule: MemoryRule, options: Options, device_type: str | None) -> str | None:
    asked = [name for name, value in options._asdict().items() if value]
    if asked:
        return f"the token loop has no {', '.join(asked)}; choose kernel = 'chunk', or leave that option out"
    return None


def _run_triton(
    inputs: Inputs, initial: Initial, rule: MemoryRule, state: MemoryState | None, document_starts: Tensor | None,
    blocking: Blocking | None, *, options: Options,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """The kernels keep few states in any case, which is what `options.recompute` asks for."""
    reason = _inputs_reason("triton", inputs, initial)
    if reason is not None:
        raise KernelError(f"kernel = 'triton': {reason}; choose kernel = 'chunk'")
    return triton_call.self_modify(inputs, initial, rule, state, document_starts, blocking=blocking)


def _refuse_triton(rule: MemoryRule, options: Options, device_type: str | None) -> str | None:
    asked = [name for name in ("compile_backend", "truncate_blocks") if getattr(options, name)]
    if asked:
        return f"the Triton kernels have no {', '.join(asked)}; choose kernel = 'chunk', or leave that option out"
    return triton_call.refusal(rule, device_type)


IMPLEMENTATIONS = {
    "triton": Implementation(_run_triton, _refuse_triton, triton_call.refused_inputs),
    "chunk": Implementation(_run_chunk, _refuse_chunk),
    "naive": Implementation(_run_naive, _refuse_naive),
}
# The fastest first. The token loop is a definition to compare with: "auto" never takes it. "triton" joins in front of
# "chunk" when `make gpu-check` has shown it on a card; until then a config has to name it.
AUTOMATIC = ("chunk",)
KERNELS = (AUTO, *IMPLEMENTATIONS)


def refusal(name: str, rule: MemoryRule, options: Options, device_type: str | None = None) -> str | None:
    """Why `name` cannot run with these options, or None. For "auto": why none of its candidates can.

    device_type: "cpu", "cuda"; None before a device is known, which checks only what does not depend on it.
    """
    if name not in KERNELS:
        return f"choose one of {', '.join(KERNELS)}"
    if name != AUTO:
        return IMPLEMENTATIONS[name].refusal(rule, options, device_type)
    reasons = {other: IMPLEMENTATIONS[other].refusal(rule, options, device_type) for other in AUTOMATIC}
    if None in reasons.values():
        return None
    return "; ".join(f"{other}: {reason}" for other, reason in reasons.items())


@cache
def chosen(name: str, rule: MemoryRule, options: Options, device_type: str) -> str:
    """The name of the implementation that computes `name` on this device type.

    Raises:
        KernelError: it cannot run; the message says why.
    """
    reason = refusal(name, rule, options, device_type)
    if reason is not None:
        raise KernelError(f"kernel = {name!r}: {reason}")
    if name != AUTO:
        return name
    return next(other for other in AUTOMATIC if IMPLEMENTATIONS[other].refusal(rule, options, device_type) is None)


def _inputs_reason(name: str, inputs: Inputs, initial: Initial) -> str | None:
    w1 = initial.weights.w1
    hidden = 0 if w1 is None else w1.shape[-1]
    return IMPLEMENTATIONS[name].refused_inputs(inputs.k.dtype, inputs.k.shape[-1], hidden)


@cache
def _say_passed_over(name: str, reason: str) -> None:
    LOG.warning("kernel = 'auto' does not take %r: %s", name, reason)


def _run_automatic(
    inputs: Inputs, initial: Initial, rule: MemoryRule, state: MemoryState | None, document_starts: Tensor | None,
    blocking: Blocking | None, *, options: Options,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """The first of AUTOMATIC that can run with this dtype and these widths too."""
    device_type = inputs.k.device.type
    for name in AUTOMATIC:
        reason = IMPLEMENTATIONS[name].refusal(rule, options, device_type) or _inputs_reason(name, inputs, initial)
        if reason is None:
            run = IMPLEMENTATIONS[name].run
            return run(inputs, initial, rule, state, document_starts, blocking, options=options)
        if device_type == "cuda":
            _say_passed_over(name, reason)
    raise KernelError(f"kernel = {AUTO!r}: {refusal(AUTO, rule, options, device_type) or reason}")


@cache
def choose(name: str, rule: MemoryRule, options: Options, device_type: str) -> SelfModify:
    """The function that computes the memories on this device type.

    Raises:
        KernelError: `name` cannot run; the message says why.
    """
    found = chosen(name, rule, options, device_type)
    return partial(_run_automatic if name == AUTO else IMPLEMENTATIONS[found].run, options=options)
