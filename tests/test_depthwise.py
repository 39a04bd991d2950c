"""The depthwise convolution of accelerate_training: values and gradients against PyTorch's own, however asked for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transcnn.errors import UserError
from transcnn.fast import accelerate_training
from transcnn.fast import plain as undo
from transcnn.fast.training.depthwise import KernelDepthwise


def faster(conv: nn.Conv2d) -> nn.Conv2d:
    return accelerate_training(copy.deepcopy(conv))


def plain_conv(channels: int, size: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=bias)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@given(
    size=st.sampled_from([5, 7, 9]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradients_are_those_of_a_plain_convolution(size, shape, layout, bias, seed):
    torch.manual_seed(seed)
    plain = plain_conv(shape[1], size, bias)
    conv = faster(plain)
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
    conv, exact = faster(plain), copy.deepcopy(plain).double()
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
    conv = faster(plain_conv(2, 5, bias=True)).double()
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x,))

    weight, bias = (p.detach().clone().requires_grad_() for p in conv.parameters())
    assert torch.autograd.gradcheck(call, (x, weight, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_gradients_for_each_sample_by_torch_func():
    torch.manual_seed(0)
    conv = faster(plain_conv(3, 5))
    x = torch.randn(4, 3, 6, 7)

    def loss(weight, image):
        return torch.func.functional_call(conv, {"weight": weight}, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(conv.weight, x)
    for one, image in zip(each, x, strict=True):
        conv.weight.grad = None
        conv(image[None]).square().sum().backward()
        torch.testing.assert_close(one, conv.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        dict(dilation=(2, 2), padding=(4, 4)),
        dict(stride=(2, 2)),
        dict(padding=(0, 0)),
        dict(padding="same"),
        dict(padding_mode="circular"),
        dict(groups=2, in_channels=8),
    ],
)
def test_changed_options_are_obeyed(change):
    """As for an output stride of 16, say: what a convolution says of itself is what it does."""
    plain = nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 5, "padding": 2, "groups": 4, **change})
    x = torch.randn(1, plain.in_channels, 11, 9)
    assert type(faster(plain)) is nn.Conv2d
    assert torch.equal(faster(plain)(x), plain(x))
    changed = faster(plain_conv(4, 5, bias=True))
    if plain.groups == 4 and plain.padding_mode == "zeros":  # others are made with their mode
        for name, value in change.items():
            setattr(changed, name, value)
        changed.load_state_dict(plain.state_dict())
        assert torch.equal(changed(x), plain(x))


def test_only_those_that_gain_are_replaced_and_all_come_back():
    row = [plain_conv(4, size) for size in (1, 3, 5, 9, 11)]
    model = nn.Sequential(*row)
    accelerate_training(model)
    assert [type(conv) for conv in model] == [nn.Conv2d, nn.Conv2d, KernelDepthwise, KernelDepthwise, nn.Conv2d]
    assert [type(conv) for conv in undo(model)] == [nn.Conv2d] * 5


def test_frozen_weights_and_frozen_inputs_get_no_gradient():
    conv = faster(plain_conv(2, 5))
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
    conv = faster(plain_conv(2, 5, bias=True))
    x = torch.randn(1, 2, 8, 8)
    program = torch.export.export(conv, (x,))
    assert "conv2d" in str(program.graph)
    torch.testing.assert_close(program.module()(x), conv(x))
    traced = torch.jit.trace(conv, x, check_trace=False)
    assert "PythonOp" not in str(traced.graph)


def test_fx_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"torch\.fx can't trace"):
        torch.fx.symbolic_trace(nn.Sequential(faster(plain_conv(2, 5))))
