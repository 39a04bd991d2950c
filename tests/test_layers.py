"""The depthwise convolution: values and gradients against PyTorch's own, in every way that gradients are asked for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transcnn.layers import DepthwiseConv2d, StridedConv2d


def same_as(plain: nn.Conv2d) -> DepthwiseConv2d:
    conv = DepthwiseConv2d(plain.in_channels, plain.kernel_size[0])
    if plain.bias is not None:  # as folding a norm leaves it
        conv.bias = nn.Parameter(torch.zeros_like(plain.bias))
    conv.load_state_dict(plain.state_dict())
    return conv


def plain_conv(channels: int, size: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=bias)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@given(
    size=st.sampled_from([1, 3, 5, 7, 9]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradients_are_those_of_a_plain_convolution(size, shape, layout, bias, seed):
    torch.manual_seed(seed)
    plain = plain_conv(shape[1], size, bias)
    conv = same_as(plain)
    plain = plain.double()
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    grad = torch.randn(shape)
    y, expected = conv(x), plain(x64)
    y.backward(grad)
    expected.backward(grad.double())
    assert relative(y, expected) < 1e-5
    assert relative(x.grad, x64.grad) < 1e-5
    assert (conv.weight.grad.double() - plain.weight.grad).norm() < 1e-5 * max(1, grad.norm() * x.norm())
    if bias:
        assert relative(conv.bias.grad, plain.bias.grad) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_bf16_it_is_as_near_as_the_plain_convolution(layout, bias):
    torch.manual_seed(0)
    plain = plain_conv(16, 5, bias)
    conv, exact = same_as(plain), copy.deepcopy(plain).double()
    x = torch.randn(2, 16, 23, 31).contiguous(memory_format=layout)
    grad = torch.randn_like(x)
    exact(x.double()).backward(grad.double())
    errors = []
    for module in (conv, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        y.float().backward(grad)
        assert module.weight.grad.dtype == torch.float32
        errors.append(relative(module.weight.grad, exact.weight.grad))
    assert errors[0] <= 1.1 * errors[1] < 0.02


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # PyTorch's own forward mode
def test_gradients_of_gradients_and_forward_ones():
    torch.manual_seed(0)
    conv = same_as(plain_conv(2, 5, bias=True)).double()
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x,))

    weight, bias = (p.detach().clone().requires_grad_() for p in conv.parameters())
    assert torch.autograd.gradcheck(call, (x, weight, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_gradients_for_each_sample_by_torch_func():
    torch.manual_seed(0)
    conv = DepthwiseConv2d(3, 5)
    x = torch.randn(4, 3, 6, 7)

    def loss(weight, image):
        return torch.func.functional_call(conv, {"weight": weight}, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(conv.weight, x)
    for one, image in zip(each, x, strict=True):
        conv.weight.grad = None
        conv(image[None]).square().sum().backward()
        torch.testing.assert_close(one, conv.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [dict(dilation=(2, 2), padding=(2, 2)), dict(stride=(2, 2)), dict(padding=(0, 0))])
@pytest.mark.parametrize("kind", ["depthwise", "strided"])
def test_changed_options_are_obeyed(kind, change):
    """As for an output stride of 16, say: what a convolution says of itself is what it does."""
    conv = same_as(plain_conv(4, 3, bias=True)) if kind == "depthwise" else StridedConv2d(4, 4)
    plain = nn.Conv2d(4, 4, 3, stride=conv.stride, padding=1, groups=conv.groups)
    plain.load_state_dict(conv.state_dict())
    for module in (conv, plain):
        for name, value in change.items():
            setattr(module, name, value)
    x = torch.randn(1, 4, 11, 9)
    assert torch.equal(conv(x), plain(x))


def test_frozen_weights_and_frozen_inputs_get_no_gradient():
    conv = DepthwiseConv2d(2, 5)
    conv(torch.randn(1, 2, 5, 5)).sum().backward()
    assert conv.weight.grad is not None
    conv.weight.grad = None
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    conv.requires_grad_(False)
    conv(x).sum().backward()
    assert conv.weight.grad is None
    torch.testing.assert_close(x.grad, F.conv_transpose2d(torch.ones(1, 2, 5, 5), conv.weight, padding=2, groups=2))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_traced_and_an_exported_one_hold_plain_convolutions():
    conv = same_as(plain_conv(2, 5, bias=True))
    x = torch.randn(1, 2, 8, 8)
    program = torch.export.export(conv, (x,))
    assert "conv2d" in str(program.graph)
    torch.testing.assert_close(program.module()(x), conv(x))
    traced = torch.jit.trace(conv, x, check_trace=False)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(torch.fx.symbolic_trace(conv)(x), conv(x))
