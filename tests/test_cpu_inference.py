"""The C++ kernels against their formulas in double precision, how they are compiled, and networks that use them."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fuzz import little_memory
from transcnn.attention import HMHSA, LocalStep
from transcnn.blocks import DualDownsample
from transcnn.fast import dispatch, optimize
from transcnn.fast.cpu import build, norms, passes, support, training
from transcnn.fast.cpu import call as cpu_call
from transcnn.fast.cpu import inference as cpu
from transcnn.fast.cpu.inverted_residual import pack_squeeze
from transcnn.fast.inference.attention import FastHMHSA, FastLocalStep
from transcnn.fast.inference.blocks import FastDualDownsample, FastInvertedResidual, FastStem
from transcnn.fast.inference.convolutions import make_fast
from transcnn.fast.inference.layers import SpatialConv, fuse

has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
has_kernels = pytest.mark.skipif(build.library() is None, reason="needs the kernels")
NATIVE = {1: "x86-64-v3", 3: "cooperlake", 7: "amx"}.get(build.isa_support())
DTYPES = [
    pytest.param(torch.float32, id="fp32", marks=has_kernels),
    pytest.param(
        torch.bfloat16,
        id="bf16",
        marks=pytest.mark.skipif(not support.supports(torch.bfloat16), reason="no bf16 on this processor"),
    ),
]
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
NETWORKS = {
    "transcnn": {},
    "hatnet": dict(design="hatnet", norm_layer="groupnorm1", grid_sizes=(8, 7, 7, None), kernel_sizes=(3, 5, 7, 3)),
    "three levels": dict(stem_width=16, grid_sizes=((4, 2), (4, 2), 4, None), pool_ratios=((2, 2), (2, 3), 2, None)),
}


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@contextmanager
def counted() -> Iterator[Counter]:
    """How often each kernel is called meanwhile."""
    called: Counter = Counter()

    def count(name: str, *arguments: object, **options: object) -> None:
        called[name] += 1
        run(name, *arguments, **options)

    support.supports(torch.float32)  # which tries each of them
    support.supports(torch.bfloat16)
    run = cpu_call.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_call, "call", count)
        yield called


@contextmanager
def plain() -> Iterator[None]:
    """PyTorch's own operations in place of the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "supports", lambda dtype: False)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def compare(
    module: nn.Module, exact: Callable[..., Tensor], *inputs: Tensor | None, kernel: str, **others: int
) -> None:
    """The kernel's error against ``exact`` in double precision, and against that of the plain path.

    ``others`` are calls of further kernels.
    """
    with counted() as called:
        ours = module(*inputs)
    assert called == {kernel: 1, **others}
    expected = exact(*(None if x is None else x.double() for x in inputs))
    assert ours.shape == expected.shape
    assert ours.dtype == inputs[0].dtype
    assert error(ours, expected) <= BOUNDS[ours.dtype]
    if ours.dtype == torch.bfloat16 and ours.numel() > 1000:  # of fewer numbers, errors are a matter of chance
        with plain(), counted() as called:
            assert error(ours, expected) <= 1.1 * error(module(*inputs), expected)
        assert not called


# 1. The inverted residual


def inverted_residual(
    channels: int, hidden: int, outputs: int, size: int, dtype: torch.dtype, bias: bool = True
) -> tuple[FastInvertedResidual, Callable[..., Tensor]]:
    layers = nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, size, padding=size // 2, groups=hidden, bias=bias),
        nn.SiLU(),
        nn.Conv2d(hidden, outputs, 1),
    ).to(dtype)
    for conv in layers[::2]:
        nn.init.normal_(conv.weight, std=1.5 / conv.weight[0].numel() ** 0.5)
    double = copy.deepcopy(layers).double()

    def exact(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = double(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y if residual is None else y + residual

    return FastInvertedResidual(*fuse(layers)), exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 5, 7])
