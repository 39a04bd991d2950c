"""BatchNorm's running statistics in the first updates of a training: the mean of what was seen, without a trace of 1.

Running variances begin at 1. With a momentum of 0.1 a share 0.9ⁿ of that is left after n updates, and where true
variances are a thousandth (weights begin small), a network in evaluation mode puts out the same class for everything
until some fifty updates later, however well it has learnt. Cumulative averages have no such memory.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["StatisticsWarmup"]


class StatisticsWarmup:
    """Gives every BatchNorm the momentum max(m, 1 / (1 + n)), n being the batches that it has seen and m its own.

    What it needs to know is in ``num_batches_tracked``, so a resumed run goes on alike. Norms whose statistics come
    from weights that were loaded keep their momentum; where such weights don't say how many batches they have seen,
    as older files don't, they are taken for settled. A norm without momentum averages cumulatively anyway.

    Args:
        model: The network, with the weights that training begins with.
    """

    def __init__(self, model: nn.Module) -> None:
        self._momenta: dict[_BatchNorm, float] = {}
        for norm in model.modules():
            if not isinstance(norm, _BatchNorm) or not norm.momentum or norm.num_batches_tracked is None:
                continue
            if int(norm.num_batches_tracked) == 0 and not _is_initial(norm):
                norm.num_batches_tracked.fill_(math.ceil(1 / norm.momentum))
            self._momenta[norm] = norm.momentum

    @property
    def running(self) -> bool:
        """Whether any norm's momentum isn't its own yet."""
        return bool(self._momenta)

    def step(self) -> None:
        """Set the momenta for the next batch; call it before each."""
        if not self._momenta:
            return
        counters = [norm.num_batches_tracked for norm in self._momenta]
        counts = torch.stack(counters).tolist()  # pyright: ignore  (one wait for a GPU, not one a norm)
        for (norm, own), count in zip(list(self._momenta.items()), counts, strict=True):
            norm.momentum = max(own, 1 / (1 + count))
            if norm.momentum == own:
                del self._momenta[norm]

    def stop(self) -> None:
        """Give all norms their own momentum back."""
        for norm, own in self._momenta.items():
            norm.momentum = own
        self._momenta.clear()


def _is_initial(norm: _BatchNorm) -> bool:
    """Whether the statistics are those of a new norm."""
    mean, variance = norm.running_mean, norm.running_var
    return mean is None or variance is None or (not bool(mean.any()) and bool((variance == 1).all()))
