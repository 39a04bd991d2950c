"""H-MHSA equals its formulas, at any size, and has the properties that they promise."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from transcnn import HMHSA
from transcnn.attention import default_head_dim, global_attention, grid_attention, merge, spread

NORMS = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 1, eps=1e-6)}
ODD_SIZES = [(1, 1, 1), (3, 7, 5), (1, 8, 8), (2, 17, 3), (1, 2, 31), (4, 24, 12), (2, 13, 22)]  # (B, H, W)


def make(dim=8, *, dtype=torch.float64, training=False, norm="batch", seed=0, **kwargs) -> HMHSA:
    """An H-MHSA whose every parameter and buffer matters."""
    module = HMHSA(dim, norm_layer=NORMS[norm], dtype=dtype, **kwargs).train(training)
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=dtype)
            scale = name.endswith(("norm.weight", "running_var"))
            value.copy_(0.6 + 0.1 * noise.abs() if scale else noise / value[0].numel() ** 0.5)
    return module


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@st.composite
def cases(draw):
    """Random levels, grids, ratios, head dims and sizes."""
    levels = draw(st.integers(0, 3))
    head_dim = draw(st.sampled_from([1, 2, 3, 4, 8]))
    config = {
        "dim": head_dim * draw(st.integers(1, 3)),
        "head_dim": head_dim,
        "grid_sizes": tuple(draw(st.integers(1, 5)) for _ in range(levels)),
        "pool_ratios": tuple(draw(st.integers(1, 4)) for _ in range(levels)),
        "norm": draw(st.sampled_from(list(NORMS))),
        "training": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    size = (draw(st.integers(1, 3)), config["dim"], draw(st.integers(1, 11)), draw(st.integers(1, 11)))
    if config["training"] and config["norm"] == "batch":  # BatchNorm can't train on a single value
        size = (max(size[0], 2), *size[1:])
    return config, size


@settings(max_examples=80)
@given(cases())
def test_equals_the_formulas(case):
    config, size = case
    module = make(**config)
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(config["seed"]))
    weights = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    expected = reference.hmhsa(
        x.numpy(),
        weights,
        config["head_dim"],
        config["grid_sizes"],
        config["pool_ratios"],
        config["norm"],
        config["training"],
    )
    with torch.no_grad():
        assert relative_error(module(x), torch.from_numpy(expected)) <= 1e-10


@given(height=st.integers(1, 9), width=st.integers(1, 9), beyond=st.integers(0, 3))
@settings(max_examples=20)
def test_one_grid_over_everything_is_plain_attention(height, width, beyond):
    qkv = torch.randn(2, 3 * 8, height, width, dtype=torch.float64)
    whole = global_attention(*qkv.chunk(3, dim=1), head_dim=4)
    torch.testing.assert_close(grid_attention(qkv, 4, max(height, width) + beyond), whole, rtol=1e-12, atol=1e-12)


def test_a_value_outside_a_grid_cannot_change_the_local_step_inside():
    step = make(grid_sizes=(4,), pool_ratios=(2,)).local[0]
    x = torch.randn(1, 8, 10, 11, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 9, 10] += 100.0  # in the ragged last grid: rows 8 and 9, columns 8 to 10
    before, after = step(x), step(changed)
    moved = (before != after).any(dim=1)[0]
    assert moved[8:, 8:].all()
    assert not moved[:8].any()
    assert not moved[:, :8].any()


def test_a_ragged_border_equals_the_same_positions_alone():
    step = make(grid_sizes=(4,), pool_ratios=(2,)).local[0]
    x = torch.randn(2, 8, 10, 11, dtype=torch.float64)
    whole = step(x)
    for rows, columns in reference.patches(x, 4):
        alone = step(x[:, :, rows, columns])
        torch.testing.assert_close(whole[:, :, rows, columns], alone, rtol=1e-12, atol=1e-12)


def test_merging_averages_real_positions_and_spreading_returns_them():
    x = torch.arange(15.0).view(1, 1, 3, 5)
    merged = merge(x, 2)
    assert merged.flatten().tolist() == [3.0, 5.0, 6.5, 10.5, 12.5, 14.0]
    back = spread(merged, 2, x)
    assert back.shape == x.shape
    assert back[0, 0, 2].tolist() == [10.5, 10.5, 12.5, 12.5, 14.0]
    assert merge(x, 1) is x


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("grids", "ratios"), [((), ()), ((4,), (2,)), ((4, 2, 2), (2, 2, 2))])
def test_gradients_reach_every_parameter_and_the_input(norm, grids, ratios):
    module = make(norm=norm, training=True, grid_sizes=grids, pool_ratios=ratios)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64, requires_grad=True)
    (module(x) * torch.randn(2, 8, 9, 10, dtype=torch.float64)).sum().backward()
    for name, value in [*module.named_parameters(), ("input", x)]:
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().sum() > 0, name


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_right(norm):
    levels = 1 if norm == "batch" else 2
    module = make(4, norm=norm, training=True, head_dim=2, grid_sizes=[2] * levels, pool_ratios=[2] * levels)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)]
)
def test_lower_precision_is_finite_and_near(norm, dtype, tolerance):
    exact = make(norm=norm, grid_sizes=(4, 2), pool_ratios=(2, 2))
    x = torch.randn(2, 8, 13, 10)
    expected = exact(x.double())
    module = copy.deepcopy(exact).float()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = module(x)
    assert y.isfinite().all()
    assert relative_error(y.double(), expected) <= tolerance
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    whole = copy.deepcopy(exact).to(dtype)(x.to(dtype))  # without autocast
    assert whole.dtype == dtype
    assert relative_error(whole.double(), expected) <= 2 * tolerance


def test_nothing_that_depends_on_sizes_is_kept():
    module = make(grid_sizes=(4, 2), pool_ratios=(2, 2))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {name: set(vars(part)) for name, part in module.named_modules()}
    x = torch.randn(2, 8, 13, 10, dtype=torch.float64)
    first = module(x)
    for batch, height, width in ODD_SIZES:
        size = (batch, 8, height, width)
        assert module(torch.randn(size, dtype=torch.float64)).shape == size
    assert torch.equal(module(x), first)
    assert {name: set(vars(part)) for name, part in module.named_modules()} == attributes
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("height", [12, 13])
def test_memory_format_changes_nothing(height):
    module = make(grid_sizes=(4, 2), pool_ratios=(2, 2))
    x = torch.randn(2, 8, height, 10, dtype=torch.float64)
    expected = module(x)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(module(last), expected, rtol=1e-12, atol=1e-12)
    strided = torch.randn(2, 8, 10, height, dtype=torch.float64).transpose(2, 3)
    torch.testing.assert_close(module(strided), module(strided.contiguous()), rtol=1e-12, atol=1e-12)


def test_an_empty_batch_passes():
    assert make()(torch.zeros(0, 8, 13, 10, dtype=torch.float64)).shape == (0, 8, 13, 10)


@pytest.mark.parametrize(("dim", "expected"), [(512, 64), (96, 48), (240, 48), (40, 8), (12, 4), (7, 1)])
def test_default_head_dim(dim, expected):
    assert default_head_dim(dim) == expected
    assert HMHSA(dim, device="meta").head_dim == expected


def test_device_dtype_and_repr():
    module = HMHSA(8, device="meta", dtype=torch.bfloat16, grid_sizes=[4], pool_ratios=[2])
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert repr(module).startswith("HMHSA(\n  8, head_dim=8, grid_sizes=(4,), pool_ratios=(2,)")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(dim=0), r"dim must be 1 or more, got 0"),
        (dict(dim=12, head_dim=5), r"head_dim must divide dim=12, got 5; allowed: 1, 2, 3, 4, 6, 12"),
        (dict(dim=12, head_dim=0), r"head_dim must divide dim=12, got 0"),
        (dict(dim=8, grid_sizes=(0,)), r"grid_sizes must be whole numbers of 1 or more, got \(0,\)"),
        (dict(dim=8, grid_sizes=(2.5,)), r"grid_sizes must be whole numbers of 1 or more, got \(2.5,\)"),
        (dict(dim=8, pool_ratios=(-1,)), r"pool_ratios must be whole numbers of 1 or more, got \(-1,\)"),
        (dict(dim=8, grid_sizes=(4, 4), pool_ratios=(2,)), r"equally many, got 2 and 1: \(4, 4\) and \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HMHSA(**kwargs)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 5, 5), r"expected a \(B, 8, H, W\) tensor, got 3 dimensions: \(8, 5, 5\)"),
        ((1, 5, 5, 8), r"expected 8 channels, got 5 in \(1, 5, 5, 8\)"),
        ((1, 8, 0, 5), r"expected H and W of 1 or more, got \(1, 8, 0, 5\)"),
    ],
)
def test_wrong_inputs_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        make(dtype=torch.float32)(torch.zeros(shape))


def test_compiled_equals_eager():
    module = make(dtype=torch.float32, grid_sizes=(4,), pool_ratios=(2,))
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for height, width in [(8, 12), (7, 9)]:
            x = torch.randn(2, 8, height, width)
            torch.testing.assert_close(compiled(x), module(x))


@pytest.fixture(scope="module")
def to_export():
    return make(dtype=torch.float32, norm="group", grid_sizes=(4, 2), pool_ratios=(3, 2))


@pytest.fixture(scope="module")
def program(to_export):
    """One trace for both tests below: it takes most of the time."""
    dynamic = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    return torch.export.export(to_export, (torch.randn(2, 8, 24, 36),), dynamic_shapes=dynamic)


def test_exported_for_any_size(to_export, program):
    # The guards only say which sizes share the example's memory layout: the graph itself is right for all.
    exported = program.module(check_guards=False)
    with torch.no_grad():
        for batch, height, width in ODD_SIZES:
            x = torch.randn(batch, 8, height, width)
            assert relative_error(exported(x), to_export(x)) <= 1e-6, (batch, height, width)


def test_onnx_for_any_size(to_export, program, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "hmhsa.onnx"
    names = ({0: "batch", 2: "height", 3: "width"},)
    torch.onnx.export(program, (), path, dynamo=True, dynamic_shapes=names, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 8, "height", "width"]
    for batch, height, width in ODD_SIZES:
        x = torch.randn(batch, 8, height, width)
        y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            assert relative_error(torch.from_numpy(y), to_export(x)) <= 1e-6, (batch, height, width)
    assert np.isfinite(y).all()
