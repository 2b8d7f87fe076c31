"""Every tolerance of the suite, each with the line of reasoning it comes from."""

import numpy as np

# --- training side: cells, activity, masks ---------------------------------------------------------------------------

EPS64 = 2.0**-52

# A cell against another order of the same sums: 4 · n · eps · Σ|w·x| with n <= 32 terms and Σ|w·x| <= 16 per gate, and
# at most 8 steps that each pass on what came before.
CELL_F64 = 4 * 32 * EPS64 * 16 * 8

# A weight's gradient sums at most 64 (time, batch) pairs, each as exact as the cell.
GRADIENT_F64 = 64 * CELL_F64

# Central differences with step 1e-6: rounding eps·|f|/step ~ 1e-9, truncation step²·|f'''| ~ 1e-11, and where a corner
# of the triangle falls inside the step, step · slope / 4 with slope height / half_width = 1, times a gain of a few.
GRADCHECK = {"eps": 1e-6, "atol": 2e-6, "rtol": 0.0}

# Two networks whose sums differ by terms that are exactly 0, so by their order alone: a cell a layer, three layers and a reader,
# at most 20 steps that each pass on what came before (CELL_F64 covers 8).
SHRUNK_F64 = 4 * 3 * CELL_F64

# A mean of at most 64 float64 values in [0, 1].
MEAN_F64 = 64 * EPS64

# The same mean as the difference of two float32 values, mean = own + (mean - own): two roundings of values below 1.
DISTRIBUTED_F32 = 4 * 2.0**-23

# Norms of blocks of at most 9 weights below 6 in float64: at most 12 operations on values below 20, and a division.
LASSO_F64 = 16 * EPS64 * 20

# A threshold is eight float64 operations of either order, relative.
THRESHOLD_F64 = 16 * EPS64


# --- native training kernels ------------------------------------------------------------------------------------------


def gradient_f32(steps, batch, units, largest):
    """Bound of a float32 gradient against float64 on the same numbers with the same events.

    A gradient is a sum of steps·batch terms, each of which passed through a product of 3·units terms at most `steps` times:
    4·n·eps·Σ|terms| with n = steps·batch + 3·units. The sizes of the terms sum up to no more than 8·steps times the largest
    gradient of the tensor here, where signs are random; what is all but zero is measured with 1 for that.
    """
    return 4 * (steps * batch + 3 * units) * 2.0**-24 * 8 * steps * max(largest, 1.0)


# --- a GPU's cells in bfloat16 -----------------------------------------------------------------------------------------

EPS_BF16 = 2.0**-9  # relative error of one rounding to bfloat16

# Before a gate stand two products, which round to bfloat16 (|W x| and |W y| below 4 each), of operands of which y was rounded
# (Σ|w y| below 4): an error of at most 12 roundings, with a slope of at most 1 behind it. What goes out (below 4) rounds once
# more. At most 3 steps pass it on, each through products of a gain of at most 2 and a gate: 12 · (1 + 2 + 4) + 4.
BF16_CELL = (12 * 7 + 4) * EPS_BF16

# A gradient is a sum over at most 3 steps of terms that pass three times: each factor on the way (four gates of the tape, the
# product of the step after, the gradient's own tape) was rounded or is as wrong as the cell, relative to the largest of all.
BF16_GRADIENT = BF16_CELL


# A float32 stream against float64 on the same rounded weights: sums of at most 28 terms below 16 in all, two layers, five steps
# that pass on what came before.
STREAM_F32 = 4 * 28 * 2.0**-24 * 16 * 2 * 5


# --- runtime side: kernels and one step of the engine ----------------------------------------------------------------

EPS32 = 2.0**-24  # relative error of one float32 operation
TINY32 = 2.0**-126  # below this the engine counts a number as zero

# 1 / (1 + e^-x): the exponential's relative error of 2e-7 weighs at most s·(1-s) <= 1/4, sum and quotient round once each.
# 5e-8 + 2·6e-8 = 1.7e-7 at worst; the worst of all float32 between 2^-14 and 100, both signs, is 1.0643e-7.
SIGMOID_F32 = 1.1e-7

# tanh x = 2·sigmoid(2x) - 1 doubles that; the worst of the same numbers is 2.1286e-7.
TANH_F32 = 2.2e-7


def product_f32(terms, magnitude):
    """Bound of a float32 sum of ``terms`` products, any order, against float64; ``magnitude`` is Σ|w·x|.

    A term passes one product and at most ``terms`` sums, each of relative error EPS32: terms·EPS32·Σ|w·x|. Four of these
    leave room for the chains' last sums and for second order. A product that underflows is lost whole.
    """
    return 4 * terms * EPS32 * magnitude + terms * TINY32


