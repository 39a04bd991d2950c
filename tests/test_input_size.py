"""The size of images where none is given: by what the images are, and said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from transcnn import cli
from transcnn.data.images import BrokenImage
from transcnn.settings import TrainSettings
from transcnn.training.input_size import choose_img_size


class Images:
    """Stands for a training split; None for an image that can't be read."""

    groups: Any = None

    def __init__(self, *sizes: tuple[int, int] | None) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, i: int) -> tuple[Image.Image, int]:
        size = self.sizes[i]
        if size is None:
            raise BrokenImage("damaged")
        return Image.new("L", size), 0


@pytest.mark.parametrize(
    ("sizes", "settings", "chosen", "said"),
    [
        ([(4000, 3000)], {}, 224, "images of about 3000 pixels are resized to 224x224, instead of the 32x32"),
        ([(100, 90), (130, 120), None, (500, 110)], {}, 96, "about 110 pixels are resized to 96x96"),
        ([(40, 36)], {}, None, ""),  # near what the network was made for
        ([(8, 8)], {}, None, "about 8 pixels are resized to 32x32, which the network was made for"),
        ([(500, 400)], {"img_size": 64}, 64, ""),
        ([(500, 400)], {"pretrained": True}, None, "400 pixels are resized to 32x32, which its weights are for"),
        ([(500, 400)], {"model": "transcnn_tiny"}, None, ""),
        ([(500, 400)], {"model": "vit_tiny_patch16_224"}, None, ""),  # takes one size alone
        ([(500, 400)], {"task": "segment"}, None, ""),
        ([None], {}, None, ""),
    ],
)
def test_it_is_chosen_by_the_images(sizes, settings, chosen, said, capsys):
    given = TrainSettings(**{"model": "transcnn_nano", **settings})
    found = choose_img_size(given, SimpleNamespace(train=Images(*sizes)), quiet=False)
    told = capsys.readouterr().err
    assert found.img_size == chosen
    assert (said in told) if said else not told
    assert choose_img_size(given, SimpleNamespace(train=Images(*sizes)), quiet=True) == found
    assert not capsys.readouterr().err


def test_files_that_must_be_fetched_are_not_looked_at():
    images = Images((500, 400))
    images.groups = [0]
    assert (
        choose_img_size(TrainSettings(model="transcnn_nano"), SimpleNamespace(train=images), quiet=True).img_size
        is None
    )


@pytest.mark.filterwarnings("ignore")
def test_a_run_takes_it_and_records_it(make_class_folder, capsys):
    data = make_class_folder(classes=2, per_class=4, size=(200, 140))
    arguments = [
        "train",
        str(data),
        "--model",
        "transcnn_test",
        "--batch_size",
        "2",
        "--accelerator",
        "cpu",
        "--dry_run",
    ]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "about 140 pixels are resized to 128x128" in said.err
    assert "input 3x128x128" in said.out
    assert "the images" in next(line for line in said.out.splitlines() if line.strip().startswith("img_size"))
