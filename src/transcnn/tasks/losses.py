"""Losses of classification for classes of very different sizes: weighted, focal, with adjusted logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["ImbalancedCrossEntropy", "weights_of"]


class ImbalancedCrossEntropy(nn.Module):
    """Cross entropy of logits (B, C) with classes (B,) or shares (B, C), for classes of very different sizes.

    With neither weights, gamma nor prior it is timm's ``SoftTargetCrossEntropy``, of classes its
    ``LabelSmoothingCrossEntropy``.

    Args:
        smoothing: Share of the label that is spread over all classes; shares are taken as they are.
        weights: Of each class, a factor of its term.
        gamma: Focal loss (Lin et al., 1708.02002): each class's term times (1 - its probability) ** gamma.
        prior: Added to the logits: in proportion to the logarithm of the classes' shares (Menon et al., 2007.07314).
    """

    weights: Tensor | None
    prior: Tensor | None

    def __init__(
        self, smoothing: float = 0.0, weights: Tensor | None = None, gamma: float = 0.0, prior: Tensor | None = None
    ) -> None:
        super().__init__()
        self.smoothing, self.gamma = smoothing, gamma
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("prior", prior, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean over the batch."""
        classes = logits.shape[1]
        if target.ndim == 1:
            target = F.one_hot(target, classes) * (1 - self.smoothing) + self.smoothing / classes  # (B, C)
        if self.prior is not None:
            logits = logits + self.prior
        log_p = logits.log_softmax(1)
        terms = -target * log_p
        if self.gamma:
            terms = terms * (1 - log_p.exp()).clamp(min=0) ** self.gamma
        if self.weights is not None:
            terms = terms * self.weights
        return terms.sum(1).mean()


def weights_of(kind: str | Mapping[str, Any], counts: Sequence[int], names: Sequence[str]) -> Tensor | None:
    """A factor for each class, of mean 1 over the training images; None where all count the same.

    Args:
        kind: ``none``; ``balanced``, 1 / images; ``sqrt``, the root of that; or factors by names, 1 for all others.
        counts: Training images of each class.
        names: The classes.

    Raises:
        UserError: A name that is no class, or a factor that is no number above 0.
    """
    if kind == "none":
        return None
    images = torch.tensor(counts, dtype=torch.float64)
    if isinstance(kind, Mapping):
        if unknown := [name for name in kind if name not in names]:
            raise UserError(f"class_weights: no class is named {unknown[0]!r}; there are {', '.join(names[:20])}")
        for name, value in kind.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                raise UserError(f"class_weights: {name} must be a number above 0, got {value!r}")
        factors = torch.tensor([float(kind.get(name, 1.0)) for name in names], dtype=torch.float64)
    else:
        factors = images.clamp(min=1) ** (-1.0 if kind == "balanced" else -0.5)
    return (factors * images.sum() / (factors * images).sum().clamp(min=1e-12)).float()
