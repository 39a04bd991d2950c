"""What a run does when its arithmetic fails: a gradient that is not finite changes nothing, many send it back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ..checkpoints.files import atomic_write
from ..distributed.processes import gather
from ..errors import UserError
from ..text import json_text
from .checkpointing import LAST, KeepWeights, note

__all__ = ["Rollback", "SkipNonFinite", "first_not_finite"]

LEAST_FACTOR = 1 / 8  # the learning rate is halved three times at most


class Rollback(Exception):
    """Go on from the last good checkpoint of ``run_dir`` with the share ``lr_factor`` of the run's learning rate."""

    def __init__(self, run_dir: Path, lr_factor: float) -> None:
        super().__init__(f"{run_dir}: the learning rate is now {lr_factor:g} of what was asked for")
        self.run_dir, self.lr_factor = run_dir, lr_factor


class SkipNonFinite(Callback):
    """Leave out an update whose gradient holds NaN or infinity, and count it; ``limit`` in a row are too many.

    Statistics that the forward pass put into the network (BatchNorm's) are set back as well. While updates are being
    left out no checkpoint is written, so that the last good one stays.

    After ``limit`` updates in a row ``nonfinite.json`` says which images were in the batch and which module was the
    first whose output was not finite. The run is then rolled back to its last good checkpoint with half the learning
    rate (:class:`Rollback`), three times at most; where that is not wanted, has not helped or there is no checkpoint it
    ends.

    Gradients are summed over processes before they are looked at, so all processes decide alike. With 16-bit floats
    the gradient scaler leaves updates out by itself, overflow being part of how it finds its scale; they count where
    that is below 1 already, for then it isn't the scale that is at fault.

    Args:
        run_dir: Where the report and notes go.
        keep: What writes the checkpoints.
        limit: Updates in a row.
        rollback: Whether to roll back at all.
        lr_factor: After a rollback, the share of the learning rate that is left.
    """

    def __init__(
        self, run_dir: Path, keep: KeepWeights, limit: int = 10, rollback: bool = True, lr_factor: float | None = None
    ) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.limit = limit
        self.rollback = rollback
        self.new_factor = lr_factor
        self.lr_factor = 1.0
        self.skipped = 0  # in the whole run
        self.in_a_row = 0
        self._before: list[Tensor] = []
        self._batch: Any = None
        self._batch_idx = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "lr_factor": self.lr_factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.lr_factor = int(state_dict["skipped"]), float(state_dict["lr_factor"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.new_factor is not None:  # what the optimizer was restored with is the rate from before
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= self.new_factor / self.lr_factor
            self.lr_factor = self.new_factor
        pl_module.lr_factor = self.lr_factor  # pyright: ignore

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._batch_idx = batch, batch_idx
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._before = [buffer.detach().clone() for buffer in pl_module.buffers()]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)):  # pyright: ignore
            self.in_a_row = 0
            self.keep.hold = False
            return
        with torch.no_grad():
            for buffer, before in zip(pl_module.buffers(), self._before, strict=True):
                buffer.copy_(before)
        if scaler is not None and scaler.get_scale() >= 1:
            return
        self.skipped += 1
        self.in_a_row += 1
        self.keep.hold = True
        if self.in_a_row >= self.limit:
            self._give_up(trainer, pl_module)
        if scaler is None:
            optimizer.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient
        if trainer.is_global_zero:
            note(self.run_dir, f"update {trainer.global_step + 1} was left out: its gradient is not finite")

    def _give_up(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = self._report(trainer, pl_module)
        module = found["module"]
        what = f"the output of {module}" if module else "the gradient (no module's output)"
        trouble = f"{self.limit} updates in a row had gradients that are not finite; not finite is {what}"
        factor = self.lr_factor / 2
        if self.rollback and factor >= LEAST_FACTOR and (self.run_dir / LAST).exists():
            if trainer.is_global_zero:
                remark = f"{trouble}; back to the last checkpoint with {factor:g} of the learning rate"
                note(self.run_dir, remark)
                print(f"transcnn: {remark}", file=sys.stderr)
            raise Rollback(self.run_dir, factor)
        raise UserError(
            f"{trouble}, see {self.run_dir / 'nonfinite.json'}. The last good checkpoint is kept; try a smaller --lr "
            "or --precision 32"
        )

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Look for the cause once more and write ``nonfinite.json``."""
        module = first_not_finite(pl_module.model, lambda: pl_module.loss(self._batch))  # pyright: ignore
        loader: Any = trainer.train_dataloader
        files = loader.names(self._batch_idx) if hasattr(loader, "names") else []
        seen = gather((module, files))  # each process has its share of the batch
        module, files = next((m for m, _ in seen if m), ""), [name for _, names in seen for name in names]
        found = {"epoch": trainer.current_epoch + 1, "update": trainer.global_step + 1, "left_out": self.skipped}
        found |= {"lr": trainer.optimizers[0].param_groups[0]["lr"], "loss": str(float(pl_module.last_loss))}  # pyright: ignore
        found |= {"module": module, "files": files}
        if trainer.is_global_zero:
            text = json_text(found, indent=2) + "\n"
            path = self.run_dir / "nonfinite.json"
            atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return found


def first_not_finite(model: nn.Module, forward: Any) -> str:
    """The name of the first module whose output holds NaN or infinity when ``forward`` runs; "" if there is none."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    kept = [buffer.detach().clone() for buffer in model.buffers()]
    try:
        with torch.no_grad():
            forward()
            for buffer, before in zip(model.buffers(), kept, strict=True):
                buffer.copy_(before)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""
