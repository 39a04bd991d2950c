"""Learning from a teacher's answers, and fine-tuning at a higher resolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transcnn.checkpoints.loading import Loaded, load
from transcnn.commands.train import train
from transcnn.errors import UserError
from transcnn.settings import Augment, Distill, Ema, Optim
from transcnn.tasks import distill
from transcnn.tasks.classify import Classify
from transcnn.tasks.distill import Teacher

pytestmark = pytest.mark.usefixtures("no_report")
CONFIG = {"input_size": [3, 8, 8], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def network(classes: int = 3, hidden: int = 0) -> nn.Module:
    inner = [nn.Linear(192, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(nn.Flatten(), *inner, nn.Dropout(0.5), nn.Linear(hidden or 192, classes))


@pytest.fixture
def teach(monkeypatch):
    """Makes a teacher of a network, as if it had been read from a file."""

    def make(
        model: nn.Module,
        names: str = "abc",
        config: dict[str, Any] = CONFIG,
        task: str = "classify",
        sizes: tuple[int, ...] = (),
        **settings: Any,
    ):
        monkeypatch.setattr(distill, "load", lambda _: Loaded(model, task, list(names), config, "file"))
        return Teacher(Distill(distill_from="file", **settings), list("abc"), CONFIG, sizes)

    return make


def test_the_loss_is_that_of_the_paper(teach):
    z, t = torch.randn(5, 3), torch.randn(5, 3)
    hard = teach(network(), distill_alpha=0.25)
    soft = teach(network(), distill_type="soft", distill_alpha=0.25, distill_tau=2.0)
    for teacher in (hard, soft):
        teacher.__class__ = type("Fixed", (Teacher,), {"__call__": lambda self, images: t})
    images, labels = torch.empty(0), torch.tensor(1.5)
    expected = 0.75 * 1.5 + 0.25 * F.nll_loss(z.log_softmax(1), t.argmax(1))
    torch.testing.assert_close(hard.loss(labels, z, images), expected)
    p, q = (t / 2).softmax(1), (z / 2).softmax(1)
    expected = 0.75 * 1.5 + 0.25 * 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft.loss(labels, z, images), expected)


def test_a_teacher_is_given_its_own_normalisation_and_order_of_classes(teach):
    model = network().eval()
    pixels = torch.rand(4, 3, 8, 8)
    config = {**CONFIG, "mean": [0.1, 0.2, 0.3], "std": [1.0, 0.5, 0.3]}

    def normalised(config: dict[str, Any]) -> torch.Tensor:
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std

    teacher = teach(model.train(), "cab", config)
    answers = teacher(normalised(CONFIG))
    assert not model.training
    torch.testing.assert_close(answers, model(normalised(config))[:, [1, 2, 0]], rtol=1e-4, atol=1e-5)
    assert not answers.requires_grad
    same = teach(model, "xyz")  # other names, as many: taken as they come
    torch.testing.assert_close(same(normalised(CONFIG)), model(normalised(CONFIG)))


def test_a_teacher_of_one_size_alone_is_told_in_one_line(teach):
    large = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    with pytest.raises(UserError, match="the teacher file is made for images of 16x16, the student gets 8x8: mat1"):
        teach(large, config={**CONFIG, "input_size": [3, 16, 16]})
    with pytest.raises(UserError, match="made for images of 8x8, the student gets 4x4: mat1"):  # in its first epochs
        teach(network(), sizes=[4])


def test_a_teacher_is_given_its_own_range_of_numbers(monkeypatch):
    """Of images of any channels: both see the same numbers, each by what was measured for it."""
    model, numbers = network().eval(), 1000 + 500 * torch.rand(4, 3, 8, 8, dtype=torch.float64)
    ours = {**CONFIG, "pixel_range": [[900, 1600], [1000, 1400], [0, 1500]]}
    theirs = {**CONFIG, "mean": [0.1, 0.2, 0.3], "pixel_range": [[0, 2000], [500, 1400], [990, 1700]]}

    def normalised(config: dict[str, Any]) -> torch.Tensor:
        low, high = torch.tensor(config["pixel_range"], dtype=torch.float64).T[:, :, None, None]
        mean, std = (torch.tensor(config[key], dtype=torch.float64).view(-1, 1, 1) for key in ("mean", "std"))
        return (((numbers - low) / (high - low) - mean) / std).float()

    monkeypatch.setattr(distill, "load", lambda _: Loaded(model, "classify", list("abc"), theirs, "file"))
    teacher = Teacher(Distill(distill_from="file"), list("abc"), ours)
    torch.testing.assert_close(teacher(normalised(ours)), model(normalised(theirs)), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="reads numbers, the other photographs"):
        Teacher(Distill(distill_from="file"), list("abc"), CONFIG)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_student_learns_what_only_the_teacher_knows(teach, kind):
    teacher = teach(network(hidden=8), distill_type=kind, distill_alpha=1.0)
    student = Classify(network(hidden=64), list("abc"), CONFIG, augment=Augment(mixup=0.5, cutmix=1.0))
    student.learn_from(teacher)
    assert not any("teacher" in name for name in student.state_dict())
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    for _ in range(200):
        images = torch.randn(32, 3, 8, 8)
        student.train()
        loss = student.loss((images, torch.zeros(32, dtype=torch.int64)))  # labels that say nothing
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = torch.randn(500, 3, 8, 8)
    agree = (student.eval()(images).argmax(1) == teacher(images).argmax(1)).float().mean()
    assert agree > 0.7  # a third by chance


def test_teachers_that_do_not_fit_are_refused(teach, class_folder, tmp_path):
    for names, options, match in (
        ("ab", {}, "the teacher file knows 2 classes, the data has 3"),
        ("abx", {}, "has some of the data's class names, but not all: 'c'"),
        ("aab", {}, "but not all: 'a', 'c'"),
        ("abc", {"task": "segment"}, "is for the task segment"),
        ("abc", {"config": {**CONFIG, "input_size": [1, 8, 8]}}, "channels"),
        ("abc", {"distill_alpha": 1.5}, "distill_alpha must be from 0 to 1, got 1.5"),
        ("abc", {"distill_tau": 0}, "distill_tau must be above 0, got 0"),
    ):
        with pytest.raises(UserError, match=match):
            teach(network(), names, **options)


def test_fine_tuning_at_a_higher_resolution_layer_by_layer(class_folder, tmp_path):
    quick = dict(model="transcnn_test", batch_size=6, precision="32", accelerator="cpu", num_workers=0, quiet=True)
    quick |= dict(epochs=1, limit_batches=1, ema=Ema(ema=False))
    first = train(str(class_folder), img_size=32, out=str(tmp_path / "a"), **quick)  # pyright: ignore
    lr = 1e-3
    optim = Optim(layer_decay=0.5, weight_decay=0.0, warmup_epochs=0)
    second = train(
        str(class_folder),
        img_size=64,
        init_from=str(first.run_dir),
        lr=lr,
        optim=optim,
        out=str(tmp_path / "b"),
        **quick,
    )  # pyright: ignore
    before, after = load(first.run_dir), load(second.run_dir)
    assert after.preprocessing["input_size"] == [3, 64, 64]
    old, new = before.model.state_dict(), after.model.state_dict()
    # AdamW's first update moves each weight by its rate: whole at the head, less and less towards the stem.
    moved = {name: (old[name] - new[name]).abs().max().item() for name, _ in before.model.named_parameters()}
    assert moved["head.fc.weight"] == pytest.approx(lr, rel=0.05)
    stages = [max(v for n, v in moved.items() if n.startswith(f"stages.{i}.")) for i in range(4)]
    stem = max(value for name, value in moved.items() if name.startswith("stem."))
    assert stem < stages[0] < stages[1] < stages[2] < stages[3] <= lr * 0.51
