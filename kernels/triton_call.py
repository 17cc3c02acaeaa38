"""Self-modifying memories by Triton kernels: what they support, the blocks as a table, and the launches of one call.

Supported is the default rule; `refusal` names what is not. Equal to `naive` within rounding (tests/kernels). The state
is fp32 and lies flat, one row per sequence and head: all W2, W1 of the d -> d memories, W1 of the gates. The forward
pass keeps one state per group of blocks; the backward pass computes a group again and goes through it in reverse.
Every sum has one owner and a fixed order, so that results do not depend on timing. This file imports torch alone; the
files with kernels are loaded by the first call.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.blocking import Blocking, RowMask, build_blocking
from kernels.rule import MemoryRule
from kernels.state import Initial, Inputs, MemoryState, Weights

WIDTHS = (16, 32, 64, 128)
CHUNKS = (16, 64)
# A triangular block of 16 is inverted by its powers. For equal keys their entries grow with the weight of the erasure:
# below this limit of lambda_d * eta to 25, which costs 1e-6, at 2 to 1e6.
MAX_ERASURE = 0.5
DTYPES = (torch.bfloat16, torch.float32)
# Blocks between two stored states. More blocks keep fewer states and need more scratch memory in the backward pass.
GROUP_BLOCKS = 8
REQUIRED: dict[str, Any] = {
    "writes": True, "memory": "mlp", "adaptive": ("k", "v", "eta", "alpha"), "residual": True, "activation": "silu",
    "read": "live", "decay": "deviation", "eta_gate": "sigmoid", "objective": "l2", "target": "self",
    "normalize_inputs": True, "normalize_v": True, "normalize_target": False, "momentum": False,
    "normalized_step": False,
}  # fmt: skip


class TritonError(ValueError):
    """Arguments that the kernels cannot compute; the message names them and says what to do."""


def refusal(rule: MemoryRule, device_type: str | None) -> str | None:
    """Why the kernels cannot compute this rule on this device type, or None. Device type None: not known yet."""
    for name, value in REQUIRED.items():
        if getattr(rule, name) != value:
            return f"the Triton kernels need {name} = {value!r}, not {getattr(rule, name)!r}; choose kernel = 'chunk'"
    if rule.chunk_mem != rule.chunk_other or rule.chunk_mem not in CHUNKS:
        return (
            f"the Triton kernels need one chunk length out of {CHUNKS}, not chunk_mem = {rule.chunk_mem}, chunk_other "
            f"= {rule.chunk_other}; choose kernel = 'chunk'"
        )
    strongest = max(rule.erasures) * rule.eta_limit
    if strongest > MAX_ERASURE:
        return (
            f"the Triton kernels need lambda_d * eta_max <= {MAX_ERASURE}, not {strongest:g} (lambda_d = "
            f"{rule.lambda_d}); choose kernel = 'chunk'"
        )
    if device_type is None:
        return None
    if find_spec("triton") is None:
        return "the package triton is not installed; install it, or choose kernel = 'chunk'"
    if device_type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device_type}; choose kernel = 'chunk'"
    return None


def refused_inputs(dtype: torch.dtype, head_dim: int, hidden: int) -> str | None:
    """Why the kernels cannot compute inputs of this dtype and these widths, or None."""
    if dtype not in DTYPES:
        return f"the Triton kernels compute in fp32 at most and need inputs out of {DTYPES}, not {dtype}"
    if head_dim != hidden or head_dim not in WIDTHS:
        return f"the Triton kernels need head width = hidden width out of {WIDTHS}, not {head_dim} and {hidden}"
    return None


def interpreter_device(device: torch.device) -> bool:
    """Whether only Triton's interpreter, for tests, runs kernels on this device."""
    return device.type == "cpu"


@cache
def kernels() -> dict[str, Any]:
    """The kernels by name. Triton is imported here and not before."""
    from kernels import triton_backward, triton_forward, triton_predict

    modules = (triton_forward, triton_backward, triton_predict)
    return {n: k for module in modules for n, k in vars(module).items() if n.endswith("_kernel")}


