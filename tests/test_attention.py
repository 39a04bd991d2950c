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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference
from transcnn import HMHSA, HMHSA1d, HMHSA2d, HMHSA3d
from transcnn.attention import default_head_dim, global_attention, grid_attention, merge, spread

CLASSES = {1: HMHSA1d, 2: HMHSA2d, 3: HMHSA3d}
NORMS = {"batch": None, "group": partial(nn.GroupNorm, 1, eps=1e-6)}
ODD_SIZES = [(1, 1, 1), (3, 7, 5), (1, 8, 8), (2, 17, 3), (1, 2, 31), (4, 24, 12), (2, 13, 22)]  # (B, H, W)


def make(dim=8, *, ndim=2, dtype=torch.float64, training=False, norm="batch", seed=0, **kwargs) -> HMHSA:
    """An H-MHSA whose every parameter and buffer matters."""
    module = CLASSES[ndim](dim, norm_layer=NORMS[norm], dtype=dtype, **kwargs).train(training)
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=dtype)
            scale = name.endswith(("norm.weight", "running_var"))
            value.copy_(0.6 + 0.1 * noise.abs() if scale else noise / value[0].numel() ** 0.5)
    return module


ANY_SIZES = {
    1: [(1, 1), (3, 37), (1, 64), (2, 5)],
    2: ODD_SIZES,
    3: [(1, 1, 1, 1), (2, 7, 5, 3), (1, 8, 8, 8), (1, 2, 1, 17), (3, 5, 6, 13)],
}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


LARGEST = {1: 40, 2: 11, 3: 6}  # side of a map by its number of dimensions


@st.composite
def cases(draw, ndim):
    """Random levels, grids, ratios, head dims, sizes and masks of real positions."""
    levels = draw(st.integers(0, 3))
    head_dim = draw(st.sampled_from([1, 2, 3, 4, 8]))

    def sizes(largest):  # one number a level, or one for each dimension
        number = st.integers(1, largest)
        return tuple(draw(number | st.tuples(*[number] * ndim)) for _ in range(levels))

    config = {
        "ndim": ndim,
        "dim": head_dim * draw(st.integers(1, 3)),
        "head_dim": head_dim,
        "grid_sizes": sizes(5),
        "pool_ratios": sizes(4),
        "norm": draw(st.sampled_from(list(NORMS))),
        "training": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    size = (draw(st.integers(1, 3)), config["dim"], *(draw(st.integers(1, LARGEST[ndim])) for _ in range(ndim)))
    if config["dim"] == 1 or (config["training"] and config["norm"] == "batch"):  # PyTorch's norms refuse one value
        size = (max(size[0], 2), *size[1:])
    kind = draw(st.sampled_from(["none", "box", "any", "all padded"]))
    if kind == "none":
        return config, size, None
    rng = np.random.default_rng(config["seed"])
    mask = np.zeros((size[0], 1, *size[2:]), bool)
    if kind == "any":
        mask[:] = rng.random(mask.shape) < rng.random()
    for item in mask if kind == "box" else []:  # each item its own size, filled up to that of the batch
        item[(0, *(slice(rng.integers(1, n + 1)) for n in size[2:]))] = True
    return config, size, mask


@pytest.mark.parametrize("ndim", CLASSES)
@settings(max_examples=40)
@given(data=st.data())
def test_equals_the_formulas(ndim, data):
    config, size, mask = data.draw(cases(ndim))
    module = make(**config)
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(config["seed"]))
    weights = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    names = ("head_dim", "grid_sizes", "pool_ratios", "norm", "training")
    expected = torch.from_numpy(reference.hmhsa(x.numpy(), weights, *(config[name] for name in names), mask=mask))
    real = None if mask is None else torch.from_numpy(mask)
    with torch.no_grad():
        if one_value(config, mask):  # as BatchNorm does without a mask
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                module(x, real)
            return
        assert (module(x, real) - expected).norm() <= 1e-10 * expected.norm()


def one_value(config, mask):
    """Whether a BatchNorm that trains is given a single real position or token."""
    if mask is None or not (config["training"] and config["norm"] == "batch"):
        return False
    x = np.zeros((*mask.shape[:1], 1, *mask.shape[2:]))
    counts = [mask.sum()]
    for ratio in config["pool_ratios"]:
        x, mask = reference.pool(x, ratio, mask)
        counts.append(mask.sum())
    return 1 in counts


