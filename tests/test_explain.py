"""Attention maps are what forward uses; rollout and class maps are what their definitions say; the picture is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import transcnn.attention
from transcnn import cli
from transcnn.attention import HMHSA, merge, spread
from transcnn.checkpoints.loading import Loaded, data_config_of, load, save_weights
from transcnn.data.transforms.classify import eval_transform
from transcnn.errors import UserError
from transcnn.explain import attention_maps, attention_rollout, deletion_insertion, grad_cam, gradient_attention
from transcnn.explain.figure import draw
from transcnn.explain.geometry import carry, cell_of, edges, smooth
from transcnn.explain.image import _crop_box, _in_crop, explain_image, find_class
from transcnn.plugging.build import build_model
from transcnn.plugging.plug import plug
from transcnn.tasks import get_task


class Net(nn.Module):
    """A convolution, H-MHSA modules, and a linear head: small enough to be worked out by hand."""

    def __init__(self, *levels: tuple[tuple[int, ...], tuple[int, ...]], dim: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, stride=stride, padding=1)
        self.blocks = nn.Sequential(*(HMHSA(dim, head_dim=4, grid_sizes=g, pool_ratios=r) for g, r in levels))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


PLAIN, TWO, THREE = ((), ()), ((3,), (2,)), ((4, 2), (2, 2))


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Weights with which attention is far from even, and norms that aren't the identity."""
    for p in model.parameters():
        if p.ndim > 1:
            p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5))
        else:
            p.add_(torch.randn_like(p) * 0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)  # pyright: ignore
            module.running_var.uniform_(0.5, 2)  # pyright: ignore
    return model.eval()


# --- attention maps ---------------------------------------------------------------------------------------------


def rebuilt(attn: HMHSA, x: Tensor, weights: dict[Any, Tensor]) -> Tensor:
    """H-MHSA from maps and values: ``weights[step, level, head, y, x]`` are maps, everything else is its layers."""

    def looked_at(values: Tensor, step: str, level: int, size: tuple[int, int]) -> Tensor:
        out = values.new_empty(1, attn.dim, *size)
        for y, x_ in np.ndindex(*size):
            for head in range(attn.num_heads):
                part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
                out[0, part, y, x_] = (values[0, part] * weights[step, level, head, y, x_]).sum((1, 2))
        return out

    size = tuple(x.shape[2:])
    if not attn.local:
        return attn.proj(looked_at(attn.qkv(attn.norm(x)).chunk(3, 1)[2], "global", 1, size))
    tokens, ratio, total = x, 1, 0
    for level, (step, pool) in enumerate(zip(attn.local, attn.pool_ratios, strict=True), 1):
        v = step.qkv(step.norm(tokens)).chunk(3, 1)[2]
        a = step.grid_norm(tokens + looked_at(v, "local", level, tuple(tokens.shape[2:])))
        total = total + spread(a, ratio, x)
        tokens, ratio = merge(a, pool), ratio * pool
    v = attn.kv(attn.ds_norm(tokens)).chunk(2, 1)[1]
    return attn.proj(looked_at(v, "global", len(attn.local) + 1, size) + total)