def test_inverted_residual_of_every_size(size, dtype):
    channels, outputs = {3: (48, 64), 5: (32, 240), 7: (32, 64)}[size]
    module, exact = inverted_residual(channels, 96, outputs, size, dtype)
    maps = [(1, 1), (1, 9), (11, 1), (2, 3), (3, 7), (8, 8), (6, 17), (75, 5), (2, 131), (5, 257)]
    for batch, (height, width) in enumerate(maps, start=1):
        x = torch.randn(1 + batch % 3, height, width, channels).to(dtype)
        residual = torch.randn(*x.shape[:3], outputs).to(dtype) if batch % 2 else None
        compare(module, exact, x, residual, kernel="inverted_residual")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "hidden", "outputs", "shape"),
    [
        pytest.param(32, 48, 32, (2, 9, 10), id="half a panel of hidden channels"),
        pytest.param(32, 5, 32, (2, 9, 10), id="few hidden channels"),
        pytest.param(32, 150, 96, (1, 13, 7), id="panel and odd rest"),
        pytest.param(32, 1000, 64, (1, 4, 140), id="hidden map in several blocks"),
        pytest.param(32, 1000, 64, (2, 6, 290), id="hidden map of three tiles in several blocks"),
        pytest.param(576, 64, 576, (1, 1, 3), id="many channels, few positions"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_inverted_residual_of_any_number_of_channels(channels, hidden, outputs, shape, bias, dtype):
    module, exact = inverted_residual(channels, hidden, outputs, 5, dtype, bias)
    assert (module.depthwise.bias is None) is not bias
    x = torch.randn(*shape, channels).to(dtype)
    compare(module, exact, x, torch.randn(*shape, outputs).to(dtype), kernel="inverted_residual")


@has_kernels
def test_inverted_residual_of_half_panels_in_fp32():
    for hidden in (48, 16, 80):
        module, exact = inverted_residual(16, hidden, 48, 3, torch.float32, bias=False)
        compare(module, exact, torch.randn(2, 7, 9, 16), torch.randn(2, 7, 9, 48), kernel="inverted_residual")


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_any_number_of_threads_gives_the_same(dtype):
    module, exact = inverted_residual(32, 64, 32, 3, dtype)
    x = torch.randn(2, 150, 6, 32).to(dtype)
    expected = exact(x.double())
    attn = FastHMHSA(HMHSA(32, head_dim=32, grid_sizes=[4], pool_ratios=[4]).to(dtype).eval())
    found = []
    for count in (1, 2, 3, 5):
        with threads(count), counted() as called:
            found.append([module(x[:1]), module(x), attn.forward_nhwc(x, x)])
            steps = ("local_attention", "average_pool", "convolution", "global_attention")
            assert called == {"inverted_residual": 2, **dict.fromkeys(steps, 1)}
    for one, two, attended in found:
        assert error(two, expected) <= BOUNDS[dtype]
        assert torch.equal(one, two[:1])
        assert torch.equal(two, found[0][1])
        assert torch.equal(attended, found[0][2])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_bands_with_the_hidden_map_in_several_blocks(dtype):
    module, exact = inverted_residual(32, 1000, 32, 7, dtype)  # a band's blocks are as wide as its rows allow
    x = torch.randn(1, 58, 10, 32).to(dtype)
    expected = exact(x.double())
    for count in (1, 2, 3):
        with threads(count):
            assert error(module(x), expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 7])
@torch.no_grad()
def test_an_inverted_residual_may_write_over_what_it_reads(size, dtype):
    maps = [(3, 1, 1), (2, 8, 8), (1, 150, 6), (3, 75, 5), (1, 6, 290)]
    for hidden, largest in ((64, (2, 60, 270)), (1000, (2, 16, 270))):
        module, exact = inverted_residual(32, hidden, 32, size, dtype)
        for shape in (*maps, largest):
            x = torch.randn(*shape, 32).to(dtype)
            expected = module(x, x)
            assert error(expected, exact(x.double(), x.double())) <= BOUNDS[dtype]
            for count in (1, 2, 3):
                over = x.clone()
                with threads(count):
                    y = module(over, over, overwrite=True)
                assert y.data_ptr() == over.data_ptr()
                assert error(y, expected) <= (1e-6 if dtype == torch.float32 else 5e-3)
            over = x.clone()
            assert error(module(x, over, overwrite=True), expected) == 0
            assert error(over, expected) == 0
            apart = x.transpose(1, 2).contiguous().transpose(1, 2)  # of no use to write to
            assert error(module(x, apart, overwrite=True), expected) == 0
            assert torch.equal(apart, x)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_layers_that_the_kernel_lacks_stay_with_pytorch(dtype):
    def run(*layers: nn.Module) -> None:
        layers = nn.Sequential(*layers).to(dtype)
        x = torch.randn(2, 6, 5, layers[0].in_channels).to(dtype)
        with counted() as called:
            y = FastInvertedResidual(*fuse(layers))(x)
        exact = layers.double()(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert error(y, exact) <= BOUNDS[dtype]
        assert not called["inverted_residual"]

    def mix(size: int, **options) -> nn.Conv2d:
        return nn.Conv2d(64, 64, size, **{"padding": size // 2, "groups": 64, **options})

    one, last, act = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1), nn.SiLU()
    run(one, act, mix(9), act, last)
    run(one, act, mix(3, padding=2, dilation=2), act, last)
    run(one, act, mix(3, groups=32), act, last)
    run(one, mix(3), act, last)
    run(one, act, mix(3), last)
    run(nn.Conv2d(24, 64, 1), act, mix(3), act, last)
    run(one, act, mix(3), act, nn.Conv2d(64, 24, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_silu_everywhere(dtype):
    module, _ = inverted_residual(32, 32, 32, 3, dtype)
    for layer in (module.expand, module.project):
        layer.weight.copy_(torch.eye(32))
    module.depthwise.weight.zero_()[:, :, 1, 1] = 1
    for layer in (module.expand, module.depthwise, module.project):
        layer.bias.zero_()
    some = torch.cat((torch.linspace(-100, 100, 4096), torch.linspace(-1, 1, 1021), torch.tensor([-1e4, 1e4, -88.0])))
    x = some.view(2, 16, 5, 32).to(dtype)
    with counted() as called:
        y = module(x)
    assert called == {"inverted_residual": 1}
    exact = F.silu(F.silu(x.double()))
    bound = 1e-6 if dtype == torch.float32 else 2**-7  # two roundings of bf16
    assert ((y.double() - exact).abs() <= bound * exact.abs().clamp_min(1)).all()
    near = exact.abs() > 1e-3  # small ones must be right, too
    assert ((y.double() / exact)[near] - 1).abs().max() <= 4 * bound


# 2. Attention inside grids


def weights(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, inputs).div(inputs**0.5).to(dtype), torch.randn(outputs).mul(0.3).to(dtype)


def queries_first(qkv: tuple[Tensor, Tensor], head_dim: int) -> tuple[Tensor, Tensor]:
    """Weights and bias of Q, K and V with 1/√d in those of Q."""
    scale = torch.ones(len(qkv[1]))
    scale[: len(scale) // 3] = head_dim**-0.5
    return (qkv[0] * scale[:, None]).to(qkv[0].dtype), (qkv[1] * scale).to(qkv[0].dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """(..., N, C) and twice (..., M, C) -> (..., N, C), with Q scaled already."""
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(-2, -3) for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def exact_local(
    x: Tensor, normed: Tensor, qkv: tuple[Tensor, Tensor], scale: Tensor | None, head_dim: int, size: int
) -> Tensor:
    """Grid by grid, in double precision."""
    x, normed, weight, bias = x.double(), normed.double(), qkv[0].double(), qkv[1].double()
    out = x.clone() if scale is None else x * scale.double()
    for top in range(0, x.shape[1], size):
        for left in range(0, x.shape[2], size):
            grid = (slice(None), slice(top, top + size), slice(left, left + size))
            own = normed[grid].flatten(1, 2) @ weight.T + bias
            out[grid] += softmax_attention(*own.chunk(3, dim=-1), head_dim).view_as(out[grid])
    return out


def local_attention(x, normed, qkv, scale, head_dim, size) -> Tensor:
    with counted() as called:
        out = cpu.local_attention(x, normed, cpu.pack_pointwise(*qkv), scale, head_dim, size)
    assert called == {"local_attention": 1}
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 128, 256])
def test_attention_inside_grids(head_dim, dtype):
    if head_dim < 32 and dtype == torch.bfloat16:
        pytest.skip("bf16 sums over 32 channels at least")
    channels = head_dim * (1 if head_dim > 64 else 3)
    sizes = [(1, (3, 5)), (7, (15, 9)), (8, (8, 16)), (8, (3, 5)), (14, (15, 29)), (20, (21, 25)), (20, (1, 1))]
    for i, (size, (height, width)) in enumerate(sizes):
        x, normed = torch.randn(2, 1 + i % 2, height, width, channels).to(dtype)
        qkv = queries_first(weights(3 * channels, channels, dtype), head_dim)
        scale = torch.rand(channels) + 0.5 if i % 3 else None
        out = local_attention(x, normed, qkv, scale, head_dim, size)
        exact = exact_local(x, normed, qkv, scale, head_dim, size)
        assert error(out, exact) <= BOUNDS[dtype]
        plainly = exact - x.double() * (1 if scale is None else scale)
        assert error(out, exact) <= 5e-2 * error(exact - plainly, exact)  # the attention isn't lost in the sum


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(1, channels)], ids=["batch", "group"])
def test_the_local_step_is_as_near_as_the_plain_one(norm, dtype):
    step = LocalStep(norm(64), nn.Conv2d(64, 192, 1), norm(64), 32, 7).to(dtype).eval()
    nn.init.normal_(step.qkv.weight, std=0.3)
    for layer in (step.norm, step.grid_norm):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, std=0.3)
    fast, double = FastLocalStep(step), copy.deepcopy(step).double()
    x = torch.randn(2, 17, 23, 64).to(dtype)
    others = {"group_norm": 2} if isinstance(step.norm, nn.GroupNorm) else {}
    compare(fast, lambda x: double(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), x, kernel="local_attention", **others)


@has_kernels
@pytest.mark.usefixtures("forks")
def test_a_kernel_without_memory_is_an_error():
    """In a process of its own, whose heap holds nothing that could be used again."""
    torch.multiprocessing.start_processes(run_without_memory, nprocs=1, start_method="forkserver")


def run_without_memory(rank: int):
    """Not the end of the process; with memory it goes on."""
    x, weight = torch.zeros(1, 256, 256, 512), torch.randn(1536, 512)
    packed = cpu.pack_pointwise(weight, torch.zeros(1536))
    small = cpu.local_attention(x[:, :8, :8], x[:, :8, :8], packed, None, 256, 8)
    # 540 MB for one grid of 256x256: more than a heap may have kept for use again.
    with little_memory(200), pytest.raises(MemoryError, match="local_attention"):
        cpu.local_attention(x, x, packed, None, 256, 256)
    assert torch.equal(cpu.local_attention(x[:, :8, :8], x[:, :8, :8], packed, None, 256, 8), small)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_comes_from_outside_a_grid(dtype):
    x, normed = torch.randn(2, 2, 15, 22, 64).to(dtype)
    qkv = weights(192, 64, dtype)
    before = local_attention(x, normed, qkv, None, 32, 7)
    for change in (5.0, torch.inf, torch.nan):
        changed = normed.clone()
        changed[1, 7:14, 7:14] = change
        after = local_attention(x, changed, qkv, None, 32, 7)
        inside = torch.zeros(2, 15, 22, dtype=torch.bool)
        inside[1, 7:14, 7:14] = True
        assert torch.equal(after[~inside], before[~inside])
        assert (after[inside] != before[inside]).any(-1).all() if change == 5 else after[inside].isnan().all()


# 3. Attention to merged tokens


def exact_global(own, residual, q, kv, proj, further, head_dim) -> Tensor:
    own, kv = own.double(), kv.double()
    k, v = kv.chunk(2, dim=-1)
    queries = own.flatten(1, 2) @ q[0].double().T + q[1].double()
    y = softmax_attention(queries, k, v, head_dim).view_as(own) + own
    for step, ratio in further:
        step = step.double().repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)
        y = y + step[:, : own.shape[1], : own.shape[2]]
    y = y @ proj[0].double().T + proj[1].double()
    return y if residual is None else y + residual.double()


def global_attention(own, residual, q, kv, proj, further, head_dim) -> Tensor:
    with counted() as called:
        packed = (cpu.pack_pointwise(*q), kv, cpu.pack_pointwise(*proj))
        out = cpu.global_attention(own, residual, *packed, further, head_dim)
    assert called == {"global_attention": 1}
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 256, 257, 700])
def test_attention_to_tokens(tokens, dtype):
    head_dims = [16, 32, 48, 64, 128, 256][dtype == torch.bfloat16 :]
    for i, head_dim in enumerate(head_dims):
        channels = head_dim * (1 if head_dim > 64 else 2)
        height, width = [(1, 1), (1, 9), (13, 5), (8, 8), (7, 19)][i % 5]
        own = torch.randn(2, height, width, channels).to(dtype)
        ratios = [(), (2,), (3, 5)][(i + tokens) % 3]
        further = [(torch.randn(2, -(-height // r), -(-width // r), channels).to(dtype), r) for r in ratios]
        q, proj = weights(channels, channels, dtype), weights(channels, channels, dtype)
        q = ((q[0].float() * head_dim**-0.5).to(dtype), q[1])
        kv = torch.randn(2, tokens, 2 * channels).to(dtype)
        residual = torch.randn_like(own) if i % 2 else None
        exact = exact_global(own, residual, q, kv, proj, further, head_dim)
        out = global_attention(own, residual, q, kv, proj, further, head_dim)
        assert out.data_ptr() == own.data_ptr()
        assert error(out, exact) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_any_number_of_positions(dtype):
    q, proj = weights(64, 64, dtype), weights(64, 64, dtype)
    kv = torch.randn(2, 40, 128).to(dtype)
    for n in (59, 60, 61, 64, 89, 90, 91, 95, 96, 97, 150):  # around whole pieces, and a rest in the last one
        own, step = torch.randn(2, 1, n, 64).to(dtype), torch.randn(2, 1, -(-n // 7), 64).to(dtype)
        exact = exact_global(own, own, q, kv, proj, [(step, 7)], 32)
        assert error(global_attention(own.clone(), own, q, kv, proj, [(step, 7)], 32), exact) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_in_any_memory_format(dtype):
    def spread(x: Tensor) -> Tensor:  # the same numbers, otherwise in memory
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    own, residual, normed = torch.randn(3, 2, 9, 7, 32).to(dtype)
    step, kv = torch.randn(2, 3, 3, 32).to(dtype), torch.randn(2, 40, 64).to(dtype)
    q, proj, qkv = (weights(n, 32, dtype) for n in (32, 32, 96))
    before = spread(own)
    out = global_attention(before, spread(residual), q, spread(kv), proj, [(spread(step), 3)], 32)
    assert torch.equal(before, own)  # a copy was written over
    expected = global_attention(own.clone(), residual, q, kv, proj, [(step, 3)], 32)
    assert torch.equal(out, expected)
    expected = local_attention(own, normed, qkv, None, 32, 4)
    assert torch.equal(local_attention(spread(own), spread(normed), qkv, None, 32, 4), expected)
    module, _ = inverted_residual(32, 64, 32, 3, dtype)
    assert torch.equal(module(spread(own), spread(residual)), module(own, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratios", [(2,), (2, 3), (3, 1, 2)])
def test_hmhsa_is_as_near_as_the_plain_one(ratios, dtype):
    attn = HMHSA(64, head_dim=32, grid_sizes=(5, 4, 3)[: len(ratios)], pool_ratios=ratios).to(dtype).eval()
    for name, p in attn.named_parameters():
        nn.init.normal_(p, std=0.2) if p.ndim > 1 or name.endswith("bias") else nn.init.uniform_(p, 0.5, 1.5)
    double, fast = copy.deepcopy(attn).double(), FastHMHSA(attn)
    x, residual = torch.randn(2, 2, 64, 23, 18).to(dtype).permute(0, 1, 3, 4, 2).contiguous()
    expected = double(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + residual.double()
    with torch.no_grad(), counted() as called:
        ours = error(fast.forward_nhwc(x, residual), expected)
        pools = sum(ratio > 1 for ratio in ratios)
        expected_calls = {
            "local_attention": len(ratios),
            "average_pool": pools,
            "convolution": 1,
            "global_attention": 1,
        }
        assert called == expected_calls
        with plain():
            theirs = error(fast.forward_nhwc(x, residual), expected)
    assert called == expected_calls
    assert ours <= (1e-6 if dtype == torch.float32 else 1.1 * theirs)


# 4. The stem and the downsampling


def stem(channels: int, middle: int, outputs: int, strides: tuple[int, int], dtype: torch.dtype) -> nn.Sequential:
    first = nn.Conv2d(channels, middle, 3, strides[0], padding=1)
    layers = nn.Sequential(first, nn.SiLU(), nn.Conv2d(middle, outputs, 3, strides[1], padding=1)).to(dtype)
    for conv in layers[::2]:
        nn.init.normal_(conv.weight, std=1.5 / conv.weight[0].numel() ** 0.5)
    return layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 1), (2, 2)])
@torch.no_grad()
def test_stem(strides, dtype):
    maps = [(1, 1), (1, 9), (8, 1), (2, 3), (16, 12), (37, 131), (70, 33), (5, 600)]
    for i, (height, width) in enumerate(maps):
        channels, middle, outputs = (3, 16, 64) if i % 2 else (1 + i, 48, 16)
        layers = stem(channels, middle, outputs, strides, dtype)
        x = torch.randn(1 + i % 3, channels, height, width).to(dtype)
        compare(FastStem(layers), copy.deepcopy(layers).double(), x, kernel="stem")


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_the_stem_takes_images_in_any_memory_format(dtype):
    fast = FastStem(stem(3, 16, 32, (2, 2), dtype))
    x = torch.randn(2, 3, 21, 30).to(dtype)
    expected = fast(x)
    apart = torch.randn(4, 6, 42, 90).to(dtype)[1::2, ::2, 1::2, ::3]
    apart.copy_(x)
    views = [x.to(memory_format=torch.channels_last), apart, x.transpose(2, 3).contiguous().transpose(2, 3)]
    for view in (*views, x.float()):
        with counted() as called:
            assert torch.equal(fast(view), expected)
        assert called == {"stem": 1}
    one = x[:1, :1].expand(2, 3, 21, 30)
    assert torch.equal(fast(one), fast(one.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_stems_that_the_kernel_lacks_stay_with_pytorch(dtype):
    def run(first: nn.Conv2d, act: nn.Module, *rest: nn.Module) -> None:
        layers = nn.Sequential(first, act, *rest).to(dtype).eval()
        x = torch.randn(2, 3, 12, 11).to(dtype)
        with counted() as called:
            y = FastStem(layers)(x)
        assert error(y, layers.double()(x.double())) <= BOUNDS[dtype]
        assert not called["stem"]

    def conv(inputs: int, outputs: int, size: int = 3, **options) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, size, **{"stride": 2, "padding": 1, **options})

    run(conv(3, 16), nn.GELU(), conv(16, 32))
    run(conv(3, 16), nn.SiLU(), conv(16, 32), nn.SiLU())
    run(conv(3, 16), nn.SiLU(), nn.GroupNorm(1, 16), conv(16, 32))
    run(conv(3, 16, bias=False), nn.SiLU(), conv(16, 32))
    run(conv(3, 8), nn.SiLU(), conv(8, 32))
    run(conv(3, 16), nn.SiLU(), conv(16, 24))
    run(conv(3, 16, stride=3), nn.SiLU(), conv(16, 32))
    run(conv(3, 16, 5, padding=2), nn.SiLU(), conv(16, 32))
    run(conv(3, 16), nn.SiLU(), conv(16, 32, dilation=2, padding=2))
    run(conv(3, 16), nn.SiLU(), conv(16, 32, groups=2))
    fast = FastStem(stem(3, 16, 32, (2, 2), dtype))
    for shape in ((2, 4, 8, 8), (2, 1, 8, 8)):  # other channels fail as ever
        with pytest.raises(RuntimeError):
            fast(torch.zeros(shape))


def dual_downsample(channels: int, outputs: int, act: nn.Module, dtype: torch.dtype) -> DualDownsample:
    layers = DualDownsample(channels, outputs, norm_layer=nn.BatchNorm2d, act_layer=lambda: act)
    for norm in (layers.norm1, layers.norm2):
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return layers.to(dtype).eval()


def fast_downsample(layers: DualDownsample) -> FastDualDownsample:
    residual = (layers.residual, layers.norm2)
    return FastDualDownsample((layers.conv, layers.norm1), layers.pool, residual, layers.act)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_downsample(dtype):
    maps = [(1, 1), (1, 8), (7, 1), (2, 3), (16, 12), (13, 131), (4, 270)]
    for i, (height, width) in enumerate(maps):
        channels, outputs = (48, 96) if i % 2 else (32, 48)
        layers = dual_downsample(channels, outputs, nn.SiLU(), dtype)
        x = torch.randn(1 + i % 3, channels, height, width).to(dtype).to(memory_format=torch.channels_last)
        fast = fast_downsample(layers)
        with counted() as called:
            y = fast(x)
        assert called == {"convolution": 1, "downsample": 1}
        exact = layers.double()(x.double())
        assert y.shape == exact.shape
        assert error(y, exact) <= BOUNDS[dtype]
        assert torch.equal(fast(x.contiguous()), y)
        with plain():
            assert error(y, exact) <= max(1.1 * error(fast(x), exact), 5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_downsampling_that_the_kernel_lacks_stay_with_pytorch(dtype):
    others = [
        dual_downsample(64, 64, nn.GELU(), dtype),
        dual_downsample(24, 32, nn.SiLU(), dtype),
        dual_downsample(32, 24, nn.SiLU(), dtype),
    ]
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True)):
        others.append(dual_downsample(32, 32, nn.SiLU(), dtype))
        others[-1].pool = pool
    for layers in others:
        x = torch.randn(2, layers.conv.in_channels, 6, 8).to(dtype)
        with counted() as called:
            y = fast_downsample(layers)(x)
        assert error(y, layers.double()(x.double())) <= BOUNDS[dtype]
        assert not called["stem"]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_convolutions_of_ours_and_of_other_networks_are_by_the_same_kernels(dtype):
    for channels, size, stride, options, kernel in (
        (16, 1, 2, {}, False),  # in bf16 the kernel sums over at least 32 numbers
        (32, 1, 2, {}, True),
        (32, 3, 2, {"padding": 1}, True),
        (16, 3, 1, {"padding": (2, 0)}, True),
        (32, 3, 1, {"padding": "same"}, False),
        (24, 3, 1, {}, False),
        (32, 3, 1, {"dilation": 2}, False),
        (32, 3, 2, {"padding": 1, "groups": 2}, False),
        (32, (3, 5), 1, {}, False),
    ):
        conv = nn.Conv2d(channels, 48, size, stride, **options).to(dtype).requires_grad_(False)
        x = torch.randn(2, channels, 7, 2 if options.get("padding") == 1 else 6).to(dtype)
        exact = copy.deepcopy(conv).double()(x.double())
        other = nn.Sequential(copy.deepcopy(conv))
        make_fast(other)
        for run in (lambda x, conv=conv: dispatch.to_nchw(SpatialConv(conv)(dispatch.to_nhwc(x))), other):
            with counted() as called:
                y = run(x)
            assert error(y, exact) <= BOUNDS[dtype]
            assert called["convolution"] == kernel


# 5. Extremes


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    x = (torch.randn(1, 12, 12, 64) * 1e3).to(dtype)
    # In bf16, Q and K are rounded, so that only one winner who is far ahead can be foreseen: each token itself.
    qkv = weights(192, 64, dtype)
    if dtype == torch.bfloat16:
        qkv[0][:128] = torch.eye(64).repeat(2, 1)
        qkv[1][:128] = 0
    out = local_attention(x, x, qkv, None, 32, 12)
    assert out.isfinite().all()
    assert error(out, exact_local(x, x, qkv, None, 32, 12)) <= (1e-5 if dtype == torch.float32 else 1e-2)
    q, proj = (qkv[0][:64], qkv[1][:64]), weights(64, 64, dtype)
    kv = torch.cat((x, x), -1).flatten(1, 2).repeat(1, 2, 1)[:, :280]  # the largest score twice, in two blocks
    for sign in (1, -1):
        exact = exact_global(x * sign, None, q, kv, proj, [], 32)
        out = global_attention(x * sign, None, q, kv, proj, [], 32)
        assert out.isfinite().all()
        assert error(out, exact) <= (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
def test_scores_that_have_a_large_mean(shift, dtype):
    q = (torch.zeros(32, 32).to(dtype), torch.zeros(32).to(dtype))
    q[1][0] = 1
    kv = torch.randn(1, 600, 64).to(dtype)
    kv[..., 0] = shift + torch.arange(600) // 100 * (16 if dtype == torch.bfloat16 else 1)  # exact in either
    kv = kv.roll(150, 1)  # the largest come neither first nor last
    proj = (torch.eye(32).to(dtype), torch.zeros(32).to(dtype))
    own = torch.randn(1, 3, 11, 32).to(dtype)
    exact = exact_global(own, None, q, kv, proj, [], 32)
    assert error(global_attention(own, None, q, kv, proj, [], 32), exact) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [0x7FC00000, -0x400000, 0x7FFFFFFF, -1])  # quiet NaNs of either sign, and others
def test_what_is_no_number_stays_in_its_grid_and_image(pattern, dtype):
    nan = torch.tensor(pattern, dtype=torch.int32).view(torch.float32)
    if dtype == torch.bfloat16:
        nan = torch.tensor(pattern >> 16, dtype=torch.int16).view(dtype)
    assert nan.isnan()
    x = torch.randn(2, 10, 13, 32).to(dtype)
    qkv = weights(96, 32, dtype)
    before = local_attention(x, x, qkv, None, 32, 8)
    for place in ((0, 0), (3, 7), (7, 7)):  # the first, a middle and the last position of a grid
        bad = x.clone()
        bad[0][place] = nan
        after = local_attention(bad, bad, qkv, None, 32, 8)
        assert after[0, :8, :8].isnan().all()
        assert torch.equal(after[0, 8:], before[0, 8:])
        assert torch.equal(after[0, :, 8:], before[0, :, 8:])
        assert torch.equal(after[1], before[1])

    module, _ = inverted_residual(32, 64, 32, 5, dtype)
    with torch.no_grad():
        before, bad = module(x), x.clone()
        bad[0, 4, 6, 3] = nan
        after = module(bad)
    assert after[0, 2:7, 4:9].isnan().all()
    assert int(after.isnan().sum()) == 5 * 5 * 32
    assert torch.equal(after[~after.isnan()], before[~after.isnan()])

    q, proj = weights(32, 32, dtype), weights(32, 32, dtype)
    for place in (0, 255, 256, 299):
        kv = torch.randn(2, 300, 64).to(dtype)
        before = global_attention(x.clone(), None, q, kv, proj, [], 32)
        kv[1, place] = nan
        after = global_attention(x.clone(), None, q, kv, proj, [], 32)
        assert torch.equal(after[0], before[0])
        assert after[1].isnan().all()


@has_kernels
def test_a_key_alone_that_is_no_number():
    q, proj = weights(32, 32, torch.float32), weights(32, 32, torch.float32)
    for place in (0, 17, 256, 299):
        kv = torch.randn(1, 300, 64)
        kv[0, place, 5] = torch.nan
        assert global_attention(torch.randn(1, 4, 4, 32), None, q, kv, proj, [], 32).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_several_callers_at_once(dtype):
    module, _ = inverted_residual(32, 200, 32, 5, dtype)
    attn = FastHMHSA(HMHSA(32, head_dim=32, grid_sizes=[4], pool_ratios=[4]).to(dtype).eval())
    maps = [torch.randn(1, 5 + 7 * i, 20, 32).to(dtype) for i in range(6)]

    def both(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(attn.forward_nhwc(x), x)

    expected = [both(x) for x in maps]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(both, maps), expected))


# 6. What they are given


def kernel_calls(dtype: torch.dtype) -> list[tuple]:
    """The name and the arguments of each call, of all kernels."""
    given: list[tuple] = []

    def record(name: str, *arguments: object, **options: object) -> None:
        given.append((name, arguments, options))
        run(name, *arguments, **options)

    run = cpu_call.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_call, "call", record)
        x, one = torch.randn(2, 9, 10, 32).to(dtype), torch.ones(32)
        with torch.no_grad():
            inverted_residual(32, 64, 64, 3, dtype)[0](x, torch.randn(2, 9, 10, 64).to(dtype))
            FastStem(stem(3, 16, 32, (2, 2), dtype))(torch.randn(2, 3, 9, 9).to(dtype))
            fast_downsample(dual_downsample(32, 64, nn.SiLU(), dtype))(x.permute(0, 3, 1, 2))
        cpu.local_attention(x, x, cpu.pack_pointwise(*weights(96, 32, dtype)), one, 32, 8)
        packed = [cpu.pack_pointwise(*weights(32, 32, dtype)) for _ in range(2)]
        tokens = torch.randn(2, 7, 64).to(dtype)
        cpu.global_attention(x.clone(), x, packed[0], tokens, packed[1], [(x[:, ::2, ::2], 2)], 32)
        qkv = torch.randn(2, 9, 10, 96).to(dtype)
        training.grid_backward(qkv, training.grid_forward(qkv, 32, 4, x), 32, 4)
        queries = x.flatten(1, 2)
        training.global_backward(queries, tokens, training.global_forward(queries, tokens, 32, queries), 32)
        kernel = torch.randn(9, 32)
        training.channel_sums(x)
        for activate in (False, True):
            training.bn_silu_dwconv_forward(x, (one, one), kernel, activate)
        training.bn_silu_dwconv_backward(x, training.bn_silu(x, (one, one)), (one,) * 5, x, (one,) * 3, kernel)
        training.bn_silu_backward_sums(x, x, (one,) * 3)
        training.bn_backward(x.clone(), x, (one,) * 3)
        _, statistics = norms.group_norm_forward(x, one, one, 2, 1e-5)
        norms.group_norm_backward(x, x, one, one, statistics)
        norms.batch_norm_backward(x, x, norms.batch_norm_forward(x, one, one, 1e-5)[1])
        training.pointwise_gradient(tokens.flatten(0, 1), torch.randn(14, 32).to(dtype), bias=True)
        passes.group_norm(x, one, one, 1e-5, residual=x)
        passes.squeeze(x, pack_squeeze(torch.ones(8, 32), None, torch.ones(32, 8), None))
        passes.max_pool(x, passes.Window(2, 2))
        passes.average_pool(x, (2, 3))
        passes.layer_norm(x, one, one, 1e-5)
        cpu.convolution(
            x, cpu.pack_convolution(torch.randn(16, 32, 3, 3).to(dtype), None), 3, residual=x[:, 2:, 2:, :16]
        )
        cpu.full_attention(qkv.flatten(1, 2), 32)
    return given


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_of_every_call_is_checked(dtype):
    """A kernel reads and writes as many numbers as it is told, wherever they are."""

    class Own(Tensor):
        pass

    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    given = kernel_calls(dtype)
    exported = {name.rpartition("_")[0] for name in exported_functions()}
    assert {name for name, *_ in given} == exported
    for name, arguments, options in given:
        tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, tuple)]
        assert len(tensors) >= 2
        for i in tensors:
            label, x, expected, shape = arguments[i]
            wide = x.repeat_interleave(2, -1)[..., ::2]
            wrong = [
                x.to(other if expected == dtype else torch.float16),
                x[:-1],
                x.flatten()[:-1],
                x.new_empty(*shape, 1),
                x.new_empty(0),
                x.to("meta"),
                x.to_sparse(),
                x.as_subclass(Own),
                torch._neg_view(x),
                None,
                *([wide] if not wide.is_contiguous() else []),
            ]
            for tensor in wrong:
                changed = [*arguments]
                changed[i] = (label, tensor, expected, shape)
                with pytest.raises(ValueError, match=f"kernel '{name}': {label} must be"):
                    cpu_call.call(name, *changed, **options)


def exported_functions() -> set[str]:
    sources = build.SOURCES.glob("*.cpp")
    text = "".join(path.read_text() for path in sources)
    found = re.findall(r"^\s*extern \"C\" void (\w+)##SUFFIX", text, re.MULTILINE)
    found += re.findall(r"^[A-Z_]+\((\w+)_fp32, float\)", text, re.MULTILINE)
    return {f"{name.rstrip('_')}_fp32" for name in found}


@has_kernels
def test_sizes_that_a_kernel_lacks_are_refused():
    x, one = torch.randn(1, 4, 4, 32), torch.ones(32)
    for head_dim in (0, 8, 24, 64):
        with pytest.raises(ValueError, match=r"can't be called with these sizes: 32"):
            cpu.local_attention(x, x, cpu.pack_pointwise(*weights(96, 32, torch.float32)), None, head_dim, 4)
    with pytest.raises(ValueError, match=r"can't be called with these sizes: 81, 32"):
        training.bn_silu_dwconv_forward(x, (one, one), torch.ones(81, 32))
    with pytest.raises(ValueError, match=r"there is no kernel 'channel_sums' for torch.float64"):
        training.channel_sums(x.double())


# 7. How they come to be


@pytest.fixture
def anew() -> Iterator[None]:
    """Nothing is known of the library, neither before nor after."""
    build.library.cache_clear()
    support._supports.cache_clear()
    yield
    build.library.cache_clear()
    support._supports.cache_clear()


def script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


@has_kernels
@torch.no_grad()
def test_forbidden(anew, monkeypatch):
    fast, x = optimize(network()), torch.randn(1, 3, 70, 50)
    ours = fast(x)
    build.library.cache_clear()
    support._supports.cache_clear()
    monkeypatch.setenv("TRANSCNN_NATIVE", "0")
    assert build.library() is None
    assert not support.supports(torch.float32)
    with counted() as called:
        assert error(ours, fast(x)) <= 1e-6
    assert not called


@has_compiler
@pytest.mark.parametrize(
    "what",
    [
        "no compiler",
        "none of that name",
        "one that fails",
        "one that fails later",
        "one that writes nonsense",
        "one that speaks no UTF-8",
        "no folder",
        "no writable folder",
        "no home",
    ],
)
def test_without_a_library_the_log_says_why_once(what, anew, monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TRANSCNN_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if what == "no compiler":
        monkeypatch.setenv("PATH", "")
    elif what == "none of that name":
        monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    elif what == "one that fails":
        monkeypatch.setenv("CXX", "/bin/false")
    elif what == "one that fails later":
        lines = ('[ "$1" = --version ] && exit', "echo no such flag >&2", "exit 1")
        monkeypatch.setenv("CXX", script(tmp_path / "cxx", *lines))
    elif what == "one that writes nonsense":
        lines = ('[ "$1" = --version ] && exit', 'while [ "$1" != -o ]; do shift; done', 'echo nonsense > "$2"')
        monkeypatch.setenv("CXX", script(tmp_path / "cxx", *lines))
    elif what == "one that speaks no UTF-8":
        monkeypatch.setenv("CXX", script(tmp_path / "cxx", "printf '\\344' >&2", "printf '\\344'", "exit 1"))
    elif what == "no folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif what == "no writable folder":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        (tmp_path / "cache").mkdir(0o500)
    elif what == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    with caplog.at_level(logging.INFO, build.__name__):
        assert build.library() is None
        assert build.library() is None
        assert not support.supports(torch.float32)
        assert not dispatch.fits_cpu(torch.zeros(1, 1, 1, 32), 32)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "PyTorch's operations are used" in record.message
    if what == "one that fails later":
        assert "no such flag" in record.message
        assert not list((tmp_path / "cache" / "transcnn").iterdir())


@has_compiler
@has_kernels
def test_processes_that_compile_at_once_and_one_that_comes_later(tmp_path):
    log = tmp_path / "log"
    env = dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache"), PYTHONPATH="")
    env.pop("TRANSCNN_NATIVE", None)
    # A compiler that takes a while, and then has what this process uses; build.py alone, without PyTorch.
    lines = ['[ "$1" = --version ] && exec g++ --version', 'case " $* " in *" -c "*) exit 0;; esac']
    lines += [f"echo compiled >> {log}", "sleep 0.5"]
    lines += ['while [ "$1" != -o ]; do shift; done', f'cp {build.library()._name} "$2"']
    env["CXX"] = script(tmp_path / "cxx", *lines)
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
assert build.library() is not None
assert build.isa_support() & 1
print(build.library()._name)
"""

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)

    def name(process: subprocess.Popen) -> Path:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        return Path(out.strip())

    processes = [start() for _ in range(8)]
    (path,) = {name(process) for process in processes}
    assert set((tmp_path / "cache" / "transcnn").iterdir()) == {
        path,
        path.with_suffix(".sha256"),
    }  # nothing else is left
    before = path.stat()
    assert log.read_text().count("compiled") == 1
    assert name(start()) == path
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert log.read_text().count("compiled") == 1


def test_another_compiler_flag_or_source_makes_another_library(tmp_path, monkeypatch):
    def path() -> Path:
        made = build._compiled()
        assert made.parent == tmp_path / "cache" / "transcnn"
        return made

    lines = ('[ "$1" = --version ] && echo $VERSION && exit', 'while [ "$1" != -o ]; do shift; done', 'touch "$2"')
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", *lines))
    monkeypatch.setenv("VERSION", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "a.cpp").write_text("1")
    monkeypatch.setattr(build, "SOURCES", sources)
    paths = [path(), path()]
    assert len(set(paths)) == 1
    (sources / "note.txt").write_text("no source")
    paths.append(path())
    assert len(set(paths)) == 1
    monkeypatch.setenv("VERSION", "2")
    paths.append(path())
    (sources / "b.h").write_text("2")
    paths.append(path())
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    paths.append(path())
    monkeypatch.setattr(build, "_cpu", lambda: "another")
    paths.append(path())
    assert len(set(paths)) == 5
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build._compiled() == tmp_path / ".cache" / "transcnn" / paths[-1].name
    assert all(path.exists() for path in paths)


@has_compiler
@pytest.mark.parametrize(
    ("kind", "needs"),
    [("x86-64", "sse2"), ("x86-64-v3", "avx2 fma"), ("cooperlake", "avx512_bf16"), ("amx", "avx512_bf16")],
)
@torch.no_grad()
def test_what_is_compiled_for_other_cpus(kind, needs, anew, monkeypatch, tmp_path):
    """For AMX with its tiles computed by tests/amx.h, so on other CPUs, too."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if not set(needs.split()) <= set(flags):
        pytest.skip(f"this CPU can't run what is compiled for {kind}")
    if kind == NATIVE:
        pytest.skip("all other tests run what is compiled for this kind")
    monkeypatch.delenv("TRANSCNN_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [f"-march={kind}"]
    if kind == "amx":
        flags = ["-march=cooperlake", "-D__AMX_BF16__", "-include", str(Path(__file__).with_name("amx.h"))]
    monkeypatch.setattr(build, "FLAGS", ["-O0", *flags, *build.FLAGS[2:]])
    monkeypatch.setattr(build, "TIME_LIMIT", 600)  # on a busy machine
    assert build.library() is not None
    assert Path(build.library()._name).parent == tmp_path / "transcnn"
    assert support.supports(torch.bfloat16) is not kind.startswith("x86-64")
    for dtype in (torch.float32, torch.bfloat16)[: 1 + support.supports(torch.bfloat16)]:
        for channels in (32, 48):
            module, exact = inverted_residual(channels, 80, 64, 5, dtype)
            for shape in ((2, 7, 9), (1, 1, 1), (1, 1, 5)):
                compare(module, exact, torch.randn(*shape, channels).to(dtype), kernel="inverted_residual")
        layers = stem(3, 16, 64, (2, 2), dtype)
        compare(FastStem(layers), copy.deepcopy(layers).double(), torch.randn(1, 3, 19, 30).to(dtype), kernel="stem")
        layers = dual_downsample(32, 64, nn.SiLU(), dtype)
        x = torch.randn(1, 32, 9, 11).to(dtype)
        assert error(fast_downsample(layers)(x), layers.double()(x.double())) <= BOUNDS[dtype]
        for size, shape, head_dim in ((8, (9, 13, 96), 48), (1, (1, 2, 528), 48), (8, (9, 13, 64), 32)):
            x = torch.randn(1, *shape).to(dtype)
            qkv = queries_first(weights(3 * shape[-1], shape[-1], dtype), head_dim)
            out = local_attention(x, x, qkv, None, head_dim, size)
            assert error(out, exact_local(x, x, qkv, None, head_dim, size)) <= BOUNDS[dtype]
        kv, proj, q = torch.randn(1, 270, 128).to(dtype), weights(64, 64, dtype), (qkv[0][:64], qkv[1][:64])
        exact = exact_global(x, x, q, kv, proj, [], 32)
        assert error(global_attention(x.clone(), x, q, kv, proj, [], 32), exact) <= BOUNDS[dtype]
        test_silu_everywhere(dtype)


# 8. Networks


def network(**changes) -> nn.Module:
    model = timm.create_model("transcnn_test", **{"dims": (32, 64, 64, 96), "head_dim": 32, **changes})
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5 / p[0].numel() ** 0.5)
        else:
            nn.init.uniform_(p, 0.4, 0.8) if name.endswith("weight") else nn.init.normal_(p, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.4, 0.8)
    return model.eval()


@has_kernels
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_networks_give_the_same(kind):
    model = network(**NETWORKS[kind])
    fast = optimize(model)
    for size in ((64, 64), (97, 131), (33, 40), (5, 3)):
        x = torch.randn(2, 3, *size)
        with counted() as called:
            assert error(fast(x), model(x)) <= 1e-5
        steps = sum(len(stage.blocks[0].attn.local) for stage in fast.stages)
        others = {
            "hatnet": {"group_norm": 22},
            "transcnn": {"downsample": 3},
            "three levels": {"downsample": 3, "stem": 1},
        }
        local = {"local_attention": steps, "average_pool": steps}
        # Of convolutions: three between stages, K and V of three blocks, and Q, K and V and a projection of one.
        last = {"global_attention": 3, "full_attention": 1, "convolution": 8}
        assert called == {"inverted_residual": 4, **local, **last, **others[kind]}


@pytest.mark.skipif(not support.supports(torch.bfloat16), reason="no bf16 on this processor")
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_networks_round_no_worse_than_autocast_does(kind):
    model = network(**NETWORKS[kind])
    fast = optimize(model, "bf16")
    x = torch.randn(4, 3, 97, 131)
    exact = copy.deepcopy(model).double().forward_features(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = error(model.forward_features(x), exact)
    with counted() as called:
        ours = error(fast.forward_features(x.bfloat16()), exact)
        assert called["inverted_residual"] == 4
        assert called["global_attention"] == 3
        with plain():
            theirs = error(fast.forward_features(x.bfloat16()), exact)
    assert called["inverted_residual"] == 4
    assert ours <= 1.1 * autocast <= 2e-2
    assert ours <= 1.02 * theirs
    assert fast(x).dtype == torch.float32  # as the input


@has_kernels
@torch.no_grad()
def test_weights_may_change_in_place():
    x = torch.randn(1, 3, 65, 40)
    one, other = optimize(network()), optimize(network())
    before, expected = one(x), other(x)
    assert error(before, expected) > 1e-2
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), expected)
    for name, p in one.named_parameters():
        was = p.clone()
        p.mul_(1.5)
        with plain():
            changed = one(x)
        assert error(one(x), changed) <= 1e-6, name
        p.copy_(was)
    assert torch.equal(one(x), expected)


@has_kernels
@torch.no_grad()
def test_weights_may_be_exchanged():
    x = torch.randn(1, 3, 40, 40)
    fast = optimize(network())
    fast(x)
    state = {key: value * 1.1 for key, value in fast.state_dict().items()}
    fast.load_state_dict(state, assign=True)
    del state
    with plain():
        expected = fast(x)
    assert error(fast(x), expected) <= 1e-6
    for p in fast.parameters():
        for _ in range(2):  # the second time, it may well lie where it lay at first
            p.data = p.data * 1.1
    with plain():
        expected = fast(x)
    assert error(fast(x), expected) <= 1e-6
    fast.bfloat16()
    ours = fast(x.bfloat16())
    fast.float()
    with plain():
        expected = fast(x)
    assert error(fast(x), expected) <= 1e-6
    assert error(ours, expected) <= 3e-2


@has_kernels
def test_memory_used_anew_is_not_taken_for_the_weights_that_lay_there():
    for n in range(32, 1025, 32):
        packed, bias = cpu.Packed(cpu.pack_pointwise), torch.zeros(n)
        weight = nn.Parameter(torch.randn(n, 32), requires_grad=False)
        packed(weight, bias)
        for _ in range(2):  # what is second made may well lie where the first lay
            weight.data = weight.data * 2
        assert torch.equal(packed(weight, bias)[0], cpu.pack_pointwise(weight, bias)[0])
        made = packed(weight, bias)
        assert packed(weight, bias) is made


@has_kernels
def test_weights_may_change_in_inference_mode():
    with torch.inference_mode():
        fast, x = optimize(network()), torch.randn(1, 3, 40, 40)
        before = fast(x)
        for p in fast.parameters():
            p.mul_(1.1)
        ours = fast(x)
        with plain():
            expected = fast(x)
    assert error(before, expected) > 1e-3
    assert error(ours, expected) <= 1e-6


@has_kernels
@torch.no_grad()
def test_copies_are_models_of_their_own():
    x = torch.randn(1, 3, 40, 40)
    fast = optimize(network())
    unused = len(pickle.dumps(fast))
    before = fast(x)
    stored = pickle.dumps(fast)
    assert len(stored) <= 1.05 * unused  # what was made for the kernels isn't kept
    for again in (copy.deepcopy(fast), pickle.loads(stored)):
        with counted() as called:
            assert torch.equal(again(x), before)
        assert called["inverted_residual"] == 4
        for p in again.parameters():
            p.mul_(1.1)
        with plain():
            expected = again(x)
        assert error(again(x), expected) <= 1e-6
        assert torch.equal(fast(x), before)


@has_kernels
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "recorder", ["torch.export", "torch.jit.trace", pytest.param("torch.compile", marks=pytest.mark.slow), "make_fx"]
)
@torch.no_grad()
def test_tracers_do_not_see_the_kernels(recorder):
    fast, x = optimize(network()), torch.randn(1, 3, 64, 48)
    expected = fast(x)
    with counted() as called:
        if recorder == "torch.export":
            recorded = torch.export.export(fast, (x + 1,)).module()
        elif recorder == "torch.jit.trace":
            recorded = torch.jit.trace(fast, x + 1, check_trace=False)
        elif recorder == "torch.compile":
            recorded = torch.compile(fast, backend="eager")
        else:
            recorded = make_fx(fast)(x + 1)
        assert error(recorded(x), expected) <= 1e-6
    assert not called


@has_kernels
def test_fits():
    x = torch.zeros(1, 2, 2, 32)
    assert dispatch.fits_cpu(x)
    assert dispatch.fits_cpu(x, 16, 32, 48)
    assert dispatch.fits_cpu(nn.Parameter(x), 32)
    assert not dispatch.fits_cpu(x, 24)
    assert not dispatch.fits_cpu(x, 32, 8)
    assert not dispatch.fits_cpu(x.double())
    assert not dispatch.fits_cpu(x.half())
    assert not dispatch.fits_cpu(x[:0])
    assert not dispatch.fits_cpu(x.to("meta"))
    if support.supports(torch.bfloat16):
        assert dispatch.fits_cpu(x.bfloat16(), 32, 48, 64)
        assert not dispatch.fits_cpu(x.bfloat16(), 16)
        assert not dispatch.fits_cpu(x.bfloat16(), 40)
        assert dispatch.fits_cpu(x.bfloat16(), 16, gemm=False)

    class Own(Tensor):
        pass

    assert not dispatch.fits_cpu(x.as_subclass(Own))


@has_kernels
@pytest.mark.skipif(not support.supports(torch.bfloat16), reason="no bf16 on this processor")
@torch.no_grad()
def test_inputs_of_another_dtype_than_the_weights_are_refused_as_ever():
    module, _ = inverted_residual(32, 64, 32, 3, torch.float32)
    local = FastLocalStep(LocalStep(nn.Identity(), nn.Conv2d(32, 96, 1), nn.Identity(), 32, 4))
    x = torch.randn(1, 5, 5, 32).bfloat16()
    for layer in (module, local):
        with pytest.raises(RuntimeError):
            layer(x)