@pytest.mark.parametrize("ndim", CLASSES)
@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=6)
@given(seed=st.integers(0, 1000))
def test_padding_changes_nothing(norm, ndim, seed):
    """Items of several sizes in one batch answer, with the mask, as each alone; whatever the padding holds."""
    rng = np.random.default_rng(seed)
    grids = [tuple(rng.integers(1, 5, ndim).tolist()) for _ in range(2)]
    module = make(ndim=ndim, norm=norm, seed=seed, grid_sizes=grids, pool_ratios=grids[::-1])
    sizes = rng.integers(1, LARGEST[ndim] + 1, (3, ndim)).tolist()
    items = [torch.from_numpy(rng.standard_normal((1, 8, *size))) for size in sizes]
    batch = torch.full((3, 8, *np.max(sizes, 0)), torch.nan, dtype=torch.float64)
    mask = torch.zeros(3, 1, *batch.shape[2:], dtype=torch.bool)
    for i, item in enumerate(items):
        here = (i, slice(None), *map(slice, item.shape[2:]))
        batch[here], mask[here] = item[0], True
    with torch.no_grad():
        y = module(batch, mask)
        for i, item in enumerate(items):
            alone = module(item)[0]
            assert relative_error(y[(i, slice(None), *map(slice, item.shape[2:]))], alone) <= 1e-10
    assert not y[~mask.expand_as(y)].any()


@pytest.mark.parametrize("ndim", CLASSES)
def test_gradients_with_a_mask_are_finite_and_none_reach_the_padding(ndim):
    module = make(ndim=ndim, norm="group", training=True, grid_sizes=(2, 2), pool_ratios=(2, 2))
    x = torch.randn(3, 8, *(5, 4, 3)[:ndim], dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 1, *x.shape[2:], dtype=torch.bool)
    mask[0], mask[1, :, :3] = True, True  # the third item is all padding
    module(x, mask).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert (x.grad != 0).any(1, keepdim=True).equal(mask)


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


@pytest.mark.parametrize("ndim", CLASSES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_right(masked, norm, ndim):
    levels = 1 if norm == "batch" else 2
    sizes = dict(grid_sizes=[2] * levels, pool_ratios=[2] * levels)
    module = make(4, ndim=ndim, norm=norm, training=True, head_dim=2, **sizes)
    x = torch.randn(2, 4, *(3, 5, 2)[:ndim], dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, *x.shape[2:]) < 0.6 if masked else None
    names, values = zip(*module.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, mask))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize(("ndim", "masked"), [(2, False), (1, False), (3, False), (1, True), (3, True)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)]
)
def test_lower_precision_is_finite_and_near(norm, dtype, tolerance, ndim, masked):
    exact = make(ndim=ndim, norm=norm, grid_sizes=(4, 2), pool_ratios=(2, 2))
    x = torch.randn(2, 8, *{1: (130,), 2: (13, 10), 3: (7, 6, 5)}[ndim])
    mask = None
    if masked:
        mask = torch.ones(2, 1, *x.shape[2:], dtype=torch.bool)
        mask[1, :, 3:] = False
    expected = exact(x.double(), mask)
    module = copy.deepcopy(exact).float()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = module(x, mask)
    assert y.isfinite().all()
    assert relative_error(y.double(), expected) <= tolerance
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    whole = copy.deepcopy(exact).to(dtype)(x.to(dtype), mask)  # without autocast
    assert whole.dtype == dtype
    assert relative_error(whole.double(), expected) <= 2 * tolerance


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ndim", CLASSES)
def test_no_scores_are_kept(ndim, masked):
    """Nothing is larger than q, k and v together; scores of each position and 64 keys would be."""
    sizes = {1: (16,), 2: (4,), 3: (4,)}[ndim]
    module = make(ndim=ndim, dtype=torch.float32, norm="group", training=True, grid_sizes=sizes, pool_ratios=sizes)
    x = torch.randn(1, 8, *{1: (1024,), 2: (32, 32), 3: (16, 16, 16)}[ndim], requires_grad=True)
    mask = torch.rand(1, 1, *x.shape[2:]) < 0.9 if masked else None
    with Largest() as made:
        module(x, mask).square().sum().backward()
    assert made.largest == 3 * x.numel()


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


@pytest.mark.parametrize("ndim", CLASSES)
def test_an_empty_batch_passes(ndim):
    x = torch.zeros(0, 8, *(13, 10, 9)[:ndim], dtype=torch.float64)
    assert make(ndim=ndim)(x).shape == x.shape
    assert make(ndim=ndim, norm="group")(x, x[:, :1].bool()).shape == x.shape


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
        (dict(dim=8, grid_sizes=((2, 8, 8),)), r"got \(\(2, 8, 8\),\); one for each level, or a tuple of 2"),
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


