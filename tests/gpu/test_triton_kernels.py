"""The Triton kernels equal the plain layers: on a GPU, or under Triton's interpreter on a CPU.

``tests/test_triton.py`` starts these tests under the interpreter; where there is a GPU, ``pytest tests/gpu`` will do.
The interpreter has no bfloat16 (it multiplies it as if its bits were integers), and no CUDA graphs.
"""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from transcnn.attention import grid_attention as plain_grids
from transcnn.attention import merge as plain_merge
from transcnn.blocks import InvertedResidual
from transcnn.compare.engines import randomise
from transcnn.fast import accelerate_training, dispatch, optimize, record_training
from transcnn.fast.training import layers
from transcnn.fast.triton import autograd, linear, local_attention, norms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LAST = torch.channels_last
HALVES = ["float16"] if INTERPRETED else ["float16", "bfloat16"]
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
on_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(layers, "MIN_NUMEL", 1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the autograd operations and kernels that ran."""
    names: list[str] = []

    def recorded(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            names.append(name)
            return made(*arguments, **options)

        return run

    for module in (autograd, local_attention, linear, norms):
        for name in module.__all__:
            function = getattr(module, name)
            if not isinstance(function, type):
                monkeypatch.setattr(module, name, recorded(name, function))
    return names


def rand(*shape: int, dtype: str = "float32") -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(getattr(torch, dtype))


# --- attention inside grids -------------------------------------------------------------------------------------------

GRIDS = [(2, 16, 16, 1, 16, 8), (1, 11, 13, 2, 16, 8), (1, 3, 5, 1, 32, 8), (2, 9, 15, 1, 48, 7), (1, 8, 12, 3, 16, 4)]


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize(("batch", "height", "width", "heads", "head_dim", "size"), GRIDS)
def test_grid_attention_and_its_gradients(batch, height, width, heads, head_dim, size, dtype):
    qkv = rand(batch, height, width, 3 * heads * head_dim, dtype=dtype)
    own, up = (rand(batch, height, width, heads * head_dim, dtype=dtype) for _ in range(2))
    exact, exact_own = qkv.double().requires_grad_(), own.double().requires_grad_()
    expected = exact_own + plain_grids(exact.permute(0, 3, 1, 2), head_dim, size).permute(0, 2, 3, 1)
    expected.backward(up.double())
    ours, ours_own = qkv.clone().requires_grad_(), own.clone().requires_grad_()
    got = local_attention.grid_attention(ours, head_dim, size, ours_own)
    got.backward(up)
    for found, value in ((got, expected), (ours.grad, exact.grad), (ours_own.grad, exact_own.grad)):
        assert relative(found, value) <= TOLERANCE[dtype]


def test_grid_attention_of_inference_adds_the_map_times_a_factor():
    qkv, own, factor = rand(1, 9, 10, 96), rand(1, 9, 10, 32), rand(32)
    found = local_attention.attend(qkv, 16, 8, 1.0, residual=own, factor=factor)
    scaled = torch.cat((qkv[..., :32] * 4, qkv[..., 32:]), -1)  # the plain one divides by √16
    expected = own * factor + plain_grids(scaled.permute(0, 3, 1, 2), 16, 8).permute(0, 2, 3, 1)
    assert relative(found, expected) <= 1e-5


def test_what_the_grid_kernel_is_made_for():
    assert local_attention.supports(torch.float32, 64, 8)
    assert not local_attention.supports(torch.float32, 64, 16)
    assert not local_attention.supports(torch.float32, 8, 8)
    assert not local_attention.supports(torch.double, 64, 8)


# --- products, merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(70, 48, 40), (130, 64, 96), (5, 16, 200)])
def test_linear(rows, depth, columns, residual, silu, dtype):
    x, weight, bias = rand(rows, depth, dtype=dtype), rand(columns, depth, dtype=dtype), rand(columns, dtype=dtype)
    more = rand(rows, columns, dtype=dtype) if residual else None
    expected = F.linear(x.double(), weight.double(), bias.double())
    expected = expected + more.double() if residual else expected
    expected = F.silu(expected) if silu else expected
    for function in (linear.linear, linear.plain_linear):
        assert relative(function(x, weight, bias, more, silu), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("height", "width", "ratio"), [(16, 24, 8), (17, 9, 8), (5, 7, 2), (3, 2, 4)])
def test_merge(height, width, ratio):
    x, up = rand(2, 24, height, width).contiguous(memory_format=LAST).requires_grad_(), None
    expected = plain_merge(x, ratio)
    up = torch.randn_like(expected)
    (slope,) = torch.autograd.grad(expected, x, up)
    found = autograd.merge(x, ratio)
    assert relative(found, expected) <= 1e-6
    assert relative(torch.autograd.grad(found, x, up)[0], slope) <= 1e-6


# --- training ---------------------------------------------------------------------------------------------------------


def learn(module: nn.Module, x: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    """Answer, all gradients and all buffers of one step."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(up.to(y.dtype))
    assert x.grad is not None
    found = {"answer": y.detach(), "input": x.grad}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def check(plain: nn.Module, x: torch.Tensor, limit: float = 2e-5) -> nn.Module:
    """``plain`` with the kernels learns what it learns in double precision; it is returned."""
    plain = plain.to(DEVICE).to(memory_format=LAST)
    exact, ours = copy.deepcopy(plain).double(), accelerate_training(copy.deepcopy(plain))
    x = x.contiguous(memory_format=LAST)
    with torch.no_grad():
        up = torch.randn_like(exact(x.double()))
    exact.load_state_dict(plain.state_dict())  # that pass has moved its statistics
    expected, found = learn(exact, x.double(), up), learn(ours, x, up.float())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert relative(found[name], value) <= limit or value.norm() < 1e-9, name
    return ours


def lively(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.4, 1.2)
    return module


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("norm", [True, False], ids=["transcnn", "hatnet"])
def test_bn_silu_dwconv_of_the_inverted_residual(norm, size, launched):
    layer = nn.BatchNorm2d if norm else (lambda c: nn.GroupNorm(1, c))
    block = InvertedResidual(16, 3, size, pre_norm=not norm, norm_layer=layer, act_layer=nn.SiLU)
    check(lively(block), rand(2, 16, 9, 20))
    assert launched.count("bn_silu_dwconv") == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.5}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=["usual", "faster", "own", "eps"],
)
@pytest.mark.parametrize("channels", [24, 130])
def test_batch_norm(channels, options, launched):
    norm = check(lively(nn.Sequential(nn.BatchNorm2d(channels, **options))), rand(3, channels, 7, 9))
    assert launched.count("batch_norm") == 1
    if norm[0].num_batches_tracked is not None:
        assert int(norm[0].num_batches_tracked) == 1


