"""1x1 convolutions whose weights' gradients are a C++ kernel's: the formula's, and otherwise PyTorch's layers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from test_cpu_inference import counted, error, threads
from test_cpu_training import KINDS, check
from transcnn.errors import UserError
from transcnn.fast import accelerate_training
from transcnn.fast.cpu import support
from transcnn.fast.cpu.training import pointwise_gradient
from transcnn.fast.training import layers

pytestmark = pytest.mark.skipif(not support.supports(torch.float32), reason="needs the kernels")
DTYPES = [torch.float32, torch.bfloat16][: 1 + support.supports(torch.bfloat16)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_number_of_positions_and_channels(data):
    draw = data.draw
    positions, inputs, outputs = draw(st.integers(1, 800)), 16 * draw(st.integers(1, 9)), 16 * draw(st.integers(1, 9))
    dtype, bias = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x, grad = (torch.randn(positions, n, generator=generator).to(dtype) for n in (inputs, outputs))
    with threads(draw(st.sampled_from([1, 2, 3]))):
        weight, of_bias = pointwise_gradient(x, grad, bias)
        assert torch.equal(weight, pointwise_gradient(x, grad, bias)[0])
    assert weight.is_contiguous()
    assert error(weight, grad.double().mT @ x.double()) <= 2e-6  # of bf16, too: products and sums are in fp32
    assert (of_bias is not None) is bias
    if of_bias is not None:
        assert error(of_bias, grad.double().sum(0)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(48, 16, True), (16, 80, False)])
def test_layers(inputs, outputs, bias, kind, monkeypatch):
    monkeypatch.setattr(layers, "MIN_NUMBERS", 0)
    plain = nn.Conv2d(inputs, outputs, 1, bias=bias).to(memory_format=torch.channels_last)
    ours = accelerate_training(copy.deepcopy(plain))
    with counted() as called:
        check(plain, ours, (3, inputs, 13, 17), kind)
    assert called == {"pointwise_gradient": 1}


@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize("channels", [1, 3, 15])
def test_few_channels_with_a_stride(channels, stride):
    """PyTorch's gradient may write past the end of its memory, so what it is asked for is looked at, and not tried."""
    exact = nn.Conv2d(channels, 8, 1, stride).double()
    ours = accelerate_training(copy.deepcopy(exact).float().to(memory_format=torch.channels_last))
    other = torch.randn(2, channels, 9, 12, dtype=torch.double, requires_grad=True)
    x = other.detach().float().contiguous(memory_format=torch.channels_last).requires_grad_()
    y, expected = ours(x), exact(other)
    with torch.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    expected.sum().backward()
    (call,) = [event for event in profile.events() if event.name == "aten::convolution_backward"]
    assert call.concrete_inputs[4] == [1, 1]  # the stride
    found = y.detach(), x.grad, ours.weight.grad, ours.bias.grad
    wanted = expected.detach(), other.grad, exact.weight.grad, exact.bias.grad
    assert all(a.shape == b.shape and error(a, b) <= 1e-6 for a, b in zip(found, wanted, strict=True))


def test_not_a_number_stays_where_it_is():
    x, grad = torch.randn(300, 32), torch.randn(300, 16)
    x[270, 5], grad[3, 2] = torch.nan, torch.inf
    weight, bias = pointwise_gradient(x, grad, True)
    assert torch.equal(weight.isfinite(), (grad.mT @ x).isfinite())
    assert torch.equal(bias.isfinite(), grad.sum(0).isfinite())


def test_what_the_kernel_does_not_know_is_left_to_pytorch():
    x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)

    def runs(conv: nn.Module, x: torch.Tensor = x) -> bool:
        with counted() as called:
            accelerate_training(conv)(x.detach().requires_grad_()).sum().backward()
        return bool(called)

    assert runs(nn.Conv2d(32, 16, 1))
    assert not runs(nn.Conv2d(32, 16, 1), x.contiguous())  # not channels-last
    assert not runs(nn.Conv2d(32, 16, 1), x[:0])  # an empty batch
    assert not runs(nn.Conv2d(32, 24, 1))
    assert not runs(nn.Conv2d(32, 16, 1).bfloat16(), x.bfloat16())  # small
    assert not runs(nn.Conv2d(32, 16, 1, stride=2))
    assert not runs(nn.Conv2d(32, 16, 1, groups=2))
    assert not runs(nn.Conv2d(32, 16, 1).double(), x.double())
    assert not runs(nn.Conv2d(32, 16, 1).requires_grad_(False))  # nothing to compute
    with pytest.raises(RuntimeError, match="32"):
        accelerate_training(nn.Conv2d(16, 16, 1))(x)
    with pytest.raises(RuntimeError):
        accelerate_training(nn.Conv2d(32, 16, 1))(x.bfloat16())
    with pytest.raises(ValueError, match="can't be called with these sizes: 24, 16"):
        pointwise_gradient(torch.ones(3, 24), torch.ones(3, 16), False)


def test_a_frozen_bias_and_second_derivatives():
    conv = accelerate_training(nn.Conv2d(32, 16, 1))
    conv.bias.requires_grad_(False)
    x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    (first,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivatives"):
        first.sum().backward()
    conv(x).sum().backward()
    assert conv.bias.grad is None


def test_gradients_lie_in_memory_as_their_weights_do():
    """DDP warns of others, and copies them."""
    for layout in (torch.channels_last, torch.contiguous_format):
        conv = accelerate_training(nn.Conv2d(32, 16, 1)).to(memory_format=layout)
        x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)
        with counted() as called:
            (gradient,) = torch.autograd.grad(conv(x).sum(), conv.weight)
        assert called
        assert gradient.stride() == conv.weight.stride()
