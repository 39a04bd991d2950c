"""Training with the kernels for CPUs: answers, gradients and statistics are those of the plain layers."""

import copy
import io

import pytest
import timm
import torch
from torch import nn

import transcnn
from transcnn.blocks import InvertedResidual
from transcnn.errors import UserError
from transcnn.fast import accelerate_training, fold_batchnorms
from transcnn.fast.cpu import call as cpu_call
from transcnn.fast.cpu.build import library
from transcnn.fast.cpu.support import supports
from transcnn.fast.training import attention
from transcnn.fast.training import residual as fused
from transcnn.fast.training.residual import KernelInvertedResidual

if library() is None:
    pytest.skip("there is no compiler for the kernels", allow_module_level=True)

KINDS = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(not supports(torch.bfloat16), reason="no bf16 on this processor")),
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def randomise(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.4, 1.2)
        elif p.shape[1] == 1:
            nn.init.normal_(p, std=0.3)
    return module.to(memory_format=torch.channels_last)


def residual(dim: int, expansion: int, size: int, norm: bool = True, momentum: float | None = 0.1) -> nn.Module:
    layer = (lambda c: nn.BatchNorm2d(c, momentum=momentum)) if norm else (lambda c: nn.GroupNorm(1, c))
    block = InvertedResidual(dim, expansion, size, pre_norm=not norm, norm_layer=layer, act_layer=nn.SiLU)
    return randomise(block)