def test_a_mean_far_from_zero_costs_no_digits():
    norm = nn.BatchNorm2d(16)
    norm.running_mean.fill_(300.0)  # as it is after some steps on such maps
    check(lively(nn.Sequential(norm)), rand(4, 16, 12, 12) + 300, limit=2e-4)


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}])
def test_other_batch_norms_are_pytorchs(options, launched):
    check(nn.Sequential(nn.BatchNorm2d(16, **options)), rand(2, 16, 5, 6))
    assert not launched


@pytest.mark.parametrize(("layer", "kernel"), [(nn.BatchNorm2d(16), "batch_norm"), (nn.Conv2d(16, 16, 1), "pointwise")])
def test_an_activation_in_place_after_a_kernel(layer, kernel, launched):
    """As in ResNets of timm and torchvision."""
    check(lively(nn.Sequential(layer, nn.ReLU(inplace=True))), rand(3, 16, 7, 9))
    assert launched.count(kernel) == 1


def test_pointwise_convolution(launched):
    check(nn.Sequential(nn.Conv2d(24, 40, 1)), rand(2, 24, 7, 9))
    assert launched.count("pointwise") == 1


def test_small_maps_and_other_formats_are_pytorchs(launched, monkeypatch):
    norm = accelerate_training(nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1))).to(DEVICE)
    norm(rand(2, 16, 5, 6))
    monkeypatch.setattr(layers, "MIN_NUMEL", 2**23)
    norm(rand(2, 16, 5, 6).contiguous(memory_format=LAST))
    assert not launched


# --- whole networks ---------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    model = timm.create_model(
        "transcnn_test", dims=(16, 16, 16, 32), head_dim=16, grid_sizes=(4, 4, None, None), drop_path_rate=0.0
    )
    randomise(model)
    return model.to(DEVICE)


def images(batch: int = 1, height: int = 41, width: int = 36) -> torch.Tensor:
    return rand(batch, 3, height, width).contiguous(memory_format=LAST)


@pytest.fixture
def kernels_always(monkeypatch) -> None:
    """Kernels run even where autotuning would find them slower."""
    for module in ("dispatch", "inference.layers"):
        monkeypatch.setattr(f"transcnn.fast.{module}.autotune", lambda key, make: 0)