def matrix_product(weight, bias, x, x_error):
    """(W x + b, bound of its float32 error) where ``x`` itself may be wrong by ``x_error``."""
    w = weight.to_dense().astype(np.float64)
    size = np.abs(w)
    flipped = 0.0
    if weight.precision == "w8a8" and len(x):
        x, x_error, flipped = rounded_input(weight, x, x_error)
    bound = product_f32(w.shape[1] + 1, size @ np.abs(x) + np.abs(bias)) + (1 + 4 * w.shape[1] * EPS32) * (
        size @ x_error
    )
    return w @ x + bias, bound + size @ np.broadcast_to(flipped, x.shape)


def rounded_input(weight, x, x_error):
    """(x as a w8a8 product reads it, bound of its error, what one code more would change where the code is in doubt).

    The engine rounds x · (127 / largest), two float32 operations and the largest's own error away from the exact quotient;
    where that lies as near to a half, the code may be the next one. Code times scale rounds twice more.
    """
    largest = np.abs(x).max()
    if not np.isfinite(largest) or largest <= 1e-30:
        return weight._seen(x), x_error, 0.0
    error = np.broadcast_to(x_error, x.shape)
    share = error.max() / largest + 4 * EPS32
    quotient = x * 127 / largest
    doubt = error * 127 / largest + np.abs(quotient) * share
    flips = np.abs(np.abs(quotient) % 1 - 0.5) <= doubt
    seen = weight._seen(x)
    return seen, np.abs(seen) * share, flips * largest / 127


def memory_f32(weight, bias, sent):
    """Bound of the error of a memory of changes whose last values sent were the rows of ``sent``, from 0 or a new sum on.

    A change is wrong by EPS32 of itself and adds |w·d|. A row's memory is a chain of float32 sums, one for every term that
    ever entered it, of which none is larger than the magnitude: |b| and all |w·d| so far.
    """
    w = np.abs(weight.to_dense().astype(np.float64))
    d = np.abs(np.diff(sent.astype(np.float64), axis=0, prepend=0))
    terms = np.count_nonzero(d) + len(d)
    return product_f32(terms, np.abs(bias) + w @ d.sum(0))


def changes_step(op, at, side, x, x_error, state, found):
    """(memory, bound) of one product that reads changes, and in ``found`` also what was sent; the step before is exact.

    What stands within its error of the threshold may be sent or not: the memory is then wrong by all of the change.
    """
    ih = side == "x"
    weight, bias, threshold = (
        (op.weight_ih, op.bias_ih, op.delta_input) if ih else (op.weight_hh, op.bias_hh, op.delta_hidden)
    )
    sent, memory, age = (state[f"{at}.{n}"].astype(np.float64) for n in (f"sent_{side}", f"memory_{side}", "age"))
    d = x - sent
    d_error = x_error + EPS32 * (np.abs(d) + x_error)
    changed = np.abs(d) > np.float32(threshold)
    doubt = (np.abs(np.abs(d) - np.float32(threshold)) <= d_error) & (d_error > 0) & (d != 0)
    sent_error = np.where(doubt, np.abs(d) + x_error, np.where(changed, x_error, 0.0))
    sent = np.where(changed, x, sent)
    if age[0] + 1 == 1024:
        new, bound = matrix_product(weight, bias.astype(np.float64), sent, sent_error)
    else:
        delta = np.where(changed, d, 0)
        delta_error = np.where(doubt, np.abs(d) + d_error, np.where(changed, d_error, 0.0))
        new, bound = matrix_product(weight, memory, delta, delta_error)
    found[f"{at}.sent_{side}"], found[f"{at}.memory_{side}"] = (sent, sent_error), (new, bound)
    found[f"{at}.age"] = (age + 1) % 1024, np.zeros(1)
    return new, bound


def both_products(op, at, x, x_error, state, found):
    """((W_ih x + b_ih, bound), (W_hh h + b_hh, bound)) of a dense cell, or the memories in their place."""
    h = state[f"{at}.h"].astype(np.float64)
    none = np.zeros(len(h))
    of_x = (
        matrix_product(op.weight_ih, op.bias_ih.astype(np.float64), x, x_error)
        if op.delta_input is None
        else changes_step(op, at, "x", x, x_error, state, found)
    )
    of_h = (
        matrix_product(op.weight_hh, op.bias_hh.astype(np.float64), h, none)
        if op.delta_hidden is None
        else changes_step(op, at, "h", h, none, state, found)
    )
    return of_x, of_h


