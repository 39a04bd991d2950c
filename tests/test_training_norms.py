"""BatchNorm and GroupNorm that train by the C++ kernels: answers and gradients are the formula's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from test_cpu_inference import counted, threads
from test_cpu_training import KINDS, check
from transcnn.blocks import InvertedResidual, Stem
from transcnn.errors import UserError
from transcnn.fast import accelerate_training
from transcnn.fast.cpu import norms as cpu
from transcnn.fast.cpu import support
from transcnn.fast.training import norms
from transcnn.fast.training.norms import run_fused

pytestmark = pytest.mark.skipif(not support.supports(torch.float32), reason="needs the kernels")
DTYPES = [torch.float32, torch.bfloat16][: 1 + support.supports(torch.bfloat16)]
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float64: 1e-5}  # relative to the largest number


@pytest.fixture(autouse=True)
def small_maps(request, monkeypatch) -> None:
    """The kernels also where PyTorch takes less time."""
    if request.node.name != "test_kernels_take_large_maps_alone":
        monkeypatch.setattr(norms, "_gains", lambda *_: True)


def near(ours: Tensor, exact: Tensor, bound: float | None = None) -> bool:
    bound = BOUNDS[ours.dtype] if bound is None else bound
    difference = (ours.double() - exact).abs().max()
    return ours.shape == exact.shape and bool(difference <= bound * exact.abs().max().clamp_min(1e-3))


def learned(
    groups: int, x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, silu: bool, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """PyTorch's answer and gradients, computed in ``dtype``, (B, *S, C); a BatchNorm where ``groups`` is 0."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    y = leaves[0].movedim(-1, 1)
    y = F.group_norm(y, groups, *leaves[1:]) if groups else F.batch_norm(y, None, None, *leaves[1:], True)
    y = (F.silu(y) if silu else y).movedim(1, -1)
    return [y.detach(), *torch.autograd.grad(y, leaves, up.to(dtype))]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_map(data):
    draw = data.draw
    channels = 16 * draw(st.integers(1, 9))
    groups = draw(st.sampled_from([n for n in range(channels + 1) if n == 0 or channels % n == 0]))
    shape = [draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 23), min_size=2, max_size=2)), channels]
    shape[1] += shape[0] * shape[1] * shape[2] == 1
    shape[2] += channels == groups and shape[1] * shape[2] == 1
    dtype, silu = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def rand(*sizes: int, to: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=generator).to(to)

    x, up = rand(*shape, to=dtype) + draw(st.sampled_from([0, 3])), rand(*shape, to=dtype)
    weight, bias = rand(channels), rand(channels)
    exact, *gradients = learned(groups, x, weight, bias, up, silu)
    with threads(draw(st.sampled_from([1, 2, 3]))):
        if groups:
            y, statistics = cpu.group_norm_forward(x, weight, bias, groups, 1e-5, silu)
            found = cpu.group_norm_backward(x, up, weight, bias, statistics, silu)
        else:
            y, statistics = cpu.batch_norm_forward(x, weight, bias, 1e-5, silu)
            found = cpu.batch_norm_backward(x, up, statistics, silu)
    assert y.dtype == found[0].dtype == dtype
    assert near(y, exact)
    # Gradients of few numbers cancel: dx of two numbers is next to nothing, times 1/σ. PyTorch's in fp32 lose as much.
    few = (1e-3 if dtype == torch.float32 else 2e-2) if x.numel() < 600 else 0.0
    _, *plain = learned(groups, x, weight, bias, up, silu, torch.float32)
    for ours, theirs, right in zip(found, plain, gradients, strict=True):
        lost = (theirs.double() - right).abs().max() / right.abs().max().clamp_min(1e-3)
        assert near(ours, right, max(few, BOUNDS[ours.dtype], 3 * float(lost)))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d(32), nn.GroupNorm(1, 32), nn.GroupNorm(4, 32)], ids=repr)