@pytest.mark.parametrize("levels", [PLAIN, TWO, THREE], ids=["plain", "two levels", "three levels"])
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [((4, 4), torch.float32, 1e-5), ((7, 5), torch.float32, 1e-5), ((7, 5), torch.float64, 1e-13)],
)
def test_maps_times_values_give_what_forward_gives(
    levels: Any, size: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    net = shake(Net(levels)).to(dtype)
    image = torch.randn(3, *size, dtype=dtype)
    weights = {}
    for query in np.ndindex(*size):
        for head in range(2):
            for m in attention_maps(net, image, query, head=head):
                weights[(m.step, m.level, head, *m.query)] = m.weights
                assert float(m.weights.sum()) == pytest.approx(1, abs=1e-6)
    assert max(float(w.max()) for w in weights.values()) > 0.3  # far from even
    with torch.no_grad():
        x = net.stem(image[None])
        expected = net.blocks(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(rebuilt(net.blocks[0], x, weights), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(64, 64), (45, 61)])
def test_maps_of_a_network(size: tuple[int, int]) -> None:
    model = shake(timm.create_model("transcnn_test"))
    query = (size[0] - 1, size[1] // 2)
    maps = attention_maps(model, torch.randn(1, 3, *size), query)
    assert [(m.stage, m.step, m.level) for m in maps] == [
        (0, "local", 1), (0, "global", 2), (1, "local", 1), (1, "global", 2), (2, "local", 1), (2, "global", 2),
        (3, "global", 1),
    ]  # fmt: skip
    for m in maps:
        pixels = m.pixels
        assert pixels.shape == size
        assert float(pixels.sum()) == pytest.approx(1, abs=1e-5)
        top, left, bottom, right = m.box
        assert top <= query[0] < bottom
        assert left <= query[1] < right
        assert float(pixels[top:bottom, left:right].sum()) == pytest.approx(1, abs=1e-5)
        assert int((m.weights > 0).sum()) == m.seen
    one = attention_maps(model, torch.randn(3, *size), query, stage=-2)
    assert {m.stage for m in one} == {2}


def test_heads_average_to_the_mean() -> None:
    net, image = shake(Net(TWO)), torch.randn(3, 6, 7)
    heads = [attention_maps(net, image, (2, 5), head=h) for h in (0, 1)]
    for m, first, second in zip(attention_maps(net, image, (2, 5)), *heads, strict=True):
        torch.testing.assert_close(m.weights, (first.weights + second.weights) / 2)
        assert not torch.allclose(first.weights, second.weights, atol=1e-2)


def test_plugged_networks() -> None:
    model = plug(timm.create_model("resnet10t", num_classes=4)).eval()
    shake(nn.ModuleList(m for m in model.modules() if isinstance(m, HMHSA)))
    image = torch.randn(1, 3, 70, 100)
    share = attention_rollout(model, image, query=(0, 0))  # a fresh plug takes nothing from elsewhere
    assert float(share[:32, :32].sum()) == pytest.approx(1, abs=1e-5)
    for name, p in model.named_parameters():
        if name.endswith("hmhsa.scale"):
            p.data.fill_(0.1)
    maps = attention_maps(model, image, (69, 99))
    assert sorted({m.stage for m in maps}) == [0, 1, 2]
    assert [m.size for m in maps] == [(70, 100)] * len(maps)
    for m in maps:
        assert float(m.pixels.sum()) == pytest.approx(1, abs=1e-5)
    assert float(attention_rollout(model, image, query=(0, 0))[:32, :32].sum()) < 0.99
    cams = [grad_cam(model, image, target, stage=1) for target in range(4)]  # what speaks against a class alone is 0
    for values in (*cams, gradient_attention(model, image, 2)):
        assert values.shape == (70, 100)
        assert float(values.min()) >= 0
    assert max(float(cam.sum()) for cam in cams) == pytest.approx(1, abs=1e-4)
    assert float(gradient_attention(model, image, 2).sum()) == pytest.approx(1, abs=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = timm.create_model("transcnn_test")
    model.set_grad_checkpointing()
    model.stages[1].eval()
    model.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    image = torch.randn(3, 40, 40)
    attention_maps(model, image, (0, 0))
    attention_rollout(model, image)
    grad_cam(model, image)
    gradient_attention(model, image)
    assert [m.training for m in model.modules()] == modes
    assert all(stage.grad_checkpointing for stage in model.stages)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert not image.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_images_and_files_are_normalised(tmp_path: Path, class_image: Any) -> None:
    model = shake(timm.create_model("transcnn_test"))
    image = class_image(1, size=(50, 37))
    image.save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(model.default_cfg[key])[:, None, None] for key in ("mean", "std"))  # pyright: ignore
    expected = attention_maps(model, (pixels - mean) / std, (36, 49))
    for source in (image, tmp_path / "a.png"):
        for m, want in zip(attention_maps(model, source, (36, 49)), expected, strict=True):
            torch.testing.assert_close(m.weights, want.weights)


def test_an_image_in_memory_is_read_as_its_file_is(tmp_path: Path, class_image: Any) -> None:
    model = shake(timm.create_model("transcnn_test"))
    pixels = np.asarray(class_image(1, size=(50, 37)))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")  # of 16 bits
    see_through = Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 90, np.uint8)]))
    see_through.convert("P").save(tmp_path / "palette.png", transparency=3)
    for name in ("turned.png", "deep.png", "palette.png"):
        with Image.open(tmp_path / name) as image:
            found = attention_maps(model, image, (36, 36), stage=0)
        for m, want in zip(found, attention_maps(model, tmp_path / name, (36, 36), stage=0), strict=True):
            assert m.size == want.size
            torch.testing.assert_close(m.weights, want.weights)


