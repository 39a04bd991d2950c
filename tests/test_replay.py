"""Kernel calls that are recorded and made again without Python in between."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from test_cpu_inference import threads
from transcnn import HMHSA, HMHSA1d, HMHSA3d, plug
from transcnn.dense.build import build_network
from transcnn.fast import optimize
from transcnn.fast.cpu import build, inference, passes, support
from transcnn.fast.cpu import replay as cpu_replay
from transcnn.fast.inference.replays import Replays
from transcnn.settings import Detect, Segment

pytestmark = pytest.mark.skipif(build.library() is None, reason="needs the kernels")
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not support.supports(dtype), reason="not on this CPU"))
    for dtype in (torch.float32, torch.bfloat16)
]


@contextmanager
def replays() -> Iterator[Counter]:
    """How often recorded calls are made meanwhile."""
    made: Counter = Counter()
    run = cpu_replay.Replay.__call__

    def count(self: Any, *maps: Tensor) -> Tensor:
        made["replays"] += 1
        return run(self, *maps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_replay.Replay, "__call__", count)
        yield made


@contextmanager
def without() -> Iterator[None]:
    """Every call made by Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replays, "__call__", lambda self, module, function, *maps: function(*maps))
        yield


WIDE: dict[str, Any] = {"dims": (32, 64, 64, 96), "head_dim": 32}
SHALLOW = {**WIDE, "depths": (1, 1, 1, 1), "expansions": (3, 3, 3, 3)}  # of transcnn_tiny: nothing but kernels computes


