"""Pieces of the Triton kernels: rows of tokens, matrices of a state, norms, decays, triangular inverse, erased sides.

Letters: C tokens per block, D head width, HID hidden width, F d -> d memories, G gates; a program handles one head of
one sequence. A tile is a C-row array in scratch memory; all tiles of a scratch buffer have the same room. DOUT is the
number of rows of W1: D, and for a gate, whose W1 is one row, 16 with rows of zeros, the least that a product takes.
OP is the dtype of the operands of products, PREC the precision of fp32 products; sums and the state are fp32.
The files whose names begin with `triton_` and that import triton are loaded by `triton_call` alone.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

EPS = constexpr(1e-6)
# Precision of the triangular inverse: three TF32 products are as exact as one of fp32.
EXACT = constexpr("tf32x3")
# Tiles of one memory, written by `write_kernel`.
AT_K = constexpr(0)  # W2 k [C, HID]
AT_V = constexpr(1)  # W2 v [C, HID]
BACK = constexpr(2)  # W1^T e [C, HID]
ERROR = constexpr(3)  # e [C, DOUT]
WRITE2 = constexpr(4)  # Z2 [C, HID]
WRITE1 = constexpr(5)  # Z1 [C, DOUT]
INVERSE2 = constexpr(6)  # (I + A)^-1 of the keys k [C, C]
INVERSE1 = constexpr(7)  # the same of the keys act(W2 k) [C, C]
MEMORY_TILES = constexpr(8)
# Tiles of one head, written by `generate_kernel`.
KEY = constexpr(0)  # k [C, D]
VALUE = constexpr(1)  # v [C, D]
GATES = constexpr(2)  # rows eta, log alpha, and their derivatives by the logits [4, C]
HEAD_TILES = constexpr(3)


@triton.jit
def _rounded(x: tensor) -> tensor:
    """x rounded to the nearest bf16, as fp32: Triton's interpreter cuts the digits off instead."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def dot(a: tensor, b: tensor, OP: constexpr, PREC: constexpr) -> tensor:
    """a b with fp32 sums. PREC "rounded": what bf16 operands give, for the interpreter, which has no bf16 products."""
    if PREC == "rounded":
        return tl.dot(_rounded(a), _rounded(b))
    return tl.dot(a.to(OP), b.to(OP), input_precision=PREC)


@triton.jit
def load_rows(ptr: tensor, first: tensor, length: tensor, row_stride: tensor, C: constexpr, D: constexpr) -> tensor:
    """Tokens first ... first + length - 1 of one head as fp32 [C, D]; rows without a token are zero."""
    i = tl.arange(0, C)
    places = (first + i).to(tl.int64)[:, None] * row_stride + tl.arange(0, D)[None, :]
    return tl.load(ptr + places, mask=(i < length)[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_rows(
    ptr: tensor, x: tensor, first: tensor, length: tensor, row_stride: tensor, C: constexpr, D: constexpr
) -> tensor:
    """The inverse of `load_rows`: writes the rows that hold a token."""
    i = tl.arange(0, C)
    places = (first + i).to(tl.int64)[:, None] * row_stride + tl.arange(0, D)[None, :]
    tl.store(ptr + places, x.to(ptr.dtype.element_ty), mask=(i < length)[:, None])


@triton.jit
def load_tile(ptr: tensor, C: constexpr, WIDTH: constexpr) -> tensor:
    """A tile as fp32 [C, WIDTH]."""
    return tl.load(ptr + tl.arange(0, C)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]).to(tl.float32)


@triton.jit
def store_tile(ptr: tensor, x: tensor, C: constexpr, WIDTH: constexpr) -> tensor:
    """Writes [C, WIDTH]."""
    tl.store(ptr + tl.arange(0, C)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], x.to(ptr.dtype.element_ty))


@triton.jit
def fp32_rows(ptr: tensor) -> tensor:
    """A tile as a place for fp32 rows of C values, whatever the dtype of the scratch memory."""
    return ptr.to(tl.pointer_type(tl.float32))


