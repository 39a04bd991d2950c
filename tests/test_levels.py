"""A run's network costs what its images' pixels cost, and a step that doesn't fit into memory is refused in a line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from transcnn.errors import UserError
from transcnn.levels import auto_levels
from transcnn.plugging.build import build_model
from transcnn.plugging.cost import count
from transcnn.settings import TrainSettings, as_plain
from transcnn.training import memory
from transcnn.training.building import make_network
from transcnn.training.levels import choose_levels
from transcnn.variants import VARIANTS


def macs(args: dict[str, Any], side: int) -> int:
    with torch.device("meta"):
        return count(build_model("transcnn_nano", **args).eval(), torch.empty(1, 3, side, side)).macs


def test_cost_is_linear_in_the_pixels_by_default(capsys):
    pixels = {}
    for side in (512, 1024, 2048):
        args: dict[str, Any] = {}
        choose_levels("transcnn_nano", args, (side, side), fixed=False, quiet=side != 1024)
        assert len(args["grid_sizes"]) == len(args["pool_ratios"]) == 3
        pixels[side] = macs(args, side) / side**2
    assert pixels[2048] < 1.1 * pixels[512]
    assert macs({}, 2048) / 2048**2 > 3 * macs({}, 512) / 512**2  # two levels
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "levels of attention for images of up to 1024x1024" in told


@pytest.mark.parametrize(
    ("args", "size", "fixed"),
    [({}, (32, 32), False), ({"grid_sizes": [8, 4, 4]}, (800, 1333), False), ({}, (800, 1333), True)],
)
def test_levels_that_suffice_are_given_or_are_the_weights_stay(args, size, fixed, capsys):
    before = dict(args)
    choose_levels("transcnn_nano", args, size, fixed=fixed, quiet=False)
    choose_levels("resnet18", args, size, fixed=fixed, quiet=False)
    assert args == before
    assert ("the levels of attention are those of the weights" in capsys.readouterr().err) == fixed


class Photographs:
    """A split of images of one size."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height

    def __len__(self) -> int:
        return 3

    def read(self, i: int) -> tuple[Image.Image, None]:
        return Image.new("RGB", self.size), None


@pytest.mark.parametrize(
    ("task", "changes", "seen"),
    [
        ("segment", {}, (360, 480)),  # whole images are evaluated
        ("segment", {"resize": 180}, (180, 240)),
        ("segment", {"window": 32}, (24, 32)),
        ("detect", {"short_side": 800, "long_side": 1000}, (750, 1000)),
        ("detect", {"short_side": 96, "long_side": 333, "side_range": (0.5, 1.5)}, (144, 192)),
    ],
)
def test_levels_follow_from_the_sizes_that_the_task_will_see(task, changes, seen):
    s = TrainSettings("", task=task, model="transcnn_nano", quiet=True)
    images = Photographs(480, 360)
    splits = SimpleNamespace(class_names=["a", "b"], in_chans=3, train=images, val=images)
    network, args = make_network(s, splits, {**as_plain(s)[task], **changes})
    variant = VARIANTS["transcnn_nano"]
    grids, _ = auto_levels(variant["grid_sizes"], variant["pool_ratios"], seen, variant["stem_stride"])
    assert [len(g) for g in args.get("grid_sizes", grids)] == [len(g) for g in grids]
    assert ("grid_sizes" in args) == (max(seen) > 100)
    again, _ = make_network(TrainSettings("", task=task, model="transcnn_nano", model_args=args), splits,
                            {**as_plain(s)[task], **changes})  # fmt: skip
    again.load_state_dict(network.state_dict())


@pytest.mark.parametrize(("name", "args"), [("transcnn_test", {}), ("resnet10t", {}), ("transcnn_nano", {})])
def test_what_a_step_keeps_is_extrapolated_from_smaller_images(name, args):
    body = build_model(name, num_classes=2, **args)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    state = torch.random.get_rng_state()
    expected = memory._kept(memory.copied_for_training(body), (3, 192, 256), None)
    assert memory.bytes_kept(body, (3, 192, 256)) == pytest.approx(expected, rel=0.1)
    assert all(torch.equal(before[key], value) for key, value in body.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_step_that_does_not_fit_is_one_clear_line(monkeypatch):
    network = build_model("transcnn_test", num_classes=2)
    settings: dict[str, Any] = dict(processes=1, dtype=None)
    monkeypatch.setattr(memory, "available_bytes", lambda: 100 << 20)
    with pytest.raises(UserError, match=r"a step of 512 images of 128x96 takes .* GiB of memory or more, and 0\.1 GiB"):
        memory.check_memory(network, 512, (3, 96, 128), **settings)
    memory.check_memory(network, 32, (3, 96, 128), **settings)  # small: nothing is tried
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    memory.check_memory(network, 512, (3, 96, 128), **settings)
    monkeypatch.undo()
    assert (memory.available_bytes() or 1) > 0
