"""Depthwise and 1x1x1 convolutions of accelerate_training: values and gradients against those of PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transcnn.attention import CONVS
from transcnn.errors import UserError
from transcnn.fast import accelerate_training
from transcnn.fast import plain as undo
from transcnn.fast.training.depthwise import KernelDepthwise, KernelDepthwise1d, KernelDepthwise3d
from transcnn.fast.training.layers import KernelPointwise3d


def faster(conv: nn.Module) -> nn.Module:
    return accelerate_training(copy.deepcopy(conv))


def plain_conv(channels: int, size: int, bias: bool = False, ndim: int = 2) -> nn.Module:
    return CONVS[ndim](channels, channels, size, padding=size // 2, groups=channels, bias=bias)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def channels_innermost(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@given(
    case=st.one_of(
        st.tuples(st.just(1), st.sampled_from([5, 7, 9]), st.tuples(st.integers(1, 40))),
        st.tuples(st.just(2), st.sampled_from([5, 7, 9]), st.tuples(*[st.integers(1, 20)] * 2)),
        st.tuples(st.just(3), st.sampled_from([3, 5, 7]), st.tuples(*[st.integers(1, 9)] * 3)),
    ),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    layouts=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradients_are_those_of_a_plain_convolution(case, batch, channels, layouts, bias, seed):
    torch.manual_seed(seed)
    ndim, size, sides = case
    plain = plain_conv(channels, size, bias, ndim)
    conv = faster(plain)
    assert type(conv) is not type(plain)
    plain = plain.double()
    x, grad = (
        channels_innermost(torch.randn(batch, channels, *sides)) if last else torch.randn(batch, channels, *sides)
        for last in layouts
    )
    x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, expected = conv(x), plain(x64)
    y.backward(grad)
    expected.backward(grad.double())
    assert relative(y, expected) < 1e-5
    assert relative(x.grad, x64.grad) < 1e-5
    assert (conv.weight.grad.double() - plain.weight.grad).norm() < 1e-5 * max(1, grad.norm() * x.norm())
    if bias:
        assert relative(conv.bias.grad, plain.bias.grad) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_1x1x1_convolution_is_one_product_in_channels_last_memory(layout, bias):
    torch.manual_seed(0)
    plain = nn.Conv3d(6, 10, 1, bias=bias)
    conv, plain = faster(plain), plain.double()
    assert type(conv) is KernelPointwise3d
    x = torch.randn(2, 6, 3, 5, 4).contiguous(memory_format=layout).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, expected = conv(x), plain(x64)
    assert y.is_contiguous(memory_format=layout)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in ((y, expected), (x.grad, x64.grad), *zip(gradients(conv), gradients(plain), strict=True)):
        assert relative(ours, theirs) < 1e-6
    assert torch.equal(conv(x[0]), plain.float()(x[0]))  # (C, D, H, W), as PyTorch's take it
    with pytest.raises(RuntimeError, match="channels"):
        conv(torch.randn(2, 5, 3, 5, 4).contiguous(memory_format=layout))


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("size", "sides"), [(9, (310,)), (5, (23, 31)), (3, (9, 12, 10))])
def test_in_bf16_it_is_as_near_as_the_plain_convolution(size, sides, last, bias):
    torch.manual_seed(0)
    plain = plain_conv(16, size, bias, len(sides))
    conv, exact = faster(plain), copy.deepcopy(plain).double()
    x = torch.randn(2, 16, *sides)
    x = channels_innermost(x) if last else x
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
@pytest.mark.parametrize(("size", "sides"), [(5, (6,)), (5, (4, 3)), (3, (2, 3, 2))])
def test_gradients_of_gradients_and_forward_ones(size, sides):
    torch.manual_seed(0)
    conv = faster(plain_conv(2, size, bias=True, ndim=len(sides))).double()
    x = torch.randn(1, 2, *sides, dtype=torch.float64, requires_grad=True)

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


@pytest.mark.parametrize(
    ("ndim", "kind", "gain"), [(1, KernelDepthwise1d, 5), (2, KernelDepthwise, 5), (3, KernelDepthwise3d, 3)]
)
def test_only_those_that_gain_are_replaced_and_all_come_back(ndim, kind, gain):
    sizes = (1, 3, 5, 9, 11)
    model = nn.Sequential(*(plain_conv(4, size, ndim=ndim) for size in sizes))
    accelerate_training(model)
    assert [type(conv) for conv in model] == [kind if gain <= size <= 9 else CONVS[ndim] for size in sizes]
    assert [type(conv) for conv in undo(model)] == [CONVS[ndim]] * 5


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
