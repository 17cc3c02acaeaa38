"""Backward kernels of what the snapshot computes: the error of each memory, and the generated k, v and gates.

`triton_backward` goes first. Gradients by the snapshot are added to `snap_bar`, which is the carry where the block
begins a chunk, and to `base_bar`, because the snapshot is the initial weights plus what was learned since.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from kernels.triton_backward import (
    AT_K_BAR,
    AT_V_BAR,
    BACKWARD_TILES,
    DECAY_BAR,
    DIRECT_BAR,
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
    query,
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
    fp32_rows,
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
def _error_backward(
    start: tensor, snap_bar: tensor, last_bar: tensor, base: tensor, base_bar: tensor, d_out: tensor, tiles: tensor,
    bars: tensor, reads: tensor, is_mem: tensor, keep: tensor, is_last: tensor, first: tensor, length: tensor,
    num_rows: tensor, GATE: constexpr, C: constexpr, DOUT: constexpr, HID: constexpr, H: constexpr, ROOM: constexpr,
    OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Through W1 and the unit keys to W2 k and W2 v, and the gradient by W1; the pointers are at W1."""
    at_k = load_tile(tiles + AT_K * ROOM, C, HID)
    s = at_k * tl.sigmoid(at_k)
    norm = tl.sqrt(tl.sum(s * s, 1) + EPS)[:, None]
    w1 = load_matrix(start, keep * num_rows, DOUT, HID) + load_matrix(base, num_rows, DOUT, HID)
    back_bar = silu_slope(at_k) * load_tile(bars + FACTOR2_BAR * ROOM, C, HID)
    error_bar = norm * load_tile(bars + FACTOR1_BAR * ROOM, C, DOUT) + dot(back_bar, tl.trans(w1), OP, PREC)
    store_tile(bars + DIRECT_BAR * ROOM, error_bar, C, DOUT)
    difference_bar = dot(error_bar, w1, OP, PREC)
    at_v = load_tile(tiles + AT_V * ROOM, C, HID)
    store_tile(bars + AT_V_BAR * ROOM, -silu_slope(at_v) * difference_bar, C, HID)
    along = tl.sum(load_tile(bars + FACTOR1_BAR * ROOM, C, DOUT) * load_tile(tiles + ERROR * ROOM, C, DOUT), 1)
    unit_bar = load_tile(bars + KEYS1_BAR * ROOM, C, HID)
    s_bar = (unit_bar + s * (along[:, None] - tl.sum(s * unit_bar, 1)[:, None] / (norm * norm))) / norm + difference_bar
    curved = load_tile(tiles + BACK * ROOM, C, HID) * load_tile(bars + FACTOR2_BAR * ROOM, C, HID)
    store_tile(bars + AT_K_BAR * ROOM, silu_curve(at_k) * curved + silu_slope(at_k) * s_bar, C, HID)

    difference = s - at_v * tl.sigmoid(at_v)
    w1_bar = dot(tl.trans(load_tile(tiles + ERROR * ROOM, C, DOUT)), back_bar, OP, PREC)
    w1_bar += dot(tl.trans(error_bar), difference, OP, PREC)
    added = w1_bar + load_matrix(last_bar, is_last * num_rows, DOUT, HID)
    add_matrix(snap_bar, added, keep * num_rows, DOUT, HID)
    if not GATE and is_mem:
        out_bar = load_rows(d_out, first, length, H * DOUT, C, DOUT)
        w1_bar += dot(tl.trans(out_bar), load_tile(reads + HIDDEN_READ * ROOM, C, HID), OP, PREC)
    add_matrix(base_bar, w1_bar, num_rows, DOUT, HID)