def gru_step(op, x, x_error, seen, h, products=None):
    """((1-z)·n + z·h, bound of its float32 error); ``seen`` and ``h`` are exact, for every step is teacher-forced.

    The sigmoid's slope is at most 1/4, that of tanh at most 1, so an error e before them is e/4 and e behind them, and
    their own error comes on top. A product a·b of values wrong by e and f is wrong by |a|·f + |b|·e + e·f.
    """
    none = np.zeros(len(seen))
    (gi, gi_error), (gh, gh_error) = products or (
        matrix_product(op.weight_ih, op.bias_ih.astype(np.float64), x, x_error),
        matrix_product(op.weight_hh, op.bias_hh.astype(np.float64), seen, none),
    )
    (ir, iz, inn), (hr, hz, hn) = np.split(gi, 3), np.split(gh, 3)
    (eir, eiz, ein), (ehr, ehz, ehn) = np.split(gi_error, 3), np.split(gh_error, 3)
    r, z = _sigmoid(ir + hr), _sigmoid(iz + hz)
    r_error = (eir + ehr + EPS32 * np.abs(ir + hr)) / 4 + SIGMOID_F32
    z_error = (eiz + ehz + EPS32 * np.abs(iz + hz)) / 4 + SIGMOID_F32
    if op.reset_after:
        inner = inn + r * hn
        inner_error = ein + np.abs(hn) * r_error + r * ehn + r_error * ehn + 2 * EPS32 * (np.abs(inn) + np.abs(r * hn))
    else:
        scaled_error = np.abs(seen) * r_error + EPS32 * np.abs(seen)
        hn, ehn = (
            np.split(v, 3)[2]
            for v in matrix_product(op.weight_hh, op.bias_hh.astype(np.float64), r * seen, scaled_error)
        )
        inner = inn + hn
        inner_error = ein + ehn + EPS32 * (np.abs(inn) + np.abs(hn))
    n, n_error = np.tanh(inner), inner_error + TANH_F32
    u = (1 - z) * n + z * h
    error = np.abs(h - n) * z_error + (1 - z) * n_error + z_error * n_error + 4 * EPS32 * (np.abs(h) + np.abs(n))
    return u, error + 4 * TINY32


def egru_step(op, x, x_error, y, h):
    """(u, bound of its float32 error) of an EGRU: the GRU's step, then reset "output" and zoneout, one rounding each."""
    u, error = gru_step(op, x, x_error, y, h)
    if op.reset == "output":
        u = u - y
        error = error + EPS32 * (np.abs(u) + np.abs(y))
    zoned = op.zoneout * h + (1 - op.zoneout) * u
    return zoned, (1 - op.zoneout) * error + 4 * EPS32 * op.zoneout * (np.abs(h) + np.abs(u)) + EPS32 * np.abs(zoned)


def gate_sums(op, x, x_error, state, at, found):
    """(W_ih x + b_ih + W_hh h + b_hh, bound of its float32 error): two products and one sum."""
    (gi, gi_error), (gh, gh_error) = both_products(op, at, x, x_error, state, found)
    return gi + gh, gi_error + gh_error + EPS32 * np.abs(gi + gh) + EPS32 * (gi_error + gh_error)


def lstm_step(op, x, x_error, state, at, found):
    """State h and c of an LSTM; those of the step before are exact.

    Slopes as for the GRU. f·c' + i·g: a product of values wrong by e and f is wrong by |a|·f + |b|·e + e·f, and rounds
    once; so does the sum: together at most 2·EPS32·(|f c'| + |i g|), first order, doubled for the rest.
    """
    c = state[f"{at}.c"].astype(np.float64)
    total, total_error = gate_sums(op, x, x_error, state, at, found)
    (i, f, g, o), (ei, ef, eg, eo) = np.split(total, 4), np.split(total_error, 4)
    i, f, o, g = _sigmoid(i), _sigmoid(f), _sigmoid(o), np.tanh(g)
    ei, ef, eo, eg = ei / 4 + SIGMOID_F32, ef / 4 + SIGMOID_F32, eo / 4 + SIGMOID_F32, eg + TANH_F32
    new = f * c + i * g
    error = (
        np.abs(c) * ef + i * eg + np.abs(g) * ei + ei * eg + 4 * EPS32 * (np.abs(f * c) + np.abs(i * g)) + 4 * TINY32
    )
    t, et = np.tanh(new), error + TANH_F32
    return {
        f"{at}.c": (new, error),
        f"{at}.h": (o * t, np.abs(t) * eo + o * et + eo * et + 2 * EPS32 * np.abs(o * t) + 4 * TINY32),
    }


