"""The definition of the cells, against torch, a scalar loop, finite differences and a backward derived by hand."""

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sparsefold.nn import Triangle
from sparsefold.nn.reference import EGRUTrace, Event, Reset, egru, gru
from tolerances import CELL_F64, GRADCHECK, GRADIENT_F64

torch.set_num_threads(1)

FORMS = list(itertools.product(get_args(Reset), (True, False)))


def inputs(T=5, B=3, I=4, H=6, seed=0, scale=1.0) -> dict[str, Tensor]:  # noqa: E741
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "x": draw(T, B, I),
        "y0": draw(B, H).clamp(min=0),
        "h0": draw(B, H) / 2,
        "weight_ih": draw(3 * H, I) / I**0.5,
        "weight_hh": draw(3 * H, H) / H**0.5,
        "bias_ih": draw(3 * H) / 4,
        "bias_hh": draw(3 * H) / 4,
        "threshold": draw(H).abs() / 8 + 0.02,
    }


def leaves(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone().requires_grad_() for k, v in p.items()}


def close(a: Tensor, b: Tensor, atol: float = CELL_F64) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def as_torch_gru(p: dict[str, Tensor]) -> torch.nn.GRU:
    layer = torch.nn.GRU(p["x"].shape[2], p["h0"].shape[1]).double()
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(layer, name + "_l0").copy_(p[name])
    return layer