@triton.jit
def load_matrix(ptr: tensor, num_rows: tensor, ROWS: constexpr, COLS: constexpr) -> tensor:
    """The first `num_rows` rows of a matrix as fp32 [ROWS, COLS], the others zero; 0 rows: zeros, nothing is read."""
    r = tl.arange(0, ROWS)
    places = r[:, None] * COLS + tl.arange(0, COLS)[None, :]
    return tl.load(ptr + places, mask=(r < num_rows)[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_matrix(ptr: tensor, x: tensor, num_rows: tensor, ROWS: constexpr, COLS: constexpr) -> tensor:
    """Writes the first `num_rows` rows."""
    r = tl.arange(0, ROWS)
    places = r[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(ptr + places, x, mask=(r < num_rows)[:, None])


@triton.jit
def add_matrix(ptr: tensor, x: tensor, num_rows: tensor, ROWS: constexpr, COLS: constexpr) -> tensor:
    """Adds to the first `num_rows` rows. One program owns the matrix, so that the order of the sums is fixed."""
    store_matrix(ptr, load_matrix(ptr, num_rows, ROWS, COLS) + x, num_rows, ROWS, COLS)


@triton.jit
def w1_place(memory: tensor, D: constexpr, HID: constexpr, F: constexpr, G: constexpr) -> tensor:
    """Where W1 of a memory begins in the flat weights of one head: all W2, W1 of d -> d memories, W1 of gates."""
    full = (F + G) * HID * D + memory * D * HID
    return tl.where(memory < F, full, (F + G) * HID * D + F * D * HID + (memory - F) * HID)


@triton.jit
def unit_rows(x: tensor) -> tensor:
    """Rows of unit length, and what each was multiplied with."""
    scale = tl.rsqrt(tl.sum(x * x, 1) + EPS)
    return x * scale[:, None], scale


@triton.jit
def unit_rows_backward(d_y: tensor, y: tensor, scale: tensor) -> tensor:
    """Gradient of `unit_rows` by x."""
    return (d_y - y * tl.sum(y * d_y, 1)[:, None]) * scale[:, None]


@triton.jit
def silu_slope(a: tensor) -> tensor:
    """Derivative of SiLU."""
    gate = tl.sigmoid(a)
    return gate * (1 + a * (1 - gate))


@triton.jit
def decays(gates: tensor, C: constexpr) -> tensor:
    """eta [C], sums of log alpha up to and including each token and up to the one before [C], and the last sum."""
    i = tl.arange(0, C)
    eta = tl.load(gates + i)
    log_alpha = tl.load(gates + C + i)
    log_gamma = tl.sum(tl.where(i[:, None] >= i[None, :], log_alpha[None, :], 0.0), 1)
    return eta, log_gamma, log_gamma - log_alpha, tl.sum(log_alpha, 0)


@triton.jit
def ratios(log_row: tensor, log_column: tensor, C: constexpr, STRICT: constexpr) -> tensor:
    """exp(log_row_t - log_column_i) for i <= t (STRICT: i < t), else 0 [C, C]."""
    i = tl.arange(0, C)
    kept = (i[:, None] > i[None, :]) if STRICT else (i[:, None] >= i[None, :])
    return tl.exp(tl.where(kept, log_row[:, None] - log_column[None, :], float("-inf")))


@triton.jit
def _merged(inverse: tensor, a: tensor, N: constexpr, S: constexpr) -> tensor:
    """Inverses of the N diagonal blocks of width 2S from those [2N, S, S] of width S; a: [C, C], C = 2 N S."""
    n = tl.arange(0, N)
    h = tl.arange(0, 2)
    apart = tl.reshape(a, (N, 2 * S, N, 2 * S))
    own = tl.sum(tl.where(n[:, None, None, None] == n[None, None, :, None], apart, 0.0), 2)
    quarters = tl.reshape(own, (N, 2, S, 2, S))
    below = h[None, :, None, None, None] > h[None, None, None, :, None]
    corner = tl.sum(tl.sum(tl.where(below, quarters, 0.0), 3), 1)  # [N, S, S]
    pair = tl.reshape(inverse, (N, 2, S, S))
    first = tl.sum(tl.where(h[None, :, None, None] == 0, pair, 0.0), 1)
    second = tl.sum(tl.where(h[None, :, None, None] == 1, pair, 0.0), 1)
    corner = -tl.dot(tl.dot(second, corner, input_precision=EXACT), first, input_precision=EXACT)
    square = h[None, :, None, None, None] == h[None, None, None, :, None]
    whole = tl.where(square, pair[:, :, :, None, :], tl.where(below, corner[:, None, :, None, :], 0.0))
    return tl.reshape(whole, (N, 2 * S, 2 * S))


@triton.jit
def unit_lower_inverse(a: tensor, C: constexpr) -> tensor:
    """(I + a)^-1 for strictly lower triangular a [C, C], C = 16 or 64, by blocks of 16 and two merges.

    A block of 16 is nilpotent: (I + a)^-1 = (I - a)(I + a^2)(I + a^4)(I + a^8).
    """
    N: constexpr = C // 16
    n = tl.arange(0, N)
    i = tl.arange(0, 16)
    apart = tl.reshape(a, (N, 16, N, 16))
    power = tl.sum(tl.where(n[:, None, None, None] == n[None, None, :, None], apart, 0.0), 2)
    inverse = tl.where((i[:, None] == i[None, :])[None, :, :], 1.0, 0.0) - power
    for _ in tl.static_range(3):
        power = tl.dot(power, power, input_precision=EXACT)
        inverse = inverse + tl.dot(inverse, power, input_precision=EXACT)
    if C == 64:
        inverse = _merged(inverse, a, 2, 16)
        inverse = _merged(inverse, a, 1, 32)
    return tl.reshape(inverse, (C, C))


@triton.jit
def bounded(f: tensor, inv_b2: tensor) -> tensor:
    """Rows f / sqrt(1 + |f|^2 / b^2) and the factor; inv_b2 = 1 / b^2, 0 for no bound."""
    scale = tl.rsqrt(1 + tl.sum(f * f, 1) * inv_b2)
    return f * scale[:, None], scale


@triton.jit
def side_write(
    keys: tensor, f: tensor, x: tensor, gates: tensor, weight: tensor, inv_b2: tensor, C: constexpr, OP: constexpr,
    PREC: constexpr,
) -> tensor:  # fmt: skip
    """All writes of a block to one side: factors Z [C, r], the inverse [C, C] and the matrix after the block [r, key].

    keys: [C, key] unit rows; f: [C, r] gradient factors; x: [r, key] the decaying part; weight: of the erasure.
    """
    eta, log_gamma, log_before, log_end = decays(gates, C)
    lower = weight * eta[:, None] * ratios(log_before, log_gamma, C, True) * dot(keys, tl.trans(keys), OP, PREC)
    inverse = unit_lower_inverse(lower, C)
    found = weight * tl.exp(log_before)[:, None] * dot(keys, tl.trans(x), OP, PREC)
    bound, _ = bounded(f, inv_b2)
    z = dot(inverse, -eta[:, None] * (bound + found), OP, PREC)
    last = tl.exp(log_end - log_gamma)
    after = tl.exp(log_end) * x + dot(tl.trans(last[:, None] * z), keys, OP, PREC)
    return z, inverse, after
