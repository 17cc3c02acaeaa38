"""Backward kernels: of the live read, of one erased side, of the error, and of the generated k, v and gates.

`x_bar` is the gradient of the loss by x. A block goes backward in three launches, after those of the blocks behind it;
the live read of all blocks of a group goes first, because it depends on no other block. Letters as in `triton_parts`.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from kernels.triton_forward import live_products
from kernels.triton_parts import (
    AT_K,
    BACK,
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
BACKWARD_TILES = constexpr(7)
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
    out_bar: tensor, q: tensor, keys: tensor, z: tensor, x: tensor, base: tensor, decayed: tensor, masked: tensor,
    gates: tensor, C: constexpr, OP: constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """Gradients of `live_products` by q, keys, z, and by the sums of log alpha [C]."""
    _, log_gamma, _, _ = decays(gates, C)
    gamma = tl.exp(log_gamma)
    by_masked = dot(out_bar, tl.trans(z), OP, PREC)
    shares = by_masked * masked
    by_gamma = tl.sum(shares, 1) - tl.sum(shares, 0) + gamma * tl.sum(out_bar * decayed, 1)
    z_bar = dot(tl.trans(masked), out_bar, OP, PREC)
    by_gram = by_masked * ratios(log_gamma, log_gamma, C, False)
    keys_bar = dot(tl.trans(by_gram), q, OP, PREC)
    q_bar = dot(by_gram, keys, OP, PREC) + dot(out_bar, base, OP, PREC) + dot(gamma[:, None] * out_bar, x, OP, PREC)
    return q_bar, keys_bar, z_bar, by_gamma


@triton.jit
def read_backward_kernel(
    x_q: tensor, d_out: tensor, d_q: tensor, bounds: tensor, ring: tensor, base: tensor, table: tensor, heads: tensor,
    tiles: tensor, reads: tensor, num_tokens: tensor, num_sequences: tensor, C: constexpr, D: constexpr, HID: constexpr,
    H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr, OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, blocks of the group): from the gradient of the outputs to that of the input q, and to `reads`."""
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
    base += n % H * SIZE
    heads += slot * HEAD_TILES * ROOM
    tiles += (slot * (F + G) + F - 1) * MEMORY_TILES * ROOM
    reads += slot * READ_TILES * ROOM
    gates = heads + GATES * ROOM
    memory: constexpr = F - 1
    at1: constexpr = (F + G) * HID * D + memory * D * HID
    x2 = load_matrix(state + memory * HID * D, keep * HID, HID, D)
    base2 = load_matrix(base + memory * HID * D, HID, HID, D)
    q, _ = unit_rows(load_rows(x_q + offset, first, length, H * D, C, D))
    q, _ = unit_rows(q)
    k = load_tile(heads + KEY * ROOM, C, D)
    z2 = load_tile(tiles + WRITE2 * ROOM, C, HID)
    p, decayed2, masked2 = live_products(q, k, z2, x2, base2, gates, C, OP, PREC)
    s = p * tl.sigmoid(p)
    store_tile(reads + HIDDEN_READ * ROOM, s, C, HID)

    x1 = load_matrix(state + at1, keep * D, D, HID)
    base1 = load_matrix(base + at1, D, D, HID)
    at_k = load_tile(tiles + AT_K * ROOM, C, HID)
    unit, _ = unit_rows(at_k * tl.sigmoid(at_k))
    z1 = load_tile(tiles + WRITE1 * ROOM, C, D)
    _, decayed1, masked1 = live_products(s, unit, z1, x1, base1, gates, C, OP, PREC)
    out_bar = load_rows(d_out + offset, first, length, H * D, C, D)
    s_bar, keys_bar, z_bar, by_gamma = _live_backward(
        out_bar, s, unit, z1, x1, base1, decayed1, masked1, gates, C, OP, PREC
    )
    store_tile(reads + UNIT_BAR * ROOM, keys_bar, C, HID)
    store_tile(reads + WRITE1_BAR * ROOM, z_bar, C, D)
    p_bar = silu_slope(p) * s_bar
    store_tile(reads + PRE_BAR * ROOM, p_bar, C, HID)

    q_bar, keys_bar, z_bar, more = _live_backward(p_bar, q, k, z2, x2, base2, decayed2, masked2, gates, C, OP, PREC)
    store_tile(reads + KEY_BAR * ROOM, keys_bar, C, D)
    store_tile(reads + WRITE2_BAR * ROOM, z_bar, C, HID)
    by_gamma += more
    tl.store(reads + DECAY_BAR * ROOM + tl.arange(0, C), _by_log_alpha(by_gamma, by_gamma * 0, C))
    q_bar += load_rows(d_out + offset, first, length, H * D, C, D)
    q, scale = unit_rows(load_rows(x_q + offset, first, length, H * D, C, D))
    unit, again = unit_rows(q)
    q_bar = unit_rows_backward(unit_rows_backward(q_bar, unit, again), q, scale)
    store_rows(d_q + offset, q_bar, first, length, H * D, C, D)