class Masked(Net):
    """A network that tells its attention which positions are real."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mask = x.new_ones(1, 1, *x.shape[2:]).bool()
        mask[..., self.real :] = False
        return self.head(self.blocks[0](x, mask=mask).mean((2, 3)))


def test_attention_with_a_mask_is_not_shown_as_if_it_had_none() -> None:
    model, image = shake(Masked(TWO)), torch.randn(3, 6, 6)
    model.real = 4
    for method in (attention_rollout, grad_cam, gradient_attention):
        with pytest.raises(UserError, match=r"blocks\.0 runs with a mask; maps are of inputs without padding"):
            method(model, image)
    model.real = 6  # all are real
    torch.testing.assert_close(attention_rollout(model, image).sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": (32, 0)}, r"within \(0, 0\) and \(31, 31\), got \(32, 0\)"),
        ({"query": (0, -1)}, r"got \(0, -1\)"),
        ({"stage": 4}, r"stage must be one of 0, 1, 2, 3 .* got 4"),
        ({"head": 2}, r"head must be 'mean' or a number from 0 to 0 in stages\.0\.blocks\.0\.attn, got 2"),
        ({"image": torch.zeros(2, 3, 32, 32)}, r"expected one image.*\(2, 3, 32, 32\)"),
        ({"image": "nowhere.png"}, r"can't read nowhere\.png: no such file"),
        ({"model": nn.Conv2d(3, 3, 1)}, "Conv2d ran no H-MHSA"),
    ],
)
def test_errors_name_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    usual = {"model": timm.create_model("transcnn_test"), "image": torch.zeros(3, 32, 32), "query": (0, 0)}
    with pytest.raises(UserError, match=message):
        attention_maps(**{**usual, **arguments})


@pytest.mark.parametrize(
    ("fine", "coarse", "side"), [(33, 2, None), (97, 25, None), (224, 7, None), (10, 4, 3), (7, 3, None)]
)
def test_carrying_keeps_sums(fine: int, coarse: int, side: int | None) -> None:
    values = torch.rand(coarse, fine, dtype=torch.float64)
    out = carry(values, (fine, coarse), side)
    assert out.shape == (fine, coarse)
    assert float(out.sum()) == pytest.approx(float(values.sum()))
    cells = cell_of(fine, coarse, side)
    assert cells.unique().tolist() == list(range(coarse))
    assert edges(fine, coarse)[-1] == fine
    assert smooth(values[:, :3].float(), (fine, 12)).shape == (fine, 12)


# --- rollout ----------------------------------------------------------------------------------------------------


def dense(attn: Any, size: tuple[int, int], rows: dict[Any, dict[tuple[int, int], np.ndarray]]) -> np.ndarray:
    """The matrix of one block as the definition says it, from the maps of its positions, (H·W, H·W)."""
    height, width = size
    matrix = {key: np.stack([of[q] for q in sorted(of)]) for key, of in rows.items()}
    levels = len(attn.grid_sizes) + 1
    a, ratio, terms = np.eye(height * width), 1, []
    for level, pool in enumerate(attn.pool_ratios, 1):
        a = 0.5 * (a + matrix["local", level] @ a)  # A_l from X
        up = np.zeros((height * width, len(a)))
        for y, x in np.ndindex(height, width):
            up[y * width + x, y // ratio * size[1] + x // ratio] = 1
        terms.append(up @ a)
        smaller = (-(-size[0] // pool), -(-size[1] // pool))
        averaging = np.zeros((smaller[0] * smaller[1], len(a)))
        for y, x in np.ndindex(*size):
            averaging[y // pool * smaller[1] + x // pool, y * size[1] + x] = 1
        a, size, ratio = averaging / averaging.sum(1, keepdims=True) @ a, smaller, ratio * pool
    total = (matrix["global", levels] @ a + sum(terms)) / levels
    return 0.5 * (np.eye(len(total)) + total)


@pytest.mark.parametrize("size", [(4, 8), (7, 5)])
def test_rollout_is_its_definition(size: tuple[int, int]) -> None:
    net, image = shake(Net(THREE, TWO, PLAIN)), torch.randn(3, *size)
    rows: dict[str, Any] = {}
    for query in np.ndindex(*size):
        for m in attention_maps(net, image, query):
            of = rows.setdefault(m.name, {}).setdefault((m.step, m.level), {})
            of[m.query] = m.weights.double().numpy().ravel()
    whole = np.eye(size[0] * size[1])
    for name, matrices in rows.items():
        whole = dense(net.get_submodule(name), size, matrices) @ whole
    np.testing.assert_allclose(whole.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(attention_rollout(net, image).numpy().ravel(), whole.mean(0), atol=1e-6)
    found = attention_rollout(net, image, query=(3, 3)).numpy().ravel()
    np.testing.assert_allclose(found, whole[3 * size[1] + 3], atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (47, 33)])
def test_rollout_of_a_network(size: tuple[int, int]) -> None:
    model, image = shake(timm.create_model("transcnn_test")), torch.randn(3, *size)
    for stage in (None, 0, -2):
        values = attention_rollout(model, image, stage=stage)
        assert values.shape == size
        assert float(values.min()) > 0
        assert float(values.sum()) == pytest.approx(1, abs=1e-5)


# --- class maps -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's own imports
def test_grad_cam_equals_the_library() -> None:
    library = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model, image = shake(timm.create_model("transcnn_test")), torch.randn(1, 3, 64, 96)
    compared = 0
    for stage in range(4):
        with library.GradCAM(model, [model.stages[stage]]) as cam:
            expected = cam(image, [targets.ClassifierOutputTarget(3)])[0]
        ours = grad_cam(model, image, 3, stage).numpy()
        if expected.any():
            np.testing.assert_allclose((ours - ours.min()) / np.ptp(ours), expected, atol=1e-4)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("levels", [PLAIN, TWO, THREE], ids=["plain", "two levels", "three levels"])
def test_gradient_attention_is_weights_times_their_gradients(levels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, image = shake(Net(levels)), torch.randn(3, 7, 10)
    found = gradient_attention(net, image, 1)
    held: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, fused: bool = True) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        weights.retain_grad()
        held.append(weights)
        return weights @ v

    monkeypatch.setattr(transcnn.attention, "attend", attend)
    net(image[None])[0, 1].backward()
    attn: Any = net.blocks[0]
    total, ratio, size = np.zeros((7, 10)), 1, (7, 10)
    for level, weights in enumerate(held):
        taken = (weights * weights.grad).clamp(min=0).detach().numpy()  # pyright: ignore
        values = np.zeros(size)
        if level < len(attn.grid_sizes):
            g = attn.grid_sizes[level]
            columns = -(-size[1] // g)
            for y, x in np.ndindex(*size):
                values[y, x] = taken[y // g * columns + x // g, :, :, y % g * g + x % g].sum()
        else:
            values = taken.sum((0, 1, 2)).reshape(size)
        for y, x in np.ndindex(*size):
            patch = total[y * ratio : (y + 1) * ratio, x * ratio : (x + 1) * ratio]
            patch += values[y, x] / patch.size
        if level < len(attn.pool_ratios):
            pool = attn.pool_ratios[level]
            ratio, size = ratio * pool, (-(-size[0] // pool), -(-size[1] // pool))
    np.testing.assert_allclose(found.numpy(), total / total.sum(), atol=1e-6)


def test_class_maps_of_classes_and_stages() -> None:
    model, image = shake(timm.create_model("transcnn_test")), torch.randn(3, 45, 61)
    top1 = int(model(image[None]).argmax())
    torch.testing.assert_close(grad_cam(model, image), grad_cam(model, image, top1))
    assert not torch.allclose(grad_cam(model, image, 0), grad_cam(model, image, 1))
    for stage in (0, 1, 2, -1, None):
        values = gradient_attention(model, image, 2, stage)
        assert values.shape == (45, 61)
        assert float(values.min()) >= 0
        assert float(values.sum()) == pytest.approx(1, abs=1e-4)
    with pytest.raises(UserError, match="from 0 to 9, got 10"):
        grad_cam(model, image, 10)
    features = timm.create_model("transcnn_test", features_only=True)
    assert len(attention_maps(features, image, (0, 0))) == 7
    with pytest.raises(UserError, match="class maps need a classifier"):
        grad_cam(features, image)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [grad_cam, gradient_attention])
def test_class_maps_where_gradients_are_off(mode: Any, method: Any) -> None:
    net, image = shake(Net(TWO)), torch.randn(3, 6, 6)
    expected = method(net, image, 2)
    with mode():
        torch.testing.assert_close(method(net, image.clone(), 2), expected)
        made = image.clone()
    found = method(net, made, 2)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert all(p.grad is None for p in net.parameters())


class Odd(nn.Module):
    """H-MHSA in a module whose output is no map."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.attn, self.output = HMHSA(8, head_dim=4, grid_sizes=(3,), pool_ratios=(2,)), output

    def forward(self, x: Tensor) -> Any:
        y = x + self.attn(x)
        return y.mean((2, 3)) if self.output == "pooled" else (y, x)


