"""Forward kernels: generate k, v and the gates of a block; write a block to every memory; read the main memory live.

The first two run once per block, because a block needs the state that the block before it leaves. The third one needs
states and writes only and runs over a group of blocks at once. Letters as in `triton_parts`; N = sequences x heads.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from kernels.triton_parts import (
    AT_K,
    AT_V,
    BACK,
    ERROR,
    GATES,
    HEAD_TILES,
    INVERSE1,
    INVERSE2,
    KEY,
    MEMORY_TILES,
    VALUE,
    WRITE1,
    WRITE2,
    decays,
    dot,
    fp32_rows,
    load_matrix,
    load_rows,
    load_tile,
    ratios,
    side_write,
    silu_slope,
    store_matrix,
    store_rows,
    store_tile,
    unit_rows,
    w1_place,
)


@triton.jit
def _generate_vector(
    x_ptr: tensor, out: tensor, start: tensor, base: tensor, memory: tensor, first: tensor, length: tensor, keep:
    tensor, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, F: constexpr, G: constexpr, OP: constexpr, PREC:
    constexpr,
) -> tensor:  # fmt: skip
    """unit(M(unit(x))) of one memory, Eq. 83."""
    x, _ = unit_rows(load_rows(x_ptr, first, length, H * D, C, D))
    at = memory * HID * D
    w2 = load_matrix(start + at, keep * HID, HID, D) + load_matrix(base + at, HID, HID, D)
    a = dot(x, tl.trans(w2), OP, PREC)
    at = w1_place(memory, D, HID, F, G)
    w1 = load_matrix(start + at, keep * D, D, HID) + load_matrix(base + at, D, D, HID)
    y, _ = unit_rows(x + dot(a * tl.sigmoid(a), tl.trans(w1), OP, PREC))
    store_tile(out, y, C, D)


@triton.jit
def _generate_gates(
    x_ptr: tensor, out: tensor, start: tensor, base: tensor, slow: tensor, bias: tensor, head: tensor, first: tensor,
    length: tensor, keep: tensor, eta_max: tensor, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, F:
    constexpr, G: constexpr, OP: constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """eta and log alpha of a block, 0 where there is no token, and their derivatives by the logits."""
    x, _ = unit_rows(load_rows(x_ptr, first, length, H * D, C, D))
    i = tl.arange(0, C)
    valid = tl.where(i < length, 1.0, 0.0)
    for gate in tl.static_range(2):
        memory = F + gate
        at = memory * HID * D
        w2 = load_matrix(start + at, keep * HID, HID, D) + load_matrix(base + at, HID, HID, D)
        a = dot(x, tl.trans(w2), OP, PREC)
        at = w1_place(memory, D, HID, F, G) + tl.arange(0, HID)
        g1 = tl.load(start + at, mask=tl.arange(0, HID) < keep * HID, other=0.0)
        g1 += tl.load(base + at).to(tl.float32)
        row = tl.load(slow + (gate * H + head) * D + tl.arange(0, D))
        logit = tl.load(bias + gate * H + head) + tl.sum(x * row[None, :], 1)
        logit += tl.sum(a * tl.sigmoid(a) * g1[None, :], 1)
        share = tl.sigmoid(logit)
        if gate == 0:
            value, slope = eta_max * share, eta_max * share * (1 - share)
        else:  # log sigmoid without overflow
            value = tl.minimum(logit, 0.0) - tl.log(1 + tl.exp(-tl.abs(logit)))
            slope = 1 / (1 + tl.exp(logit))
        tl.store(out + gate * C + i, value * valid)
        tl.store(out + (2 + gate) * C + i, slope * valid)


@triton.jit
def generate_kernel(
    x_k: tensor, x_v: tensor, x_gate: tensor, start: tensor, base: tensor, slow: tensor, bias: tensor, table: tensor,
    heads: tensor, num_tokens: tensor, eta_max: tensor, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, F:
    constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr, OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, 3): k, v, both gates of one block. table: its row of `triton_call.block_table`, [B, 4]."""
    n = tl.program_id(0)
    what = tl.program_id(1)
    sequence = n // H
    head = n % H
    first = tl.load(table + sequence * 4)
    length = tl.load(table + sequence * 4 + 1)
    keep = tl.load(table + sequence * 4 + 2)
    offset = (sequence * num_tokens).to(tl.int64) * H * D + head * D
    own = heads + n.to(tl.int64) * HEAD_TILES * ROOM
    start += n.to(tl.int64) * SIZE
    base += head.to(tl.int64) * SIZE
    if what == 2:
        _generate_gates(
            x_gate + offset, fp32_rows(own + GATES * ROOM), start, base, slow, bias, head, first, length, keep, eta_max,
            C, D, HID,
            H, F, G, OP, PREC,
        )  # fmt: skip
    else:
        x_ptr = x_k
        if what == 1:
            x_ptr = x_v
        _generate_vector(
            x_ptr + offset, own + what * ROOM, start, base, what, first, length, keep, C, D, HID, H, F, G, OP, PREC
        )