def rnn_step(op, x, x_error, state, at, found):
    """State of a plain RNN: tanh and relu have slopes of at most 1, and relu rounds nothing."""
    total, error = gate_sums(op, x, x_error, state, at, found)
    if op.nonlinearity == "relu":
        return {f"{at}.h": (np.maximum(total, 0), error)}
    return {f"{at}.h": (np.tanh(total), error + TANH_F32)}


def layer_norm(op, x, x_error):
    """((x - mean) / sqrt(var + epsilon) · weight + bias, bound of its float32 error).

    A mean is a sum of n terms and one division. What is wrong by e and passes 1/sqrt, which falls and is convex, is wrong
    by at most f(a - e) - f(a); the computed variance is never negative, so a - e is never below epsilon. 1/sqrt itself
    rounds twice, and each product and sum once.
    """
    n = len(x)
    weight, bias = op.weight.astype(np.float64), op.bias.astype(np.float64)
    mean = x.mean()
    mean_error = x_error.mean() + product_f32(n, (np.abs(x) + x_error).sum()) / n + 2 * EPS32 * np.abs(mean)
    d = x - mean
    d_error = (x_error + mean_error) * (1 + 2 * EPS32) + 2 * EPS32 * np.abs(d)
    a = (d**2).mean() + op.epsilon
    squares = (np.abs(d) + d_error) ** 2
    a_error = (squares - d**2).mean() + product_f32(n, squares.sum()) / n + 4 * EPS32 * (squares.mean() + op.epsilon)
    scale, most = a**-0.5, max(a - a_error, op.epsilon * (1 - 4 * EPS32)) ** -0.5
    scale_error = most - scale + 4 * EPS32 * most
    normed = d * scale
    error = np.abs(d) * scale_error + d_error * (scale + scale_error)
    error = error + 2 * EPS32 * (np.abs(normed) + error)
    value = normed * weight + bias
    return value, np.abs(weight) * error + 4 * EPS32 * (
        np.abs(normed * weight) + np.abs(weight) * error + np.abs(bias)
    ) + 4 * TINY32


def program_step(program, x, state):
    """One step of a whole program from an exact float32 state: {"i.u" | "i.h" | "i.c" | "out": (float64 value, bound)}.

    What the next op reads is wrong by the bound; a unit whose event may fall either way is wrong by all it could say.
    """
    found, value, error = {}, x, None
    of_linear = None  # what the last linear read
    others = {"lstm": lstm_step, "rnn": rnn_step}
    for i, op in enumerate(program.ops):
        if op.kind == "embedding":
            value = op.weight[x].astype(np.float64)
            error = np.zeros(len(value))
            continue
        value = np.asarray(value, np.float64)
        error = np.zeros(len(value)) if error is None else error
        if op.kind == "linear":
            of_linear = value, error
            value, error = matrix_product(op.weight, op.bias.astype(np.float64), value, error)
        elif op.kind == "conv1d":
            past = state.get(f"{i}.x", np.zeros((0, op.inputs))).astype(np.float64)
            value = np.concatenate([past, value[None]])[:: op.dilation].reshape(-1)
            error = np.concatenate([np.zeros(len(value) - op.inputs), error])
            value, error = matrix_product(op.weight, op.bias.astype(np.float64), value, error)
        elif op.kind == "gru":
            h = state[f"{i}.h"].astype(np.float64)
            products = both_products(op, i, value, error, state, found)
            value, error = found[f"{i}.h"] = gru_step(op, value, error, h, h, products)
        elif op.kind in ("relu", "events", "kwta"):
            # Slope at most 1, nothing rounds; found["i.u"] is how far a value lies from where it would fall silent.
            above = value - kwta_limit(op, value) if op.kind == "kwta" else value
            if op.kind == "kwta":
                error = np.full(len(value), error.max())
            exact = error == 0
            found[f"{i}.u"] = above, np.where(exact, -1.0, error)
            if op.kind == "relu":
                value = np.maximum(value, 0)
            elif op.kind == "kwta":
                error = np.where((np.abs(above) <= error) & ~exact, np.abs(value) + error, error)
                value = np.where(_winners(op, value), value, 0)
        elif op.kind == "log_softmax":
            value, error = log_softmax(value, error)
        elif op.kind == "cluster":
            value, error = cluster(op, value, error, *of_linear)
        elif op.kind == "top_k":
            value, error = top_k(op, value, error)
        elif op.kind == "layer_norm":
            value, error = layer_norm(op, value, error)
        elif op.kind in others:
            found |= others[op.kind](op, value, error, state, i, found)
            value, error = found[f"{i}.h"]
        else:
            y, h = (state[f"{i}.{n}"].astype(np.float64) for n in "yh")
            u, error = found[f"{i}.u"] = egru_step(op, value, error, y, h)
            value = u
            if op.output == "events" and op.event == "threshold":
                value = u * (u > op.threshold)
                error = np.where(np.abs(u - op.threshold) <= error, np.abs(u) + error, error)
    found["out"] = value, error
    return found