@pytest.mark.parametrize("output", ["pooled", "pair"])
def test_modules_that_give_no_map_show_the_output_of_their_attention(output: str) -> None:
    net = shake(Net(TWO))
    odd = Odd(output)
    odd.attn.load_state_dict(net.blocks[0].state_dict())

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = net.stem, odd, net.head

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(self.stem(x))
            return self.head(y if output == "pooled" else y[0].mean((2, 3)))

    model, image = Whole().eval(), torch.randn(3, 6, 6)
    assert len(attention_maps(model, image, (1, 1))) == 2
    # The head's row is the gradient of each position alike, so this is Grad-CAM worked out by hand.
    with torch.no_grad():
        made = model.block.attn(model.stem(image[None]))[0]
        by_hand = (net.head.weight[2][:, None, None] * made).sum(0).clamp(min=0)
    torch.testing.assert_close(grad_cam(model, image, 2), by_hand / by_hand.sum())


class Twice(nn.Module):
    """Runs one H-MHSA twice, beside another that counts for nothing; ``cut`` keeps gradients from coming back."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.net, self.idle, self.cut = shake(Net(TWO)), HMHSA(8, head_dim=4, grid_sizes=(3,), pool_ratios=(2,)), cut

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cut):
            x = self.net.blocks(self.net.blocks(self.net.stem(x)))
        self.idle(x)
        return self.net.head(x.mean((2, 3)))


def test_attention_that_runs_twice_and_attention_that_counts_for_nothing() -> None:
    model, image = Twice().eval(), torch.randn(3, 6, 6)
    maps = attention_maps(model, image, (1, 1))
    assert [m.name for m in maps] == ["net.blocks.0"] * 4 + ["idle"] * 2
    assert (maps[1].weights - maps[3].weights).abs().max() > 1e-3  # of the first and of the second time
    torch.testing.assert_close(attention_rollout(model, image).sum(), torch.tensor(1.0))
    assert grad_cam(model, image).abs().sum() == 0  # of the last one that ran
    torch.testing.assert_close(gradient_attention(model, image).sum(), torch.tensor(1.0))
    cut = Twice(cut=True).eval()
    cut.idle = nn.Identity()  # pyright: ignore
    for method in (grad_cam, gradient_attention):
        with pytest.raises(UserError, match="this network cuts them off"):
            method(cut, image)


def test_numbers_of_any_kind() -> None:
    net, image = shake(Net(TWO)), torch.randn(3, 6, 6)
    whole = attention_maps(net, image, (np.int64(1), torch.arange(6)[2].item()), head=np.int64(1))  # pyright: ignore
    assert len(whole) == 2
    with pytest.raises(UserError, match=r"must be within \(0, 0\) and \(5, 5\), got \(1\.0, 2\)"):
        attention_maps(net, image, (1.0, 2))  # pyright: ignore
    with pytest.raises(UserError, match=r"a normalised image of floats, got torch\.uint8"):
        grad_cam(net, torch.zeros(3, 6, 6, dtype=torch.uint8))


# --- scores -----------------------------------------------------------------------------------------------------


class Corner(nn.Module):
    """Class 1 is likely as far as the top left quarter is bright."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, :, :4, :4].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(bright), 8 * bright - 4], dim=1)


