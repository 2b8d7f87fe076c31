"""What a step does besides its products, in Triton: one kernel a step and direction. Imported when it is first needed.

A loop over a window is captured in a CUDA graph, whose addresses stay, while a window's own tensors are fresh at every call.
Their addresses, and the strides of gradients from above, stand in `table`, which `fill` writes before the loop; tensors that
carry state from step to step stay where they are and come as arguments. A program takes BLOCK of the B·H units.

`STATE` is the dtype that is computed and carried in, `IO` that of what goes in and out, `MATMUL` that of a product's operands and
of the tape. Rows of the tape and of products are HP = H padded wide.
"""

import triton
import triton.language as tl

# Places in the table.
GATES = tl.constexpr(0)
SAID = tl.constexpr(1)
MASK = tl.constexpr(2)
LENGTHS = tl.constexpr(3)
THETA = tl.constexpr(4)
BIAS_IH = tl.constexpr(5)
BIAS_HH = tl.constexpr(6)
U = tl.constexpr(7)  # of an LSTM: c
O = tl.constexpr(8)  # noqa: E741 - the equation's name
Y = tl.constexpr(9)  # of an LSTM: h
START = tl.constexpr(10)  # the private state before the first step
D_GATES = tl.constexpr(11)
D_Y = tl.constexpr(12)  # and two strides, of time and of batch; so have the next
D_U = tl.constexpr(15)
D_O = tl.constexpr(18)
MASK_C = tl.constexpr(21)
TABLE = 22


@triton.jit(do_not_specialize=[f"a{i}" for i in range(TABLE)])
def fill(
    table, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21
):  # fmt: skip
    """Addresses travel as arguments of a launch: a copy from the host would wait for it."""
    tl.store(table, a0)
    tl.store(table + 1, a1)
    tl.store(table + 2, a2)
    tl.store(table + 3, a3)
    tl.store(table + 4, a4)
    tl.store(table + 5, a5)
    tl.store(table + 6, a6)
    tl.store(table + 7, a7)
    tl.store(table + 8, a8)
    tl.store(table + 9, a9)
    tl.store(table + 10, a10)
    tl.store(table + 11, a11)
    tl.store(table + 12, a12)
    tl.store(table + 13, a13)
    tl.store(table + 14, a14)
    tl.store(table + 15, a15)
    tl.store(table + 16, a16)
    tl.store(table + 17, a17)
    tl.store(table + 18, a18)
    tl.store(table + 19, a19)
    tl.store(table + 20, a20)
    tl.store(table + 21, a21)


@triton.jit
def _address(table, place: tl.constexpr, dtype: tl.constexpr):
    return tl.load(table + place).to(tl.pointer_type(dtype))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _biases(table, at, place: tl.constexpr, there: tl.constexpr, live, STATE: tl.constexpr, IO: tl.constexpr):
    if there:
        return tl.load(_address(table, place, IO) + at, mask=live, other=0).to(STATE)
    else:
        return tl.zeros(at.shape, STATE)


@triton.jit
def _from_above(table, place: tl.constexpr, there: tl.constexpr, t, b, j, live, STATE: tl.constexpr, IO: tl.constexpr):
    """The gradient of step t of an output, which may be one row for all steps and samples (strides 0)."""
    if there:
        at = _address(table, place, IO) + t * tl.load(table + place + 1) + b * tl.load(table + place + 2) + j
        return tl.load(at, mask=live, other=0).to(STATE)
    else:
        return tl.zeros(j.shape, STATE)


@triton.jit
def _passes(
    table, place: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr, ENDS: tl.constexpr, t, b, at, live,
    STATE: tl.constexpr,
):  # fmt: skip
    """The share of a unit's new state that a step lets through: zoneout's mask or mean, 0 after a sample's end."""
    share = tl.zeros(b.shape, STATE) + (1.0 - KEEP)
    if MASKED:
        share = tl.load(_address(table, place, tl.uint8) + at, mask=live, other=0).to(STATE)
    if ENDS:
        share = tl.where(t < tl.load(_address(table, LENGTHS, tl.int64) + b, mask=live, other=0), share, 0.0)
    return share


@triton.jit
def _mixed(new, old, share):
    """`new` and `old` by shares; one that gets nothing is not looked at, whatever it is."""
    mean = old + share * (new - old)
    return tl.where(share == 1.0, new, tl.where(share == 0.0, old, mean))


