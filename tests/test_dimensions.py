"""Networks for sequences and volumes: masks, the fast paths, and H-MHSA in hosts of one and three dimensions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import transcnn
from transcnn.backbone import TransCNN
from transcnn.errors import UserError
from transcnn.fast import accelerate_training, optimize, plain
from transcnn.levels import auto_levels, further_levels

LARGEST = {1: (403,), 2: (37, 52), 3: (11, 13, 18)}
SMALL = dict(
    num_classes=5,
    in_chans=2,
    dims=(16, 32),
    depths=(1, 1),
    expansions=(2, 2),
    kernel_sizes=(5, 3),
    head_dim=16,
    stem_width=8,
    stem_stride=2,
    drop_rate=0.0,
)
LEVELS = {
    1: dict(grid_sizes=((16, 4), None), pool_ratios=((4, 2), None)),
    2: dict(grid_sizes=((4, (2, 4)), None), pool_ratios=((2, (2, 1)), None)),
    3: dict(grid_sizes=((4, (1, 2, 2)), None), pool_ratios=(((1, 2, 2), 2), None)),
}
DESIGNS = {"transcnn": {}, "hatnet": dict(design="hatnet", norm_layer="groupnorm1")}


def make(ndim: int, design: str = "transcnn", dtype: torch.dtype = torch.float64) -> TransCNN:
    """A small network whose every parameter and buffer matters."""
    torch.manual_seed(0)
    model = TransCNN(ndim=ndim, dtype=dtype, **SMALL, **LEVELS[ndim], **DESIGNS[design]).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            scale = name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight"))
            noise = torch.randn_like(value)
            value.copy_(0.6 + 0.1 * noise.abs() if scale else noise / max(value[0].numel(), 1) ** 0.5)
    return model


def padded(ndim: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Items of several sizes, and one batch of them with its mask; the padding is not a number."""
    sizes = [LARGEST[ndim], tuple(n // 2 + 1 for n in LARGEST[ndim]), (3, 2, 1)[:ndim]]
    items = [torch.randn(1, 2, *size, dtype=torch.float64) for size in sizes]
    batch = torch.full((3, 2, *LARGEST[ndim]), torch.nan, dtype=torch.float64)
    mask = torch.zeros(3, 1, *LARGEST[ndim], dtype=torch.bool)
    for i, item in enumerate(items):
        here = tuple(map(slice, item.shape[2:]))
        batch[(i, slice(None), *here)], mask[(i, 0, *here)] = item[0], True
    return items, batch, mask


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("ndim", LEVELS)
def test_a_padded_batch_answers_as_each_item_alone(ndim: int, design: str) -> None:
    model = make(ndim, design)
    items, batch, mask = padded(ndim)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, mask), torch.cat([model(item) for item in items]), rtol=1e-9, atol=1e-9)
        assert (
            model.forward_features(batch, mask)[~model.feature_mask(mask).expand(-1, 32, *[-1] * ndim)].abs().sum() == 0
        )
    model.train().set_grad_checkpointing()
    model(batch, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_batchnorm_that_trains_sees_real_positions_alone() -> None:
    """Items of one size padded train as without padding: outputs, gradients and running statistics."""
    model, x = make(1).train(), torch.randn(3, 2, 48, dtype=torch.float64)
    twin = copy.deepcopy(model)
    batch = nn.functional.pad(x, (0, 32), value=5.0)
    mask = (torch.arange(80) < 48).expand(3, 1, 80)
    y, expected = model(batch, mask), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("ndim", LEVELS)
def test_a_mask_of_real_positions_alone_trains_as_none_does(ndim: int) -> None:
    """To the last bit: what masks cost is paid by padding alone."""
    model, x = make(ndim).train(), torch.randn(2, 2, *LARGEST[ndim], dtype=torch.float64)
    twin = copy.deepcopy(model)
    mask = torch.ones_like(x[:, :1], dtype=torch.bool)
    model.forward_features(x, mask).square().sum().backward()
    twin.forward_features(x).square().sum().backward()
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.stages.parameters(), twin.stages.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    attention = model.stages[0].blocks[0].attn.eval()
    y = torch.randn(2, 16, *LARGEST[ndim], dtype=torch.float64)
    assert torch.equal(attention(y, torch.ones_like(y[:, :1], dtype=torch.bool)), attention(y))


def test_masks_that_cannot_be_are_named() -> None:
    model = make(1)
    with pytest.raises(ValueError, match=r"mask must be a bool tensor \(1, 1, 40\), got torch.bool \(1, 1, 39\)"):
        model(torch.zeros(1, 2, 40).double(), torch.ones(1, 1, 39, dtype=torch.bool))
    model.reset_classifier(5, "max")
    with pytest.raises(ValueError, match="with a mask, global_pool must be one of"):
        model(torch.zeros(1, 2, 40).double(), torch.ones(1, 1, 40, dtype=torch.bool))
    with pytest.raises(UserError, match="an optimized network takes no mask"):
        optimize(make(1))(torch.zeros(1, 2, 40), torch.ones(1, 1, 40, dtype=torch.bool))
    with pytest.raises(ValueError, match="output_stride must be 32 where ndim=3, got 16"):
        TransCNN(ndim=3, output_stride=16)
    with pytest.raises(ValueError, match=r"norm_layer must be one of .*batchnorm1d.*, got 'batchnorm2d'"):
        TransCNN(ndim=1, norm_layer="batchnorm2d")


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("ndim", LEVELS)
def test_optimized(ndim: int, design: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("transcnn.fast.cpu.support.supports", lambda dtype: False)
    exact, model = make(ndim, design), make(ndim, design, torch.float32)
    model.load_state_dict(exact.state_dict())
    fast = optimize(model)
    dividing = {1: (256,), 2: (32, 64), 3: (8, 16, 8)}[ndim]
    with torch.no_grad():
        for size in (LARGEST[ndim], dividing, (1, 1, 1)[:ndim]):
            x = torch.randn(2, 2, *size)
            expected = exact(x.double())
            assert (fast(x) - expected).norm() <= 2e-5 * expected.norm(), size
            bf16 = optimize(model, "bf16")(x)
            assert (bf16 - expected).norm() <= 0.1 * expected.norm(), size
    assert not any(isinstance(module, transcnn.HMHSA) for module in fast.modules())


@pytest.mark.parametrize("ndim", LEVELS)
def test_trains_by_kernels(ndim: int) -> None:
    exact, model = make(ndim).train(), make(ndim, dtype=torch.float32).train()
    model.load_state_dict(exact.state_dict())
    accelerate_training(model)
    dividing = {1: (256,), 2: (32, 64), 3: (8, 16, 8)}[ndim]
    for size in (LARGEST[ndim], dividing):
        x = torch.randn(2, 2, *size)
        if ndim > 1:
            x = x.to(memory_format=torch.channels_last if ndim == 2 else torch.channels_last_3d)
        y, expected = model(x), exact(x.double())
        torch.testing.assert_close(y.double(), expected, rtol=2e-4, atol=2e-4)
        y.square().sum().backward()
        expected.square().sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
            worst = (ours.grad.double() - theirs.grad).norm() / (theirs.grad.norm() + exact.head.fc.weight.grad.norm())
            assert worst <= 1e-3, name
    assert {type(m) for m in plain(model).modules()} == {type(m) for m in exact.modules()}


class Network3d(nn.Module):
    """A small CNN for volumes, of PyTorch's layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm3d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv3d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm3d(16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3, 4)))


def test_any_cnn_of_three_dimensions_is_optimized() -> None:
    model = Network3d().eval()
    for _ in range(3):
        model.train()(torch.randn(2, 1, 9, 8, 7))
    fast, x = optimize(model.eval()), torch.randn(2, 1, 9, 8, 7)
    torch.testing.assert_close(fast(x), model(x).detach())
    assert not any(isinstance(module, nn.BatchNorm3d) for module in fast.modules())
    assert fast.stem[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("name", "size"), [("transcnn1d_nano", (700,)), ("transcnn3d_nano", (16, 20, 9))])
def test_named_networks(name: str, size: tuple[int, ...]) -> None:
    model = transcnn.create_model(name, num_classes=10).eval()
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert model(torch.zeros(2, 1, *size)).shape == (2, 10)
    assert transcnn.create_model(name, num_classes=0, in_chans=3)(torch.zeros(2, 3, *size)).shape == (
        2,
        model.num_features,
    )
    with pytest.raises(ValueError, match=f"there are no weights of {name}"):
        transcnn.create_model(name, pretrained=True)
    large = transcnn.create_model(
        name, grid_sizes="auto", pool_ratios="auto", img_size=2**18 if len(size) == 1 else 256
    )
    assert len(large.stages[0].blocks[0].attn.local) > 1


def test_levels_leave_few_tokens_in_any_dimension() -> None:
    for sides in [(8_192,), (2**20,), (16,) * 3, (256,) * 3, (16, 112, 112), (2, 300, 7)]:
        grids, ratios = further_levels(sides)
        left = list(sides)
        for ratio in ratios:
            each = (ratio,) * len(left) if isinstance(ratio, int) else ratio
            left = [-(-n // r) for n, r in zip(left, each, strict=True)]
        assert max(left) <= {1: 144, 3: 5}[len(sides)]
        assert all(max(g) if isinstance(g, tuple) else g in (64, 4) for g in grids)
    assert further_levels((16, 112, 112)) == ((4, 4, 4), (4, (1, 4, 4), (1, 2, 2)))
    assert auto_levels(((64,), None), ((16,), None), 2**16, 4, ndim=1) == (((64, 64), (64,)), ((16, 16), (64,)))


# --- seeing inside ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", LEVELS)
def test_attention_maps_are_the_weights_that_forward_uses(ndim: int) -> None:
    """With the values of the layers they give the output, at a position at the border and one inside."""
    levels = {1: ((5, 3), (3, 2)), 2: ((4, (2, 3)), ((3, 2), 2)), 3: ((3, (1, 2, 2)), ((1, 2, 2), 2))}[ndim]
    attn = {1: transcnn.HMHSA1d, 2: transcnn.HMHSA2d, 3: transcnn.HMHSA3d}[ndim](
        8, head_dim=4, grid_sizes=levels[0], pool_ratios=levels[1], dtype=torch.float64
    ).eval()
    x = torch.randn(1, 8, *(23, 11, 5)[:ndim], dtype=torch.float64)
    place = tuple(n - 1 for n in x.shape[2:])
    seen: dict[nn.Module, torch.Tensor] = {}
    for module in (attn.local[0].qkv, attn.kv):
        module.register_forward_hook(lambda module, args, output: seen.__setitem__(module, output))
    attn.local[0].grid_norm.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0]))
    for query in (place, tuple(n // 2 for n in x.shape[2:])):
        heads = [transcnn.attention_maps(attn, x, query, head=head) for head in (0, 1)]
        assert [(m.step, m.level) for m in heads[0]] == [("local", 1), ("local", 2), ("global", 3)]
        here = (0, slice(None), *query)
        v = seen[attn.local[0].qkv].chunk(3, dim=1)[2][0].unflatten(0, (2, 4))
        local = torch.cat([(v[h] * maps[0].weights).flatten(1).sum(1) for h, maps in enumerate(heads)])
        torch.testing.assert_close(local, (seen[attn.local[0].grid_norm] - x)[here])
        for m in heads[0]:
            assert abs(float(m.weights.sum()) - 1) < 1e-9
            assert abs(float(m.pixels.sum()) - 1) < 1e-9
            assert m.pixels.shape == x.shape[2:]
            assert int((m.weights > 0).sum()) == m.seen
            assert len(m.box) == 2 * ndim
    rollout = transcnn.attention_rollout(attn, x, place)
    assert rollout.shape == x.shape[2:]
    assert abs(float(rollout.sum()) - 1) < 1e-9


def test_seeing_inside_networks_for_sequences_and_volumes() -> None:
    for name, size in [("transcnn1d_nano", (700,)), ("transcnn3d_nano", (12, 16, 9))]:
        model = transcnn.create_model(name, num_classes=3).eval()
        x = torch.randn(1, *size)
        maps = transcnn.attention_maps(model, x, tuple(n // 2 for n in size))
        assert {m.pixels.shape for m in maps} == {torch.Size(size)}
        for values in (transcnn.explain.grad_cam(model, x), transcnn.explain.gradient_attention(model, x)):
            assert values.shape == size
    with pytest.raises(UserError, match=r"expected one input, \(C, D, H, W\) or \(1, C, D, H, W\), got \(1, 700\)"):
        transcnn.attention_maps(model, torch.zeros(1, 700), (3,))
    with pytest.raises(
        UserError, match=r"the query \(depth, row, column\) must be within \(0, 0, 0\) and \(11, 15, 8\)"
    ):
        transcnn.attention_maps(model, x, (3, 4))