def test_deletion_and_insertion() -> None:
    image = torch.zeros(3, 8, 8)
    image[:, :4, :4] = 1
    good = image[0]
    scores = {name: deletion_insertion(Corner(), image, m, steps=64) for name, m in (("good", good), ("bad", -good))}
    # The quarter's 16 pixels go first, then nothing more happens; the other way round for the opposite map.
    curve = torch.sigmoid(8 * (1 - torch.arange(65) / 16).clamp(min=0) - 4).numpy()
    np.testing.assert_allclose(scores["good"].deletion_curve, curve, atol=1e-6)
    assert scores["good"].deletion == pytest.approx(np.trapezoid(curve, dx=1 / 64), abs=1e-6)
    assert scores["bad"].deletion > 0.75
    good_curve, bad_curve = scores["good"].insertion_curve, scores["bad"].insertion_curve
    np.testing.assert_allclose(good_curve[16:], torch.sigmoid(torch.tensor(4.0)).item(), atol=1e-6)
    assert good_curve[0] == bad_curve[0]  # both begin with the blurred image
    assert (good_curve[1:16] > bad_curve[1:16]).all()
    again = deletion_insertion(Corner(), image, good, steps=64, batch_size=7)
    np.testing.assert_allclose(again.insertion_curve, scores["good"].insertion_curve, atol=1e-6)


