"""Data that all fault tests train on, and an undisturbed run to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import BUSY, Command
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, class_image: Callable[..., Image.Image]) -> Path:
    """Two classes of 12 images each: 22 to learn from, five batches of four an epoch."""
    folder = tmp_path_factory.mktemp("images")
    for label in range(2):
        (folder / f"class_{label}").mkdir()
        for i in range(12):
            class_image(label, i).save(folder / f"class_{label}" / f"{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run of four epochs that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Command("train", images, *BUSY, "--epochs=4", "--out", folder / "run", log=folder / "log") as command:
        assert command.wait() == 0, command.text
    return folder / "run"
