"""Backward kernels of the live read and of one erased side.

`x_bar` is the gradient of the loss by x. A block goes backward in four launches, after those of the blocks behind it:
`side_backward_kernel` here, then the three of `triton_predict`. The live read of all blocks of a group goes first,
because it depends on no other block. Letters as in `triton_parts`.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from kernels.triton_forward import live_products
from kernels.triton_parts import (
    AT_K,
    BACK,
    EPS,
    ERROR,
    GATES,
    HEAD_TILES,
    INVERSE1,
    INVERSE2,
    KEY,
    MEMORY_TILES,
    WRITE1,
    WRITE2,
    bounded,
    decays,
    dot,
    fp32_rows,
    load_matrix,
    load_rows,
    load_tile,
    ratios,
    silu_slope,
    store_matrix,
    store_rows,
    store_tile,
    unit_rows,
    unit_rows_backward,
    w1_place,
)

# Tiles of one memory in the backward pass.
KEYS2_BAR = constexpr(0)  # by k, from the writes to W2 [C, D]
FACTOR2_BAR = constexpr(1)  # by the gradient factor of W2 [C, HID]
KEYS1_BAR = constexpr(2)  # by the unit keys of W1 [C, HID]
FACTOR1_BAR = constexpr(3)  # by the gradient factor of W1 [C, DOUT]
K_BAR = constexpr(4)  # by k, all of this memory [C, D]
V_BAR = constexpr(5)  # by v [C, D]
GATES_BAR = constexpr(6)  # rows: by eta and log alpha from the writes to W2, then from those to W1 [4, C]
DIRECT_BAR = constexpr(7)  # by the error [C, DOUT]
AT_K_BAR = constexpr(8)  # by W2 k [C, HID]
AT_V_BAR = constexpr(9)  # by W2 v [C, HID]
BACKWARD_TILES = constexpr(10)
# Tiles of the live read of one head.
HIDDEN_READ = constexpr(0)  # act(W2,t q) [C, HID]
PRE_BAR = constexpr(1)  # by W2,t q [C, HID]
WRITE1_BAR = constexpr(2)  # by Z1 [C, D]
WRITE2_BAR = constexpr(3)  # by Z2 [C, HID]
UNIT_BAR = constexpr(4)  # by the unit keys of W1 [C, HID]
KEY_BAR = constexpr(5)  # by k [C, D]
DECAY_BAR = constexpr(6)  # row: by log alpha [C]
READ_TILES = constexpr(7)


@triton.jit
def _by_log_alpha(by_gamma: tensor, by_before: tensor, C: constexpr) -> tensor:
    """Gradient by log alpha [C] from those by the sums up to and including, and up to before, each token."""
    i = tl.arange(0, C)
    return tl.sum(tl.where(i[:, None] >= i[None, :], (by_gamma + by_before)[:, None], 0.0), 0) - by_before


@triton.jit
def _live_backward(
    out_bar: tensor, q: tensor, keys: tensor, z_ptr: tensor, x_ptr: tensor, base: tensor, kept_rows: tensor,
    gates: tensor, C: constexpr, ROWS: constexpr, COLS: constexpr, OP: constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """Gradients of `live_products` by q, keys, z, and by the sums of log alpha [C]. x, base: [ROWS, COLS]."""
    _, log_gamma, _, _ = decays(gates, C)
    gamma = tl.exp(log_gamma)
    ratio = ratios(log_gamma, log_gamma, C, False)
    by_masked = dot(out_bar, tl.trans(load_tile(z_ptr, C, ROWS)), OP, PREC)
    masked = ratio * dot(q, tl.trans(keys), OP, PREC)
    shares = by_masked * masked
    by_gamma = tl.sum(shares, 1) - tl.sum(shares, 0)
    z_bar = dot(tl.trans(masked), out_bar, OP, PREC)
    by_gram = by_masked * ratio
    keys_bar = dot(tl.trans(by_gram), q, OP, PREC)
    x = load_matrix(x_ptr, kept_rows, ROWS, COLS)
    decayed_bar = gamma[:, None] * dot(out_bar, x, OP, PREC)
    # gamma_t out_bar_t . (X q_t) = q_t . (gamma_t X^T out_bar_t)
    by_gamma += tl.sum(decayed_bar * q, 1)
    q_bar = decayed_bar + dot(by_gram, keys, OP, PREC)
    q_bar += dot(out_bar, load_matrix(base, ROWS, ROWS, COLS), OP, PREC)
    return q_bar, keys_bar, z_bar, by_gamma


@triton.jit
def query(x_q: tensor, first: tensor, length: tensor, C: constexpr, D: constexpr, H: constexpr) -> tensor:
    """q of one block: the input at unit length, twice, as the token loop makes it."""
    q, _ = unit_rows(load_rows(x_q, first, length, H * D, C, D))
    q, _ = unit_rows(q)
    return q


@triton.jit
def read_backward_kernel(
    x_q: tensor, d_out: tensor, d_q: tensor, bounds: tensor, ring: tensor, base: tensor, table: tensor, heads: tensor,
    tiles: tensor, reads: tensor, num_tokens: tensor, num_sequences: tensor, SIDE: constexpr, C: constexpr,
    D: constexpr, HID: constexpr, H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr,
    OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, blocks of the group). SIDE 1, first: backward through W1 to W2,t q. SIDE 2: on to the input q."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    sequence = n // H
    row = table + (block * num_sequences + sequence) * 4
    first = tl.load(row)
    length = tl.load(row + 1)
    keep = tl.load(row + 2)
    offset = sequence * num_tokens * H * D + n % H * D
    slot = block * num_sequences * H + n
    state = bounds + n * SIZE
    if block > 0:
        state = ring + (slot - num_sequences * H) * SIZE
    heads += slot * HEAD_TILES * ROOM
    tiles += (slot * (F + G) + F - 1) * MEMORY_TILES * ROOM
    reads += slot * READ_TILES * ROOM
    gates = fp32_rows(heads + GATES * ROOM)
    memory: constexpr = F - 1
    base += n % H * SIZE + memory * HID * D
    state += memory * HID * D
    out_bar = load_rows(d_out + offset, first, length, H * D, C, D)
    q = query(x_q + offset, first, length, C, D, H)
    if SIDE == 1:
        p = live_products(
            q, load_tile(heads + KEY * ROOM, C, D), load_tile(tiles + WRITE2 * ROOM, C, HID),
            load_matrix(state, keep * HID, HID, D), load_matrix(base, HID, HID, D), gates, C, OP, PREC,
        )  # fmt: skip
        s = p * tl.sigmoid(p)
        store_tile(reads + HIDDEN_READ * ROOM, s, C, HID)
        base += (F + G) * HID * D
        state += (F + G) * HID * D
        at_k = load_tile(tiles + AT_K * ROOM, C, HID)
        unit, _ = unit_rows(at_k * tl.sigmoid(at_k))
        s_bar, keys_bar, z_bar, by_gamma = _live_backward(
            out_bar, s, unit, tiles + WRITE1 * ROOM, state, base, keep * D, gates, C, D, HID, OP, PREC
        )
        store_tile(reads + UNIT_BAR * ROOM, keys_bar, C, HID)
        store_tile(reads + WRITE1_BAR * ROOM, z_bar, C, D)
        store_tile(reads + PRE_BAR * ROOM, silu_slope(p) * s_bar, C, HID)
        tl.store(fp32_rows(reads + DECAY_BAR * ROOM) + tl.arange(0, C), _by_log_alpha(by_gamma, by_gamma * 0, C))
    else:
        q_bar, keys_bar, z_bar, by_gamma = _live_backward(
            load_tile(reads + PRE_BAR * ROOM, C, HID), q, load_tile(heads + KEY * ROOM, C, D), tiles + WRITE2 * ROOM,
            state, base, keep * HID, gates, C, HID, D, OP, PREC,
        )  # fmt: skip
        store_tile(reads + KEY_BAR * ROOM, keys_bar, C, D)
        store_tile(reads + WRITE2_BAR * ROOM, z_bar, C, HID)
        by_log_alpha = fp32_rows(reads + DECAY_BAR * ROOM) + tl.arange(0, C)
        tl.store(by_log_alpha, tl.load(by_log_alpha) + _by_log_alpha(by_gamma, by_gamma * 0, C))
        q, scale = unit_rows(load_rows(x_q + offset, first, length, H * D, C, D))
        unit, again = unit_rows(q)
        q_bar = unit_rows_backward(unit_rows_backward(q_bar + out_bar, unit, again), q, scale)
        store_rows(d_q + offset, q_bar, first, length, H * D, C, D)


@triton.jit
def _side_keys(heads: tensor, tiles: tensor, SIDE: constexpr, C: constexpr, COLS: constexpr, ROOM: constexpr) -> tensor:
    """Unit keys of one side: k for W2, act(W2 k) / |act(W2 k)| for W1."""
    if SIDE == 2:
        return load_tile(heads + KEY * ROOM, C, COLS)
    at_k = load_tile(tiles + AT_K * ROOM, C, COLS)
    unit, _ = unit_rows(at_k * tl.sigmoid(at_k))
    return unit


@triton.jit
def _side_factor(
    tiles: tensor, SIDE: constexpr, C: constexpr, ROWS: constexpr, HID: constexpr, ROOM: constexpr
) -> tensor:
    """The gradient factor of one side before its bound [C, ROWS]."""
    at_k = load_tile(tiles + AT_K * ROOM, C, HID)
    if SIDE == 2:
        return load_tile(tiles + BACK * ROOM, C, HID) * silu_slope(at_k)
    s = at_k * tl.sigmoid(at_k)
    return load_tile(tiles + ERROR * ROOM, C, ROWS) * tl.sqrt(tl.sum(s * s, 1) + EPS)[:, None]


@triton.jit
def _inner_product(a: tensor, b: tensor, a_rows: tensor, b_rows: tensor, ROWS: constexpr, COLS: constexpr) -> tensor:
    """Sum of the products of two matrices, 16 rows at a time."""
    total = 0.0
    for r in range(0, ROWS, 16):
        left = load_matrix(a + r * COLS, a_rows - r, 16, COLS)
        total += tl.sum(tl.sum(left * load_matrix(b + r * COLS, b_rows - r, 16, COLS), 1), 0)
    return total


@triton.jit
def _system_backward(
    keys: tensor, right_bar: tensor, z: tensor, weight: tensor, eta: tensor, ratio: tensor, OP: constexpr,
    PREC: constexpr,
) -> tensor:  # fmt: skip
    """From the solution of the triangular system to its matrix: gradients by keys and eta, and by log gamma."""
    share = -weight * ratio * dot(right_bar, tl.trans(z), OP, PREC)
    gram = dot(keys, tl.trans(keys), OP, PREC)
    eta_bar = tl.sum(share * gram, 1)
    share = eta[:, None] * share
    keys_bar = dot(share + tl.trans(share), keys, OP, PREC)
    share = share * gram
    return keys_bar, eta_bar, tl.sum(share, 1), tl.sum(share, 0)


@triton.jit
def _side_backward(
    run: tensor, carry: tensor, weight: tensor, x_q: tensor, d_out: tensor, heads: tensor, tiles: tensor, bars: tensor,
    reads: tensor, keep: tensor, is_mem: tensor, first: tensor, length: tensor, inv_b2: tensor, num_rows: tensor,
    SIDE: constexpr, GATE: constexpr, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, ROWS: constexpr,
    COLS: constexpr, ROOM: constexpr, OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Gradients of `triton_parts.side_write` by keys, gradient factor, gates and matrix, for W2 or W1 (SIDE).

    run, carry: the matrix before the block and the gradient by the matrix after it. Tiles are loaded where they are
    used, some twice, because a program cannot hold them all. With `is_mem` the live read adds its part.
    """
    WRITE: constexpr = WRITE2 if SIDE == 2 else WRITE1
    WRITE_BAR: constexpr = WRITE2_BAR if SIDE == 2 else WRITE1_BAR
    INVERSE: constexpr = INVERSE2 if SIDE == 2 else INVERSE1
    gates = fp32_rows(heads + GATES * ROOM)
    out_gates = fp32_rows(bars + GATES_BAR * ROOM) + (0 if SIDE == 2 else 2 * C)
    eta, log_gamma, log_before, log_end = decays(gates, C)
    last = tl.exp(log_end - log_gamma)
    by_end = tl.exp(log_end) * _inner_product(carry, run, num_rows, keep * num_rows, ROWS, COLS)
    keys = _side_keys(heads, tiles, SIDE, C, COLS, ROOM)
    g = load_matrix(carry, num_rows, ROWS, COLS)
    z = load_tile(tiles + WRITE * ROOM, C, ROWS)
    moved = last[:, None] * dot(keys, tl.trans(g), OP, PREC)
    by_last = tl.sum(z * moved, 1)
    keys_bar = dot(last[:, None] * z, g, OP, PREC)
    moved += load_matrix(reads + WRITE_BAR * ROOM, is_mem * C, C, ROWS)
    right_bar = dot(tl.trans(load_tile(tiles + INVERSE * ROOM, C, C)), moved, OP, PREC)

    more, eta_bar, by_before, by_column = _system_backward(
        keys, right_bar, z, weight, eta, ratios(log_before, log_gamma, C, True), OP, PREC
    )
    keys_bar += more
    by_gamma = tl.where(tl.arange(0, C) == C - 1, by_end + tl.sum(by_last, 0), 0.0) - by_column - by_last

    before = weight * tl.exp(log_before)[:, None]
    x = load_matrix(run, keep * num_rows, ROWS, COLS)
    seen = before * dot(keys, tl.trans(x), OP, PREC)
    h_bar = -eta[:, None] * right_bar
    keys_bar += dot(before * h_bar, x, OP, PREC)
    by_before += tl.sum(h_bar * seen, 1)
    bound, scale = bounded(_side_factor(tiles, SIDE, C, ROWS, HID, ROOM), inv_b2)
    eta_bar -= tl.sum(right_bar * (bound + seen), 1)
    tl.store(out_gates + tl.arange(0, C), eta_bar)
    tl.store(out_gates + C + tl.arange(0, C), _by_log_alpha(by_gamma, by_before, C))
    f_bar = (h_bar - bound * (tl.sum(bound * h_bar, 1) * inv_b2)[:, None]) * scale[:, None]
    store_tile(bars + (FACTOR2_BAR if SIDE == 2 else FACTOR1_BAR) * ROOM, f_bar, C, ROWS)
    keys_bar += load_matrix(reads + (KEY_BAR if SIDE == 2 else UNIT_BAR) * ROOM, is_mem * C, C, COLS)
    store_tile(bars + (KEYS2_BAR if SIDE == 2 else KEYS1_BAR) * ROOM, keys_bar, C, COLS)
    keys = _side_keys(heads, tiles, SIDE, C, COLS, ROOM)
    x_bar = dot(tl.trans(before * h_bar), keys, OP, PREC)
    if not GATE and is_mem:
        gamma = tl.exp(log_gamma)[:, None]
        if SIDE == 2:
            q = query(x_q, first, length, C, D, H)
            x_bar += dot(tl.trans(load_tile(reads + PRE_BAR * ROOM, C, ROWS) * gamma), q, OP, PREC)
        else:
            out_bar = load_rows(d_out, first, length, H * D, C, ROWS) * gamma
            x_bar += dot(tl.trans(out_bar), load_tile(reads + HIDDEN_READ * ROOM, C, COLS), OP, PREC)
    x_bar += tl.exp(log_end) * load_matrix(carry, num_rows, ROWS, COLS)
    store_matrix(carry, tl.where(keep > 0, x_bar, 0.0), num_rows, ROWS, COLS)


