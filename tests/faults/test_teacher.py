"""A run that learns from a teacher goes on exactly where it stopped, mixed images and all."""

from __future__ import annotations

import signal

from harness import BUSY, Command, assert_equal_weights, checkpoint


def test_distillation_goes_on_in_the_middle_of_an_epoch(undisturbed, images, tmp_path):
    arguments = [images, *BUSY, "--epochs=2", "--distill_from", undisturbed, "--distill_type=soft"]
    with Command("train", *arguments, "--out", tmp_path / "whole", log=tmp_path / "log") as command:
        assert command.wait() == 0, command.text
    with Command("train", *arguments, "--out", tmp_path / "run", log=tmp_path / "log1") as command:
        command.until(lambda: command.step >= 3)
        command.signal(signal.SIGTERM)
        assert command.wait() == 0, command.text
    with Command("train", "--resume", tmp_path / "run", log=tmp_path / "log2") as command:
        assert command.wait() == 0, command.text
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")
    state = checkpoint(tmp_path / "run" / "last.ckpt")["state_dict"]
    alone = checkpoint(undisturbed / "last.ckpt")["state_dict"]
    assert state.keys() == alone.keys()  # nothing of the teacher is kept
    assert any(not state[name].equal(alone[name]) for name in state)