@pytest.mark.parametrize(
    ("ndim", "shape", "message"),
    [
        (1, (2, 8, 5, 5), r"expected a \(B, 8, L\) tensor, got 4 dimensions"),
        (3, (2, 8, 5, 5), r"expected a \(B, 8, D, H, W\) tensor, got 4 dimensions"),
        (3, (2, 8, 5, 0, 5), r"expected D and H and W of 1 or more"),
    ],
)
def test_wrong_dimensions_are_named(ndim, shape, message):
    with pytest.raises(ValueError, match=message):
        make(ndim=ndim, dtype=torch.float32)(torch.zeros(shape))


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 5), torch.ones(2, 8, 5).bool(), torch.ones(1, 1, 5).bool()])
def test_a_wrong_mask_is_named(mask):
    with pytest.raises(ValueError, match=r"mask must be a bool tensor \(2, 1, 5\), got torch\."):
        make(ndim=1, dtype=torch.float32)(torch.zeros(2, 8, 5), mask)


@pytest.mark.parametrize("ndim", CLASSES)
def test_compiled_equals_eager(ndim):
    torch.compiler.reset()
    module = make(ndim=ndim, dtype=torch.float32, grid_sizes=(4,), pool_ratios=(2,))
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for sides in [(8, 12), (7, 9)] if ndim == 2 else []:
            x = torch.randn(2, 8, *sides)
            torch.testing.assert_close(compiled(x), module(x))
        x = torch.randn(2, 8, *(8, 12, 4)[:ndim]) if ndim != 2 else x
        mask = torch.rand(2, 1, *x.shape[2:]) < 0.7 if ndim != 3 else None
        torch.testing.assert_close(compiled(x, mask), module(x, mask))


class Masked(nn.Module):
    """Takes the number of real positions of each item, as a network for sound would."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x, lengths):
        return self.attn(x, (torch.arange(x.shape[2]) < lengths[:, None])[:, None])


EXAMPLE = {1: (96,), 2: (24, 36), 3: (12, 16, 20)}


def inputs_of(size):
    """An input of this batch and these sides, and lengths where it is a batch of sequences."""
    x = torch.randn(size[0], 8, *size[1:])
    return (x, torch.randint(1, size[1] + 1, size[:1])) if len(size) == 2 else (x,)


@pytest.fixture(scope="module", params=CLASSES)
def exported(request):
    """A module (of sequences with a mask), and one trace of it for both tests below: it takes most of the time."""
    ndim = request.param
    sizes = dict(grid_sizes=(4, 2), pool_ratios=(3, 2)) if ndim == 2 else dict(grid_sizes=(4,), pool_ratios=(3,))
    module = make(ndim=ndim, dtype=torch.float32, norm="group", **sizes)
    module = Masked(module) if ndim == 1 else module
    example = inputs_of((2, *EXAMPLE[ndim]))
    dims = torch.export.Dim.DYNAMIC
    dynamic = (dict.fromkeys((0, *range(2, 2 + ndim)), dims), {0: dims})[: len(example)]
    return ndim, module, torch.export.export(module, example, dynamic_shapes=dynamic)


def test_exported_for_any_size(exported):
    ndim, module, program = exported
    # The guards only say which sizes share the example's memory layout: the graph itself is right for all.
    graph = program.module(check_guards=False)
    with torch.no_grad():
        for size in ANY_SIZES[ndim]:
            if ndim == 1 and size[1] <= 3:
                continue  # PyTorch's export keeps one-dimensional attention from a single token, ONNX doesn't
            inputs = inputs_of(size)
            assert relative_error(graph(*inputs), module(*inputs)) <= 1e-6, size


def test_onnx_for_any_size(exported, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    ndim, module, program = exported
    path = tmp_path / "hmhsa.onnx"
    sides = ("length",) if ndim == 1 else ("depth", "height", "width")[-ndim:]
    names = ({0: "batch", **dict(enumerate(sides, start=2))}, {0: None})[: len(program.example_inputs[0])]
    torch.onnx.export(program, (), path, dynamo=True, dynamic_shapes=names, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 8, *sides]
    for size in ANY_SIZES[ndim]:
        inputs = inputs_of(size)
        named = zip((i.name for i in session.get_inputs()), (x.numpy() for x in inputs), strict=True)
        y = session.run(None, dict(named))[0]
        with torch.no_grad():
            assert relative_error(torch.from_numpy(y), module(*inputs)) <= 1e-6, size
        assert np.isfinite(y).all()
