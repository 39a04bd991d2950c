"""A run on packed data that is stopped in the middle of an epoch goes on exactly where it stopped."""

from __future__ import annotations

import signal

from harness import BUSY, Command, assert_equal_weights

from transcnn.commands.pack import pack


def test_a_run_on_shards_goes_on_in_the_middle_of_an_epoch(undisturbed, images, tmp_path):
    shards, run = tmp_path / "shards", tmp_path / "run"
    pack(str(images), out=str(shards), shard_mb=0.01, quiet=True)
    with Command("train", shards, *BUSY, "--epochs=4", "--out", run, log=tmp_path / "log") as command:
        command.until(lambda: command.step >= 7)  # five updates an epoch
        command.signal(signal.SIGTERM)
        assert command.wait() == 0, command.text
    with Command("train", "--resume", run, "--num_workers=2", log=tmp_path / "log2") as command:
        assert command.wait() == 0, command.text
    assert_equal_weights(undisturbed, run)  # which read the folder
