"""The event's forward and backward, and the surrogate with its primitive."""

import pytest
import torch

from sparsefold.nn import Triangle, event
from tolerances import CELL_F64, GRADCHECK


def test_no_event_on_a_tie_and_none_for_nan():
    v = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 2.0, float("nan")])
    assert event(v, Triangle()).tolist() == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smooth", [False, True])
def test_backward_is_the_surrogate(dtype, smooth):
    v = torch.tensor([-0.6, -0.5, -0.25, 0.0, 0.25, 0.5, 0.6], dtype=dtype, requires_grad=True)
    out = event(v, Triangle(height=2.0, half_width=0.5), smooth=smooth)
    assert out.dtype == dtype
    out.backward(torch.full_like(v, 3.0))
    assert v.grad.tolist() == [0, 0, 3, 6, 3, 0, 0]


def test_a_tensor_may_be_used_in_two_events():
    v = torch.tensor([0.125], requires_grad=True)
    (event(v, Triangle(1.0, 0.5)) + 2 * event(v, Triangle(1.0, 0.25))).backward()
    assert v.grad.item() == 0.75 + 2 * 0.5


def test_the_primitive_is_the_integral_of_the_surrogate():
    surrogate = Triangle(height=0.7, half_width=0.4)
    v = torch.linspace(-0.9, 0.9, 301, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: event(x, surrogate, smooth=True), (v,), **GRADCHECK)
    ends = surrogate.primitive(torch.tensor([-9.0, 0.0, 9.0], dtype=torch.float64))
    area = 0.7 * 0.4
    torch.testing.assert_close(ends, torch.tensor([0, area / 2, area], dtype=torch.float64), rtol=0, atol=CELL_F64)


@pytest.mark.parametrize("values", [(-0.1, 1.0), (1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_a_triangle_without_width_is_refused(values):
    with pytest.raises(ValueError, match="height >= 0 and half_width > 0"):
        Triangle(*values)
