"""Class maps, which show the evidence for a class: Grad-CAM, and gradients times attention; on any stage.

Grad-CAM is a line of arithmetic once activations and gradients are there, and the records hold them. Its well-known
library would bring 150 MB of OpenCV, which clashes with other builds of OpenCV, and clears the gradients that a
training loop has gathered. So it is here in full; the tests hold it against that library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.loading import Loaded
from ..errors import UserError
from ..grids import cut_into_grids, join_grids, product
from .geometry import carry, smooth
from .record import ImageLike, Record, as_input, check_stage, heads_of, local_weights, record, token_weights

__all__ = ["check_logits", "check_target", "grad_cam", "gradient_attention"]


@torch.inference_mode(False)
@torch.enable_grad()
def grad_cam(
    model: nn.Module | Loaded, image: ImageLike, target: int | None = None, stage: int | None = None
) -> Tensor:
    """Grad-CAM of a class at the end of a stage, (H, W), of sum 1 (or all 0: nothing there is evidence for the class).

    R. R. Selvaraju et al., "Grad-CAM", arXiv 1610.02391: the stage's channels, each weighted by the mean gradient of
    the class's logit with respect to it, summed; what is below 0 is cut off; then interpolated to the image's size.

    Args:
        model, image: As for :func:`~transcnn.explain.attention_maps`; the model gives logits (1, classes).
        target: Number of the class; None is the most probable one.
        stage: The stage, from 0, or negative from the end; None is the last. The last H-MHSA block (or plugged branch)
            of it is what is looked at.

    Raises:
        UserError: No such class or stage, or a model of another output.
    """
    module, x = as_input(model, image)
    logits, records = record(module, x, gradients=True)
    last = check_stage(records, -1 if stage is None else stage)[-1]
    gradient = _gradients(_logit(logits, target), [last.output])[0].float()
    weighted = (
        gradient.mean(tuple(range(2, gradient.ndim)), keepdim=True) * last.output.detach().float()
    )  # (1, C, H', W')
    return _to_one(smooth(weighted.sum(1)[0].clamp(min=0), tuple(x.shape[2:])))  # pyright: ignore


@torch.inference_mode(False)
@torch.enable_grad()
def gradient_attention(
    model: nn.Module | Loaded, image: ImageLike, target: int | None = None, stage: int | None = None
) -> Tensor:
    """What the attention of a stage takes for a class from each pixel, (H, W), of sum 1 (or all 0).

    Of each step of each block: weights times the gradient of the class's logit with respect to them, cut off below 0
    (the element-wise product of H. Chefer et al., "Generic Attention-model Explainability", arXiv 2103.15679), summed
    over heads and over all positions that ask, so that a value for each token asked is left. Brought to the image's
    size, those of all steps and blocks are added: to first order, each is what the logit would lose without that
    attention. The gradients are exact: for ``out = A·V`` that of A is the one of ``out`` times Vᵀ.

    Args:
        model, image, target: As for :func:`grad_cam`.
        stage: One stage, from 0, or negative from the end; None is all of them.

    Raises:
        UserError: No such class or stage, or a model of another output.
    """
    module, x = as_input(model, image)
    size = tuple(x.shape[2:])
    logits, records = record(module, x, gradients=True)
    chosen = check_stage(records, stage)
    inner = [tensor for r in chosen for tensor in (*r.mixed, r.summed)]
    gradients = iter(_gradients(_logit(logits, target), inner))
    total = torch.zeros(size, device=x.device)
    with torch.no_grad():
        for r in chosen:
            for part, ratio in _taken(r, [next(gradients) for _ in (*r.mixed, r.summed)]):
                total += carry(carry(part, r.size, side=ratio), size)
    return _to_one(total)


def _taken(r: Record, gradients: list[Tensor]) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Σ (A ⊙ ∂logit/∂A)⁺ over heads and queries for each token of each step, (H_l, W_l), and the tokens' ratio."""
    d = r.attn.head_dim
    parts, ratio = [], (1,) * r.attn.ndim
    steps = zip(r.qkv, gradients[:-1], r.attn.grid_sizes, r.attn.pool_ratios, strict=True)
    for qkv, gradient, grid_size, pool in steps:
        weights, v = local_weights(qkv, d, grid_size)  # (G, h, N, N), (G, h, N, d)
        g, _ = cut_into_grids(gradient, grid_size)  # (G, N, C), zeros where positions aren't real
        g = g.unflatten(2, (-1, d)).transpose(1, 2).to(weights.dtype)  # (G, h, N, d)
        tokens = (weights * (g @ v.to(g.dtype).mT)).clamp(min=0).sum((1, 2))  # (G, N)
        parts.append((join_grids(tokens[..., None], grid_size, 1, qkv.shape[2:])[0, 0], ratio))
        ratio = product(ratio, pool)
    weights = token_weights(heads_of(r.q, d), heads_of(r.k, d))  # (h, H·W, M)
    g = heads_of(gradients[-1], d).to(weights.dtype)  # (h, H·W, d)
    tokens = (weights * (g @ heads_of(r.v, d).to(g.dtype).mT)).clamp(min=0).sum((0, 1))  # (M,)
    return [*parts, (tokens.view(r.k.shape[2:]), ratio)]


def _gradients(logit: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of a logit with respect to tensors: zeros where it doesn't depend on them."""
    if not (logit.requires_grad and all(tensor.requires_grad for tensor in tensors)):
        raise UserError("class maps need gradients, and this network cuts them off (torch.no_grad or detach inside it)")
    return torch.autograd.grad(logit, tensors, materialize_grads=True)


def _logit(logits: Any, target: int | None) -> Tensor:
    return check_logits(logits)[0, check_target(target, logits[0])]


def check_logits(logits: Any) -> Tensor:
    """What a network gave, (B, classes); refuses anything else."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"class maps need a classifier, whose output is (B, classes); this model gives {what}")
    return logits


def check_target(target: int | None, logits: Tensor) -> int:
    """The class's number; the most probable one for None."""
    if target is None:
        return int(logits.argmax())
    if not 0 <= target < len(logits):
        raise UserError(f"the class must be a number from 0 to {len(logits) - 1}, got {target}")
    return target


def _to_one(values: Tensor) -> Tensor:
    total = values.sum()
    return (values / total if total > 0 else values).cpu()
