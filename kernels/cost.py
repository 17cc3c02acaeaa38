"""What one call costs: forward FLOPs and bytes kept for the backward pass, as formulas.

benchmarks/smt.py counts the real ones and holds them against these; README.md beside this file derives them.
"""

from kernels.ops import DIAGONAL
from kernels.rule import GATES, MemoryRule


def inverse_flops(tokens: int) -> int:
    """FLOPs of inverting a unit lower triangular matrix: substitution on small blocks, products above."""
    if tokens <= DIAGONAL or tokens % 2:
        return tokens**3  # a solve with `tokens` right-hand sides, c^2 each
    half = tokens // 2
    return 2 * inverse_flops(half) + 2 * 2 * half**3


def forward_flops_per_token(rule: MemoryRule, d: int, h: int) -> float:
    """Matrix-product FLOPs per token and head of the forward pass (multiply-add = 2), chunk <= 64, no momentum.

    Per full two-layer memory: 4dh read, 4dh target and prediction on the input side, 2dh for both on the output side
    (the same weights make target and prediction, so one product of the difference serves both), 2dh back, 4dh write.
    """
    c, f, g = rule.block_tokens, len(rule.full_names), len(rule.gate_names)
    rows = rule.num_rows(d, h)
    generators = f - 1
    mlp = rule.memory == "mlp"
    out = h * d if mlp else 0  # output side of one memory
    one = h * d if mlp else d * d  # input side of one memory
    shared_error = rule.target == "self" and rule.objective == "l2" and not rule.normalize_target
    total = 2.0 * generators * (one + out)  # generated k, v, q
    total += 2 * d * (len(GATES) + (rows - f * (h if mlp else d)))  # gates: slow part and hidden rows
    total += 2 * (2 if rule.target == "self" else 1) * d * rows  # input side at k and, for own targets, at v
    total += 2 * f * out * (1 if shared_error else (rule.target == "self") + (rule.objective == "l2"))
    if g and not (rule.target == "value" and rule.objective == "l2"):
        total += 2 * d * g  # slow part of the gates' errors
    total += 2 * f * out  # back through W1
    total += 2 * d * rows + 2 * f * out + (2 * g * h if mlp else 0)  # writes
    if rule.erases:
        total += 2 * c * d + inverse_flops(c) / c + 2 * c * rows  # Gram matrix, inverse, inverse times right-hand side
        if rule.decay == "deviation":
            total += 2 * d * rows  # what the erasure finds, apart from the prediction
    if rule.erases_output_side:  # the same for W1: a Gram matrix of act(W2 k) and an inverse per memory
        total += (f + g) * (2 * c * h + inverse_flops(c) / c) + 2 * c * (f * d + g) + 2 * h * (f * d + g)
    sides = 2 if rule.decay == "deviation" else 1
    if rule.read == "frozen":
        return total + 2 * (one + out)
    width = h if mlp else d
    total += 2 * sides * one + 2 * c * d + 2 * c * width  # live read, input side
    return total + (2 * sides * out + 2 * c * h + 2 * c * d if mlp else 0)


def published_flops_per_token(rule: MemoryRule, d: int, h: int) -> float:
    """The usual count: 18dh per full memory, 8dh + 6h per gate, and the triangular part, without sharing or options."""
    c, f, g = rule.block_tokens, len(rule.full_names), len(rule.gate_names)
    rows = rule.num_rows(d, h)
    triangular = 2 * c * d + inverse_flops(c) / c + 2 * c * rows
    return 18 * d * h * f + (8 * d * h + 6 * h) * g + triangular


def saved_bytes_per_block(tokens: int, d: int, h: int) -> float:
    """Bytes kept for the backward pass per block and head: defaults, five memories, fp32.

    In fp32 values: 51 c h (8 arrays over the 5 h hidden units of all memories, two of them twice, at k and at v; 2 over
    those of the four that generate; 3 over one), 19 c d (inputs, k and v with what multiplies k, errors and what W1 was
    written), 15 c^2 (decay ratios; Gram matrix and inverse of k and of every memory; masked products), 16 d h (2 copies
    of all matrices: the snapshot, and the state), 46 c scalars.
    """
    c = tokens
    return 4 * (51 * c * h + 19 * c * d + 15 * c * c + 16 * d * h + 46 * c)