@triton.jit(do_not_specialize=["t", "B"])
def gru_before(
    table, product, said, scaled, t, B, H: tl.constexpr, HP: tl.constexpr, HAS_IH: tl.constexpr, HAS_HH: tl.constexpr,
    STATE: tl.constexpr, IO: tl.constexpr, MATMUL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """reset_after=False: r, and r ⊙ y⁻ which W_hn is to multiply. product (B, 2HP), scaled (B, HP)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < B * H
    b, j = at // H, at % H
    gates = _address(table, GATES, MATMUL) + (t.to(tl.int64) * B + b) * (3 * HP) + j
    r = tl.load(gates, mask=live, other=0).to(STATE) + tl.load(product + b * (2 * HP) + j, mask=live, other=0).to(STATE)
    r += _biases(table, j, BIAS_IH, HAS_IH, live, STATE, IO) + _biases(table, j, BIAS_HH, HAS_HH, live, STATE, IO)
    r = _sigmoid(r)
    y = tl.load(said + b * HP + j, mask=live, other=0).to(STATE)
    tl.store(gates, r.to(MATMUL), mask=live)
    tl.store(scaled + b * HP + j, (r * y).to(MATMUL), mask=live)


@triton.jit(do_not_specialize=["t", "B"])
def gru_forward(
    table, product_rz, product_n, said, carried, last_y, t, B,
    H: tl.constexpr, HP: tl.constexpr, RESET: tl.constexpr, AFTER: tl.constexpr, EVENT: tl.constexpr, LEAN: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ZONED: tl.constexpr, MASKED: tl.constexpr,
    KEEP: tl.constexpr, ENDS: tl.constexpr,
    HAS_IH: tl.constexpr, HAS_HH: tl.constexpr,
    STATE: tl.constexpr, IO: tl.constexpr, MATMUL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The end of a step: gates, u, o, y and the state carried on. LEAN: a GRU, whose u is y and h, and its only output.

    said (B, HP) holds y⁻ for the product and gets y; carried (B, H) and, in reset="output", last_y (B, H) alike.
    """
    G: tl.constexpr = 4 if AFTER else 3
    RZ: tl.constexpr = 3 if AFTER else 2
    N: tl.constexpr = 3 if AFTER else 1
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < B * H
    b, j = at // H, at % H
    row = t.to(tl.int64) * B + b
    out = row * H + j
    gates = _address(table, GATES, MATMUL) + row * (G * HP) + j

    z = tl.load(gates + HP, mask=live, other=0).to(STATE)
    z += tl.load(product_rz + b * (RZ * HP) + HP + j, mask=live, other=0).to(STATE)
    z += _biases(table, H + j, BIAS_IH, HAS_IH, live, STATE, IO) + _biases(
        table, H + j, BIAS_HH, HAS_HH, live, STATE, IO
    )
    z = _sigmoid(z)
    n = tl.load(gates + 2 * HP, mask=live, other=0).to(STATE) + _biases(
        table, 2 * H + j, BIAS_IH, HAS_IH, live, STATE, IO
    )
    k = tl.load(product_n + b * (N * HP) + j, mask=live, other=0).to(STATE)
    k += _biases(table, 2 * H + j, BIAS_HH, HAS_HH, live, STATE, IO)
    if AFTER:
        r = tl.load(gates, mask=live, other=0).to(STATE) + tl.load(
            product_rz + b * (RZ * HP) + j, mask=live, other=0
        ).to(STATE)
        r += _biases(table, j, BIAS_IH, HAS_IH, live, STATE, IO) + _biases(table, j, BIAS_HH, HAS_HH, live, STATE, IO)
        r = _sigmoid(r)
        tl.store(gates, r.to(MATMUL), mask=live)
        tl.store(gates + 3 * HP, k.to(MATMUL), mask=live)
        k = r * k
    n = _tanh(n + k)
    tl.store(gates + HP, z.to(MATMUL), mask=live)
    tl.store(gates + 2 * HP, n.to(MATMUL), mask=live)

    h = tl.load(carried + at, mask=live, other=0)
    u = n + z * (h - n)
    if RESET == "output":
        u -= tl.load(last_y + at, mask=live, other=0)
    if ZONED:
        u = _mixed(u, h, _passes(table, MASK, MASKED, KEEP, ENDS, t, b, out, live, STATE))

    theta = tl.load(_address(table, THETA, IO) + j, mask=live, other=0).to(STATE)
    v = u - theta
    if EVENT == "always":
        o = tl.zeros(u.shape, STATE) + 1.0
    elif EVENT == "smooth":
        c = tl.minimum(tl.maximum(v, -WIDTH), WIDTH)
        o = HEIGHT * (c + WIDTH / 2 - c * tl.abs(c) / (2 * WIDTH))
    else:
        o = tl.where(v > 0, 1.0, 0.0).to(STATE)
    y = o * u + 0.0  # +0.0 where a unit with a negative u is silent
    before = tl.load(said + b * HP + j, mask=live, other=0)
    tl.store(_address(table, SAID, MATMUL) + row * HP + j, before, mask=live)
    tl.store(said + b * HP + j, y.to(MATMUL), mask=live)
    tl.store(_address(table, U, IO) + out, u.to(IO), mask=live)
    if not LEAN:
        tl.store(_address(table, O, IO) + out, o.to(IO), mask=live)
        tl.store(_address(table, Y, IO) + out, y.to(IO), mask=live)
    if RESET == "output":
        tl.store(last_y + at, y, mask=live)
    tl.store(carried + at, u - o * theta if RESET == "threshold" else u, mask=live)


@triton.jit(do_not_specialize=["t", "B"])
def gru_backward(
    table, product, q_rz, q_n, d_said, d_carried, d_theta, t, B,
    H: tl.constexpr, HP: tl.constexpr, RESET: tl.constexpr, AFTER: tl.constexpr, EVENT: tl.constexpr, LEAN: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ZONED: tl.constexpr, MASKED: tl.constexpr,
    KEEP: tl.constexpr, ENDS: tl.constexpr, HAS_Y: tl.constexpr, HAS_U: tl.constexpr, HAS_O: tl.constexpr, LEARNS: tl.constexpr,
    STATE: tl.constexpr, IO: tl.constexpr, MATMUL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a step's gates, to the left of their nonlinearities, and of the states before it.

    product (B, HP) is W_hhᵀ q of the step after; d_said (B, H) what else reaches y; q_rz and q_n (B, 3HP or 2HP and HP) become
    what W_hh is to multiply; the tape of gradients holds a_n, a_r, a_z and, with reset_after, r ⊙ a_n.
    """
    G: tl.constexpr = 4 if AFTER else 3
    RZ: tl.constexpr = 3 if AFTER else 2
    N: tl.constexpr = 3 if AFTER else 1
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < B * H
    b, j = at // H, at % H
    row = t.to(tl.int64) * B + b
    out = row * H + j

    theta = tl.load(_address(table, THETA, IO) + j, mask=live, other=0).to(STATE)
    dy = tl.load(product + b * HP + j, mask=live, other=0).to(STATE) + tl.load(d_said + at, mask=live, other=0)
    dy += _from_above(table, D_Y, HAS_Y, t, b, j, live, STATE, IO)
    dh = tl.load(d_carried + at, mask=live, other=0)
    d = dh + _from_above(table, D_U, HAS_U, t, b, j, live, STATE, IO)
    if EVENT == "always":
        d += dy
        if LEARNS and RESET == "threshold":
            tl.store(d_theta + at, tl.load(d_theta + at, mask=live, other=0) - dh, mask=live)
    else:
        u = tl.load(_address(table, U, IO) + out, mask=live, other=0).to(STATE)
        o = tl.load(_address(table, O, IO) + out, mask=live, other=0).to(STATE)
        slope = HEIGHT * tl.maximum(1.0 - tl.abs(u - theta) / WIDTH, 0.0)
        do = _from_above(table, D_O, HAS_O, t, b, j, live, STATE, IO) + u * dy
        if RESET == "threshold":
            do -= theta * dh
        dv = slope * do
        d += o * dy + dv
        if LEARNS:
            lost = dv + o * dh if RESET == "threshold" else dv
            tl.store(d_theta + at, tl.load(d_theta + at, mask=live, other=0) - lost, mask=live)

    # The state before this step: what the step before left, or the start.
    later = live & (t > 0)
    h = tl.load(_address(table, U, IO) + out - B * H, mask=later, other=0).to(STATE)
    if RESET == "threshold":
        if EVENT == "always":
            h -= theta
        else:
            h -= theta * tl.load(_address(table, O, IO) + out - B * H, mask=later, other=0).to(STATE)
    h = tl.where(t > 0, h, tl.load(_address(table, START, IO) + at, mask=live & (t == 0), other=0).to(STATE))

    gates = _address(table, GATES, MATMUL) + row * (G * HP) + j
    z = tl.load(gates + HP, mask=live, other=0).to(STATE)
    n = tl.load(gates + 2 * HP, mask=live, other=0).to(STATE)
    kept = tl.zeros(d.shape, STATE)
    if ZONED:
        share = _passes(table, MASK, MASKED, KEEP, ENDS, t, b, out, live, STATE)
        kept = (1.0 - share) * d
        d = share * d
    tl.store(d_carried + at, kept + z * d, mask=live)
    tl.store(d_said + at, -d if RESET == "output" else tl.zeros(d.shape, STATE), mask=live)
    a_n = (1.0 - z) * d * (1.0 - n * n)
    a_z = (h - n) * d * z * (1.0 - z)

    q = q_rz + b * (RZ * HP) + j
    tape = _address(table, D_GATES, MATMUL) + row * (G * HP) + j
    tl.store(q + HP, a_z.to(MATMUL), mask=live)
    tl.store(tape, a_n.to(MATMUL), mask=live)
    tl.store(tape + 2 * HP, a_z.to(MATMUL), mask=live)
    if AFTER:
        r = tl.load(gates, mask=live, other=0).to(STATE)
        a_r = (a_n * tl.load(gates + 3 * HP, mask=live, other=0).to(STATE) * r * (1.0 - r)).to(MATMUL)
        a_n = r * a_n
        tl.store(q, a_r, mask=live)
        tl.store(tape + HP, a_r, mask=live)
        tl.store(tape + 3 * HP, a_n.to(MATMUL), mask=live)
    tl.store(q_n + b * (N * HP) + j, a_n.to(MATMUL), mask=live)


@triton.jit(do_not_specialize=["t", "B"])
def gru_backward_before(
    table, product, q, d_said, t, B, H: tl.constexpr, HP: tl.constexpr,
    STATE: tl.constexpr, MATMUL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """reset_after=False: a_r and what reaches y⁻ through r ⊙ y⁻, from product (B, HP) = W_hnᵀ a_n. q (B, 2HP)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < B * H
    b, j = at // H, at % H
    row = t.to(tl.int64) * B + b
    r = tl.load(_address(table, GATES, MATMUL) + row * (3 * HP) + j, mask=live, other=0).to(STATE)
    y = tl.load(_address(table, SAID, MATMUL) + row * HP + j, mask=live, other=0).to(STATE)
    ds = tl.load(product + b * HP + j, mask=live, other=0).to(STATE)
    a_r = (ds * y * r * (1.0 - r)).to(MATMUL)
    tl.store(q + b * (2 * HP) + j, a_r, mask=live)
    tl.store(_address(table, D_GATES, MATMUL) + row * (3 * HP) + HP + j, a_r, mask=live)
    tl.store(d_said + at, tl.load(d_said + at, mask=live, other=0) + ds * r, mask=live)


@triton.jit(do_not_specialize=["t", "B"])
def lstm_forward(
    table, product, said, hidden, cell, t, B,
    H: tl.constexpr, HP: tl.constexpr, ZONED: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
    ZONED_C: tl.constexpr, MASKED_C: tl.constexpr, KEEP_C: tl.constexpr, ENDS: tl.constexpr,
    HAS_IH: tl.constexpr, HAS_HH: tl.constexpr,
    STATE: tl.constexpr, IO: tl.constexpr, MATMUL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The end of a step from product (B, 4HP); said (B, HP) holds h⁻ for the product, hidden and cell (B, H) the state."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < B * H
    b, j = at // H, at % H
    row = t.to(tl.int64) * B + b
    out = row * H + j
    gates = _address(table, GATES, MATMUL) + row * (4 * HP) + j
    product += b * (4 * HP) + j

    i = tl.load(gates, mask=live, other=0).to(STATE) + tl.load(product, mask=live, other=0).to(STATE)
    i += _biases(table, j, BIAS_IH, HAS_IH, live, STATE, IO) + _biases(table, j, BIAS_HH, HAS_HH, live, STATE, IO)
    f = tl.load(gates + HP, mask=live, other=0).to(STATE) + tl.load(product + HP, mask=live, other=0).to(STATE)
    f += _biases(table, H + j, BIAS_IH, HAS_IH, live, STATE, IO) + _biases(
        table, H + j, BIAS_HH, HAS_HH, live, STATE, IO
    )
    g = tl.load(gates + 2 * HP, mask=live, other=0).to(STATE) + tl.load(product + 2 * HP, mask=live, other=0).to(STATE)
    g += _biases(table, 2 * H + j, BIAS_IH, HAS_IH, live, STATE, IO)
    g += _biases(table, 2 * H + j, BIAS_HH, HAS_HH, live, STATE, IO)
    o = tl.load(gates + 3 * HP, mask=live, other=0).to(STATE) + tl.load(product + 3 * HP, mask=live, other=0).to(STATE)
    o += _biases(table, 3 * H + j, BIAS_IH, HAS_IH, live, STATE, IO)
    o += _biases(table, 3 * H + j, BIAS_HH, HAS_HH, live, STATE, IO)
    i, f, g, o = _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)
    tl.store(gates, i.to(MATMUL), mask=live)
    tl.store(gates + HP, f.to(MATMUL), mask=live)
    tl.store(gates + 2 * HP, g.to(MATMUL), mask=live)
    tl.store(gates + 3 * HP, o.to(MATMUL), mask=live)

    old_c = tl.load(cell + at, mask=live, other=0)
    c = f * old_c + i * g
    h = o * _tanh(c)
    if ZONED:
        old_h = tl.load(hidden + at, mask=live, other=0)
        h = _mixed(h, old_h, _passes(table, MASK, MASKED, KEEP, ENDS, t, b, out, live, STATE))
    if ZONED_C:
        c = _mixed(c, old_c, _passes(table, MASK_C, MASKED_C, KEEP_C, ENDS, t, b, out, live, STATE))
    before = tl.load(said + b * HP + j, mask=live, other=0)
    tl.store(_address(table, SAID, MATMUL) + row * HP + j, before, mask=live)
    tl.store(said + b * HP + j, h.to(MATMUL), mask=live)
    tl.store(_address(table, Y, IO) + out, h.to(IO), mask=live)
    tl.store(_address(table, U, IO) + out, c.to(IO), mask=live)
    tl.store(hidden + at, h, mask=live)
    tl.store(cell + at, c, mask=live)


@triton.jit(do_not_specialize=["t", "B"])
def lstm_backward(
    table, product, q, d_hidden, d_cell, t, B,
    H: tl.constexpr, HP: tl.constexpr, ZONED: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr,
    ZONED_C: tl.constexpr, MASKED_C: tl.constexpr, KEEP_C: tl.constexpr, ENDS: tl.constexpr,
    HAS_H: tl.constexpr, HAS_C: tl.constexpr,
    STATE: tl.constexpr, IO: tl.constexpr, MATMUL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a step's gates, to the left of their nonlinearities, into q (B, 4HP) and the tape, and of h⁻ and c⁻."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < B * H
    b, j = at // H, at % H
    row = t.to(tl.int64) * B + b
    out = row * H + j
    gates = _address(table, GATES, MATMUL) + row * (4 * HP) + j
    i = tl.load(gates, mask=live, other=0).to(STATE)
    f = tl.load(gates + HP, mask=live, other=0).to(STATE)
    g = tl.load(gates + 2 * HP, mask=live, other=0).to(STATE)
    o = tl.load(gates + 3 * HP, mask=live, other=0).to(STATE)
    old_c = tl.load(_address(table, U, IO) + out - B * H, mask=live & (t > 0), other=0).to(STATE)
    old_c = tl.where(t > 0, old_c, tl.load(_address(table, START, IO) + at, mask=live & (t == 0), other=0).to(STATE))

    dh = tl.load(product + b * HP + j, mask=live, other=0).to(STATE) + tl.load(d_hidden + at, mask=live, other=0)
    dh += _from_above(table, D_Y, HAS_H, t, b, j, live, STATE, IO)
    dc = tl.load(d_cell + at, mask=live, other=0) + _from_above(table, D_U, HAS_C, t, b, j, live, STATE, IO)
    kept_h = tl.zeros(dh.shape, STATE)
    kept_c = tl.zeros(dh.shape, STATE)
    if ZONED:
        share = _passes(table, MASK, MASKED, KEEP, ENDS, t, b, out, live, STATE)
        kept_h = (1.0 - share) * dh
        dh = share * dh
    if ZONED_C:
        share = _passes(table, MASK_C, MASKED_C, KEEP_C, ENDS, t, b, out, live, STATE)
        kept_c = (1.0 - share) * dc
        dc = share * dc
    s = _tanh(f * old_c + i * g)
    dc += dh * o * (1.0 - s * s)
    tl.store(d_hidden + at, kept_h, mask=live)
    tl.store(d_cell + at, kept_c + f * dc, mask=live)

    q += b * (4 * HP) + j
    tape = _address(table, D_GATES, MATMUL) + row * (4 * HP) + j
    a = (dc * g * i * (1.0 - i)).to(MATMUL)
    tl.store(q, a, mask=live)
    tl.store(tape, a, mask=live)
    a = (dc * old_c * f * (1.0 - f)).to(MATMUL)
    tl.store(q + HP, a, mask=live)
    tl.store(tape + HP, a, mask=live)
    a = (dc * i * (1.0 - g * g)).to(MATMUL)
    tl.store(q + 2 * HP, a, mask=live)
    tl.store(tape + 2 * HP, a, mask=live)
    a = (dh * s * o * (1.0 - o)).to(MATMUL)
    tl.store(q + 3 * HP, a, mask=live)
    tl.store(tape + 3 * HP, a, mask=live)


@triton.jit
def _of_gate(sums, gate: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 4)[:, None] == gate, sums, 0.0), axis=0)


@triton.jit
def stream_step(
    values, columns, starts, seen, said, onward, hidden, bias, theta, counts,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, RESET: tl.constexpr, EVENT: tl.constexpr, KEEP: tl.constexpr,
    PART: tl.constexpr, HANDS_ON_STATE: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """A step of ROWS units of one sample: of the blocks that exist those are read whose column is not zero.

    Block i is values[i] (ROWS), its column of seen = (x, y⁻, r ⊙ y⁻) columns[i]; starts (groups · 4 + 1) bounds the blocks of r,
    z, n from x and n from y⁻ of each group of units. PART "all"; reset_after=False takes two launches: "reset" makes r ⊙ y⁻,
    "rest" all else. said and onward (H) become y for the next step and for the next layer; counts: events, blocks read.
    """
    group = tl.program_id(0)
    gate = tl.arange(0, 4)
    lane = tl.arange(0, ROWS)
    first = tl.load(starts + group * 4 + gate)
    last = tl.load(starts + group * 4 + gate + 1)
    if PART == "reset":
        last = tl.where(gate == 0, last, first)
    elif PART == "rest":
        last = tl.where(gate == 0, first, last)
    # What the end of the step needs is on its way while the blocks are.
    j = group * ROWS + lane
    live_j = j < H
    y = tl.load(seen + D + j, mask=live_j, other=0)
    h = tl.load(hidden + j, mask=live_j, other=0)
    threshold = tl.load(theta + j, mask=live_j, other=0)
    b_r = tl.load(bias + j, mask=live_j, other=0)
    b_z = tl.load(bias + H + j, mask=live_j, other=0)
    b_n = tl.load(bias + 2 * H + j, mask=live_j, other=0)
    b_k = tl.load(bias + 3 * H + j, mask=live_j, other=0)

    sums = tl.zeros((4, ROWS), STATE)
    read = tl.zeros((4, CHUNK), tl.int32)
    for chunk in range(CHUNKS):
        i = first[:, None] + chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        live = i < last[:, None]
        x = tl.load(seen + tl.load(columns + i, mask=live, other=0), mask=live, other=0)
        spoke = live & (x != 0)
        w = tl.load(values + i[:, :, None] * ROWS + lane[None, None, :], mask=spoke[:, :, None], other=0).to(STATE)
        sums += tl.sum(w * x[:, :, None], axis=1)
        read += spoke.to(tl.int32)
    tl.atomic_add(counts + 1, tl.sum(tl.sum(read, axis=1), axis=0).to(tl.int64))

    if PART == "reset":
        tl.store(seen + D + H + j, _sigmoid(_of_gate(sums, 0) + b_r) * y, mask=live_j)
    else:
        z = _sigmoid(_of_gate(sums, 1) + b_z)
        k = _of_gate(sums, 3) + b_k
        if PART == "all":
            k *= _sigmoid(_of_gate(sums, 0) + b_r)
        n = _tanh(_of_gate(sums, 2) + b_n + k)
        u = n + z * (h - n)
        if RESET == "output":
            u -= y
        u = u + KEEP * (h - u)
        o = tl.where((u - threshold > 0) | (EVENT == "always"), 1.0, 0.0).to(STATE)
        y = o * u + 0.0
        tl.store(said + j, y, mask=live_j)
        tl.store(onward + j, u if HANDS_ON_STATE else y, mask=live_j)
        tl.store(hidden + j, u - o * threshold if RESET == "threshold" else u, mask=live_j)
        tl.atomic_add(counts, tl.sum(tl.where(live_j, o, 0.0), axis=0).to(tl.int64))