def launch(name: str, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Starts one kernel. Every launch of this implementation goes through here."""
    kernels()[name][grid](*arguments, **options)


def _rows(mask: RowMask, num_sequences: int, device: torch.device) -> Tensor:
    return mask if isinstance(mask, Tensor) else torch.full((num_sequences,), mask, device=device)


_TABLES: "WeakKeyDictionary[Blocking, Tensor]" = WeakKeyDictionary()


def block_table(blocking: Blocking, num_sequences: int, device: torch.device) -> Tensor:
    """[blocks, B, 4] int32: first token, number of tokens, whether the state before it is kept (no document begins),
    and whether it is the last one of a row that ends inside a chunk. Layers that share a blocking share the table."""
    found = _TABLES.get(blocking)
    if found is not None:
        return found
    blocks = blocking.blocks
    if blocking.source is None or blocking.valid is None:
        spans = _moved(torch.tensor([[b.begin, b.end - b.begin] for b in blocks]), device)
        first, length = (column[:, None].expand(-1, num_sequences) for column in spans.unbind(1))
    else:
        width = blocks[0].end - blocks[0].begin
        first = blocking.source[:, ::width].T
        length = blocking.valid.unflatten(1, (-1, width)).sum(2).T
    resets = torch.stack([_rows(block.resets, num_sequences, device) for block in blocks])
    numbers = torch.arange(len(blocks), device=device)[:, None]
    last = torch.where(length > 0, numbers, -1).amax(0)
    is_last = (numbers == last) & ~_rows(blocking.ends_mem, num_sequences, device)
    table = torch.stack([first, length, ~resets, is_last], -1).to(torch.int32)
    _TABLES[blocking] = table
    return table


class Plan(NamedTuple):
    """What one call keeps constant."""

    rule: MemoryRule
    num_sequences: int
    num_tokens: int
    num_heads: int
    head_dim: int
    hidden: int
    table: Tensor  # [blocks, B, 4], see `block_table`
    weights: Tensor  # [2, H] weight of the erasure of W2 and of W1
    low_precision: bool  # bf16 operands of the products, and bf16 scratch memory
    group: int  # blocks between two stored states
    differentiable: bool  # whether states are kept for a backward pass

    @property
    def rows(self) -> int:
        """N, sequences x heads."""
        return self.num_sequences * self.num_heads

    @property
    def memories(self) -> int:
        """All memories, gates included."""
        return len(self.rule.full_names) + len(self.rule.gate_names)

    @property
    def room(self) -> int:
        """Values of one tile of scratch memory."""
        return self.rule.block_tokens * max(self.rule.block_tokens, self.head_dim, self.hidden)

    @property
    def size(self) -> int:
        """Values of the flat weights of one head."""
        full, gates = len(self.rule.full_names), len(self.rule.gate_names)
        return (2 * full + gates) * self.head_dim * self.hidden + gates * self.hidden

    @property
    def inv_b2(self) -> float:
        """1 / gradient_bound^2, 0 where nothing is bounded."""
        return 0.0 if self.rule.gradient_bound is None else self.rule.gradient_bound**-2

    @property
    def scratch(self) -> torch.dtype:
        """Of what goes from one kernel to another. Gates and states are fp32 in any case.

        Triton's interpreter, on the CPU, does not round to bf16 but cuts off: there it is fp32.
        """
        return torch.bfloat16 if self.low_precision and not interpreter_device(self.device) else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the call runs."""
        return self.table.device

    def groups(self) -> list[tuple[int, int]]:
        """First block and number of blocks of each group."""
        blocks = len(self.table)
        return [(first, min(self.group, blocks - first)) for first in range(0, blocks, self.group)]

    def options(self, **more: Any) -> dict[str, Any]:
        """The compile-time arguments that all kernels share, and `more`."""
        import triton.language as tl

        # Three TF32 products are as exact as one of fp32, and run on the tensor cores.
        operands, precision = tl.float32, "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        if self.low_precision:
            operands, precision = (tl.float32, "rounded") if interpreter_device(self.device) else (tl.bfloat16, "ieee")
        shared = {
            "C": self.rule.block_tokens, "D": self.head_dim, "HID": self.hidden, "H": self.num_heads,
            "F": len(self.rule.full_names), "G": len(self.rule.gate_names), "ROOM": self.room, "SIZE": self.size,
            "OP": operands, "PREC": precision,
            "num_warps": 8 if self.head_dim == max(WIDTHS) else 4, "num_stages": 1,
        }  # fmt: skip
        return shared | more


def _moved(host: Tensor, device: torch.device) -> Tensor:
    """A copy of numbers of the host that the host does not wait for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@cache
def _erasure_weights(rule: MemoryRule, num_heads: int, device: torch.device) -> Tensor:
    """[2, H] weight of the erasure of W2 and of W1."""
    erasure = torch.tensor(rule.erasures).expand(num_heads)
    return _moved(torch.stack([erasure, erasure * rule.erases_output_side]), device)


def _flat(weights: Weights, lead: int) -> Tensor:
    """Weights as [..., size], `lead` leading dims folded into one."""
    return torch.cat([w.flatten(0, lead - 1).flatten(1) for w in weights], 1)


def _unflat(flat: Tensor, like: Weights, num_sequences: int) -> Weights:
    """[N, size] to the weights of a state [B, H, ...]."""
    shapes = [w.shape[1:] for w in like]
    parts = flat.split([shape.numel() for shape in shapes], 1)
    return Weights(*(p.reshape(num_sequences, -1, *s) for p, s in zip(parts, shapes, strict=True)))


def self_modify(
    inputs: Inputs,
    initial: Initial,
    rule: MemoryRule,
    state: MemoryState | None = None,
    document_starts: Tensor | None = None,
    *,
    blocking: Blocking | None = None,
    group_blocks: int = GROUP_BLOCKS,
) -> tuple[Tensor, MemoryState]:
    """Outputs o [B, T, H, d] and the state after the last token, as `naive.self_modify`.

    The outputs have the dtype of the inputs, the state is fp32.

    Raises:
        TritonError: the dtype or the widths are not supported.
    """
    from kernels.triton_run import MemoriesFunction

    num_sequences, num_tokens, num_heads, head_dim = inputs.k.shape
    hidden = initial.weights.w1.shape[-1]
    reason = refused_inputs(inputs.k.dtype, head_dim, hidden)
    if reason is not None:
        raise TritonError(reason)
    rule.check_heads(num_heads)
    device = inputs.k.device
    if blocking is None:
        position = torch.zeros(num_sequences, dtype=torch.long, device=device) if state is None else state.position
        blocking = build_blocking(rule, num_tokens, position.to(device), document_starts)
    plan = Plan(
        rule, num_sequences, num_tokens, num_heads, head_dim, hidden, block_table(blocking, num_sequences, device),
        _erasure_weights(rule, num_heads, device), inputs.k.dtype == torch.bfloat16, group_blocks,
        torch.is_grad_enabled(),
    )  # fmt: skip
    base, start = _flat(initial.weights, 1), None
    if base.dtype not in (torch.float32, torch.bfloat16):
        base = base.float()
    if state is None:
        run = base.new_zeros(plan.rows, plan.size, dtype=torch.float32)
    else:
        run, begins = _flat(state.run, 2).float(), blocking.blocks[0].begins_mem
        if begins is not True:
            rows = _rows(begins, num_sequences, device).repeat_interleave(num_heads)[:, None]
            start = torch.where(rows, run, _flat(state.start, 2).float())
    tensors = (x.contiguous() for x in inputs[:4])
    out, final, last_start = MemoriesFunction.apply(
        plan, *tensors, base, initial.slow.float().contiguous(), initial.bias.float().contiguous(), run, start
    )
    end = final
    if blocking.ends_mem is not True:
        ends = _rows(blocking.ends_mem, num_sequences, device).repeat_interleave(num_heads)[:, None]
        end = torch.where(ends, final, last_start)
    snapshot, running = (_unflat(w, initial.weights, num_sequences) for w in (end, final))
    return out, MemoryState(snapshot, running, None, blocking.position)