@triton.jit
def error_backward_kernel(
    start: tensor, snap_bar: tensor, last_bar: tensor, base: tensor, base_bar: tensor, d_out: tensor, table: tensor,
    tiles: tensor, bars: tensor, reads: tensor, num_tokens: tensor, C: constexpr, D: constexpr, HID: constexpr,
    H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr, OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, F + G): W1 of one memory, one block. last_bar: gradient by the snapshot that the call returns."""
    n = tl.program_id(0).to(tl.int64)
    memory = tl.program_id(1)
    sequence = n // H
    first = tl.load(table + sequence * 4)
    length = tl.load(table + sequence * 4 + 1)
    keep = tl.load(table + sequence * 4 + 2)
    is_last = tl.load(table + sequence * 4 + 3)
    at = w1_place(memory, D, HID, F, G)
    start += n * SIZE + at
    snap_bar += n * SIZE + at
    last_bar += n * SIZE + at
    base += n % H * SIZE + at
    base_bar += n * SIZE + at
    d_out += sequence * num_tokens * H * D + n % H * D
    tiles += (n * (F + G) + memory) * MEMORY_TILES * ROOM
    bars += (n * (F + G) + memory) * BACKWARD_TILES * ROOM
    reads += n * READ_TILES * ROOM
    if memory < F:
        _error_backward(
            start, snap_bar, last_bar, base, base_bar, d_out, tiles, bars, reads, memory == F - 1, keep, is_last, first,
            length, D, False, C, D, HID, H, ROOM, OP, PREC,
        )  # fmt: skip
    else:
        _error_backward(
            start, snap_bar, last_bar, base, base_bar, d_out, tiles, bars, reads, memory == F - 1, keep, is_last, first,
            length, 1, True, C, 16, HID, H, ROOM, OP, PREC,
        )  # fmt: skip


@triton.jit
def hidden_backward_kernel(
    start: tensor, snap_bar: tensor, last_bar: tensor, base: tensor, base_bar: tensor, slow: tensor, slow_bar: tensor,
    x_q: tensor, table: tensor, heads: tensor, bars: tensor, reads: tensor, num_tokens: tensor, C: constexpr,
    D: constexpr, HID: constexpr, H: constexpr, F: constexpr, G: constexpr, ROOM: constexpr, SIZE: constexpr,
    OP: constexpr, PREC: constexpr,
) -> None:  # fmt: skip
    """Grid (N, F + G): W2 of one memory, one block, after `error_backward_kernel`; completes those by k and v."""
    n = tl.program_id(0).to(tl.int64)
    memory = tl.program_id(1)
    sequence = n // H
    head = n % H
    keep = tl.load(table + sequence * 4 + 2)
    is_last = tl.load(table + sequence * 4 + 3)
    at = memory * HID * D
    start += n * SIZE + at
    snap_bar += n * SIZE + at
    last_bar += n * SIZE + at
    base += head * SIZE + at
    base_bar += n * SIZE + at
    heads += n * HEAD_TILES * ROOM
    bars += (n * (F + G) + memory) * BACKWARD_TILES * ROOM
    reads += n * READ_TILES * ROOM
    w2 = load_matrix(start, keep * HID, HID, D) + load_matrix(base, HID, HID, D)
    at_k_bar = load_tile(bars + AT_K_BAR * ROOM, C, HID)
    at_v_bar = load_tile(bars + AT_V_BAR * ROOM, C, HID)
    k_bar = load_tile(bars + KEYS2_BAR * ROOM, C, D) + dot(at_k_bar, w2, OP, PREC)
    v_bar = dot(at_v_bar, w2, OP, PREC)
    k = load_tile(heads + KEY * ROOM, C, D)
    v = load_tile(heads + VALUE * ROOM, C, D)
    if memory < F:
        direct = load_tile(bars + DIRECT_BAR * ROOM, C, D)
    else:
        # The error of a gate is one number per token, the first column of its tile.
        linear = tl.load(bars + DIRECT_BAR * ROOM + tl.arange(0, C) * 16).to(tl.float32)[:, None]
        row = (memory - F) * H * D + head * D + tl.arange(0, D)
        direct = linear * tl.load(slow + row)[None, :]
        row_bar = slow_bar + n * 2 * D + (memory - F) * D + tl.arange(0, D)
        tl.store(row_bar, tl.load(row_bar) + tl.sum(linear * (k - v), 0))
    store_tile(bars + K_BAR * ROOM, k_bar + direct, C, D)
    store_tile(bars + V_BAR * ROOM, v_bar - direct, C, D)
    w2_bar = dot(tl.trans(at_k_bar), k, OP, PREC) + dot(tl.trans(at_v_bar), v, OP, PREC)
    added = w2_bar + load_matrix(last_bar, is_last * HID, HID, D)
    add_matrix(snap_bar, added, keep * HID, HID, D)
    if memory == F - 1:
        first = tl.load(table + sequence * 4)
        length = tl.load(table + sequence * 4 + 1)
        q = query(x_q + sequence * num_tokens * H * D + head * D, first, length, C, D, H)
        w2_bar += dot(tl.trans(load_tile(reads + PRE_BAR * ROOM, C, HID)), q, OP, PREC)
    add_matrix(base_bar, w2_bar, HID, HID, D)


@triton.jit
def _vector_backward(
    x_ptr: tensor, d_x: tensor, y_ptr: tensor, bar: tensor, start: tensor, snap_bar: tensor, base: tensor, base_bar:
    tensor, memory: tensor, first: tensor, length: tensor, keep: tensor, C: constexpr, D: constexpr, HID: constexpr, H:
    constexpr, F: constexpr, G: constexpr, ROOM: constexpr, OP: constexpr, PREC: constexpr,
) -> tensor:  # fmt: skip
    """Backward of `triton_forward._generate_vector`. bar: gradients by the vector, one tile in each memory's tiles."""
    x, scale = unit_rows(load_rows(x_ptr, first, length, H * D, C, D))
    at2 = memory * HID * D
    at1 = w1_place(memory, D, HID, F, G)
    w2 = load_matrix(start + at2, keep * HID, HID, D) + load_matrix(base + at2, HID, HID, D)
    a = dot(x, tl.trans(w2), OP, PREC)
    s = a * tl.sigmoid(a)
    w1 = load_matrix(start + at1, keep * D, D, HID) + load_matrix(base + at1, D, D, HID)
    y = x + dot(s, tl.trans(w1), OP, PREC)
    total = load_tile(bar, C, D)
    for other in range(1, F + G):
        total += load_tile(bar + other * BACKWARD_TILES * ROOM, C, D)
    total = unit_rows_backward(total, load_tile(y_ptr, C, D), tl.rsqrt(tl.sum(y * y, 1) + EPS))
    a_bar = silu_slope(a) * dot(total, w1, OP, PREC)
    w_bar = dot(tl.trans(total), s, OP, PREC)
    add_matrix(snap_bar + at1, w_bar, keep * D, D, HID)
    add_matrix(base_bar + at1, w_bar, D, D, HID)
    w_bar = dot(tl.trans(a_bar), x, OP, PREC)
    add_matrix(snap_bar + at2, w_bar, keep * HID, HID, D)
    add_matrix(base_bar + at2, w_bar, HID, HID, D)
    w2 = load_matrix(start + at2, keep * HID, HID, D) + load_matrix(base + at2, HID, HID, D)
    total += dot(a_bar, w2, OP, PREC)
    x, scale = unit_rows(load_rows(x_ptr, first, length, H * D, C, D))
    total = unit_rows_backward(total, x, scale)
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
        bar = tl.load(fp32_rows(read + DECAY_BAR * ROOM) + i) * gate  # the live read depends on alpha, not on eta
        for other in tl.static_range(F + G):
            own = fp32_rows(bars + (other * BACKWARD_TILES + GATES_BAR) * ROOM) + gate * C + i
            bar += tl.load(own) + tl.load(own + 2 * C)
        bar *= tl.load(gates + (2 + gate) * C + i)  # by the logit
        memory = F + gate
        at2 = memory * HID * D
        at1 = w1_place(memory, D, HID, F, G) + j
        w2 = load_matrix(start + at2, keep * HID, HID, D) + load_matrix(base + at2, HID, HID, D)
        g1 = tl.load(start + at1, mask=j < keep * HID, other=0.0)
        g1 += tl.load(base + at1).to(tl.float32)
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
            x_gate + offset, d_gate + offset, fp32_rows(heads + GATES * ROOM), bars, reads + n * READ_TILES * ROOM,
            start,
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