def test_a_unit_that_always_speaks_is_torch_gru():
    p = leaves(inputs())
    p["threshold"] = torch.zeros(6, dtype=torch.float64)
    layer = as_torch_gru(p)
    start = p["h0"].detach().clone().requires_grad_()
    x = p["x"].detach().clone().requires_grad_()
    wanted, last = layer(x, start[None])
    # One state in two places: what was said and what is carried.
    trace = egru(**{**p, "y0": p["h0"]}, reset="none", event="always")
    for out in (trace.y, trace.u):
        close(out, wanted)
    close(trace.y_n, last[0])
    close(trace.h_n, last[0])
    assert torch.equal(trace.o, torch.ones_like(trace.o))
    cotangent = torch.randn_like(wanted)
    ((trace.y * cotangent).sum() + trace.h_n.square().sum()).backward()
    ((wanted * cotangent).sum() + last.square().sum()).backward()
    close(p["x"].grad, x.grad, GRADIENT_F64)
    close(p["h0"].grad, start.grad, GRADIENT_F64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        close(p[name].grad, getattr(layer, name + "_l0").grad, GRADIENT_F64)


def test_gru_is_torch_gru():
    p = leaves(inputs())
    layer = as_torch_gru(p)
    wanted, last = layer(p["x"], p["h0"][None])
    names = ("x", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    output, h = gru(*(p[name] for name in names))
    close(output, wanted)
    close(h, last[0])
    cotangent = torch.randn_like(wanted)
    mine = torch.autograd.grad((output * cotangent).sum(), [p[name] for name in names])
    theirs = torch.autograd.grad(
        (wanted * cotangent).sum(), [p["x"], p["h0"], *(getattr(layer, name + "_l0") for name in names[2:])]
    )
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, GRADIENT_F64)


def scalar_loop(p, *, reset, reset_after, event, surrogate, zoneout=0.0, dense=False):
    """The equations once more, one number at a time. `dense` is the GRU: y and h are both u."""
    x, y, h = p["x"].tolist(), p["y0"].tolist(), p["h0"].tolist()
    W, U, bi, bh = (p[k].tolist() for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    theta = [max(t, 0.0) for t in p["threshold"].tolist()]
    H = len(theta)

    def sigmoid(a):
        return 1 / (1 + math.exp(-a))

    def dot(a, b):
        return sum(i * j for i, j in zip(a, b, strict=True))

    ys, us, os = [], [], []
    for x_t in x:
        y_new, h_new, u_t, o_t = [], [], [], []
        for b, x_b in enumerate(x_t):
            r = [sigmoid(dot(W[j], x_b) + bi[j] + dot(U[j], y[b]) + bh[j]) for j in range(H)]
            row_u, row_o, row_y, row_h = [], [], [], []
            for j in range(H):
                jz, jn = H + j, 2 * H + j
                z = sigmoid(dot(W[jz], x_b) + bi[jz] + dot(U[jz], y[b]) + bh[jz])
                if reset_after:
                    recurrent = r[j] * (dot(U[jn], y[b]) + bh[jn])
                else:
                    recurrent = dot(U[jn], [r[i] * y[b][i] for i in range(H)]) + bh[jn]
                n = math.tanh(dot(W[jn], x_b) + bi[jn] + recurrent)
                u = (1 - z) * n + z * h[b][j] - (y[b][j] if reset == "output" else 0)
                u = zoneout * h[b][j] + (1 - zoneout) * u
                v = u - theta[j]
                if event == "always":
                    o = 1.0
                elif event == "threshold":
                    o = float(v > 0)
                else:
                    w = surrogate.half_width
                    c = min(max(v, -w), w)  # the integral of the triangle, by its two halves
                    o = surrogate.height * ((c + w) ** 2 / (2 * w) if c < 0 else w / 2 + c - c * c / (2 * w))
                row_u.append(u)
                row_o.append(o)
                row_y.append(o * u)
                row_h.append(u - o * theta[j] if reset == "threshold" else u)
            u_t.append(row_u)
            o_t.append(row_o)
            y_new.append(row_u if dense else row_y)
            h_new.append(row_u if dense else row_h)
        y, h = y_new, h_new
        ys.append(y)
        us.append(u_t)
        os.append(o_t)
    return EGRUTrace(*(torch.tensor(a, dtype=torch.float64) for a in (ys, us, os, y, h)))


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
@pytest.mark.parametrize("event", get_args(Event))
@pytest.mark.parametrize("zoneout", [0.0, 0.3])
def test_egru_equals_the_equations_one_number_at_a_time(reset, reset_after, event, zoneout):
    p = inputs()
    p["threshold"][0] = -0.4  # used as 0
    form: dict[str, Any] = {"reset": reset, "reset_after": reset_after, "event": event, "zoneout": zoneout}
    form["surrogate"] = Triangle(0.7, 0.3)
    got, wanted = egru(**p, **form), scalar_loop(p, **form)
    assert 0 < wanted.o.mean() <= 1
    for a, b in zip(got, wanted, strict=True):
        close(a, b)


def test_gru_with_reset_before_the_product_equals_the_equations():
    p = inputs()
    p["y0"] = p["h0"]
    wanted = scalar_loop(p, reset="none", reset_after=False, event="always", surrogate=None, dense=True)
    names = ("x", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    output, h = gru(*(p[name] for name in names), reset_after=False)
    close(output, wanted.y)
    close(h, wanted.h_n)


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
def test_the_smooth_cell_passes_finite_differences(reset, reset_after):
    p = leaves(inputs(T=3, B=2, I=2, H=3))

    def run(*values):
        named = dict(zip(p, values, strict=True))
        return tuple(
            egru(
                **named, reset=reset, reset_after=reset_after, event="smooth", surrogate=Triangle(0.8, 0.8), zoneout=0.2
            )
        )

    assert torch.autograd.gradcheck(run, tuple(p.values()), **GRADCHECK)


@pytest.mark.parametrize("paper", [False, True])
def test_the_step_cell_has_the_backward_derived_by_hand(paper):
    """Surrogate backpropagation through time, written out for the soft reset and for the paper's form."""
    p, surrogate = leaves(inputs(T=4, B=2)), Triangle(0.7, 0.4)
    form: dict[str, Any] = {"reset": "output" if paper else "threshold", "reset_after": not paper}
    trace = egru(**p, **form, surrogate=surrogate)
    cotangents = [torch.randn_like(t) for t in trace]
    torch.autograd.backward(list(trace), cotangents)
    gy, gu, go, gy_n, gh_n = cotangents

    H = 6
    with torch.no_grad():
        W, U, bi, bh = p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]
        Ur, Uz, Un = U.split(H)
        grads = {name: torch.zeros_like(t) for name, t in p.items()}
        dy, dh = gy_n, gh_n
        for t in reversed(range(len(trace.y))):
            y = p["y0"] if t == 0 else trace.y[t - 1]
            h = p["h0"] if t == 0 else trace.u[t - 1] - (0 if paper else trace.o[t - 1] * p["threshold"])
            a = p["x"][t] @ W.T + bi
            r = torch.sigmoid(a[:, :H] + y @ Ur.T + bh[:H])
            z = torch.sigmoid(a[:, H : 2 * H] + y @ Uz.T + bh[H : 2 * H])
            k = (r * y if paper else y) @ Un.T + bh[2 * H :]
            n = torch.tanh(a[:, 2 * H :] + (k if paper else r * k))
            u, o = trace.u[t], trace.o[t]
            dy = dy + gy[t]
            soft = 0 if paper else p["threshold"] * dh
            dv = surrogate(u - p["threshold"]) * (go[t] + u * dy - soft)
            grads["threshold"] -= (dv if paper else dv + o * dh).sum(0)
            D = o * dy + dv + dh + gu[t]
            a_n, a_z = (1 - z) * D * (1 - n**2), (h - n) * D * z * (1 - z)
            if paper:
                back = a_n @ Un
                a_r = back * y * r * (1 - r)
                grads["weight_hh"] += torch.cat([a_r.T @ y, a_z.T @ y, a_n.T @ (r * y)])
                q = torch.cat([a_r, a_z, a_n], 1)
                dy = a_r @ Ur + a_z @ Uz + r * back - D
            else:
                a_r = a_n * k * r * (1 - r)
                q = torch.cat([a_r, a_z, r * a_n], 1)
                grads["weight_hh"] += q.T @ y
                dy = q @ U
            g = torch.cat([a_r, a_z, a_n], 1)
            grads["weight_ih"] += g.T @ p["x"][t]
            grads["bias_ih"] += g.sum(0)
            grads["bias_hh"] += q.sum(0)
            grads["x"][t] = g @ W
            dh = z * D
        grads["y0"], grads["h0"] = dy, dh
    for name, leaf in p.items():
        close(leaf.grad, grads[name], GRADIENT_F64)


def test_a_tie_is_no_event():
    # Zero weights and x: n = 0, z = 1/2, so u is exactly half of h.
    p = {k: torch.zeros_like(v) for k, v in inputs(T=1, B=1, H=3).items()}
    p["h0"] = torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64)
    p["threshold"] = torch.tensor([0.25, 0.25 - 2**-54, 0.25 + 2**-54], dtype=torch.float64)
    assert egru(**p).o.tolist() == [[[0.0, 1.0, 0.0]]]


def test_a_threshold_above_one_never_fires_and_silence_is_plus_zero():
    p = inputs(T=8)
    p["h0"].clamp_(-1, 1)
    p["threshold"].fill_(1.0 + 1e-9)
    trace = egru(**p)
    assert (trace.u < 0).any()
    assert not trace.o.any()
    assert not trace.y.any()
    assert not trace.y.signbit().any()


def test_an_empty_sequence_leaves_the_state_alone():
    p = inputs(T=0)
    trace = egru(**p)
    assert trace.y.shape == trace.u.shape == trace.o.shape == (0, 3, 6)
    assert torch.equal(trace.y_n, p["y0"])
    assert torch.equal(trace.h_n, p["h0"])
    output, h = gru(p["x"], p["h0"], p["weight_ih"], p["weight_hh"], None, None)
    assert output.shape == (0, 3, 6)
    assert torch.equal(h, p["h0"])


def test_one_step_one_sample_and_absent_biases():
    p = inputs(T=1, B=1)
    zero = torch.zeros_like(p["bias_ih"])
    for a, b in zip(
        egru(**{**p, "bias_ih": None, "bias_hh": None}),
        egru(**{**p, "bias_ih": zero, "bias_hh": zero}),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_sequence_in_parts_is_bit_equal(dtype, cut):
    # Inputs on a coarse grid make W x exact, whatever order a product over another number of rows sums in.
    p = {k: v.to(dtype) for k, v in inputs(T=9, B=2).items()}
    for name in ("x", "weight_ih", "bias_ih", "bias_hh"):
        p[name] = (p[name] * 8).round() / 8
    whole = egru(**p)
    first = egru(**{**p, "x": p["x"][:cut]})
    second = egru(**{**p, "x": p["x"][cut:], "y0": first.y_n, "h0": first.h_n})
    for name in ("y", "u", "o"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(whole, name))
    assert torch.equal(second.y_n, whole.y_n)
    assert torch.equal(second.h_n, whole.h_n)


@pytest.mark.parametrize(("reset", "reset_after"), FORMS)
def test_units_may_be_renamed(reset, reset_after):
    p, order = inputs(T=6), torch.tensor([3, 0, 5, 1, 4, 2])
    rows = torch.cat([order, order + 6, order + 12])
    q = {
        "x": p["x"],
        "weight_hh": p["weight_hh"][rows][:, order],
        **{k: p[k][rows] for k in ("weight_ih", "bias_ih", "bias_hh")},
        **{k: p[k][..., order] for k in ("y0", "h0", "threshold")},
    }
    for a, b in zip(
        egru(**p, reset=reset, reset_after=reset_after), egru(**q, reset=reset, reset_after=reset_after), strict=True
    ):
        close(a[..., order], b)


def test_nan_is_not_hidden_by_a_silent_gate():
    p = inputs()
    p["x"][2, 0, 1] = float("nan")
    trace = egru(**p)
    clean = egru(**inputs())
    assert trace.y[2:, 0].isnan().all()
    assert trace.h_n[0].isnan().all()
    assert torch.equal(trace.y[:, 1:], clean.y[:, 1:])
    assert not trace.y[:2].isnan().any()


def test_zoneout_keeps_units_in_training_by_its_probability():
    p = inputs(T=1, B=64, H=64)
    torch.manual_seed(0)
    plain, kept = egru(**p), egru(**p, zoneout=0.3, training=True)
    held = kept.u[0] == p["h0"]
    assert torch.equal(kept.u[0][~held], plain.u[0][~held])
    assert abs(held.double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / held.numel()) ** 0.5  # four sigma, seeded
    assert torch.equal(egru(**p, zoneout=1.0, training=True).u[0], p["h0"])