@triton.jit
def _side_backward(
    keys: tensor, f: tensor, x: tensor, g: tensor, z: tensor, z_bar: tensor, inverse: tensor, gates: tensor, out_gates:
    tensor, weight: tensor, inv_b2: tensor, C: constexpr, OP: constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """Gradients of `triton_parts.side_write` by keys, f and x; stores those by eta and log alpha.

    g [r, key]: gradient by the matrix after the block. z_bar [C, r]: gradient by Z from the live read.
    """
    eta, log_gamma, log_before, log_end = decays(gates, C)
    last = tl.exp(log_end - log_gamma)
    moved = dot(keys, tl.trans(g), OP, PREC)
    by_last = tl.sum(z * moved, 1) * last
    keys_bar = dot(last[:, None] * z, g, OP, PREC)
    right_bar = dot(tl.trans(inverse), z_bar + last[:, None] * moved, OP, PREC)

    share = -weight * ratios(log_before, log_gamma, C, True) * dot(right_bar, tl.trans(z), OP, PREC)
    by_gram = eta[:, None] * share
    gram = dot(keys, tl.trans(keys), OP, PREC)
    eta_bar = tl.sum(share * gram, 1)
    moved_rows = by_gram * gram
    by_before = tl.sum(moved_rows, 1)
    by_gamma = -tl.sum(moved_rows, 0) - by_last
    keys_bar += dot(by_gram + tl.trans(by_gram), keys, OP, PREC)

    seen = weight * tl.exp(log_before)[:, None] * dot(keys, tl.trans(x), OP, PREC)
    bound, scale = bounded(f, inv_b2)
    eta_bar -= tl.sum(right_bar * (bound + seen), 1)
    h_bar = -eta[:, None] * right_bar
    by_before += tl.sum(h_bar * seen, 1)
    f_bar = (h_bar - bound * (tl.sum(bound * h_bar, 1) * inv_b2)[:, None]) * scale[:, None]
    seen_bar = weight * tl.exp(log_before)[:, None] * h_bar
    keys_bar += dot(seen_bar, x, OP, PREC)
    i = tl.arange(0, C)
    by_end = tl.sum(by_last, 0) + tl.exp(log_end) * tl.sum(tl.sum(g * x, 1), 0)
    by_gamma += tl.where(i == C - 1, by_end, 0.0)
    tl.store(out_gates + i, eta_bar)
    tl.store(out_gates + C + i, _by_log_alpha(by_gamma, by_before, C))
    x_bar = tl.exp(log_end) * g + dot(tl.trans(seen_bar), keys, OP, PREC)
    return keys_bar, f_bar, x_bar


@triton.jit
def _output_side_backward(
    run: tensor, carry: tensor, weight: tensor, gates: tensor, tiles: tensor, bars: tensor, reads: tensor, d_out:
    tensor, at: tensor, keep: tensor, is_mem: tensor, first: tensor, length: tensor, inv_b2: tensor, num_rows: tensor,
    GATE: constexpr, C: constexpr, DOUT: constexpr, HID: constexpr, H: constexpr, ROOM: constexpr, OP: constexpr, PREC:
    constexpr,
) -> tensor:  # fmt: skip
    """Backward of the writes to W1, and with `is_mem` of what the live read finds in it."""
    at_k = load_tile(tiles + AT_K * ROOM, C, HID)
    s, scale = unit_rows(at_k * tl.sigmoid(at_k))
    f = load_tile(tiles + ERROR * ROOM, C, DOUT) / scale[:, None]
    x = load_matrix(run + at, keep * num_rows, DOUT, HID)
    g = load_matrix(carry + at, num_rows, DOUT, HID)
    keys_bar, f_bar, x_bar = _side_backward(
        s, f, x, g, load_tile(tiles + WRITE1 * ROOM, C, DOUT), load_matrix(reads + WRITE1_BAR * ROOM, is_mem * C, C,
        DOUT), load_tile(tiles + INVERSE1 * ROOM, C, C), gates, bars + GATES_BAR * ROOM + 2 * C, weight, inv_b2, C, OP,
        PREC,
    )  # fmt: skip
    store_tile(bars + KEYS1_BAR * ROOM, keys_bar + load_matrix(reads + UNIT_BAR * ROOM, is_mem * C, C, HID), C, HID)
    store_tile(bars + FACTOR1_BAR * ROOM, f_bar, C, DOUT)
    if not GATE and is_mem:
        _, log_gamma, _, _ = decays(gates, C)
        out_bar = load_rows(d_out, first, length, H * DOUT, C, DOUT) * tl.exp(log_gamma)[:, None]
        x_bar += dot(tl.trans(out_bar), load_tile(reads + HIDDEN_READ * ROOM, C, HID), OP, PREC)
    store_matrix(carry + at, tl.where(keep > 0, x_bar, 0.0), num_rows, DOUT, HID)


@triton.jit
def side_backward_kernel(
    run: tensor, carry: tensor, weights: tensor, x_q: tensor, d_out: tensor, table: tensor, heads: tensor, tiles:
    tensor, bars: tensor, reads: tensor, num_tokens: tensor, inv_b2: tensor, C: constexpr, D: constexpr, HID: constexpr,
    H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr, OP: constexpr, PREC: constexpr,
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
    run += n * SIZE
    carry += n * SIZE
    weights += n % H
    heads += n * HEAD_TILES * ROOM
    gates = heads + GATES * ROOM
    tiles += (n * (F + G) + memory) * MEMORY_TILES * ROOM
    bars += (n * (F + G) + memory) * BACKWARD_TILES * ROOM
    reads += n * READ_TILES * ROOM
    d_out += offset
    at = w1_place(memory, D, HID, F, G)
    if tl.program_id(2) == 0:
        k = load_tile(heads + KEY * ROOM, C, D)
        f = load_tile(tiles + BACK * ROOM, C, HID) * silu_slope(load_tile(tiles + AT_K * ROOM, C, HID))
        at = memory * HID * D
        x = load_matrix(run + at, keep * HID, HID, D)
        g = load_matrix(carry + at, HID, HID, D)
        keys_bar, f_bar, x_bar = _side_backward(
            k, f, x, g, load_tile(tiles + WRITE2 * ROOM, C, HID), load_matrix(reads + WRITE2_BAR * ROOM, is_mem * C, C,
            HID), load_tile(tiles + INVERSE2 * ROOM, C, C), gates, bars + GATES_BAR * ROOM, tl.load(weights), inv_b2, C,
            OP, PREC,
        )  # fmt: skip
        store_tile(bars + KEYS2_BAR * ROOM, keys_bar + load_matrix(reads + KEY_BAR * ROOM, is_mem * C, C, D), C, D)
        store_tile(bars + FACTOR2_BAR * ROOM, f_bar, C, HID)
        if is_mem:
            _, log_gamma, _, _ = decays(gates, C)
            q, _ = unit_rows(load_rows(x_q + offset, first, length, H * D, C, D))
            q, _ = unit_rows(q)
            x_bar += dot(tl.trans(load_tile(reads + PRE_BAR * ROOM, C, HID) * tl.exp(log_gamma)[:, None]), q, OP, PREC)
        store_matrix(carry + at, tl.where(keep > 0, x_bar, 0.0), HID, HID, D)
    elif memory < F:
        _output_side_backward(
            run, carry, tl.load(weights + H), gates, tiles, bars, reads, d_out, at, keep, is_mem, first, length, inv_b2,
            D, False, C, D, HID, H, ROOM, OP, PREC,
        )  # fmt: skip
    else:
        _output_side_backward(
            run, carry, tl.load(weights + H), gates, tiles, bars, reads, d_out, at, keep, is_mem, first, length, inv_b2,
            1, True, C, 16, HID, H, ROOM, OP, PREC,
        )  # fmt: skip