def test_the_mean_may_be_much_larger_than_the_spread(kind):
    norm = accelerate_training(copy.deepcopy(kind))
    x = (torch.randn(2, 32, 30, 31) + 1000).contiguous(memory_format=torch.channels_last).requires_grad_()
    up, exact = torch.randn_like(x), copy.deepcopy(kind).double()
    other = x.detach().double().requires_grad_()
    norm(x).backward(up)
    exact(other).backward(up.double())
    assert near(norm(x), exact(other), 5e-4)
    assert near(x.grad, other.grad, 5e-4)
    assert near(norm.weight.grad, exact.weight.grad, 5e-4)


def operations(y: Tensor) -> set[str]:
    """The kinds of the operations whose gradients are computed from that of ``y``."""
    waiting, found = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        found.add(type(node).__name__)
        waiting += [before for before, _ in node.next_functions if before is not None]  # pyright: ignore
    return found


@pytest.mark.parametrize("kind", ["fp32", "bf16"][: len(DTYPES)])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(32), nn.GroupNorm(4, 32)], ids=repr)
def test_an_activation_in_place_and_a_sum_in_place_after_a_norm(norm, kind):
    """As in ResNets of timm and torchvision; changed in place, a view's gradient would be several copies of the map."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(32, 32, 3, padding=1), norm, nn.ReLU(inplace=True)])

        def forward(self, x: Tensor) -> Tensor:
            conv, norm, relu = self.layers
            y = norm(conv(relu(norm(conv(x)))))
            y += x
            return relu(y)

    plain = Residual().to(memory_format=torch.channels_last)
    ours = accelerate_training(copy.deepcopy(plain))
    with counted() as calls:
        check(plain, ours, (3, 32, 9, 11), kind)
    assert sum(calls.values()) == 2 * 2
    x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ours(x)
    assert not {name for name in operations(y) if "CopySlices" in name or "AsStrided" in name}
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_kernels_take_large_maps_alone():
    large, small = (torch.randn(1, 16, side, 128).contiguous(memory_format=torch.channels_last) for side in (128, 127))
    batch, group = (accelerate_training(norm) for norm in (nn.BatchNorm2d(16), nn.GroupNorm(1, 16)))
    for x, silu, fp32, bf16 in (
        (small, [], 0, 0),
        (large, [], 1, 2),
        (small, [nn.SiLU()], 0, 0),
        (large, [nn.SiLU()], 2, 2),
    ):
        for dtype, expected in zip(DTYPES, (fp32, bf16), strict=False):
            with counted() as called:
                run_fused([batch, *silu], x.to(dtype))
                run_fused([group, *silu], x.to(dtype))
            assert sum(called.values()) == expected


@pytest.mark.parametrize("kind", [nn.BatchNorm2d(16), nn.GroupNorm(2, 16)], ids=repr)
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_not_a_number_stays_and_spreads_as_far_as_pytorchs(kind, what):
    norm = accelerate_training(copy.deepcopy(kind))
    x = torch.randn(3, 16, 5, 6).contiguous(memory_format=torch.channels_last)
    x[1, 3, 2, 2] = what
    ours, plain = (t.requires_grad_() for t in (x.clone(), x.clone()))
    y, expected = norm(ours), kind(plain)
    assert torch.equal(y.isnan(), expected.isnan())
    for z in (y, expected):
        z.square().sum().backward()
    assert torch.equal(ours.grad.isnan(), plain.grad.isnan())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d(32), nn.GroupNorm(1, 32)], ids=repr)
def test_layers_give_pytorchs_dtypes_and_statistics(kind, autocast):
    if autocast and torch.bfloat16 not in DTYPES:
        pytest.skip("no bf16 on this processor")
    ours = accelerate_training(copy.deepcopy(kind))
    for dtype in DTYPES:
        x = torch.randn(3, 32, 6, 7).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), counted() as called:
            y, expected = ours(x), kind(x)
            active = run_fused([ours, nn.SiLU()], x)
        assert sum(called.values()) == 2
        assert y.dtype == active.dtype == expected.dtype
        assert near(y, expected.double(), 2 * BOUNDS[dtype])
        assert near(active, F.silu(expected).double(), 2 * BOUNDS[dtype])
        kind.load_state_dict(ours.state_dict())


def test_what_the_kernels_do_not_know_is_left_to_pytorch():
    x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)

    def runs(norm: nn.Module, x: Tensor = x) -> bool:
        with counted() as called:
            accelerate_training(norm)(x)
        return bool(called)

    for kind in (lambda: nn.BatchNorm2d(32), lambda: nn.GroupNorm(2, 32)):
        assert runs(kind())
        assert not runs(kind(), x.contiguous())  # not channels-last
        assert not runs(kind().double(), x.double())
        assert not runs(kind().bfloat16(), x.bfloat16())  # weights in bf16
        hooked = kind()
        hooked.register_forward_hook(lambda *_: None)
        assert runs(hooked)  # by its own forward method
        with torch.no_grad():
            assert not runs(kind())
    assert not runs(nn.BatchNorm2d(32).eval())
    assert not runs(nn.GroupNorm(2, 32, affine=False))
    assert not runs(nn.GroupNorm(2, 24), x[:, :24].contiguous(memory_format=torch.channels_last))
    assert not runs(nn.GroupNorm(2, 32), x[:0])  # an empty batch
    assert accelerate_training(nn.GroupNorm(2, 32))(x[:0]).shape == (0, 32, 5, 6)
    with pytest.raises(RuntimeError, match="32"):
        accelerate_training(nn.GroupNorm(2, 64))(x)
    with pytest.raises(ValueError, match="more than 1 value"):
        accelerate_training(nn.BatchNorm2d(32))(x[:1, :, :1, :1])


def test_frozen_weights_volumes_and_second_derivatives():
    norm = accelerate_training(nn.GroupNorm(2, 16)).requires_grad_(False)
    x = torch.randn(2, 16, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with counted() as called:
        y = norm(x)
    assert called == {"group_norm_forward": 1}
    assert near(y, nn.GroupNorm(2, 16)(x).double(), 1e-5)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivatives"):
        first.sum().backward()
    assert norm.weight.grad is None


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_bits_each_time(count):
    x, up = torch.randn(3, 9, 10, 32), torch.randn(3, 9, 10, 32)
    one = torch.ones(32)
    with threads(count):
        for _ in range(2):
            runs = [cpu.batch_norm_backward(x, up, cpu.batch_norm_forward(x, one, one, 1e-5)[1]) for _ in range(2)]
            assert all(map(torch.equal, *runs))
            runs = [
                cpu.group_norm_backward(x, up, one, one, cpu.group_norm_forward(x, one, one, 2, 1e-5)[1])
                for _ in range(2)
            ]
            assert all(map(torch.equal, *runs))
    with pytest.raises(ValueError, match="can't be called with these sizes: 32, 5"):
        cpu.group_norm_forward(x, one, one, 5, 1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(2, channels)], ids=["batch", "group"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_and_its_activation_are_one_kernel(norm, kind):
    """In the stem and in inverted residuals that have no kernel of their own."""
    stem = Stem(nn.Conv2d(3, 16, 3, 2, 1), norm(16), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1))
    block = InvertedResidual(32, 2, 9, pre_norm=False, norm_layer=norm, act_layer=nn.SiLU)
    plain = nn.Sequential(stem, block).to(memory_format=torch.channels_last)
    ours = accelerate_training(copy.deepcopy(plain))
    with counted() as called:
        check(plain, ours, (2, 3, 22, 25), kind)
    assert [count for name, count in called.items() if "_norm_" in name] == [4, 4]
    x = torch.randn(2, 3, 22, 25).contiguous(memory_format=torch.channels_last)
    expected = plain(x).double()
    seen: list[int] = []
    ours[0][1].register_forward_hook(lambda *_: seen.append(1))
    ours[1].conv1.register_forward_hook(lambda *_: seen.append(2))
    assert near(ours(x), expected, 1e-5)
    assert seen == [1, 2]
