"""What one block of one head costs by the Triton kernels: FLOPs and bytes of every launch, as formulas.

benchmarks/kernels.py counts the same in the kernels' own loops. Products: multiply-add = 2. Bytes: what a launch reads
and what it writes, each address once, with bf16 inputs, initial weights and scratch memory, fp32 state and gradients.
c tokens, d head width, h hidden width, F d -> d memories, G gates, `P` rows that W1 of a gate takes in a product.
"""

from typing import NamedTuple

from kernels.rule import MemoryRule

P = 16
STATE, LOW = 4, 2  # bytes of a value


class Cost(NamedTuple):
    """Of one launch, one block, one head."""

    flops: float
    bytes_moved: float


class _Sizes(NamedTuple):
    """Values of the arrays that the kernels pass on."""

    c: int
    d: int
    h: int
    full: int  # F
    gates: int  # G

    @property
    def all(self) -> int:
        """All memories."""
        return self.full + self.gates

    @property
    def matrix(self) -> int:
        """d h, which a product of c tokens with it multiplies by 2 c FLOPs."""
        return self.d * self.h

    @property
    def outer(self) -> int:
        """Values of all W1."""
        return self.full * self.matrix + self.gates * self.h

    @property
    def made(self) -> int:
        """Values of the memories that generate k, v and the gates."""
        return (self.full - 1) * 2 * self.matrix + self.gates * (self.matrix + self.h)

    @property
    def errors(self) -> int:
        """Values of the error tiles."""
        return self.c * (self.full * self.d + self.gates * P)


def inverse_flops(c: int) -> int:
    """Of `triton_parts.unit_lower_inverse`: blocks of 16 by their powers, then merges."""
    total, width = 6 * (c // 16) * 2 * 16**3, 16
    while width < c:
        total += c // (2 * width) * 2 * 2 * width**3
        width *= 2
    return total


def _read_flops(c: int, d: int, h: int) -> int:
    """The live read of both sides."""
    return 2 * (2 * c * c * (d + h) + 4 * c * d * h)


def forward_costs(rule: MemoryRule, d: int, h: int, *, save: bool = False) -> dict[str, Cost]:
    """By kernel. save: the forward pass that the backward pass makes again, which keeps the inverses."""
    c = rule.block_tokens
    s = _Sizes(c, d, h, len(rule.full_names), len(rule.gate_names))
    product, tile, hidden = 2 * c * s.matrix, LOW * c * d, LOW * c * h
    both = STATE + LOW
    side2 = 2 * product + 2 * c * c * (d + h) + inverse_flops(c)
    gate1 = 2 * c * c * (h + P) + 2 * 2 * c * h * P + inverse_flops(c)
    states = STATE * (s.all * s.matrix + s.outer)
    inverses = 2 * s.all * LOW * c * c if save else 0
    return {
        "generate": Cost((2 * (s.full - 1) + s.gates) * product, 3 * tile + both * s.made + 2 * tile + 4 * STATE * c),
        "predict": Cost(
            4 * s.full * product + s.gates * (2 * product + 4 * c * h * P),
            2 * tile + both * (s.all * s.matrix + s.outer) + 3 * s.all * hidden + LOW * s.errors,
        ),
        "write": Cost(
            (s.all + s.full) * side2 + s.gates * gate1,
            tile + 3 * s.all * hidden + 2 * LOW * s.errors + 2 * states + 2 * STATE * c + inverses,
        ),
        "read": Cost(_read_flops(c, d, h), 4 * tile + 2 * hidden + 2 * both * s.matrix),
    }


def backward_costs(rule: MemoryRule, d: int, h: int) -> dict[str, Cost]:
    """By kernel, without the forward pass that is made again."""
    c = rule.block_tokens
    s = _Sizes(c, d, h, len(rule.full_names), len(rule.gate_names))
    product, tile, hidden, square = 2 * c * s.matrix, LOW * c * d, LOW * c * h, c * c
    both = STATE + LOW
    states = STATE * (s.all * s.matrix + s.outer)
    side2 = 5 * product + 4 * square * (d + h)
    gate1 = 10 * c * h * P + 4 * square * (h + P)
    return {
        "read_backward": Cost(
            _read_flops(c, d, h) // 2 + 10 * square * (d + h) + 4 * product,
            10 * tile + 8 * hidden + 3 * both * s.matrix + 3 * STATE * c,
        ),
        "side_backward": Cost(
            (s.all + s.full) * side2 + s.gates * gate1 + 2 * product,
            (5 + s.all) * tile + (4 + 5 * s.all) * hidden + 2 * s.all * LOW * square + 3 * LOW * s.errors + 3 * states
            + STATE * c * (2 + 4 * s.all),
        ),
        "error_backward": Cost(
            4 * s.full * product + s.gates * 8 * c * h * P + product,
            tile + (7 * s.all + 1) * hidden + 3 * LOW * s.errors + (both + 4 * STATE) * s.outer,
        ),
        "hidden_backward": Cost(
            4 * s.all * product + product,
            (3 + 3 * s.all + s.full) * tile + (2 * s.all + 1) * hidden + (both + 4 * STATE) * s.all * s.matrix,
        ),
        "generate_backward": Cost(
            (6 * (s.full - 1) + 3 * s.gates) * product,
            (8 + 2 * s.all) * tile + (both + 4 * STATE) * s.made,
        ),
    }  # fmt: skip


def training_cost(rule: MemoryRule, d: int, h: int) -> Cost:
    """Forward, the forward pass made again and backward, of one block."""
    again = forward_costs(rule, d, h, save=True)
    del again["read"]
    parts = (*forward_costs(rule, d, h).values(), *again.values(), *backward_costs(rule, d, h).values())
    return Cost(sum(part.flops for part in parts), sum(part.bytes_moved for part in parts))
