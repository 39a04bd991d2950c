"""TransCNN and HAT-Net: convolutional networks with H-MHSA in every block.

Papers: Y. Liu et al., "Transformer in Convolutional Neural Networks", arXiv 2106.03180v1 (TransCNN), and its later
version "Vision Transformers with Hierarchical Attention" (HAT-Net). Read :mod:`transcnn.attention` and
:mod:`transcnn.blocks` first; the published sizes are in :mod:`transcnn.variants`.

A network is a stem, four stages, and a pooled linear head; a stage is a downsampling (but for the first) and a row of
blocks. The map stays (B, C, H, W) throughout; stage i has a stride of ``stem_stride·2^i``, sizes rounded up.

Letters as in ``attention.py``; a comment at a line's end is the shape that the line makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    is_scriptable,
    trunc_normal_,
)
from torch import Tensor, nn

from .attention import BATCH_NORMS, HMHSA, SIZES, HMHSA1d, HMHSA3d
from .blocks import Parts, Stage, dilate
from .grids import Size, coarser
from .masking import check_mask, keep_real, unless_traced, unless_whole

__all__ = ["TransCNN", "norm_layers"]

ATTENTIONS = {1: HMHSA1d, 2: HMHSA, 3: HMHSA3d}
POOLS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "")
AVERAGES = ("avg", "fast", "fastavg", "")
STEM_STRIDES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # of the stem's two convolutions
# One stage's grid sizes or pool ratios: an entry a level, a number or one for each dimension; none is plain attention.
Levels = int | Sequence[Size]


def norm_layers(ndim: int = 2) -> dict[str, Callable[[int], nn.Module]]:
    """The norms by name, for maps of so many dimensions; ``batchnorm`` is that of any."""
    group = partial(nn.GroupNorm, 1, eps=1e-6)
    return {f"batchnorm{ndim}d": BATCH_NORMS[ndim], "groupnorm1": group, "batchnorm": BATCH_NORMS[ndim]}


class TransCNN(nn.Module):
    """A CNN with H-MHSA in every block: the class of all TransCNN and HAT-Net variants.

    Images (B, ``in_chans``, H, W) of any size from 32x32 up (smaller ones work too) become logits
    (B, ``num_classes``). The arguments that differ between the variants are in ``variants.VARIANTS``; make a model with
    ``transcnn.create_model(name, **changes)``. Lists hold one entry a stage.

    Args:
        num_classes: Outputs of the head; 0 leaves the pooled features.
        in_chans: Channels of the images.
        global_pool: timm's pooling types: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for none (which needs
            ``num_classes=0``).
        output_stride: 32, 16 or 8: stages beyond that stride keep the size of their map and are dilated instead, as in
            timm's CNNs. Grids and merged patches keep their number of positions.
        dims: Channels C of each stage.
        depths: Blocks in each stage.
        expansions: How much wider the inverted residual's hidden layer is.
        kernel_sizes: Side of the depthwise convolutions.
        head_dim: Channels of one attention head, for all stages or each; must divide ``dims``.
        grid_sizes: Side of the grids, for each stage a number a level (an int stands for one level);
            an empty tuple or None means plain attention. A tuple in the place of a number holds one for each dimension.
        pool_ratios: Side of the merged patches, in the same form; levels that the stage lacks grids for are ignored
            where the ratio is 1.
        design: ``transcnn`` or ``hatnet``: order of layers in the inverted residual, kind of downsampling.
        stem_width: Channels of the stem's first convolution.
        stem_stride: 4 as published; 2 or 1 for small images.
        norm_layer: ``batchnorm`` (TransCNN; also ``batchnorm2d``, or as many dimensions as there are),
            ``groupnorm1`` (HAT-Net), or anything that makes a layer from a number of channels.
        act_layer: timm's name of the activation.
        drop_rate: Dropout before the head's linear layer.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        ndim: 2 for images; 1 for sequences (B, ``in_chans``, L), 3 for volumes or video (B, ``in_chans``, D, H, W),
            whose stages are never dilated: leave ``output_stride`` as it is.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: An argument outside the values above, lists of different lengths, or timm's ``scriptable=True``:
            TorchScript can't hold these networks; ``torch.export``, ``torch.jit.trace`` and ONNX can.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 4, 2),
        expansions: Sequence[int] = (4, 4, 4, 4),
        kernel_sizes: Sequence[int] = (5, 3, 5, 3),
        head_dim: int | Sequence[int | None] | None = 64,
        grid_sizes: Sequence[Levels | None] = (8, 8, 8, None),
        pool_ratios: Sequence[Levels | None] = (8, 4, 2, None),
        design: str = "transcnn",
        stem_width: int = 16,
        stem_stride: int = 4,
        norm_layer: str | Callable[[int], nn.Module] = "batchnorm",
        act_layer: str = "silu",
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        ndim: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if is_scriptable():
            raise ValueError("scriptable must be False, got True: use torch.export, torch.jit.trace or transcnn export")
        stages = len(dims)
        head_dims = [head_dim] * stages if head_dim is None or isinstance(head_dim, int) else list(head_dim)
        _check_arguments(
            dict(
                dims=dims,
                depths=depths,
                expansions=expansions,
                kernel_sizes=kernel_sizes,
                head_dim=head_dims,
                grid_sizes=grid_sizes,
                pool_ratios=pool_ratios,
            ),
            norm_layer=norm_layer,
            act_layer=act_layer,
            drop_path_rate=drop_path_rate,
            in_chans=in_chans,
            design=design,
            stem_stride=stem_stride,
            output_stride=output_stride,
            ndim=ndim,
        )
        _check_head(num_classes, global_pool)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        make_norm = norm_layers(ndim)[norm_layer] if isinstance(norm_layer, str) else norm_layer
        # Not in place: SiLU needs its input for the backward pass, so in place it would be copied first.
        act: Callable[[], nn.Module] = get_act_layer(act_layer)  # pyright: ignore
        parts = Parts(design, ATTENTIONS[ndim], make_norm, act, dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def stage(i: int) -> Stage:
            downsample = parts.downsample(dims[i - 1] if i else None, dims[i])
            grids = _levels(grid_sizes[i])
            ratios = _levels(pool_ratios[i]) if grids else ()
            widths = (dims[i], expansions[i], kernel_sizes[i], head_dims[i])
            return Stage(downsample, [parts.block(*widths, grids, ratios, rate) for rate in rates[i]])  # pyright: ignore

        self.stem = parts.stem(in_chans, stem_width, dims[0], STEM_STRIDES[stem_stride])
        self.stages = nn.Sequential(*map(stage, range(stages)))
        self.ndim = ndim
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.drop_rate = drop_rate
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        strides = [stem_stride * 2**i for i in range(stages)]
        largest = max(stem_stride, output_stride) if ndim == 2 else strides[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": min(stride, largest), "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        for made, stride in zip(self.stages, strides, strict=True):
            if stride > largest:
                dilate(made, stride // largest // 2)  # pyright: ignore
        self.apply(_init_weights)

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images to the last stage's map, (B, in_chans, H, W) -> (B, num_features, H', W').

        With a mask the map is zero outside of :meth:`feature_mask`.
        """
        mask = unless_traced(mask)
        check_mask(mask, x)
        if self.training:  # an optimized network refuses every mask, and never trains
            mask = unless_whole(mask)
        if mask is None:
            return self.stages(self.stem(x))
        x, mask = self.stem(x, mask), self._after_stem(mask)
        for stage in self.stages:
            x, mask = stage(x, mask), stage.coarser(mask)  # pyright: ignore
        return x

    def _after_stem(self, mask: Tensor) -> Tensor:
        return coarser(mask, self.feature_info[0]["reduction"])

    def feature_mask(self, mask: Tensor) -> Tensor:
        """Which positions of the last stage's map are real, (B, 1, H, W) -> (B, 1, H', W')."""
        mask = self._after_stem(mask)
        for stage in self.stages:
            mask = stage.coarser(mask)  # pyright: ignore
        return mask

    def forward_head(self, x: Tensor, pre_logits: bool = False, mask: Tensor | None = None) -> Tensor:
        """Pool and classify, (B, num_features, H', W') -> (B, num_classes), or (B, C) with ``pre_logits``.

        ``mask`` (B, 1, H', W') tells the real positions, of which alone the average is taken.
        """
        mask = unless_traced(mask)
        pool = self.head.global_pool.pool_type
        if mask is not None:
            if pool not in AVERAGES:
                raise ValueError(f"with a mask, global_pool must be one of {AVERAGES}, got {pool!r}")
            share = mask.flatten(1).to(x.dtype).mean(1)  # of the positions, which an average over all divides by
            share = share.masked_fill(share == 0, 1) if pool else torch.ones_like(share)
            x = keep_real(x, mask) / share.view(-1, *(1,) * (x.ndim - 1))
        if self.ndim != 2 and pool:
            x = x.flatten(2)[..., None]  # (B, C, N, 1), which pools to the same
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes).

        ``mask`` (B, 1, H, W), bool, is true at real positions, where items of several sizes are filled up to one. Each
        item's answer then is its answer without padding (where BatchNorms train: with the batch's statistics, which are
        those of real positions).
        """
        mask = unless_traced(mask)
        if mask is None:
            return self.forward_head(self.forward_features(x))
        return self.forward_head(self.forward_features(x, mask), mask=self.feature_mask(mask))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of chosen stages, and the last one's (timm's interface).

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages to return (negative ones count from the end), the last n of them, or None for all.
            norm: Here for timm; there is no norm after the stages.
            stop_early: Leave out the stages after the last one asked for.
            output_fmt: Only ``NCHW``.
            intermediates_only: Return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted = _stage_indices(indices, len(self.stages))
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > max(wanted):
                break
            x = stage(x)
            if i in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of ``indices``, and return the indices (timm's interface).

        The head goes as well, where stages go or ``prune_head`` says so; :meth:`reset_classifier` makes another.
        """
        wanted = _stage_indices(indices, len(self.stages))
        shorter = max(wanted) + 1 < len(self.stages)
        self.stages = self.stages[: max(wanted) + 1]
        if shorter:
            self.num_features = self.feature_info[max(wanted)]["num_chs"]
        if prune_head or shorter:  # a head for the last stage's channels fits no other's
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        """The head's linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for ``num_classes`` (0 for none), on the network's device, with another pooling if given."""
        _check_head(num_classes, self.head.global_pool.pool_type if global_pool is None else global_pool)
        self.num_classes = num_classes
        dd: dict[str, Any] = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, about a third more time.

        Outputs and gradients stay the same; as everywhere in PyTorch, BatchNorm sees each batch twice, so that its
        running statistics follow the batches faster.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable  # pyright: ignore

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How parameters group into layers, for layer-wise learning rates (timm's interface)."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters to leave out of weight decay besides the one-dimensional ones: none."""
        return set()


def _levels(sizes: Levels | None) -> tuple[Size, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes or ())


def _stage_indices(indices: int | Sequence[int] | None, stages: int) -> list[int]:
    """timm's notation of stages as absolute indices: None is all, an int the last that many."""
    if indices is None:
        return list(range(stages))
    wanted = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not wanted or any(not -stages <= i < stages for i in wanted):
        raise ValueError(f"stages must be within {-stages} and {stages - 1}, got indices={indices}")
    return [i % stages for i in wanted]


def _init_weights(module: nn.Module) -> None:
    """Truncated normal of standard deviation 0.02, biases 0; norms keep PyTorch's 1 and 0."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and not module.weight.is_meta:  # which holds no numbers
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_arguments(
    per_stage: dict[str, Any],
    *,
    norm_layer: object,
    act_layer: str,
    drop_path_rate: float,
    in_chans: int,
    **one_of: Any,
) -> None:
    choices = {
        "design": ("transcnn", "hatnet"),
        "stem_stride": tuple(STEM_STRIDES),
        "output_stride": (8, 16, 32),
        "ndim": tuple(SIZES),
    }
    for name, value in one_of.items():
        if value not in choices[name]:
            raise ValueError(f"{name} must be one of {choices[name]}, got {value!r}")
    if one_of["ndim"] != 2 and one_of["output_stride"] != 32:
        raise ValueError(f"output_stride must be 32 where ndim={one_of['ndim']}, got {one_of['output_stride']}")
    norms = norm_layers(one_of["ndim"])
    if isinstance(norm_layer, str) and norm_layer not in norms:
        raise ValueError(f"norm_layer must be one of {tuple(norms)} or a callable, got {norm_layer!r}")
    try:
        get_act_layer(act_layer)
    except KeyError:
        raise ValueError(f"act_layer must be timm's name of one, such as 'silu' or 'gelu', got {act_layer!r}") from None
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be from 0 to below 1, got {drop_path_rate}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be 1 or more, got {in_chans}")
    stages = len(per_stage["dims"])
    for name, values in per_stage.items():
        if not isinstance(values, Sequence) or len(values) != stages:
            raise ValueError(f"{name} must have one entry for each of the {stages} stages of dims, got {values!r}")
    if any(size % 2 == 0 for size in per_stage["kernel_sizes"]):
        raise ValueError(f"kernel_sizes must be odd, got {per_stage['kernel_sizes']}")


def _check_head(num_classes: int, global_pool: str | None) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no head) or more, got {num_classes}")
    if (global_pool or "") not in POOLS:
        raise ValueError(f"global_pool must be one of {POOLS}, got {global_pool!r}")
    if num_classes and not global_pool:
        raise ValueError(f"without global_pool there is a map, not classes: num_classes must be 0, got {num_classes}")