def network(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    changes = dict(WIDE)
    if kind == "hatnet":
        changes |= dict(design="hatnet", norm_layer="groupnorm1", grid_sizes=(8, 7, 7, None), kernel_sizes=(3, 5, 7, 3))
    if kind == "plugged":
        model = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU())
        model = plug(model, "3", example=torch.zeros(1, 3, 64, 64))
        nn.init.ones_(next(p for name, p in model.named_parameters() if name.endswith("scale")))
    elif kind in ("mobilenetv2_035", "efficientnet_b0"):
        model = timm.create_model(kind, num_classes=10)
    elif kind == "convnext":  # whose blocks call other operations in between
        model = timm.create_model("convnext_atto", num_classes=10, depths=(2, 1, 2, 1), dims=(16, 32, 48, 64))
    else:
        model = timm.create_model("transcnn_test", **changes)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return optimize(model.eval(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["transcnn", "hatnet", "mobilenetv2_035", "efficientnet_b0", "convnext", "plugged"])
@torch.no_grad()
def test_networks_give_the_same_to_the_last_bit(kind, dtype):
    model = network(kind, dtype)
    images = [torch.randn(*size) for size in ((1, 3, 64, 64), (1, 3, 64, 64), (2, 3, 64, 64), (1, 3, 52, 75))]
    images.append(images[0].to(memory_format=torch.channels_last))
    with without():
        expected = [model(x) for x in images]
    with replays() as made:
        for _ in range(3):
            assert all(map(torch.equal, map(model, images), expected))
    assert made["replays"] >= len(images)
    copied = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    assert all(torch.equal(one(images[0]), expected[0]) for one in copied for _ in range(3))
    with torch.inference_mode():
        assert torch.equal(model(images[3]), expected[3])


SETTINGS = {"segment": Segment(), "detect": Detect(short_side=64, long_side=96)}


def in_dense_prediction(kind: str) -> nn.Module:
    """A network that gives more than a map, or is built on one that does."""
    if kind in SETTINGS:
        task_args = {f.name: getattr(SETTINGS[kind], f.name) for f in dataclasses.fields(SETTINGS[kind])}
        return build_network(kind, "transcnn_tiny", task_args, num_classes=2, **SHALLOW)
    if kind == "torchvision":
        return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    return timm.create_model(kind, features_only=True, **(SHALLOW if kind == "transcnn_tiny" else {}))


def maps_in(found: Any) -> list[Tensor]:
    """All tensors in lists and dictionaries."""
    if isinstance(found, Tensor):
        return [found]
    return [x for part in (found.values() if isinstance(found, Mapping) else found) for x in maps_in(part)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["transcnn_tiny", "mobilenetv2_035", "convnext_atto", "segment", "detect", "torchvision"]
)
@torch.no_grad()
def test_networks_that_give_lists_and_dictionaries_run_again_and_again(kind, dtype):
    model, x = optimize(in_dense_prediction(kind).eval(), dtype), torch.rand(1, 3, 64, 96)
    first, *others = [maps_in(model(x)) for _ in range(4)]
    assert first
    assert all(len(found) == len(first) and all(map(torch.equal, found, first)) for found in others)


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda block: block.attn.proj.weight.mul_(2),
    "loaded": lambda block: block.load_state_dict({k: v * 1.25 for k, v in block.state_dict().items()}),
    "other memory": lambda block: setattr(block.attn.proj.weight, "data", block.attn.proj.weight * 2),
    "another parameter": lambda block: setattr(
        block.attn.proj, "weight", nn.Parameter(block.attn.proj.weight * 2, requires_grad=False)
    ),
    "another module": lambda block: setattr(block.attn, "proj", copy.deepcopy(block.attn.kv).requires_grad_(False)),
    "another layer": lambda block: block.irb.insert(0, nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_weights_and_modules_that_change_are_seen(change):
    model = network("transcnn", torch.float32)
    block, x = model.stages[0].blocks[0], torch.randn(1, 32, 16, 16)
    before = [block(x) for _ in range(3)][-1]
    if change is CHANGES["another module"]:
        block.attn.kv.weight = nn.Parameter(block.attn.kv.weight[:32].clone(), requires_grad=False)
        block.attn.kv.bias = nn.Parameter(block.attn.kv.bias[:32].clone(), requires_grad=False)
    change(block)
    if change is CHANGES["another module"]:
        block.attn.kv = copy.deepcopy(network("transcnn", torch.float32).stages[0].blocks[0].attn.kv)
    with without():
        expected = block(x)
    with replays() as made:
        assert all(torch.equal(block(x), expected) for _ in range(4))
    assert made["replays"] == 2
    assert torch.equal(before, expected) is (change is CHANGES["another layer"])


@torch.no_grad()
def test_weights_of_inference_mode_whose_changes_are_not_counted():
    model, x = network("mobilenetv2_035", torch.float32), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        copied = copy.deepcopy(model)
    with replays() as made:
        assert all(torch.allclose(copied(x), model(x), atol=1e-4) for _ in range(2))
    assert not made


@pytest.mark.parametrize("kind", ["transcnn", "hatnet", "plugged"])
def test_copies_of_our_blocks_made_within_inference_mode(kind):
    model, x = network(kind, torch.float32), torch.randn(1, 3, 64, 64)

    def near(y: Tensor, expected: Tensor) -> bool:
        return bool((y - expected).norm() < 1e-5 * expected.norm())

    with torch.inference_mode():
        expected, copied = model(x), copy.deepcopy(model)
        assert all(near(copied(x), expected) for _ in range(3))
        other = copy.deepcopy(model)
        for weight in (*copied.parameters(), *other.parameters()):
            weight.mul_(1.5)  # which nothing counts
        assert torch.equal(copied(x), other(x))
        assert not near(copied(x), expected)
    assert near(copied(x), other(x))


@torch.no_grad()
def test_hooks_are_called():
    model = network("hatnet", torch.float32)
    block, x = model.stages[1].blocks[0], torch.randn(1, 64, 8, 8)
    expected = [block(x) for _ in range(3)][-1]
    seen: list[Any] = []
    for register in (block.irb[0].register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = register(lambda module, args, y: seen.append(module))
        with replays() as made:
            assert torch.equal(block(x), expected)
        handle.remove()
        assert block.irb[0] in seen
        assert not made
        seen.clear()
    with replays() as made:
        assert torch.equal(block(x), expected)
    assert made == {"replays": 1}
    block.irb[0].forward = lambda x: torch.zeros_like(x)
    with replays() as made:
        assert not torch.equal(block(x), expected)
    assert not made


@pytest.mark.parametrize("kind", [HMHSA1d, HMHSA, HMHSA3d])
@torch.no_grad()
def test_any_dimension(kind):
    attn = optimize(kind(32, head_dim=16, grid_sizes=[4], pool_ratios=[2]).eval())
    x = torch.randn(2, 32, *(9,) * kind.ndim)
    with without():
        expected = attn(x)
    with replays() as made:
        assert all(torch.equal(attn(x), expected) for _ in range(3))
    assert made["replays"] == (kind is not HMHSA3d)  # whose grids PyTorch cuts out


@torch.no_grad()
def test_threads_and_many_sizes():
    block = network("transcnn", torch.float32).stages[0].blocks[0]
    maps = [torch.randn(1, 32, 8 + i, 9) for i in range(12)]
    with without():
        expected = [block(x) for x in maps]
    assert all(torch.equal(block(x), y) for _ in range(3) for x, y in zip(maps, expected, strict=True))
    assert len(block._replays._known) <= 8
    assert len(block._replays._seen) <= 8
    with ThreadPoolExecutor(4) as pool, replays() as made:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(block, maps[:4]), expected))
    assert made["replays"] > 4
    with ThreadPoolExecutor(4) as pool:  # all sizes at once, so that each thread adds and forgets some
        for _ in range(20):
            assert all(map(torch.equal, pool.map(block, maps), expected))
    with threads(torch.get_num_threads() + 1):
        assert all(torch.equal(block(maps[0]), expected[0]) for _ in range(3))


@torch.no_grad()
def test_results_are_maps_of_their_own():
    block = network("transcnn", torch.float32).stages[0].blocks[0]
    maps = torch.randn(3, 1, 32, 12, 12)
    results = [block(x) for x in (*maps, *maps)]
    copies = [y.clone() for y in results]
    block(torch.zeros(1, 32, 12, 12))
    assert all(map(torch.equal, results, copies))
    assert len({y.data_ptr() for y in results}) == 6
    assert torch.equal(maps, maps.clone())


# What is recorded


def affine(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    return inference.pack_pointwise(torch.randn(outputs, inputs), torch.randn(outputs))


@torch.no_grad()
def test_what_else_computes_is_never_replayed():
    matrix, x = affine(32, 32), torch.randn(4, 6, 32)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "an operation": lambda x: inference.pointwise(x, matrix) + 1,
        "in place": lambda x: inference.pointwise(x, matrix).add_(1),
        "a copy": lambda x: inference.pointwise(x.transpose(0, 1).contiguous(), matrix),
        "a conversion": lambda x: inference.pointwise(x.to(torch.float64).to(x.dtype), matrix),
        "reads numbers": lambda x: inference.pointwise(x, matrix if x.sum() > 0 else affine(32, 32)),
        "asks for numbers": lambda x: inference.pointwise(x, matrix) if x[0, 0, 0].item() else x,
        "an index": lambda x: inference.pointwise(x[:, 1:], matrix),
        "zeros": lambda x: inference.pointwise(x, matrix, x.new_zeros(4, 6, 32)),
        "no kernel": lambda x: x.view(4, 6, 32),
        "a part": lambda x: inference.pointwise(x, matrix)[:, :3],
        "a constant": lambda x: (inference.pointwise(x, matrix), matrix[0])[1],
    }
    for name, function in functions.items():
        result, replay = cpu_replay.record(function, x)
        assert replay is None, name
        assert torch.equal(result, function(x)), name
    result, replay = cpu_replay.record(lambda x: inference.pointwise(x, matrix), x)
    assert replay is not None
    assert torch.equal(replay(x + 1), inference.pointwise(x + 1, matrix))
    _, replay = cpu_replay.record(lambda x, y: inference.pointwise(x, matrix, y), x, x)  # which is one map twice
    assert replay is None


@torch.no_grad()
def test_structs_that_point_into_maps_are_not_replayed():
    x, kv = torch.randn(1, 6, 6, 32), torch.randn(1, 4, 64)
    q, proj = affine(32, 32), affine(32, 32)

    def attend(x: Tensor, kv: Tensor) -> Tensor:
        a, level = inference.pointwise(x, q), passes.average_pool(x, (2, 2))
        return inference.global_attention(a, None, q, kv, proj, [(level, 2)] if levels else [], 16)

    for levels in (True, False):
        result, replay = cpu_replay.record(attend, x, kv)
        assert (replay is None) is levels
        assert torch.equal(result, attend(x, kv))
    assert replay is not None
    other = torch.randn_like(x), torch.randn_like(kv)
    assert torch.equal(replay(*other), attend(*other))


@torch.no_grad()
def test_results_over_a_map():
    one, x = torch.ones(32), torch.randn(2, 5, 32)

    def norm(x: Tensor, y: Tensor) -> Tensor:
        return passes.group_norm(x, one, one, 1e-5, residual=y, out=y)

    y = torch.randn_like(x)
    _, replay = cpu_replay.record(norm, x, y.clone())
    assert replay is not None
    expected = norm(x + 1, y.clone())
    result = replay(x + 1, y)
    assert torch.equal(result, expected)
    assert result.data_ptr() == y.data_ptr()


@torch.no_grad()
def test_no_memory(monkeypatch):
    """A kernel that finds no memory leaves its result as it is and counts that, so it must be told."""
    matrix, x = affine(32, 32), torch.randn(4, 6, 32)
    _, replay = cpu_replay.record(lambda x: inference.pointwise(x, matrix), x)
    assert replay is not None
    library, counts = replay._library, iter((7, 7, 7, 8))

    class Library:
        replay = library.replay

        def allocations_that_failed(self) -> int:
            return next(counts)

    monkeypatch.setattr(replay, "_library", Library())
    assert torch.equal(replay(x), inference.pointwise(x, matrix))
    with pytest.raises(MemoryError, match="replay"):
        replay(x)


@given(
    st.dictionaries(
        st.integers(0, 40),
        st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 5000)).map(
            lambda t: (min(t[:2]), max(t[:2]), t[2])
        ),
    )
)
@settings(max_examples=200, deadline=None)
def test_maps_in_use_at_a_time_never_overlap(lives):
    offsets, size = cpu_replay._layout(lives)
    assert set(offsets) == set(lives)
    for one, (first, last, length) in lives.items():
        assert offsets[one] % 64 == 0
        assert offsets[one] + length <= size
        for other, (begun, ended, long) in lives.items():
            if other != one and begun <= last and first <= ended:
                assert offsets[one] + length <= offsets[other] or offsets[other] + long <= offsets[one]