def learn(module: nn.Module, x: torch.Tensor, up: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """Answer, all gradients and all buffers of one step."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        y = module(x)
    y.backward(up.to(y.dtype))
    found = {"answer": y.detach(), "input": x.grad}
    found |= {name: p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def check(plain: nn.Module, ours: nn.Module, shape: tuple[int, ...], kind: str, step: int = 0) -> None:
    """As near to what double precision gives as the plain layers are, give or take a rounding."""
    exact = copy.deepcopy(plain).double()
    torch.manual_seed(step)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        up = torch.randn_like(exact(x.double())).float()
    exact.load_state_dict(plain.state_dict())  # that pass has moved its statistics
    expected = learn(exact, x.double(), up.double(), "fp64")
    usual, found = learn(plain, x, up, kind), learn(ours, x, up, kind)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == usual[name].dtype
        limit = 2 * relative(usual[name], value) + (2e-5 if kind == "fp32" else 2e-3)
        assert relative(found[name], value) <= limit or value.norm() < 1e-10, name


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """Names of the kernels that were called, but for those of single layers."""
    called: list[str] = []
    assert supports(torch.float32)  # which tries each of them
    supports(torch.bfloat16)
    call = cpu_call.call

    def spy(name, dtype, *arguments, **options):
        if "_norm_" not in name and name != "pointwise_gradient":
            called.append(name)
        return call(name, dtype, *arguments, **options)

    monkeypatch.setattr(cpu_call, "call", spy)
    return called


MIDDLE = [(16, 3, 3, 2, 7, 9), (16, 3, 5, 2, 1, 9), (32, 4, 7, 3, 20, 13), (16, 1, 5, 2, 40, 70), (16, 5, 3, 1, 3, 150)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "expansion", "size", "batch", "height", "width"), MIDDLE)
@pytest.mark.parametrize("norm", [True, False], ids=["transcnn", "hatnet"])
def test_inverted_residual(dim, expansion, size, batch, height, width, norm, kind, kernels):
    torch.manual_seed(0)
    plain = residual(dim, expansion, size, norm)
    ours = accelerate_training(copy.deepcopy(plain))
    check(plain, ours, (batch, dim, height, width), kind)
    assert kernels.count("bn_silu_dwconv_forward") == kernels.count("bn_silu_dwconv_backward") == 1


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_statistics_go_on_as_those_of_pytorch(momentum):
    plain = residual(16, 2, 3, momentum=momentum)
    ours = accelerate_training(copy.deepcopy(plain))
    for step in range(3):
        check(plain, ours, (2, 16, 5 + step, 6), "fp32", step)
    assert int(ours.conv1[1].num_batches_tracked) == 3
    x = torch.randn(2, 16, 9, 8).contiguous(memory_format=torch.channels_last)
    assert relative(ours.eval()(x), plain.eval()(x)) < 1e-5


def test_a_mean_far_from_zero_costs_no_digits():
    plain = residual(16, 2, 3)
    ours = accelerate_training(copy.deepcopy(plain))
    x = torch.randn(4, 16, 12, 12).contiguous(memory_format=torch.channels_last) + 300
    exact = copy.deepcopy(plain).double()(x.double())
    assert relative(ours(x), exact) <= 2 * relative(plain(x), exact) + 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_each_time(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = timm.create_model("transcnn_test", dims=(16, 32, 32, 32), head_dim=16).train()
        model = accelerate_training(model.to(memory_format=torch.channels_last))
        x = torch.randn(3, 3, 65, 70).contiguous(memory_format=torch.channels_last)
        state, runs = copy.deepcopy(model.state_dict()), []
        for _ in range(2):
            model.load_state_dict(state)
            model.zero_grad()
            model(x).square().sum().backward()
            runs.append([p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers()))
            runs[-1] = [t.clone() for t in runs[-1]]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.set_num_threads(before)


ATTENTION = [
    (16, 16, [4], [4], 2, 9, 11),
    (64, 32, [8], [8], 2, 33, 17),
    (96, 48, [7], [4], 1, 15, 22),
    (32, 32, [8, 4], [4, 2], 1, 40, 37),
    (32, 32, [20], [1], 1, 21, 40),
    (128, 128, [8], [8], 1, 5, 3),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "head_dim", "grids", "ratios", "batch", "height", "width"), ATTENTION)
def test_both_steps_of_attention(dim, head_dim, grids, ratios, batch, height, width, kind, kernels):
    torch.manual_seed(0)
    norm = lambda c: nn.GroupNorm(1, c)  # noqa: E731
    plain = randomise(transcnn.HMHSA(dim, head_dim=head_dim, grid_sizes=grids, pool_ratios=ratios, norm_layer=norm))
    ours = accelerate_training(copy.deepcopy(plain))
    check(plain, ours, (batch, dim, height, width), kind)
    if kind == "fp32" or head_dim >= 32:
        assert kernels.count("grid_forward") == kernels.count("grid_backward") == len(grids)
        assert kernels.count("global_forward") == kernels.count("global_backward") == 1
    else:
        assert not kernels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width", "calls"), [(7, 9, 1), (1, 1, 1), (3, 40, 1), (40, 40, 0)])
def test_attention_of_all_positions_is_that_of_one_grid(height, width, calls, kind, kernels):
    plain = randomise(
        transcnn.HMHSA(64, head_dim=32, grid_sizes=(), pool_ratios=(), norm_layer=lambda c: nn.Identity())
    )
    ours = accelerate_training(copy.deepcopy(plain))
    check(plain, ours, (2, 64, height, width), kind)
    assert kernels.count("grid_forward") == kernels.count("grid_backward") == calls  # large maps are left to PyTorch


@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_added_to_attention_gets_its_gradient(gradients):
    qkv, kv = torch.randn(2, 5, 6, 96).requires_grad_(), torch.randn(2, 7, 64).requires_grad_()
    residual = torch.randn(2, 5, 6, 32).requires_grad_(gradients)
    q = qkv[..., :32].flatten(1, 2).contiguous()
    for run, added in (
        (lambda x: attention.grid_attention(qkv, 32, 4, x), residual),
        (lambda x: attention._GlobalAttention.apply(q, kv, x, 32), residual.flatten(1, 2)),
    ):
        alone, y = run(None), run(added)
        assert relative(y, alone + added) < 1e-6
        up = torch.randn_like(y)
        found = torch.autograd.grad(y, [qkv, *([residual] if gradients else [])], up, retain_graph=True)
        assert torch.equal(found[0], torch.autograd.grad(alone, qkv, up, retain_graph=True)[0])
        assert not gradients or torch.equal(found[1], up.view(residual.shape))


def test_large_scores_do_not_overflow():
    qkv = (100 * torch.randn(1, 8, 8, 48)).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    plain = transcnn.attention.grid_attention(exact.permute(0, 3, 1, 2), 16, 8).permute(0, 2, 3, 1)
    ours = attention.grid_attention(qkv, 16, 8)
    up = torch.randn_like(ours)
    ours.backward(up)
    plain.backward(up.double())
    assert relative(ours, plain) < 1e-3
    assert torch.isfinite(qkv.grad).all()
    assert relative(qkv.grad, exact.grad) < 1e-2


@pytest.mark.parametrize("design", ["transcnn", "hatnet"])
def test_a_network_learns_the_same(design, kernels):
    torch.manual_seed(0)
    changes = dict(design="hatnet", norm_layer="groupnorm1") if design == "hatnet" else {}
    plain = timm.create_model("transcnn_test", dims=(16, 32, 32, 64), head_dim=16, **changes)
    plain = plain.train().to(memory_format=torch.channels_last)
    ours = accelerate_training(copy.deepcopy(plain))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 3, 64, 72).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4)
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    assert {"bn_silu_dwconv_backward", "grid_backward", "global_backward"} <= set(kernels)
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert (a - b).float().norm() < 1e-3 * b.float().norm() + 1e-5, name  # a bias before a norm learns nothing


def test_what_the_kernels_do_not_know_is_left_to_pytorch(kernels):
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)

    def runs(block: nn.Module, x: torch.Tensor = x) -> bool:
        kernels.clear()
        accelerate_training(block)(x).sum().backward()
        return bool(kernels)

    assert runs(residual(16, 2, 3))
    assert not runs(residual(16, 2, 9))  # kernel sizes 3, 5 and 7
    assert not runs(residual(16, 2, 3).double(), x.double())
    assert not runs(residual(16, 2, 3).eval())  # fixed statistics
    assert not runs(residual(16, 2, 3).to(memory_format=torch.contiguous_format), x.contiguous())  # not channels-last
    assert not runs(InvertedResidual(16, 2, 3, pre_norm=False, norm_layer=nn.BatchNorm2d, act_layer=nn.GELU))
    hooked = residual(16, 2, 3)
    hooked.conv1[1].register_forward_hook(lambda *_: None)
    assert not runs(hooked)
    with torch.no_grad():
        kernels.clear()
        accelerate_training(residual(16, 2, 3))(x)
    assert not kernels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [True, False], ids=["transcnn", "hatnet"])
def test_a_depthwise_convolution_with_a_bias_keeps_it(norm, kind, kernels):
    plain = residual(16, 2, 5, norm)
    if norm:
        fold_batchnorms(plain.eval())
        plain.train().requires_grad_()
    else:
        plain.conv2[0].bias = nn.Parameter(torch.rand(32) + 0.5)
    check(plain, accelerate_training(copy.deepcopy(plain)), (2, 16, 7, 9), kind)
    assert not kernels


def test_one_position_is_refused_as_pytorch_refuses_it():
    block = accelerate_training(residual(16, 2, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 16, 1, 1).contiguous(memory_format=torch.channels_last))


def test_frozen_weights_and_a_frozen_input():
    block = accelerate_training(residual(16, 2, 5))
    block.requires_grad_(False)
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    block(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_copies_traces_and_checkpointing():
    model = timm.create_model("transcnn_test", dims=(16, 32, 32, 32), head_dim=16).train()
    model = accelerate_training(model.to(memory_format=torch.channels_last))
    assert any(isinstance(module, KernelInvertedResidual) for module in model.modules())
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.set_grad_checkpointing()
        gradients = [
            torch.autograd.grad(m(x).square().sum(), [p for p in m.parameters() if p.requires_grad])
            for m in (copy.deepcopy(model), other)
        ]
        assert all(relative(a, b) < 1e-5 for a, b in zip(*gradients, strict=True) if b.norm() > 1e-6)
    model.eval()
    program = torch.export.export(model, (x,)).module(check_guards=False)
    assert relative(program(x), model(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_for_each_sample_are_left_to_pytorch():
    attention = accelerate_training(transcnn.HMHSA(16, norm_layer=lambda c: nn.GroupNorm(1, c)))
    parameters = dict(attention.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(attention, parameters, (image[None],)).square().sum()

    images = torch.randn(3, 16, 9, 9)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    one = torch.autograd.grad(loss(parameters, images[1]), list(parameters.values()))
    for a, b in zip(each.values(), one, strict=True):
        assert relative(a[1], b) < 1e-4 or b.norm() < 1e-4


def test_gradients_of_gradients_are_refused_in_one_line():
    block = accelerate_training(residual(16, 2, 3))
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    for loss in (block(x).square().sum(), block(x).sum()):
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(UserError, match=r"no second derivatives; call transcnn.fast.plain\(model\)"):
            first.sum().backward()
    expected = torch.autograd.grad(block(x).square().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(block(x).square().sum(), x, create_graph=True)[0], expected)
    assert fused._fits_training(x)