@triton.jit
def side_backward_kernel(
    run: tensor, carry: tensor, weights: tensor, x_q: tensor, d_out: tensor, table: tensor, heads: tensor,
    tiles: tensor, bars: tensor, reads: tensor, num_tokens: tensor, inv_b2: tensor, C: constexpr, D: constexpr,
    HID: constexpr, H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr, OP: constexpr,
    PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, F + G, 2): one side of one memory; `carry` [N, SIZE] goes from the state after to that before."""
    n = tl.program_id(0).to(tl.int64)
    memory = tl.program_id(1)
    sequence = n // H
    first = tl.load(table + sequence * 4)
    length = tl.load(table + sequence * 4 + 1)
    keep = tl.load(table + sequence * 4 + 2)
    is_mem = (memory == F - 1).to(tl.int32)
    offset = sequence * num_tokens * H * D + n % H * D
    x_q += offset
    d_out += offset
    weights += n % H
    heads += n * HEAD_TILES * ROOM
    tiles += (n * (F + G) + memory) * MEMORY_TILES * ROOM
    bars += (n * (F + G) + memory) * BACKWARD_TILES * ROOM
    reads += n * READ_TILES * ROOM
    at = n * SIZE + memory * HID * D
    if tl.program_id(2) == 1:
        at = n * SIZE + w1_place(memory, D, HID, F, G)
        weights += H
    run += at
    carry += at
    weight = tl.load(weights)
    if tl.program_id(2) == 0:
        _side_backward(
            run, carry, weight, x_q, d_out, heads, tiles, bars, reads, keep, is_mem, first, length, inv_b2, HID,
            2, False, C, D, HID, H, HID, D, ROOM, OP, PREC,
        )  # fmt: skip
    elif memory < F:
        _side_backward(
            run, carry, weight, x_q, d_out, heads, tiles, bars, reads, keep, is_mem, first, length, inv_b2, D,
            1, False, C, D, HID, H, D, HID, ROOM, OP, PREC,
        )  # fmt: skip
    else:
        _side_backward(
            run, carry, weight, x_q, d_out, heads, tiles, bars, reads, keep, is_mem, first, length, inv_b2, 1,
            1, True, C, D, HID, H, 16, HID, ROOM, OP, PREC,
        )  # fmt: skip
