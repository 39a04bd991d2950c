"""Make a finished run's weights the package's own: ``python -m transcnn.commands.pack_weights RUN DATA``.

They are stored as 16-bit floats, half the size, and put in place only if the accuracy on the test images is the same.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from ..checkpoints.files import atomic_write
from ..checkpoints.hub import model_card
from ..checkpoints.loading import load, save_weights
from ..data.paths import StrPath
from ..errors import UserError
from ..weights import NOTES
from .evaluate import evaluate

__all__ = ["pack"]

LARGEST = 9_000_000  # bytes
WEIGHTS = Path(__file__).parent.parent / "weights"
KEPT = ("model", "model_args", "task", "class_names", "data_config", "data", "epoch", "val_top1", "settings")
LICENCE = "apache-2.0"  # of this package
PLACES = ("data", "out", "resume", "init_from", "distill", "table")  # settings that name a machine's folders


def pack(
    run: StrPath,
    data: StrPath,
    *,
    name: str = "transcnn_nano.cifar10",
    folder: StrPath | None = None,
    slack: float = 0.05,
) -> Path:
    """Store a run's best weights as ``NAME.safetensors``, with the card ``NAME.md``, and say what that cost.

    Args:
        run: A run's directory, or its best.safetensors.
        data: What the run was trained on, with a test split.
        name: Architecture and tag, as timm writes them.
        folder: Where to; without it the package's own folder of weights.
        slack: Percentage points of test accuracy that the rounding may cost.

    Raises:
        UserError: The file is too large, or less accurate.
    """
    loaded = load(run)
    before = evaluate(run, data, split="test", precision="32", quiet=True)
    info: dict[str, Any] = {key: loaded.info[key] for key in KEPT if key in loaded.info}
    info["settings"] = {key: value for key, value in info.get("settings", {}).items() if key not in PLACES}
    info["test_top1"] = before["top1"]
    target = Path(folder or WEIGHTS) / f"{name}.safetensors"
    trial = target.with_name(f".{name}.trial.safetensors")
    try:
        save_weights(trial, copy.deepcopy(loaded.model).half(), info)
        size = trial.stat().st_size
        if size > LARGEST:
            raise UserError(f"{size / 1e6:.1f} MB are more than the {LARGEST / 1e6:.0f} MB that a package may hold")
        after = evaluate(str(trial), data, split="test", precision="32", quiet=True)
        if not after["top1"] >= before["top1"] - slack:
            raise UserError(f"16-bit weights are at {after['top1']} % instead of {before['top1']} %: not packed")
        loaded.info = info
        card = str(model_card(loaded, licence=LICENCE, metrics=after, packaged=name, notes=NOTES.get(name, "")))
        os.replace(trial, target)
    finally:
        trial.unlink(missing_ok=True)
    atomic_write(target.with_suffix(".md"), lambda path: path.write_text(card, encoding="utf-8"))
    print(f"{target}: {size / 1e6:.2f} MB, top-1 {before['top1']} % as 32-bit and {after['top1']} % as 16-bit floats")
    return target


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(pack, as_positional=True)
