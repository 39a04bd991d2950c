"""Layers of accelerate_training under PyTorch's settings, hooks and other ways to differentiate, beside plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from test_cpu_inference import counted
from test_cpu_training import relative, residual
from transcnn import HMHSA
from transcnn.errors import UserError
from transcnn.fast import accelerate_training
from transcnn.fast.cpu import support
from transcnn.fast.training import norms
from transcnn.fast.training.norms import run_fused

pytestmark = pytest.mark.skipif(not support.supports(torch.float32), reason="needs the kernels")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batchnorm": lambda: nn.BatchNorm2d(32),
    "groupnorm": lambda: nn.GroupNorm(4, 32),
    "pointwise": lambda: nn.Conv2d(32, 48, 1),
    "transcnn's block": lambda: residual(32, 2, 3),
    "hatnet's block": lambda: residual(32, 2, 3, norm=False),
    "attention": lambda: HMHSA(32, head_dim=16, grid_sizes=[4], pool_ratios=[2]),
}
OWN_GRADIENTS: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: nn.Conv2d(32, 32, 5, padding=2, groups=32)
}  # of PyTorch's operations
OWN_GRADIENTS["volumes"] = lambda: nn.Conv3d(32, 32, 3, padding=1, groups=32)
every = pytest.mark.parametrize("name", [*LAYERS, *OWN_GRADIENTS])
by_kernels = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def small_maps(monkeypatch) -> None:
    """The kernels also where PyTorch takes less time."""
    monkeypatch.setattr(norms, "_gains", lambda *_: True)


def pair(name: str) -> tuple[Any, Any, Tensor]:
    """A plain layer, the same after accelerate_training, and an input."""
    torch.manual_seed(0)
    layer = {**LAYERS, **OWN_GRADIENTS}[name]()
    if name == "volumes":
        return layer, accelerate_training(copy.deepcopy(layer)), torch.randn(2, 32, 4, 5, 6)
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 7, 9).contiguous(memory_format=torch.channels_last)
    return layer, accelerate_training(copy.deepcopy(layer)), x


def learn(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Answer and gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    up = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float32, device="cpu")
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], up.to(y.dtype))]


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("setting", [default_dtype, lambda: torch.device("meta")], ids=["dtype", "device"])
@by_kernels
def test_defaults_for_new_tensors_change_nothing(name, setting):
    _, ours, x = pair(name)
    expected = learn(copy.deepcopy(ours), x)
    with setting(), counted() as called:
        found = learn(ours, x)
    assert called
    assert all(map(torch.equal, found, expected))


@every
def test_autocast_in_the_backward_pass_alone_rounds_nothing(name):
    plain, ours, x = pair(name)
    exact = learn(plain.double(), x.double())
    x.requires_grad_()
    y = ours(x)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, [x, *ours.parameters()], up)
    assert all(relative(a, b) < 2e-5 for a, b in zip(found, exact[1:], strict=True))


@every
def test_autocast_leaves_double_precision(name):
    plain, ours, x = pair(name)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        y, expected = ours.double()(x.double()), plain.double()(x.double())
    assert y.dtype == expected.dtype == torch.double
    assert torch.allclose(y, expected)


@every
def test_shapes_are_found_without_memory(name):
    plain, ours, x = pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.to("meta")(x.to("meta")).shape == plain(x).shape


@pytest.mark.parametrize("name", ["batchnorm", "groupnorm", "attention", "attention of all to all"])
def test_what_decides_between_kernels_and_pytorch_fixes_no_size_of_an_exported_layer(name, monkeypatch):
    monkeypatch.undo()  # the kernels where they take less time
    _, ours, x = pair("attention" if "attention" in name else name)
    sizes = {0: torch.export.Dim("batch", min=1, max=4096)}
    if name == "attention of all to all":
        ours = accelerate_training(HMHSA(32, head_dim=16, grid_sizes=[], pool_ratios=[]))
        sizes |= {2: torch.export.Dim("height", max=512), 3: torch.export.Dim("width", max=512)}
    program = torch.export.export(ours, (x,), dynamic_shapes=(sizes,))
    x = torch.cat([x] * 2 if len(sizes) == 1 else [torch.cat([x] * 2, 2)] * 2)
    assert relative(program.module(check_guards=False)(x), ours(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # PyTorch's own forward mode
@every
def test_forward_mode_derivatives_are_pytorchs(name):
    plain, ours, x = pair(name)
    tangents = []
    for layer in (plain, ours):
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            tangents.append(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.sin()))).tangent)
    assert relative(tangents[1], tangents[0]) < 1e-5


@by_kernels
def test_several_gradients_at_once_are_refused_in_one_line(name):
    _, ours, x = pair(name)
    y = ours(x.requires_grad_())
    with pytest.raises(UserError, match=r"no batched gradients .*; call transcnn.fast.plain\(model\)"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)


@pytest.mark.parametrize("name", OWN_GRADIENTS)
def test_several_gradients_at_once(name):
    _, ours, x = pair(name)
    leaves = [x.requires_grad_(), *ours.parameters()]
    y = ours(x)
    ups = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, leaves, ups, is_grads_batched=True, retain_graph=True)
    expected = torch.autograd.grad(y, leaves, ups[1], retain_graph=True)
    assert all(relative(a[1], b) < 1e-5 for a, b in zip(found, expected, strict=True))


@every
def test_hooks_for_all_modules_see_each_call(name):
    plain, ours, x = pair(name)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        plain(x)
        count = len(seen)
        for layer in (ours, ours.eval()):
            seen.clear()
            layer(x)
            assert len(seen) == count == len(set(seen))
    finally:
        handle.remove()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("name", ["batchnorm", "groupnorm"])
def test_weights_of_norms_may_have_any_strides_and_change_before_the_backward_pass(name, silu):
    plain, ours, x = pair(name)
    for norm in (plain, ours):
        norm.weight, norm.bias = nn.Parameter(torch.ones(1).expand(32)), nn.Parameter(torch.arange(64.0)[::2] / 32)
    act = [nn.SiLU()] * silu
    expected = learn(nn.Sequential(plain, *act).double(), x.double())
    x.requires_grad_()
    with counted() as called:
        y = run_fused([ours, *act], x)
    assert called
    with torch.no_grad():
        ours.bias.add_(1)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = [y, *torch.autograd.grad(y, [x, *ours.parameters()], up)]
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


@by_kernels
def test_each_gradient_has_memory_of_its_own(name):
    _, ours, x = pair(name)
    ours(x).square().sum().backward()
    memory = [p.grad.untyped_storage() for p in ours.parameters()]
    assert len({storage.data_ptr() for storage in memory}) == len(memory)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_batchnorm_that_counts_no_batches(momentum):
    plain, ours, x = pair("batchnorm")
    for norm in (plain, ours):
        norm.momentum, norm.num_batches_tracked = momentum, None
        norm(x + 1)
    assert relative(ours.running_mean + 1, plain.running_mean + 1) < 1e-6
    assert relative(ours.running_var, plain.running_var) < 1e-6