def test_deletion_of_one_label_of_several() -> None:
    """Of a network of several labels each has its own probability, whatever the others' logits are."""
    image = torch.zeros(3, 8, 8)
    image[:, :4, :4] = 1

    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Corner()(x) + torch.tensor([20.0, 0.0])

    loaded = Loaded(Labels(), "multilabel", ["sky", "corner"], {}, "")
    curve = deletion_insertion(loaded, image, image[0], 1, steps=64).deletion_curve
    expected = torch.sigmoid(8 * (1 - torch.arange(65) / 16).clamp(min=0) - 4).numpy()
    np.testing.assert_allclose(curve, expected, atol=1e-6)


def test_wrong_scoring_arguments() -> None:
    image = torch.zeros(3, 8, 8)
    with pytest.raises(UserError, match=r"image's size \(8, 8\), got \(4, 4\)"):
        deletion_insertion(Corner(), image, torch.zeros(4, 4))
    with pytest.raises(UserError, match="batch_size must be 1 or more, got 0"):
        deletion_insertion(Corner(), image, torch.zeros(8, 8), batch_size=0)
    with pytest.raises(UserError, match=r"whose output is \(B, classes\); this model gives \("):
        deletion_insertion(nn.Conv2d(3, 2, 1), image, torch.zeros(8, 8))
    for task in ("regress", "segment", "detect"):
        with pytest.raises(UserError, match=f"this network is for the task {task}"):
            deletion_insertion(Loaded(Corner(), task, ["a", "b"], {}, ""), image, torch.zeros(8, 8))
    with pytest.raises(UserError, match="steps must be 1 or more, got 0"):
        deletion_insertion(Corner(), image, torch.zeros(8, 8), steps=0)


# --- the picture ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A file of ours with a small network of three levels in its first stage."""
    args = {"grid_sizes": ((4, 2), (4,), (2,), ()), "pool_ratios": ((2, 2), (2,), (2,), ())}
    model = shake(build_model("transcnn_test", num_classes=3, **args))
    names = ["a cat", "Ein sehr langer Name einer Klasse $mit$ Zeichen", "dog"]
    info = {"model": "transcnn_test", "model_args": args, "task": "classify", "class_names": names}
    path = tmp_path / "best.safetensors"
    save_weights(path, model, {**info, "data_config": data_config_of(model, 3)})
    return path