def test_an_optimized_network(launched, kernels_always):
    model, x = network().eval(), images()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        assert relative(optimize(model)(x), expected) <= 1e-5
        assert launched.count("attend") == 2  # a local step each in the first two stages
        assert launched.count("affine_silu") >= 4 + 5  # a depthwise convolution in each block; stem and downsampling
        launched.clear()
        assert relative(optimize(model, "fp16")(x), expected) <= 5e-3
        assert launched.count("linear") == 4 * 3  # expansion, projection, and that of the attention, in each block


def test_a_network_in_training(launched, kernels_always):
    ours = check(network().train(), images(2), limit=2e-4)
    assert launched.count("bn_silu_dwconv") == 4
    assert launched.count("grid_attention") == 2
    assert launched.count("merge") == 2
    assert {"batch_norm", "pointwise"} <= set(launched)
    fast = optimize(ours)  # of a network that was accelerated
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())


def test_tracing_sees_pytorchs_operations(launched):
    model, x = accelerate_training(network().eval()), images()
    torch.export.export(model, (x,))
    assert not launched


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


@on_gpu
def test_captured_inference():
    model = network().eval()
    usual = optimize(model)
    fast = optimize(model, graphs=True)
    with torch.no_grad():
        for height in (64, 64, 64, 48, 48, 48, 64):
            x = images(2, height)
            assert relative(fast(x), usual(x)) <= 1e-6
        kept = fast(x)
        before = kept.clone()
        fast(images(2, 64))
        assert torch.equal(kept, before)  # an output is not overwritten by the next call
        for p, q in zip(fast.parameters(), usual.parameters(), strict=True):
            p.mul_(1.1)
            q.mul_(1.1)
        assert relative(fast(x), usual(x)) <= 1e-6
    assert len(fast._cache._graphs) == 2


@on_gpu
def test_autotune_takes_the_fastest_that_runs():
    def fails() -> None:
        raise RuntimeError("too little shared memory")

    x = torch.zeros(2**24, device=DEVICE)
    assert dispatch.autotune("test", lambda: [fails, lambda: [x.add_(1) for _ in range(50)], lambda: x.add_(1)]) == 2
    assert dispatch.autotune("test", list) == 2  # it is not run again


def train(model: nn.Module, forward, steps: int, accumulate: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(forward(images(4, 64, 64)).float(), torch.arange(4, device=DEVICE))
        loss.backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


@on_gpu
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("accelerated", [True, False])
def test_captured_training_learns_the_same(accumulate, accelerated):
    model = network().train().to(memory_format=LAST)
    model = accelerate_training(model) if accelerated else model
    twin = copy.deepcopy(model)
    forward = record_training(twin)
    usual, found = train(model, model, 8, accumulate), train(twin, forward, 8, accumulate)
    assert len(forward._cache._graphs) == 1
    assert found == pytest.approx(usual, rel=0.02)
    assert usual[-1] < 0.97 * usual[0]  # it did learn
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert relative(b, a) <= 0.02, name


@on_gpu
def test_captured_training_draws_new_random_numbers_and_knows_its_limits():
    model = timm.create_model("transcnn_test", drop_path_rate=0.5).cuda().train()
    randomise(model)
    forward, x = record_training(model), images(4, 64, 64)
    answers = [forward(x) for _ in range(6)]
    assert len(forward._cache._graphs) == 1
    assert not torch.equal(answers[4], answers[5])  # DropPath
    answers[5].sum().backward()
    with pytest.raises(RuntimeError, match="earlier forward pass"):
        answers[4].sum().backward()
    model.eval()
    assert torch.equal(forward(x), model(x))  # not captured
    model.train()
    for p in model.stem.parameters():
        p.requires_grad_(False)
    for _ in range(4):
        model.zero_grad()
        forward(x).sum().backward()
    assert all(p.grad is None for p in model.stem.parameters())
    assert model.head.fc.weight.grad is not None
    assert len(forward._cache._graphs) == 2  # what learns has changed


def test_on_a_cpu_nothing_is_captured():
    model = timm.create_model("transcnn_test").train()
    forward, x = record_training(model), torch.randn(2, 3, 32, 32)
    for _ in range(4):
        assert forward(x).requires_grad
    assert not forward._cache._graphs
    fast = optimize(model, graphs=True)
    assert torch.equal(fast(x), fast.module(x))
