"""Norms, squeeze-and-excitation and pooling by the C++ kernels."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from test_chains import ACTS, BOUNDS, DTYPES, Row, acts
from test_cpu_inference import threads
from test_other_cnns import relative
from transcnn.fast import optimize
from transcnn.fast.cpu import passes, support
from transcnn.fast.cpu.inverted_residual import pack_squeeze
from transcnn.fast.inference import convolutions
from transcnn.fast.inference.chains import Squeeze
from transcnn.fast.inference.layers import fuse

pytestmark = pytest.mark.skipif(not support.supports(torch.float32), reason="needs the kernels")


def close(ours: Tensor, exact: Tensor) -> bool:
    bound = 2 * BOUNDS[ours.dtype] * max(1, float(exact.abs().max()))
    return ours.shape == exact.shape and bool((ours.double() - exact).abs().max() <= bound)


def group_norm(x: Tensor, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    """GroupNorm with one group by its formula, (B, H, W, C); PyTorch's refuses a single number."""
    variance, mean = torch.var_mean(x.double(), (1, 2, 3), correction=0, keepdim=True)
    return (x.double() - mean) / (variance + 1e-5).sqrt() * scale + shift


@settings(max_examples=40, deadline=None)
@given(st.data())
@torch.no_grad()
def test_any_map(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 90))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def rand(*sizes: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator).to(to)

    x, residual, channels = rand(*shape) + 1, rand(*shape), shape[3]
    act = draw(acts)
    with threads(draw(st.sampled_from([1, 2, 3]))):
        scale, shift = rand(channels, to=torch.float32), rand(channels, to=torch.float32)
        normed = group_norm(x, scale, shift)
        assert close(passes.group_norm(x, scale, shift, 1e-5, act), ACTS[act[0]](normed))
        for over in (x, residual):
            out = over.clone()
            given = {"residual": out if over is residual else residual, "out": out}
            y = passes.group_norm(out if over is x else x, scale, shift, 1e-5, **given)
            assert y is out
            assert close(y, normed + residual.double())

        normed = F.layer_norm(x.double(), (channels,), scale.double(), shift.double())
        assert close(passes.layer_norm(x, scale, shift, 1e-5), normed)
        ratio = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        mean = F.avg_pool2d(x.double().movedim(3, 1), ratio, ceil_mode=True, count_include_pad=False)
        assert close(passes.average_pool(x, ratio), mean.movedim(1, 3))

        few = draw(st.integers(1, 40))
        weights = rand(few, channels) / channels**0.5, rand(few), rand(channels, few) / few**0.5, rand(channels)
        reduce, low, excite, high = (w.double() for w in weights)
        gate = torch.sigmoid(ACTS[act[0]](x.double().mean((1, 2)) @ reduce.mT + low) @ excite.mT + high)
        exact, out = x.double() * gate[:, None, None], x.clone()
        packed, kinds = pack_squeeze(*weights), (act, ("sigmoid", 0.0, 0.0))
        assert close(passes.squeeze(x, packed, kinds), exact)
        assert close(passes.squeeze(out, packed, kinds, out), exact)

        size, stride = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        padding = draw(st.integers(0, size // 2)), draw(st.integers(0, size // 2))
        if size <= min(shape[1] + 2 * padding[0], shape[2] + 2 * padding[1]):
            pooled = F.max_pool2d(x.movedim(3, 1), size, stride, padding).movedim(1, 3)
            assert torch.equal(passes.max_pool(x, passes.Window(size, stride, padding)), pooled)


@torch.no_grad()
def test_the_mean_may_be_much_larger_than_the_spread():
    x = torch.randn(1, 70, 70, 48) + 1000
    assert relative(passes.group_norm(x, torch.ones(48), torch.zeros(48), 1e-5), group_norm(x)) <= 1e-4


@torch.no_grad()
def test_not_a_number_stays():
    x = torch.randn(1, 9, 9, 20)
    x[0, 2, 3, 4] = torch.nan
    expected = F.max_pool2d(x.movedim(3, 1), 3, 2).movedim(1, 3)
    assert torch.equal(passes.max_pool(x, passes.Window(3, 2)).isnan(), expected.isnan())
    assert passes.group_norm(x, torch.ones(20), torch.zeros(20), 1e-5).isnan().all()


@torch.no_grad()
def test_sizes_that_the_kernels_are_not_made_for_are_refused():
    x = torch.randn(1, 5, 5, 20)
    for window in (passes.Window(6, 1), passes.Window(3, 0), passes.Window(3, 1, (2, 0)), passes.Window(3, 1, (-1, 0))):
        with pytest.raises(ValueError, match="max_pool"):
            passes.max_pool(x, window)
    packed = pack_squeeze(torch.randn(4, 60), None, torch.randn(60, 4), None)
    with pytest.raises(ValueError, match="squeeze"):
        passes.squeeze(x, packed)
    with pytest.raises(ValueError, match="group_norm"):
        passes.group_norm(x, torch.ones(19), torch.zeros(20), 1e-5)


POOLS = [dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=(3, 3), stride=(1, 1)), dict(kernel_size=2)]
OTHERS = [dict(kernel_size=(3, 2)), dict(kernel_size=3, dilation=2), dict(kernel_size=3, stride=2, ceil_mode=True)]


@torch.no_grad()
def test_layers_of_max_pooling(monkeypatch):
    called: list[int] = []
    run = passes.max_pool
    monkeypatch.setattr("transcnn.fast.inference.convolutions.max_pool", lambda *a: called.append(1) or run(*a))
    for more in (*POOLS, *OTHERS):
        pool = nn.MaxPool2d(**more)
        fast = optimize(nn.Sequential(nn.Conv2d(3, 8, 1), pool))[1]
        for dtype in DTYPES:
            for x in (torch.randn(2, 8, 9, 10).to(dtype), torch.randn(8, 9, 10).to(dtype)):
                assert torch.equal(fast(x), pool(x))
            called.clear()
            x = torch.randn(2, 8, 9, 10).to(dtype).to(memory_format=torch.channels_last)
            assert torch.equal(fast(x), pool(x))
            assert bool(called) == (more in POOLS)
    with pytest.raises(RuntimeError):
        optimize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(3)))[1](x[:, :, :2])


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.act, self.excite = nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_squeeze_and_excitation_alone(dtype, monkeypatch):
    torch.manual_seed(0)
    called: list[tuple[bool, bool]] = []
    run = Squeeze.run

    def count(*args, reuse=False):
        y = run(*args, reuse=reuse)
        called.append((y is not None, reuse))
        return y

    monkeypatch.setattr(Squeeze, "run", count)
    rows = nn.Sequential(nn.Conv2d(8, 24, 3), Gate(), Gate(), nn.MaxPool2d(2), Gate())
    model = nn.Sequential(Row(rows))
    x = torch.randn(2, 8, 9, 10).to(dtype)
    fast, double = optimize(model, dtype), nn.Sequential(Row(rows)).double()
    exact = double(x.double())
    for other in (fast, pickle.loads(pickle.dumps(fast))):
        called.clear()
        assert relative(other(x), exact) <= 2 * BOUNDS[dtype]
        assert called == [(True, True), (True, True), (True, False)]  # what pooling returns might be kept elsewhere
    handle = fast[0].layers[1].act.register_forward_hook(lambda *_: torch.zeros(2, 6, 1, 1).to(dtype))
    called.clear()
    assert relative(fast(x), exact) > 0.01
    assert len(called) < 3
    handle.remove()
    fast[0].layers[1].reduce.weight.mul_(2)
    double[0].layers[1].reduce.weight.mul_(2)
    assert relative(fast(x), double(x.double())) <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_layer_norm_in_networks(dtype, monkeypatch):
    norms = [nn.LayerNorm(20), timm.layers.LayerNorm(20), timm.layers.LayerNorm2d(20)]
    given = [torch.randn(3, 7, 20), torch.randn(3, 7, 20), torch.randn(2, 20, 5, 6)]
    calls: list[Tensor] = []
    run = passes.layer_norm
    monkeypatch.setattr(convolutions, "layer_norm", lambda x, *rest: calls.append(x) or run(x, *rest))
    for norm, x in zip(norms, given, strict=True):
        for p in norm.parameters():
            nn.init.normal_(p)
        model = nn.Sequential(norm)
        fast = optimize(model, dtype)
        expected = copy.deepcopy(model).double()(x.to(dtype).double())
        assert relative(fast(x.to(dtype)), expected) <= 2 * BOUNDS[dtype]
        assert len(calls) == 1
        fast[0].weight.mul_(2)
        fast[0].bias.zero_()
        again = copy.deepcopy(fast)(x.to(dtype))
        assert (
            relative(again, 2 * (expected - model[0].bias.double().view(-1, *(1, 1) * (x.ndim == 4))))
            <= 4 * BOUNDS[dtype]
        )
        calls.clear()
        with pytest.raises(RuntimeError):
            fast((x[:, :4] if x.ndim == 4 else x[..., :4]).to(dtype))
        assert not calls
    for norm in (nn.LayerNorm(20, bias=False), nn.LayerNorm(20, elementwise_affine=False), nn.LayerNorm((7, 20))):
        assert torch.equal(optimize(nn.Sequential(norm))(given[0]), norm(given[0]))
    assert not calls


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_group_norm_among_layers(dtype):
    for affine in (True, False):
        row = [nn.Conv2d(16, 24, 3), nn.GroupNorm(1, 24, affine=affine), nn.SiLU(), nn.Conv2d(24, 16, 1)]
        norm = row[1]
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        fast = fuse(layer.to(dtype) for layer in row)
        assert len(fast) == 3
        x = torch.randn(2, 16, 9, 10).to(dtype)
        exact = copy.deepcopy(nn.Sequential(*row)).double()(x.double())
        assert relative(fast(x.movedim(1, 3).contiguous()).movedim(3, 1), exact) <= 2 * BOUNDS[dtype]
