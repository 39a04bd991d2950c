"""Whether a training waits for its images is measured, and said."""

from __future__ import annotations

import time

from transcnn.commands.train import train
from transcnn.data.sets.image_dataset import ImageDataset
from transcnn.training import loading
from transcnn.training.loading import hint


def test_a_slow_loader_is_said_once(class_folder, tmp_path, monkeypatch, capsys, no_report):
    monkeypatch.setattr(loading, "LEAST_SECONDS", 0.2)
    read = ImageDataset.__getitems__

    def slow(self, wanted):
        time.sleep(0.3 if self.replace else 0)  # training's set only
        return read(self, wanted)

    monkeypatch.setattr(ImageDataset, "__getitems__", slow)
    options = dict(
        model="transcnn_test", img_size=32, batch_size=4, epochs=2, precision="32", accelerator="cpu", limit_batches=2
    )
    train(str(class_folder), out=str(tmp_path / "run"), num_workers=0, **options)
    said = capsys.readouterr().err
    assert said.count("The loader is what limits: ") == 1


def test_the_hint_says_what_helps(monkeypatch):
    monkeypatch.setattr(loading.os, "cpu_count", lambda: 8)
    said = hint(images=1000, seconds=10, waited=6, workers=2)
    assert "60% of the time goes by waiting for images" in said
    assert "a core reads 50 images/s, the network could take 250" in said
    assert "--num_workers above 2 helps (8 cores here)" in said
    assert "all 8 cores are used" in hint(1000, 10, 6, 7)
    assert "a core reads 167 images/s" in hint(1000, 10, 6, 0)
