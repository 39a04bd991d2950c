"""Inverted residuals of CNNs that aren't ours, by the C++ kernel: what it computes, and when it runs."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from test_cpu_inference import threads
from test_other_cnns import host_named, randomised, relative
from transcnn.fast import optimize
from transcnn.fast.cpu import inference, support
from transcnn.fast.cpu.inverted_residual import Layers, inverted_residual, pack_inverted_residual, pack_squeeze
from transcnn.fast.inference.chains import Chain

pytestmark = pytest.mark.skipif(not support.supports(torch.float32), reason="needs the kernels")
DTYPES = [d for d in (torch.float32, torch.bfloat16) if support.supports(d)]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
ACTS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": F.relu,
    "clamp": lambda x: F.hardtanh(x, -0.5, 0.7),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
acts = st.sampled_from(sorted(ACTS)).map(lambda name: (name, -0.5, 0.7))


@contextmanager
def counted() -> Iterator[Counter]:
    """How often the kernel of a chain runs, and how often it can't."""
    called: Counter = Counter()
    run = Chain.run

    def count(self: Chain, *args: Any, **kwargs: Any) -> Tensor | None:
        y = run(self, *args, **kwargs)
        called["kernel" if y is not None else "parts"] += 1
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "run", count)
        yield called


def exact(x: Tensor, residual: Tensor | None, layers: Layers, convs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """An inverted residual (B, H, W, C) by PyTorch, in double precision."""
    weights = {name: [t.double() for t in pair] for name, pair in convs.items()}

    def act(x: Tensor, which: tuple[str, float, float]) -> Tensor:
        return ACTS[which[0]](x)

    def matrix(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[name]
        return F.conv2d(x, weight[..., None, None], bias)

    y = x.double().permute(0, 3, 1, 2)
    if "expand" in weights:
        y = act(matrix(y, "expand"), layers.acts[0])
    above, below, before, after = layers.padding or (0, 0, 0, 0)
    if "depthwise" in weights:
        kernel, bias = weights["depthwise"]
        y = F.conv2d(F.pad(y, (before, after, above, below)), kernel, bias, layers.stride, groups=len(kernel))
        y = act(y, layers.acts[1])
    if "reduce" in weights:
        gate = act(matrix(y.mean((2, 3), keepdim=True), "reduce"), layers.squeeze_acts[0])
        y = y * act(matrix(gate, "excite"), layers.squeeze_acts[1])
    if "project" in weights:
        y = matrix(y, "project")
        y = act(y if residual is None else y + residual.double().permute(0, 3, 1, 2), layers.acts[2])
    return y.permute(0, 2, 3, 1)


@settings(max_examples=80, deadline=None)
@given(st.data())
@torch.no_grad()
def test_any_inverted_residual(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    channels, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    size, stride = draw(st.sampled_from([3, 5, 7])), draw(st.sampled_from([1, 2]))
    padding = [draw(st.integers(0, size - 1)) for _ in range(4)]
    height, width = (draw(st.integers(max(1, size - sum(p)), 20)) for p in (padding[:2], padding[2:]))
    convolves, expands, projects = (draw(st.booleans()) for _ in range(3))
    if not convolves:
        stride, padding, expands, projects = 1, [0] * 4, True, True
    squeezes, adds = (projects and draw(st.booleans()) for _ in range(2))
    squeezes = squeezes and convolves
    hidden = draw(st.integers(1, 90)) if expands else channels
    layers = Layers(
        hidden,
        stride,
        tuple(padding) if convolves else None,
        tuple(draw(acts) for _ in range(3)),
        (draw(acts), draw(acts)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def conv(rows: int, columns: int, *sides: int) -> tuple[Tensor, Tensor]:
        weight = rand(rows, columns, *sides)
        return weight / weight[0].numel() ** 0.5, rand(rows)

    convs = {"depthwise": conv(hidden, 1, size, size)} if convolves else {}
    if expands:
        convs["expand"] = conv(hidden, channels)
    if projects:
        convs["project"] = conv(outputs, hidden)
    if squeezes:
        few = draw(st.integers(1, 40))
        convs |= {"reduce": conv(few, hidden), "excite": conv(hidden, few)}
    x = rand(draw(st.integers(1, 4)), height, width, channels)
    plain = exact(x, None, layers, convs)
    residual = rand(*plain.shape) if adds else None
    expected = exact(x, residual, layers, convs)

    flat = [convs.get(name, (None, None)) for name in ("expand", "depthwise", "project")]
    packed = pack_inverted_residual(*(t for pair in flat for t in pair))
    squeeze = pack_squeeze(*convs["reduce"], *convs["excite"]) if squeezes else None
    with threads(draw(st.sampled_from([1, 2, 3]))):
        many = {"squeeze": squeeze, "layers": layers, "outputs": outputs if projects else hidden}
        ours = inverted_residual(x, residual, *packed, **many)
    assert ours.shape == expected.shape
    assert (ours.double() - expected).abs().max() <= BOUNDS[dtype] * max(1, float(expected.abs().max())) * 2


@pytest.mark.parametrize(("height", "width"), [(9, 270), (130, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_maps_of_several_regions_and_hidden_channels_in_several_blocks(height, width, dtype):
    torch.manual_seed(0)
    convs = {
        name: (torch.randn(shape).to(dtype) / shape[1] ** 0.5 / 3, torch.randn(shape[0]).to(dtype))
        for name, shape in {"expand": (300, 24), "depthwise": (300, 1, 5, 5), "project": (40, 300)}.items()
    }
    layers = Layers(300, 2, (2, 2, 2, 2))
    x = torch.randn(1, height, width, 24).to(dtype)
    packed = pack_inverted_residual(*convs["expand"], *convs["depthwise"], *convs["project"])
    for squeezes in (False, True):
        if squeezes:
            pair = [(torch.randn(30, 300) / 17, torch.randn(30)), (torch.randn(300, 30) / 6, torch.randn(300))]
            convs |= {"reduce": pair[0], "excite": pair[1]}
        squeeze = pack_squeeze(*convs["reduce"], *convs["excite"]) if squeezes else None
        with threads(2):
            ours = inverted_residual(x, None, *packed, squeeze=squeeze, layers=layers, outputs=40)
        assert relative(ours, exact(x, None, layers, convs)) <= BOUNDS[dtype]


@torch.no_grad()
def test_not_a_number_stays_and_stays_where_it_is():
    for act in ACTS:
        layers = Layers(20, 1, (1, 1, 1, 1), (("none", 0.0, 0.0), (act, 0.0, 1.0), ("none", 0.0, 0.0)))
        x = torch.randn(1, 9, 9, 20)
        x[0, 2, 3, 4] = torch.nan
        packed = pack_inverted_residual(None, None, torch.randn(20, 1, 3, 3), None, None, None)
        y = inverted_residual(x, None, *packed, layers=layers, outputs=20)
        assert y.isnan().nonzero().tolist() == [[0, i, j, 4] for i in (1, 2, 3) for j in (2, 3, 4)], act


@torch.no_grad()
def test_sizes_that_the_kernel_is_not_made_for_are_refused():
    x, weight = torch.randn(1, 9, 9, 20), torch.randn(20, 1, 3, 3)
    packed = pack_inverted_residual(None, None, weight, None, None, None)
    for layers, outputs in (
        (Layers(20, 3), 20),
        (Layers(20, 1, (3, 0, 0, 0)), 20),
        (Layers(20, 1, (-1, 0, 0, 0)), 20),
        (Layers(40), 20),
        (Layers(4), 20),
        (Layers(20), 60),
    ):
        with pytest.raises(ValueError, match="inverted_residual"):
            inverted_residual(x, None, *packed, layers=layers, outputs=outputs)
    squeeze = pack_squeeze(torch.randn(4, 20), None, torch.randn(20, 4), None)
    for more in (dict(squeeze=squeeze), dict(residual=x)):
        with pytest.raises(ValueError, match="inverted_residual"):
            inverted_residual(x, more.pop("residual", None), *packed, layers=Layers(20), **more)


# The last one's convolutions of stride 2 pad by themselves: 7 of 11 blocks.
HOSTS = {
    "mobilenetv2_035": 17,
    "mobilenetv3_small_050": 11,
    "tf_mobilenetv3_small_075": 7,
    "torchvision mobilenet_v3_small": 12,
}


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_networks_of_inverted_residuals(host):
    torch.manual_seed(0)
    model = randomised(host_named(host))
    double = copy.deepcopy(model).double()
    for dtype in DTYPES:
        fast = optimize(model, dtype)
        for size in ((1, 3, 65, 70), (2, 3, 32, 33)):
            x = torch.randn(size).to(dtype)
            with counted() as called:
                ours = relative(fast(x), double(x.double()))
            assert called["kernel"] == HOSTS[host]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                theirs = relative(model(x.float()), double(x.double()))
            assert ours <= (max(4 * theirs, 2e-6) if dtype == torch.float32 else 1.5 * theirs + 2e-3)
    again = optimize(fast)  # of what has a plan
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), again):
        assert torch.equal(other(x), fast(x))
    assert len(fast(x[:0])) == 0


def block() -> tuple[nn.Module, nn.Module, Tensor]:
    """A block with squeeze-and-excitation and a skip, optimized and not, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(randomised(timm.create_model("efficientnet_b0").blocks[1][1]))
    return model, optimize(model), torch.randn(2, 24, 11, 10).to(memory_format=torch.channels_last)


@torch.no_grad()
def test_what_is_not_plain_runs_layer_by_layer(monkeypatch):
    model, fast, x = block()
    expected = model(x)
    with counted() as called:
        assert relative(fast(x), expected) <= 2e-6
        assert relative(fast(x.contiguous()), expected) <= 2e-6
    assert called == {"kernel": 2}
    with counted() as called, pytest.raises(RuntimeError):
        fast(x[:, :20])
    assert "kernel" not in called
    with counted() as called, monkeypatch.context() as patch:
        patch.setattr(support, "supports", lambda dtype: False)
        assert relative(fast(x), expected) <= 2e-6
    assert called["parts"]
    assert "kernel" not in called
    with counted() as called:
        for layer in (fast[0].se.gate, fast[0].conv_dw, fast[0].se, fast[0].conv_pwl):
            handle = layer.register_forward_hook(lambda *_: None)
            assert relative(fast(x), expected) <= 2e-6
            handle.remove()
        fast[0].se.gate = nn.Identity()
        model[0].se.gate = nn.Identity()
        assert relative(fast(x), model(x)) <= 2e-6
    assert "kernel" not in called
    with torch.inference_mode():
        made = optimize(model)
    assert relative(made(x), model(x)) <= 2e-6


@torch.no_grad()
def test_weights_that_change_are_packed_again():
    _, fast, x = block()
    for name, p in fast.named_parameters():
        p.mul_(1.5)
        with counted() as called, pytest.MonkeyPatch.context() as patch:
            ours = fast(x)
            patch.setattr(support, "supports", lambda dtype: False)
            assert relative(ours, fast(x)) <= 2e-6, name
        assert called["kernel"] == 1


@torch.no_grad()
def test_convolutions_that_are_not_depthwise_are_left_alone():
    for more in (dict(groups=8), dict(groups=16, dilation=2), dict(groups=16, stride=(1, 2)), dict(groups=1)):
        rows = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, **more), nn.ReLU(), nn.Conv2d(16, 8, 1))
        model, x = nn.Sequential(Row(rows)), torch.randn(2, 16, 9, 9)
        with counted() as called:
            assert relative(optimize(model)(x), model(x)) <= 2e-6
        assert not called


@settings(max_examples=60, deadline=None)
@given(st.data())
@torch.no_grad()
def test_any_convolution(data):
    draw = data.draw
    dtype, act = draw(st.sampled_from(DTYPES)), draw(acts)
    size, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    channels, outputs = (16 * draw(st.integers(1, 5)) for _ in range(2))
    channels *= 1 + (dtype == torch.bfloat16 and size == 1)
    padding = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    height, width = (draw(st.integers(max(1, size - 2 * p), 20)) for p in padding)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((draw(st.integers(1, 3)), height, width, channels), (outputs,))
    )
    weight = (torch.randn(outputs, channels, size, size, generator=generator) / (channels * size**2) ** 0.5).to(dtype)
    exact = F.conv2d(x.double().movedim(3, 1), weight.double(), bias.double(), stride, padding).movedim(1, 3)
    packed = inference.pack_convolution(weight, bias)
    with threads(draw(st.sampled_from([1, 2, 3]))):
        residual = torch.randn(exact.shape, generator=generator).to(dtype) if draw(st.booleans()) else None
        expected = ACTS[act[0]](exact if residual is None else exact + residual.double())
        ours = inference.convolution(x, packed, size, stride, padding, act, residual, residual)
        assert residual is None or ours is residual
        assert ours.shape == expected.shape
        assert (ours.double() - expected).abs().max() <= 2 * BOUNDS[dtype] * max(1, float(expected.abs().max()))


@torch.no_grad()
def test_convolutions_that_the_kernel_is_not_made_for_are_refused():
    x, packed = torch.randn(1, 5, 5, 16), inference.pack_convolution(torch.randn(16, 16, 3, 3), None)
    for size, stride, padding in ((3, 0, (1, 1)), (3, 1, (-1, 1)), (7, 1, (0, 0)), (2, 1, (1, 1)), (0, 1, (1, 1))):
        with pytest.raises(ValueError, match="convolution"):
            inference.convolution(x, packed, size, stride, padding)
    with pytest.raises(ValueError, match="convolution"):
        inference.convolution(x[..., :8], packed, 3)
    with pytest.raises(ValueError, match="convolution"):
        inference.convolution(x, packed, 3, residual=x)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_depthwise_convolutions_alone_and_with_several_outputs_of_each_input(dtype):
    torch.manual_seed(0)
    for channels, outputs, stride, more, kernels in (
        (24, 24, 1, [], 1),  # alone: by the kernel where the map is small
        (24, 24, 2, [nn.GELU()], 1),
        (16, 48, 2, [nn.GELU(), nn.Conv2d(48, 20, 1), nn.ReLU()], 1),
        (32, 64, 1, [nn.Conv2d(64, 32, 1)], 1),
        (16, 48, 1, [nn.GELU()], 0),  # whose outputs would be in another order
        (12, 24, 1, [nn.Conv2d(24, 8, 1)], 0),
    ):
        rows = nn.Sequential(nn.Conv2d(channels, outputs, 7, stride, 3, groups=channels), *more)
        model = nn.Sequential(Row(rows)).eval()
        fast, double = optimize(model, dtype), copy.deepcopy(model).double()
        alone = not any(isinstance(layer, nn.Conv2d) for layer in more)
        for side, runs in ((11, kernels), (120, 0 if alone else kernels)):
            x = torch.randn(2, channels, side, side).to(dtype)
            with counted() as called:
                assert relative(fast(x), double(x.double())) <= 2 * BOUNDS[dtype]
            assert called["kernel"] == runs


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_linear_layers_in_a_row(dtype):
    torch.manual_seed(0)
    rows = nn.Sequential(nn.Linear(20, 1500), nn.GELU(), nn.Dropout(0.1), nn.Linear(1500, 24)).eval()
    model = nn.Sequential(Row(rows))
    fast = optimize(model, dtype)
    many = [torch.randn(2, 3, 50, 20), torch.randn(70, 20), torch.randn(20, 200).t()]
    for x in (*many, torch.randn(7, 20), torch.randn(20), torch.randn(0, 20)):
        with counted() as called:
            ours = fast(x.to(dtype))
        assert called == {"kernel" if x.ndim > 1 and len(x) else "parts": 1}
        assert ours.shape == model(x).shape
        assert torch.allclose(ours.float(), model(x), atol=1e-5 if dtype == torch.float32 else 5e-2)


class Row(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
