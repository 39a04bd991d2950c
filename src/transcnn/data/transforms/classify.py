"""From a decoded image to the tensor a network takes: geometry, augmentation, normalisation.

A :class:`Transform` works in three steps, so that whatever can be done once or for many images together, is:

    prepare    PIL image -> uint8 (C, H, W); where it is deterministic, its results can be kept in memory
    per_image  uint8 -> PIL -> uint8, optional: RandAugment and colour jitter, which know only single images
    finish     uint8 (B, C, H, W) -> float (B, C, H, W): shifts, flips, rotation, normalisation, erasing

Of images of any numbers (:class:`~..bands.Bands`) the same steps give and take float32 on the scale from 0 to 255 where
uint8 stands; they have no step for single images.

Every random number is drawn from the sample's own seed (see :mod:`transcnn.data.rng`), never from a global generator:
a sample looks the same in whatever batch, process or order it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform, rand_augment_transform
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from ...errors import UserError
from ..bands import Bands
from ..images import MAX_ASPECT_RATIO, aspect_limit, crop_extreme_aspect, to_channels
from ..rng import CounterRNG, seeded
from .pixels import check_colours, to_pixels

__all__ = ["Transform", "eval_transform", "policy_for", "train_transform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL = 64  # images up to this side get the small policy, and no margin is cut off in evaluation
CROP_MODES = ("center", "border", "squash")
POLICIES = ("auto", "imagenet", "small", "none")


def train_transform(
    img_size: int | tuple[int, int],
    *,
    in_chans: int = 3,
    policy: str = "auto",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bicubic",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    pad: int | None = None,
    hflip: float = 0.5,
    vflip: float = 0.0,
    degrees: float = 0.0,
    zoom: float = 0.0,
    color_jitter: float | None = None,
    aa: str | None = None,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    bands: bool = False,
) -> Transform:
    """What training images go through.

    Policy ``imagenet`` is timm's ``create_transform``: a random crop resized to ``img_size``, flips, RandAugment or
    colour jitter. Policy ``small`` resizes the whole image once, then shifts it by up to ``pad`` pixels with black
    coming in, flips, rotates and zooms; its images can stay decoded in memory and whole batches are worked on at
    once. ``auto`` is ``small`` up to 64 pixels, ``none`` resizes and normalises. Erasing belongs to all but ``none``.

    Args:
        img_size: Side, or (height, width), in pixels.
        mean, std: Of one channel or of each; three of RGB are adapted to other numbers of channels.
        interpolation: ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``, or ``random`` (imagenet only).
        scale, ratio: Area and aspect of the random crop (imagenet only).
        pad: Pixels to shift by (small only); None is an eighth of the side.
        hflip, vflip: Probabilities. Give 0 for digits and letters.
        degrees, zoom: Largest rotation, and largest relative change of size (small only).
        color_jitter: Strength of brightness, contrast and saturation changes; not used with ``aa``, as in timm.
        aa: RandAugment in timm's notation, such as ``rand-m9-mstd0.5-inc1``; for 1 or 3 channels.
        re_prob, re_mode, re_count: Random erasing: probability, ``const`` or ``pixel`` fill, and rectangles an image.
        bands: Whether images are :class:`~..bands.Bands`; of these there is no ``color_jitter`` and no ``aa``.

    Raises:
        UserError: A value that is not allowed.
    """
    size = _size(img_size)
    mean, std = channel_stats(mean, in_chans), channel_stats(std, in_chans, alpha=0.5)
    check_colours(in_chans, bands, aa=aa, color_jitter=color_jitter)
    _check_train(policy, in_chans, aa, re_mode, hflip=hflip, vflip=vflip, re_prob=re_prob)
    policy = policy_for(policy, size)
    erase = Finish(mean, std, re_prob=re_prob, re_mode=re_mode, re_count=re_count)
    if policy == "imagenet":
        drawn: Any = dict(
            scale=scale, ratio=ratio, hflip=hflip, vflip=vflip, color_jitter=color_jitter, auto_augment=aa
        )
        prepare: Any = create_transform(
            (in_chans, *size),
            is_training=True,
            interpolation=interpolation,
            mean=mean,
            std=std,
            normalize=False,
            **drawn,
        )
        return Transform(size, in_chans, prepare, erase, bands=bands)
    prepare, key = _resize(size, in_chans, interpolation, 1.0)
    whole: dict[str, Any] = dict(key=key, max_aspect=aspect_limit(size), bands=bands)
    if policy == "none":
        return Transform(size, in_chans, prepare, Finish(mean, std), **whole)
    pad = max(1, min(size) // 8) if pad is None else pad
    finish = replace(erase, pad=pad, hflip=hflip, vflip=vflip, degrees=degrees, zoom=zoom)
    per_image = _per_image(size, mean, aa, color_jitter)
    return Transform(size, in_chans, prepare, finish, per_image=per_image, **whole)


def policy_for(policy: str, size: Sequence[int]) -> str:
    """``small``, ``imagenet`` or ``none``: what images of this size get where the policy is ``auto``."""
    return ("small" if max(size) <= SMALL else "imagenet") if policy == "auto" else policy


def eval_transform(
    img_size: int | tuple[int, int],
    *,
    in_chans: int = 3,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bicubic",
    crop_pct: float | None = None,
    crop_mode: str = "center",
    bands: bool = False,
) -> Transform:
    """The transform for evaluation, as timm's: a resize to ``img_size / crop_pct``, then a centre crop.

    ``crop_mode`` says what is resized: ``center`` the short side, ``border`` the long one (the rest is filled with the
    mean), ``squash`` both. ``crop_pct`` None is 1 up to 64 pixels, and timm's 0.875 above. Nothing is random. Called
    with one PIL image the result is a float (C, H, W) tensor, so this serves prediction as well. ``bands``: images are
    :class:`~..bands.Bands`.
    """
    size = _size(img_size)
    if crop_pct is None:
        crop_pct = 1.0 if max(size) <= SMALL else 0.875
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
    finish = Finish(channel_stats(mean, in_chans), channel_stats(std, in_chans, alpha=0.5))
    prepare, key = _resize(size, in_chans, interpolation, crop_pct, crop_mode, finish.mean)
    # What a crop of the centre doesn't look at needs no resizing; with borders the short side must keep a pixel.
    max_aspect = {"center": aspect_limit(size, crop_pct), "border": max(MAX_ASPECT_RATIO, *size)}.get(crop_mode)
    return Transform(size, in_chans, prepare, finish, key=key, max_aspect=max_aspect, bands=bands)


class Transform:
    """PIL image -> float (C, H, W), in the three steps that the module's text describes.

    Attributes:
        size: Height and width of what comes out.
        in_chans: Channels of what comes out.
        cacheable: Whether ``prepare`` gives the same for the same image each time.
        prepare_key: Equal for transforms whose ``prepare`` gives the same.
        light: Whether ``finish`` works on whole batches only, and takes microseconds an image.
        mean, std: Of each channel, on a scale from 0 to 1.
        dtype: What ``prepare`` gives: uint8, of :class:`~..bands.Bands` float32.
    """

    def __init__(
        self,
        size: tuple[int, int],
        in_chans: int,
        prepare: Callable[[Any], Any],
        finish: Finish,
        *,
        per_image: Callable[[Any], Any] | None = None,
        key: object = None,
        max_aspect: int | None = MAX_ASPECT_RATIO,
        bands: bool = False,
    ) -> None:
        self.size = size
        self.in_chans = in_chans
        self.cacheable = key is not None
        self.light = per_image is None
        self.mean, self.std = finish.mean, finish.std
        self.dtype = torch.float32 if bands else torch.uint8
        self.prepare_key = key
        self._prepare = prepare
        self._per_image = per_image
        self._finish = finish
        self._max_aspect = max_aspect

    def prepare(self, image: Any, seed: int = 0) -> Tensor:
        """Any PIL image -> uint8 (C, H, W), Bands -> float32; ``seed`` matters only where not ``cacheable``."""
        image = to_channels(image, self.in_chans)
        if self._max_aspect is not None:
            image = crop_extreme_aspect(image, self._max_aspect)
        if isinstance(image, Bands):
            image = to_pixels(image, self.in_chans)
        if self.cacheable:
            return self._prepare(image)
        with seeded(seed):
            return self._prepare(image)

    def finish(self, images: Tensor, seeds: np.ndarray) -> Tensor:
        """uint8 (B, C, H, W) -> float (B, C, H, W), augmented with the B samples' ``seeds`` and normalised."""
        if self._per_image is not None:
            done = []
            for image, seed in zip(images, seeds.tolist(), strict=True):
                with seeded(seed):
                    done.append(tvf.pil_to_tensor(self._per_image(tvf.to_pil_image(image))))
            images = torch.stack(done)
        return self._finish(images, seeds)

    def __call__(self, image: Any, seed: int | None = None) -> Tensor:
        """PIL image -> float (C, H, W); without a seed the global generator gives one."""
        if seed is None:
            seed = int(torch.randint(1 << 62, ()))
        return self.finish(self.prepare(image, seed)[None], np.array([seed], dtype=np.uint64))[0]


