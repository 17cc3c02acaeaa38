"""Backward kernels of what the snapshot computes: the error of each memory, and the generated k, v and gates.

`triton_backward` goes first. Gradients by the snapshot are added to `snap_bar`, which is the carry where the block
begins a chunk, and to `base_bar`, because the snapshot is the initial weights plus what was learned since.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from kernels.triton_backward import (
    BACKWARD_TILES,
    DECAY_BAR,
    FACTOR1_BAR,
    FACTOR2_BAR,
    GATES_BAR,
    HIDDEN_READ,
    K_BAR,
    KEYS1_BAR,
    KEYS2_BAR,
    PRE_BAR,
    READ_TILES,
    V_BAR,
)
from kernels.triton_parts import (
    AT_K,
    AT_V,
    BACK,
    EPS,
    ERROR,
    GATES,
    HEAD_TILES,
    KEY,
    MEMORY_TILES,
    VALUE,
    add_matrix,
    dot,
    load_matrix,
    load_rows,
    load_tile,
    silu_slope,
    store_rows,
    store_tile,
    unit_rows,
    unit_rows_backward,
    w1_place,
)


@triton.jit
def silu_curve(a: tensor) -> tensor:
    """Second derivative of SiLU."""
    gate = tl.sigmoid(a)
    return gate * (1 - gate) * (2 + a * (1 - 2 * gate))


@triton.jit
def _predict_backward(
    start: tensor, snap_bar: tensor, last_bar: tensor, base: tensor, base_bar: tensor, slow: tensor, slow_bar: tensor,
    q: tensor, out_bar: tensor, heads: tensor, tiles: tensor, bars: tensor, reads: tensor, memory: tensor, keep: tensor,
    is_last: tensor, num_rows: tensor, GATE: constexpr, C: constexpr, D: constexpr, DOUT: constexpr, HID: constexpr, H:
    constexpr, F: constexpr, G: constexpr, ROOM: constexpr, OP: constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """Backward of `triton_forward._predict`, of the unit keys of W1, and of the read of the initial weights."""
    k = load_tile(heads + KEY * ROOM, C, D)
    v = load_tile(heads + VALUE * ROOM, C, D)
    at_k = load_tile(tiles + AT_K * ROOM, C, HID)
    at_v = load_tile(tiles + AT_V * ROOM, C, HID)
    s_k = at_k * tl.sigmoid(at_k)
    error = load_tile(tiles + ERROR * ROOM, C, DOUT)
    factor1_bar = load_tile(bars + FACTOR1_BAR * ROOM, C, DOUT)
    factor2_bar = load_tile(bars + FACTOR2_BAR * ROOM, C, HID)
    at = w1_place(memory, D, HID, F, G)
    w1 = load_matrix(start + at, keep * num_rows, DOUT, HID) + load_matrix(base + at, num_rows, DOUT, HID)
    length = tl.sqrt(tl.sum(s_k * s_k, 1) + EPS)
    back_bar = silu_slope(at_k) * factor2_bar
    error_bar = length[:, None] * factor1_bar + dot(back_bar, tl.trans(w1), OP, PREC)
    difference_bar = dot(error_bar, w1, OP, PREC)
    difference = s_k - at_v * tl.sigmoid(at_v)
    w1_bar = dot(tl.trans(error), back_bar, OP, PREC) + dot(tl.trans(error_bar), difference, OP, PREC)
    added = w1_bar + load_matrix(last_bar + at, is_last * num_rows, DOUT, HID)
    add_matrix(snap_bar + at, added, keep * num_rows, DOUT, HID)
    if not GATE and memory == F - 1:
        w1_bar += dot(tl.trans(out_bar), load_tile(reads + HIDDEN_READ * ROOM, C, HID), OP, PREC)
    add_matrix(base_bar + at, w1_bar, num_rows, DOUT, HID)

    unit_bar = load_tile(bars + KEYS1_BAR * ROOM, C, HID)
    unit = s_k / length[:, None]
    along = tl.sum(factor1_bar * error, 1) - tl.sum(unit * unit_bar, 1) / length
    s_bar = unit_bar / length[:, None] + unit * along[:, None] + difference_bar
    at_k_bar = silu_curve(at_k) * load_tile(tiles + BACK * ROOM, C, HID) * factor2_bar + silu_slope(at_k) * s_bar
    at_v_bar = -silu_slope(at_v) * difference_bar
    at = memory * HID * D
    w2 = load_matrix(start + at, keep * HID, HID, D) + load_matrix(base + at, HID, HID, D)
    k_bar = load_tile(bars + KEYS2_BAR * ROOM, C, D) + dot(at_k_bar, w2, OP, PREC)
    v_bar = dot(at_v_bar, w2, OP, PREC)
    if GATE:
        row = slow + (memory - F) * H * D + tl.arange(0, D)
        linear_bar = tl.sum(tl.where((tl.arange(0, DOUT) == 0)[None, :], error_bar, 0.0), 1)[:, None]
        direct = linear_bar * tl.load(row)[None, :]
        row_bar = slow_bar + (memory - F) * D + tl.arange(0, D)
        tl.store(row_bar, tl.load(row_bar) + tl.sum(linear_bar * (k - v), 0))
    else:
        direct = error_bar
    store_tile(bars + K_BAR * ROOM, k_bar + direct, C, D)
    store_tile(bars + V_BAR * ROOM, v_bar - direct, C, D)
    w2_bar = dot(tl.trans(at_k_bar), k, OP, PREC) + dot(tl.trans(at_v_bar), v, OP, PREC)
    added = w2_bar + load_matrix(last_bar + at, is_last * HID, HID, D)
    add_matrix(snap_bar + at, added, keep * HID, HID, D)
    if not GATE and memory == F - 1:
        w2_bar += dot(tl.trans(load_tile(reads + PRE_BAR * ROOM, C, HID)), q, OP, PREC)
    add_matrix(base_bar + at, w2_bar, HID, HID, D)


@triton.jit
def predict_backward_kernel(
    start: tensor, snap_bar: tensor, last_bar: tensor, base: tensor, base_bar: tensor, slow: tensor, slow_bar: tensor,
    x_q: tensor, d_out: tensor, table: tensor, heads: tensor, tiles: tensor, bars: tensor, reads: tensor, num_tokens:
    tensor, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, SIZE:
    constexpr, OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, F + G): one memory, one block. last_bar: gradient by the snapshot that the call returns."""
    n = tl.program_id(0).to(tl.int64)
    memory = tl.program_id(1)
    sequence = n // H
    head = n % H
    first = tl.load(table + sequence * 4)
    length = tl.load(table + sequence * 4 + 1)
    keep = tl.load(table + sequence * 4 + 2)
    is_last = tl.load(table + sequence * 4 + 3)
    offset = sequence * num_tokens * H * D + head * D
    start += n * SIZE
    snap_bar += n * SIZE
    last_bar += n * SIZE
    base += head * SIZE
    base_bar += n * SIZE
    slow += head * D
    slow_bar += n * 2 * D
    heads += n * HEAD_TILES * ROOM
    tiles += (n * (F + G) + memory) * MEMORY_TILES * ROOM
    bars += (n * (F + G) + memory) * BACKWARD_TILES * ROOM
    reads += n * READ_TILES * ROOM
    out_bar = load_rows(d_out + offset, first, length, H * D, C, D)
    q, _ = unit_rows(load_rows(x_q + offset, first, length, H * D, C, D))
    q, _ = unit_rows(q)
    if memory < F:
        _predict_backward(
            start, snap_bar, last_bar, base, base_bar, slow, slow_bar, q, out_bar, heads, tiles, bars, reads, memory,
            keep, is_last, D, False, C, D, D, HID, H, F, G, ROOM, OP, PREC,
        )  # fmt: skip
    else:
        _predict_backward(
            start, snap_bar, last_bar, base, base_bar, slow, slow_bar, q, out_bar, heads, tiles, bars, reads, memory,
            keep, is_last, 1, True, C, D, 16, HID, H, F, G, ROOM, OP, PREC,
        )  # fmt: skip