@triton.jit
def _predict(
    start: tensor, last_start: tensor, base: tensor, slow: tensor, head_tiles: tensor, tiles: tensor, memory: tensor,
    keep: tensor, is_last: tensor, num_rows: tensor, GATE: constexpr, C: constexpr, D: constexpr, DOUT: constexpr, HID:
    constexpr, H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, OP: constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """Error and its way back through W1 for one memory, Eq. 84 and 85; W1 has `num_rows` rows."""
    at = memory * HID * D
    w2 = load_matrix(start + at, keep * HID, HID, D)
    store_matrix(last_start + at, w2, is_last * HID, HID, D)
    w2 += load_matrix(base + at, HID, HID, D)
    at_k = dot(load_tile(head_tiles + KEY * ROOM, C, D), tl.trans(w2), OP, PREC)
    at_v = dot(load_tile(head_tiles + VALUE * ROOM, C, D), tl.trans(w2), OP, PREC)
    store_tile(tiles + AT_K * ROOM, at_k, C, HID)
    store_tile(tiles + AT_V * ROOM, at_v, C, HID)
    at = w1_place(memory, D, HID, F, G)
    w1 = load_matrix(start + at, keep * num_rows, DOUT, HID)
    store_matrix(last_start + at, w1, is_last * num_rows, DOUT, HID)
    w1 += load_matrix(base + at, num_rows, DOUT, HID)
    # The target is made by the same weights, so that one product gives prediction minus target.
    error = dot(at_k * tl.sigmoid(at_k) - at_v * tl.sigmoid(at_v), tl.trans(w1), OP, PREC)
    linear = load_tile(head_tiles + KEY * ROOM, C, D) - load_tile(head_tiles + VALUE * ROOM, C, D)
    if GATE:
        row = tl.load(slow + (memory - F) * H * D + tl.arange(0, D))
        linear = tl.sum(linear * row[None, :], 1)[:, None]
        error += tl.where((tl.arange(0, DOUT) == 0)[None, :], linear, 0.0)
    else:
        error += linear
    store_tile(tiles + ERROR * ROOM, error, C, DOUT)
    store_tile(tiles + BACK * ROOM, dot(error, w1, OP, PREC), C, HID)


@triton.jit
def predict_kernel(
    start: tensor, last_start: tensor, base: tensor, slow: tensor, table: tensor, heads: tensor, tiles: tensor, C:
    constexpr, D: constexpr, HID: constexpr, H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr,
    OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, F + G): the error of one memory for one block, at the snapshot `start` [N, SIZE].

    last_start: receives the snapshot of the sequences whose last block this is and ends inside a chunk.
    """
    n = tl.program_id(0).to(tl.int64)
    memory = tl.program_id(1)
    head = n % H
    keep = tl.load(table + (n // H) * 4 + 2)
    is_last = tl.load(table + (n // H) * 4 + 3)
    start += n * SIZE
    last_start += n * SIZE
    base += head * SIZE
    slow += head * D
    heads += n * HEAD_TILES * ROOM
    tiles += (n * (F + G) + memory) * MEMORY_TILES * ROOM
    if memory < F:
        _predict(
            start, last_start, base, slow, heads, tiles, memory, keep, is_last, D, False, C, D, D, HID, H, F, G, ROOM,
            OP, PREC,
        )  # fmt: skip
    else:
        _predict(
            start, last_start, base, slow, heads, tiles, memory, keep, is_last, 1, True, C, D, 16, HID, H, F, G, ROOM,
            OP, PREC,
        )  # fmt: skip


@triton.jit
def _write_output_side(
    run: tensor, after: tensor, weight: tensor, gates: tensor, tiles: tensor, at: tensor, keep: tensor, inv_b2: tensor,
    num_rows: tensor, SAVE: constexpr, C: constexpr, DOUT: constexpr, HID: constexpr, ROOM: constexpr, OP: constexpr,
    PREC: constexpr,
) -> tensor:  # fmt: skip
    """The writes to W1, whose keys are act(W2 k) at unit length."""
    at_k = load_tile(tiles + AT_K * ROOM, C, HID)
    s, scale = unit_rows(at_k * tl.sigmoid(at_k))
    f = load_tile(tiles + ERROR * ROOM, C, DOUT) / scale[:, None]
    x = load_matrix(run + at, keep * num_rows, DOUT, HID)
    z, inverse, x = side_write(s, f, x, gates, weight, inv_b2, C, OP, PREC)
    store_matrix(after + at, x, num_rows, DOUT, HID)
    store_tile(tiles + WRITE1 * ROOM, z, C, DOUT)
    if SAVE:
        store_tile(tiles + INVERSE1 * ROOM, inverse, C, C)


@triton.jit
def write_kernel(
    run: tensor, after: tensor, weights: tensor, table: tensor, heads: tensor, tiles: tensor, inv_b2: tensor, SAVE:
    constexpr, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr,
    SIZE: constexpr, OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, F + G, 2): one side of one memory takes the writes of one block, Eq. 86-88; from `run` to `after`.

    run, after: [N, SIZE] flat states. weights: [2, H] of the erasure of W2 and W1. SAVE: keeps the inverses.
    """
    n = tl.program_id(0).to(tl.int64)
    memory = tl.program_id(1)
    keep = tl.load(table + (n // H) * 4 + 2)
    run += n * SIZE
    after += n * SIZE
    weights += n % H
    heads += n * HEAD_TILES * ROOM
    gates = fp32_rows(heads + GATES * ROOM)
    tiles += (n * (F + G) + memory) * MEMORY_TILES * ROOM
    at = w1_place(memory, D, HID, F, G)
    if tl.program_id(2) == 0:
        k = load_tile(heads + KEY * ROOM, C, D)
        f = load_tile(tiles + BACK * ROOM, C, HID) * silu_slope(load_tile(tiles + AT_K * ROOM, C, HID))
        at = memory * HID * D
        x = load_matrix(run + at, keep * HID, HID, D)
        z, inverse, x = side_write(k, f, x, gates, tl.load(weights), inv_b2, C, OP, PREC)
        store_matrix(after + at, x, HID, HID, D)
        store_tile(tiles + WRITE2 * ROOM, z, C, HID)
        if SAVE:
            store_tile(tiles + INVERSE2 * ROOM, inverse, C, C)
    elif memory < F:
        _write_output_side(
            run, after, tl.load(weights + H), gates, tiles, at, keep, inv_b2, D, SAVE, C, D, HID, ROOM, OP, PREC
        )
    else:
        _write_output_side(
            run, after, tl.load(weights + H), gates, tiles, at, keep, inv_b2, 1, SAVE, C, 16, HID, ROOM, OP, PREC
        )


@triton.jit
def live_products(
    q: tensor,
    keys: tensor,
    z: tensor,
    x: tensor,
    base: tensor,
    gates: tensor,
    C: constexpr,
    OP: constexpr,
    PREC: constexpr,
) -> tensor:
    """W_t q_t for every token after its own write; x, base: the decaying part and the initial weights."""
    _, log_gamma, _, _ = decays(gates, C)
    masked = ratios(log_gamma, log_gamma, C, False) * dot(q, tl.trans(keys), OP, PREC)
    out = tl.exp(log_gamma)[:, None] * dot(q, tl.trans(x), OP, PREC)
    out += dot(q, tl.trans(base), OP, PREC) + dot(masked, z, OP, PREC)
    return out


@triton.jit
def read_kernel(
    x_q: tensor, out: tensor, bounds: tensor, ring: tensor, base: tensor, table: tensor, heads: tensor, tiles: tensor,
    num_tokens: tensor, num_sequences: tensor, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, F: constexpr,
    G: constexpr, ROOM: constexpr, SIZE: constexpr, OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, blocks of the group): outputs of one block. bounds: the state at the group's begin, ring: the others."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    sequence = n // H
    head = n % H
    row = table + (block * num_sequences + sequence) * 4
    first = tl.load(row)
    length = tl.load(row + 1)
    keep = tl.load(row + 2)
    offset = sequence * num_tokens * H * D + head * D
    slot = block * num_sequences * H + n
    state = bounds + n * SIZE
    if block > 0:
        state = ring + (slot - num_sequences * H) * SIZE
    base += head * SIZE
    own = heads + slot * HEAD_TILES * ROOM
    tiles += (slot * (F + G) + F - 1) * MEMORY_TILES * ROOM
    gates = fp32_rows(own + GATES * ROOM)
    memory: constexpr = F - 1
    at1: constexpr = (F + G) * HID * D + memory * D * HID
    q, _ = unit_rows(load_rows(x_q + offset, first, length, H * D, C, D))
    q, _ = unit_rows(q)
    x2 = load_matrix(state + memory * HID * D, keep * HID, HID, D)
    base2 = load_matrix(base + memory * HID * D, HID, HID, D)
    z2 = load_tile(tiles + WRITE2 * ROOM, C, HID)
    p = live_products(q, load_tile(own + KEY * ROOM, C, D), z2, x2, base2, gates, C, OP, PREC)
    s = p * tl.sigmoid(p)
    at_k = load_tile(tiles + AT_K * ROOM, C, HID)
    s_k, _ = unit_rows(at_k * tl.sigmoid(at_k))
    x1 = load_matrix(state + at1, keep * D, D, HID)
    base1 = load_matrix(base + at1, D, D, HID)
    z1 = load_tile(tiles + WRITE1 * ROOM, C, D)
    y = live_products(s, s_k, z1, x1, base1, gates, C, OP, PREC)
    store_rows(out + offset, q + y, first, length, H * D, C, D)