@dataclass(frozen=True)
class Finish:
    """The steps done on whole batches: uint8 (B, C, H, W) -> float (B, C, H, W). Arguments as in train_transform."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    hflip: float = 0.0
    vflip: float = 0.0
    degrees: float = 0.0
    zoom: float = 0.0
    re_prob: float = 0.0
    re_mode: str = "pixel"
    re_count: int = 1

    def __call__(self, images: Tensor, seeds: np.ndarray) -> Tensor:
        # NumPy's operations, not PyTorch's: readers are threads, each of which would get helpers of its own.
        rng = CounterRNG(seeds)
        x, y = rng(), rng()  # drawn whether needed or not: switching one off leaves the others as they are
        images = _shift(images, x, y, self.pad) if self.pad else torch.from_numpy(np.array(images.numpy(), order="C"))
        for probability, dim in ((self.hflip, 3), (self.vflip, 2)):
            flip = rng() < probability
            if flip.any():
                which = torch.from_numpy(flip.nonzero()[0])
                images[which] = images[which].flip(dim)
        x = torch.from_numpy(images.numpy().astype(np.float32))
        rotation, scale = rng(), rng()
        if self.degrees or self.zoom:
            x = _rotate_and_zoom(x, (2 * rotation - 1) * math.radians(self.degrees), 1 + (2 * scale - 1) * self.zoom)
        pixels = x.numpy()  # the same memory
        mean, std = (255 * np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        pixels -= mean
        pixels /= std
        if self.re_prob:
            _erase(x, rng, self)
        return x


# --- steps ------------------------------------------------------------------------------------------------------


def _shift(images: Tensor, x: np.ndarray, y: np.ndarray, pad: int) -> Tensor:
    """Each image moved by up to ``pad`` pixels either way with black coming in, (B, C, H, W) -> the same."""
    height, width = images.shape[2:]
    padded = F.pad(images, (pad, pad, pad, pad)).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (2, 3))  # (B, C, 2p+1, 2p+1, H, W)
    left, top = ((uniform * (2 * pad + 1)).astype(np.int64) for uniform in (x, y))
    return torch.from_numpy(windows.swapaxes(1, 3)[np.arange(len(x)), left, top])  # (B, C, H, W)


def _rotate_and_zoom(x: Tensor, angles: np.ndarray, zooms: np.ndarray) -> Tensor:
    cos, sin = np.cos(angles) / zooms, np.sin(angles) / zooms
    zero = np.zeros_like(cos)
    aspect = x.shape[2] / x.shape[3]  # the grid goes from -1 to 1 along both sides, however long they are
    matrices = np.stack([np.stack([cos, -sin * aspect, zero], 1), np.stack([sin / aspect, cos, zero], 1)], 1)
    grid = F.affine_grid(torch.from_numpy(matrices).float(), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _erase(x: Tensor, rng: CounterRNG, settings: Finish) -> None:
    """Random erasing (Zhong et al., 1708.04896) in place; areas 2 to 33 %, aspects 0.3 to 3.3, as in timm."""
    height, width = x.shape[2:]
    pixels = x.numpy()
    for _ in range(settings.re_count):
        hit, area, aspect, top, left, start = (rng() for _ in range(6))
        area = height * width * (0.02 + (1 / 3 - 0.02) * area)
        aspect = np.exp((2 * aspect - 1) * math.log(3.3))
        h = np.sqrt(area * aspect).round().clip(1, height).astype(np.int64)
        w = np.sqrt(area / aspect).round().clip(1, width).astype(np.int64)
        y = (top * (height - h + 1)).astype(np.int64)
        z = (left * (width - w + 1)).astype(np.int64)
        for i in (hit < settings.re_prob).nonzero()[0]:
            box = pixels[i, :, y[i] : y[i] + h[i], z[i] : z[i] + w[i]]
            box[:] = 0 if settings.re_mode == "const" else _noise(start[i], box.shape)


@cache
def _noise_table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 18, np.float32)


def _noise(start: float, shape: tuple[int, ...]) -> np.ndarray:
    """Normal noise, cut out of one fixed table at ``start`` in [0, 1): making it anew takes ten times as long."""
    table = _noise_table()
    indices = np.arange(math.prod(shape)) + int(start * len(table))
    return table.take(indices, mode="wrap").reshape(shape)


def _resize(
    size: tuple[int, int],
    in_chans: int,
    interpolation: str,
    crop_pct: float,
    crop_mode: str = "center",
    mean: tuple[float, ...] = IMAGENET_MEAN,
) -> tuple[Callable[[Any], Any], object]:
    """Resizing and the centre crop, and a key that is equal for equal ones."""
    if interpolation == "random":
        interpolation = "bicubic"
    if interpolation not in ("nearest", "bilinear", "bicubic", "lanczos"):
        raise UserError(f"interpolation must be nearest, bilinear, bicubic or lanczos, got {interpolation!r}")
    if crop_mode not in CROP_MODES:
        raise UserError(f"crop_mode must be one of {', '.join(CROP_MODES)}, got {crop_mode!r}")
    resize: Any = create_transform(
        (in_chans, *size),
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        mean=mean,
        normalize=False,
    )
    return resize, (in_chans, size, interpolation, crop_pct, crop_mode, mean if crop_mode == "border" else None)


def _per_image(
    size: tuple[int, int], mean: tuple[float, ...], aa: str | None, color_jitter: float | None
) -> Callable[[Any], Any] | None:
    if aa:
        fill = tuple(min(255, round(255 * value)) for value in mean)
        return rand_augment_transform(aa, {"translate_const": int(min(size) * 0.45), "img_mean": fill})
    if color_jitter:
        return tv.ColorJitter(color_jitter, color_jitter, color_jitter)
    return None


def channel_stats(values: Sequence[float], in_chans: int, *, alpha: float = 0.5) -> tuple[float, ...]:
    """A mean or standard deviation for each channel: as given, one for all, or three of RGB adapted.

    Grey takes the average of the three and an alpha channel ``alpha``.
    """
    values = tuple(float(value) for value in values)
    if len(values) == in_chans:
        return values
    if len(values) == 1:
        return values * in_chans
    if len(values) != 3:
        raise UserError(f"mean and std need 1, 3 or in_chans={in_chans} values, got {len(values)}: {values}")
    colours = values if in_chans >= 3 else (sum(values) / 3,)
    return (*colours, alpha)[:in_chans]


def _size(img_size: int | Sequence[int]) -> tuple[int, int]:
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"img_size must be one side, or a height and a width, of 1 or more pixels, got {img_size}")
    return size[0], size[1]


def _check_train(policy: str, in_chans: int, aa: str | None, re_mode: str, **probabilities: float) -> None:
    if policy not in POLICIES:
        raise UserError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if re_mode not in ("const", "pixel"):
        raise UserError(f"re_mode must be const or pixel, got {re_mode!r}")
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} must be from 0 to 1, got {value}")
    if aa and not aa.startswith("rand"):
        raise UserError(f"aa must be a RandAugment string such as rand-m9-mstd0.5-inc1, got {aa!r}")
    if aa and in_chans not in (1, 3):
        raise UserError(f"aa (RandAugment) works on 1 or 3 channels, got in_chans={in_chans}")