def test_the_command_writes_a_picture(
    checkpoint: Path, class_image: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    monkeypatch.setitem(cli.COMMANDS, "explain", ("transcnn.commands.explain:explain", ""))
    class_image(0, size=(90, 70)).save("photo.jpg")
    assert cli.main(["explain", str(checkpoint), "photo.jpg", "--query", "12,40", "--class", "DOG"]) == 0
    assert capsys.readouterr().out == "written: photo_explain.png\n"
    with Image.open("photo_explain.png") as picture:
        assert min(picture.size) > 1500
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert (np.abs(colours.astype(int) - (0, 0xD5, 0xFF)).max(1) < 12).sum() > 200  # the mark
    for arguments, message in (
        (["--class", "cow"], "no class is named 'cow'"),
        (["--query", "70,0"], "within 0,0 and 69,89 (the image's rows and columns), got 70,0"),
        (["--query", "0,0"], "sees the middle of this image only, rows 0 to 69 and columns 10 to 79"),
        (["--query", "five"], "query must be a row and a column as 120,80, got 'five'"),
        (["--out", "a.gif"], "out must end in .png, .pdf or .svg"),
        (["--head", "7"], "head must be 'mean' or a number from 0 to 0"),
    ):
        assert cli.main(["explain", str(checkpoint), "photo.jpg", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_what_the_picture_says(checkpoint: Path, class_image: Any) -> None:
    loaded = load(checkpoint)
    explanation = explain_image(loaded, class_image(1, size=64, mode="L"), (20, 41))
    assert explanation.query == (20, 41)
    assert [len(maps) for maps in explanation.stages] == [3, 2, 2, 1]
    assert sum(share for _, share in explanation.top) == pytest.approx(1, abs=1e-5)
    figure = draw(explanation)
    words = "\n".join(text.get_text() for text in figure.texts)
    for expected in (
        "transcnn_test predicts",
        "near, inside its grid",
        "grids of level 2",
        "far, the whole image",
        "No grids here",
    ):
        assert expected in words
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 3 + 4 + 4  # image and class maps; local maps of each level that there is; global ones


def test_a_pixel_of_the_image_is_found_in_what_the_network_sees() -> None:
    config = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    cases = [("center", 200, 150, 0.875), ("center", 150, 420, 1.0), ("center", 90, 90, 0.9)]
    cases += [("border", 101, 150, 1.0), ("squash", 200, 150, 0.9)]
    for mode, width, height, crop_pct in cases:
        sized = {"crop_pct": crop_pct, "crop_mode": mode}
        transform = get_task("classify").image_transform({**config, **sized})
        for dy, dx in ((0, 0), (-34, 30), (30, -25)):  # the marks lie inside each crop
            query = (height // 2 + dy, width // 2 + dx)
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[query[0] - 3 : query[0] + 4, query[1] - 3 : query[1] + 4] = 255
            seen = transform.prepare(Image.fromarray(pixels))[0].double().numpy()
            seen[seen < 140] = 0  # the mean beside an image with borders
            middle = [(seen.sum(1 - i) * np.arange(64)).sum() / seen.sum() for i in range(2)]
            place = _in_crop(query, (height, width), (64, 64), sized)
            np.testing.assert_allclose(place, middle, atol=1)


@pytest.mark.parametrize("mode", ["center", "border", "squash"])
@pytest.mark.parametrize("goal", [(64, 64), (48, 80)])
def test_what_the_network_sees_begins_and_ends_where_the_crop_does(mode: str, goal: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for width, height in rng.integers(60, 200, (24, 2)).tolist():
        image = Image.fromarray(np.full((height, width), 255, np.uint8))
        config = {"crop_pct": 1.0, "crop_mode": mode}
        seen = eval_transform(goal, in_chans=1, mean=(0.0,), std=(1.0,), **config).prepare(image)[0].numpy()
        for axis, (first, last) in enumerate(_crop_box((height, width), goal, config)):
            had, inside = (height, width)[axis], np.flatnonzero(seen.any(1 - axis))
            scale = goal[axis] / (last - first)
            assert inside[0] == pytest.approx(max(0, -first) * scale, abs=1e-6)
            assert inside[-1] + 1 == pytest.approx(min(goal[axis], (had - first) * scale), abs=1e-6)


def test_finding_classes() -> None:
    names = ["cat", "Dog", "7"]
    assert [find_class(word, names) for word in ("cat", "dog", "7", "1")] == [0, 1, 2, 1]
    with pytest.raises(UserError, match="no class is named 'dgo'; near ones: Dog"):
        find_class("dgo", names)
