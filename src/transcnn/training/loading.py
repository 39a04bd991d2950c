"""Whether a training waits for its images: measured, and said once when the loader is what limits."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

__all__ = ["LoaderWatch", "hint"]

SHARE = 0.3  # of the time spent waiting, above which something is said
LEAST_SECONDS = 10.0  # of training, before anything is said


class LoaderWatch(Callback):
    """Compares the time that training steps waited for images with the time they took, and gives a hint once.

    ``share`` is the part of the present epoch's time that was spent waiting, without its first batch, for which loader
    processes start.
    """

    def __init__(self) -> None:
        self.said = False
        self.images, self.began, self.waited_before = 0, 0.0, 0.0
        self.share = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images, self.began, self.share = 0, 0.0, 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        waited = getattr(trainer.train_dataloader, "waited", None)
        if waited is None:
            return
        if not self.began:
            self.began, self.waited_before = time.monotonic(), waited
            return
        self.images += len(batch[0])
        seconds = time.monotonic() - self.began
        self.share = (waited - self.waited_before) / max(seconds, 1e-9)
        if self.said or self.share < SHARE or seconds < LEAST_SECONDS or not trainer.is_global_zero:
            return
        self.said = True
        workers = trainer.train_dataloader.num_workers
        print(hint(self.images, seconds, waited - self.waited_before, workers), file=sys.stderr)


def hint(images: int, seconds: float, waited: float, workers: int) -> str:
    """What to say of ``images`` that took ``seconds``, of which ``waited`` were spent waiting for them."""
    cores = os.cpu_count() or 1
    # Loader processes work all the time while they are waited for; without any, this one does while it waits.
    each = images / (seconds * workers if workers else max(waited, 1e-9))
    parts = [f"{waited / seconds:.0%} of the time goes by waiting for images"]
    parts += [f"a core reads {each:.0f} images/s, the network could take {images / max(seconds - waited, 1e-9):.0f}"]
    if workers < cores - 1:
        parts.append(f"--num_workers above {workers} helps ({cores} cores here)")
    else:
        parts.append(f"all {cores} cores are used: images stored smaller help, and a lighter --aa")
    return f"The loader is what limits: {'; '.join(parts)}; many small files on a slow disk: transcnn pack"