@triton.jit
def _vector_backward(
    x_ptr: tensor, d_x: tensor, y_ptr: tensor, bar: tensor, start: tensor, snap_bar: tensor, base: tensor, base_bar:
    tensor, memory: tensor, first: tensor, length: tensor, keep: tensor, C: constexpr, D: constexpr, HID: constexpr, H:
    constexpr, F: constexpr, G: constexpr, ROOM: constexpr, OP: constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """Backward of `triton_forward._generate_vector`. bar: gradients by the vector, one tile in each memory's tiles."""
    total = load_tile(bar, C, D)
    for other in tl.static_range(1, F + G):
        total += load_tile(bar + other * BACKWARD_TILES * ROOM, C, D)
    x, scale = unit_rows(load_rows(x_ptr, first, length, H * D, C, D))
    at2 = memory * HID * D
    at1 = w1_place(memory, D, HID, F, G)
    w2 = load_matrix(start + at2, keep * HID, HID, D) + load_matrix(base + at2, HID, HID, D)
    a = dot(x, tl.trans(w2), OP, PREC)
    s = a * tl.sigmoid(a)
    w1 = load_matrix(start + at1, keep * D, D, HID) + load_matrix(base + at1, D, D, HID)
    y = x + dot(s, tl.trans(w1), OP, PREC)
    total = unit_rows_backward(total, load_tile(y_ptr, C, D), tl.rsqrt(tl.sum(y * y, 1) + EPS))
    a_bar = silu_slope(a) * dot(total, w1, OP, PREC)
    w_bar = dot(tl.trans(total), s, OP, PREC)
    add_matrix(snap_bar + at1, w_bar, keep * D, D, HID)
    add_matrix(base_bar + at1, w_bar, D, D, HID)
    w_bar = dot(tl.trans(a_bar), x, OP, PREC)
    add_matrix(snap_bar + at2, w_bar, keep * HID, HID, D)
    add_matrix(base_bar + at2, w_bar, HID, HID, D)
    w2 = load_matrix(start + at2, keep * HID, HID, D) + load_matrix(base + at2, HID, HID, D)
    total = unit_rows_backward(total + dot(a_bar, w2, OP, PREC), x, scale)
    store_rows(d_x, total, first, length, H * D, C, D)


@triton.jit
def _gates_backward(
    x_ptr: tensor, d_x: tensor, gates: tensor, bars: tensor, read: tensor, start: tensor, snap_bar: tensor, base:
    tensor, base_bar: tensor, slow: tensor, slow_bar: tensor, bias_bar: tensor, first: tensor, length: tensor, keep:
    tensor, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, OP:
    constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """Backward of `triton_forward._generate_gates`."""
    i = tl.arange(0, C)
    j = tl.arange(0, HID)
    x, scale = unit_rows(load_rows(x_ptr, first, length, H * D, C, D))
    total = x * 0
    for gate in tl.static_range(2):
        bar = tl.load(read + DECAY_BAR * ROOM + i) * gate  # the live read depends on alpha, not on eta
        for other in tl.static_range(F + G):
            own = bars + (other * BACKWARD_TILES + GATES_BAR) * ROOM + gate * C + i
            bar += tl.load(own) + tl.load(own + 2 * C)
        bar *= tl.load(gates + (2 + gate) * C + i)  # by the logit
        memory = F + gate
        at2 = memory * HID * D
        at1 = w1_place(memory, D, HID, F, G) + j
        w2 = load_matrix(start + at2, keep * HID, HID, D) + load_matrix(base + at2, HID, HID, D)
        g1 = tl.load(start + at1, mask=j < keep * HID, other=0.0) + tl.load(base + at1)
        row = tl.arange(0, D)
        a = dot(x, tl.trans(w2), OP, PREC)
        a_bar = silu_slope(a) * bar[:, None] * g1[None, :]
        total += bar[:, None] * tl.load(slow + gate * H * D + row)[None, :] + dot(a_bar, w2, OP, PREC)
        g1_bar = tl.sum(bar[:, None] * a * tl.sigmoid(a), 0)
        tl.store(snap_bar + at1, tl.load(snap_bar + at1) + g1_bar, mask=j < keep * HID)
        tl.store(base_bar + at1, tl.load(base_bar + at1) + g1_bar)
        w2_bar = dot(tl.trans(a_bar), x, OP, PREC)
        add_matrix(snap_bar + at2, w2_bar, keep * HID, HID, D)
        add_matrix(base_bar + at2, w2_bar, HID, HID, D)
        row += gate * D
        tl.store(slow_bar + row, tl.load(slow_bar + row) + tl.sum(bar[:, None] * x, 0))
        tl.store(bias_bar + gate, tl.load(bias_bar + gate) + tl.sum(bar, 0))
    store_rows(d_x, unit_rows_backward(total, x, scale), first, length, H * D, C, D)


@triton.jit
def generate_backward_kernel(
    x_k: tensor, x_v: tensor, x_gate: tensor, d_k: tensor, d_v: tensor, d_gate: tensor, start: tensor, snap_bar: tensor,
    base: tensor, base_bar: tensor, slow: tensor, slow_bar: tensor, bias_bar: tensor, table: tensor, heads: tensor,
    bars: tensor, reads: tensor, num_tokens: tensor, C: constexpr, D: constexpr, HID: constexpr, H: constexpr, F:
    constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr, OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, 3): k, v, both gates of one block: gradients by the inputs and by the memories that made them."""
    n = tl.program_id(0).to(tl.int64)
    what = tl.program_id(1)
    sequence = n // H
    head = n % H
    first = tl.load(table + sequence * 4)
    length = tl.load(table + sequence * 4 + 1)
    keep = tl.load(table + sequence * 4 + 2)
    offset = sequence * num_tokens * H * D + head * D
    start += n * SIZE
    snap_bar += n * SIZE
    base += head * SIZE
    base_bar += n * SIZE
    heads += n * HEAD_TILES * ROOM
    bars += n * (F + G) * BACKWARD_TILES * ROOM
    if what == 2:
        _gates_backward(
            x_gate + offset, d_gate + offset, heads + GATES * ROOM, bars, reads + n * READ_TILES * ROOM, start,
            snap_bar, base, base_bar, slow + head * D, slow_bar + n * 2 * D, bias_bar + n * 2, first, length, keep, C,
            D, HID, H, F, G, ROOM, OP, PREC,
        )  # fmt: skip
    else:
        x_ptr = x_k
        d_x = d_k
        if what == 1:
            x_ptr = x_v
            d_x = d_v
        _vector_backward(
            x_ptr + offset, d_x + offset, heads + what * ROOM, bars + (K_BAR + what) * ROOM, start, snap_bar, base,
            base_bar, what, first, length, keep, C, D, HID, H, F, G, ROOM, OP, PREC,
        )  # fmt: skip