def _winners(op, value):
    parts = value.reshape(op.groups, -1)
    order = np.argsort(-parts, axis=1, kind="stable")[:, : op.k]
    won = np.zeros(parts.shape, bool)
    np.put_along_axis(won, order, True, axis=1)
    return won.reshape(-1)


def kwta_limit(op, value):
    """(units,) half way between the last value of its part that speaks and the first that does not."""
    parts = -np.sort(-value.reshape(op.groups, -1), axis=1)
    silent = parts[:, min(op.k, parts.shape[1] - 1)] if op.k < parts.shape[1] else parts[:, -1] - 1
    return np.repeat((parts[:, op.k - 1] + silent) / 2, parts.shape[1])


def log_softmax(value, error):
    """(x - log sum exp x, bound). The sum of n exponentials, each wrong by 2e-7 of itself and rounded n times, moves its
    logarithm by as much; x and the logarithm round at most three times; an error of x counts once there and once here.
    """
    below = value - value.max()
    log_sum = np.log(np.exp(below).sum())
    n = len(value)
    own = 4e-7 + 2 * n * EPS32 + 4 * EPS32 * (np.abs(below) + np.abs(value) + np.abs(value.max()) + np.abs(log_sum))
    return below - log_sum, own + error + error.max()


def cluster(op, q, q_error, x, x_error):
    """(q with the words of its cluster in the cluster's place, bound): two products, their log-softmax, and one sum."""
    narrow = matrix_product(op.projection, np.zeros(op.projection.shape[0]), x, x_error)
    words, error = log_softmax(*matrix_product(op.weight, op.bias.astype(np.float64), *narrow))
    words = q[op.at] + words
    error = q_error[op.at] + error
    error = error + 2 * EPS32 * (np.abs(words) + error)
    parts = zip((q, q_error), (words, error), strict=True)
    return tuple(np.concatenate([of[: op.at], new, of[op.at + 1 :]]) for of, new in parts)


def top_k(op, value, error):
    """(indices and values of the k largest, bound): a place in the order is certain where its neighbours are far enough."""
    order = np.argsort(-value, kind="stable")
    ranked = value[order]
    close = np.diff(ranked, prepend=np.inf, append=-np.inf) >= -2 * error.max()
    doubt = (close[:-1] | close[1:])[: op.k] & (error.max() > 0)
    return np.concatenate([order[: op.k], ranked[: op.k]]), np.concatenate(
        [np.where(doubt, len(value), 0), np.full(op.k, error.max())]
    )


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


# Two float32 players of one trained dense network, each running on its own state: a step's error is below 1e-6 there (bounds
# above), and a gate that keeps (z -> 1) passes it on for up to some hundred steps.
FREE_RUNNING_F32 = 1e-4

# An int8 weight is a code times its scale: either rounds by 2^-24 of the weight, and both may do so in two roundings compared.
ROUNDED_I8 = 2.0**-22

# An LSTM of 128 units whose weights (below 128^-1/2) and values are rounded to 7 or 8 bits by another engine: 256 products in a
# gate, each with an error of at most 1/127 of 128^-1/2 on values of about 1, of random signs: 16 · 0.0007 = 0.011, as much for
# the values; about twice their sum. Sums that overflow are 0.2 off.
RIVAL_INT8 = 0.05

# One loss or logit of a small float32 network, its sums taken in another order: some ten roundings, relative.
REORDERED_F32 = 1e-6
# A split read as one stream and as 32 pieces that are warmed up, or by the engine: some hundred of them.
STREAMED_F32 = 1e-5
# A float32 training by one process and by two, dozens of steps, each fed by what the one before rounded.
TRAINED_F32 = 1e-3
# The same in float64 over 20 steps: what the loop promises.
TRAINED_F64 = 1e-9
# A log-mel spectrum in float32 against its equation in float64: 32 products of a transform, their squares' sum and a logarithm,
# which near FLOOR makes of a relative error an absolute one.
SPECTRUM_F32 = 1e-4
# A sample of 16 bits: what rounding to its grid, and a full scale of 2^15 - 1 in place of 2^15, move.
PCM16 = 2.0**-14
