"""Classes of very different sizes: losses, the sampler, and figures in which all classes count alike."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torchvision.ops import sigmoid_focal_loss

from transcnn.commands.evaluate import evaluate
from transcnn.commands.train import train
from transcnn.data.loading.loader import make_loader
from transcnn.data.loading.sampler import EpochSampler
from transcnn.data.sets.classify import open_splits
from transcnn.data.sets.fault_tolerant import Sample
from transcnn.data.transforms.classify import train_transform
from transcnn.errors import UserError
from transcnn.settings import Classify as ClassifySettings
from transcnn.settings import TrainSettings
from transcnn.tasks.classify import Classify
from transcnn.tasks.imbalance import class_figures, macro_figures, remarks_on_classes
from transcnn.tasks.losses import ImbalancedCrossEntropy, weights_of
from transcnn.training.check import remarks_on_balance

LOGITS = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 0, 0, 1, 2])


def test_without_any_of_it_the_loss_is_timms():
    soft = torch.rand(9, 4).softmax(1)
    torch.testing.assert_close(ImbalancedCrossEntropy()(LOGITS, soft), SoftTargetCrossEntropy()(LOGITS, soft))
    smooth = LabelSmoothingCrossEntropy(0.1)(LOGITS, LABELS)
    torch.testing.assert_close(ImbalancedCrossEntropy(0.1)(LOGITS, LABELS), smooth)


def test_weights_count_as_in_cross_entropy_and_have_mean_one():
    counts = [40, 20, 10, 5]
    weights = weights_of("balanced", counts, list("abcd"))
    assert weights is not None
    assert float((weights * torch.tensor(counts)).sum()) == pytest.approx(sum(counts))
    assert weights.tolist() == pytest.approx([75 / 160, 75 / 80, 75 / 40, 75 / 20])
    expected = (F.cross_entropy(LOGITS, LABELS, reduction="none") * weights[LABELS]).mean()
    torch.testing.assert_close(ImbalancedCrossEntropy(weights=weights)(LOGITS, LABELS), expected)
    roots = weights_of("sqrt", counts, list("abcd"))
    assert roots is not None
    assert float(roots[3] / roots[0]) == pytest.approx(8**0.5)
    named = weights_of({"b": 3}, counts, list("abcd"))
    assert named is not None
    assert float(named[1] / named[0]) == pytest.approx(3)
    assert weights_of("none", counts, list("abcd")) is None
    assert torch.isfinite(weights_of("balanced", [3, 0], ["a", "b"])).all()  # pyright: ignore


def test_focal_loss_is_that_of_torchvision_for_two_classes():
    logit = torch.randn(20)
    truth = (torch.rand(20) < 0.5).long()
    expected = sigmoid_focal_loss(logit, truth.float(), alpha=-1, gamma=2, reduction="mean")
    two = torch.stack([torch.zeros(20), logit], 1)
    torch.testing.assert_close(ImbalancedCrossEntropy(gamma=2)(two, truth), expected)


def test_adjusted_logits_learn_what_plain_ones_would_of_equal_classes():
    prior = torch.tensor([0.9, 0.1]).log()
    loss = ImbalancedCrossEntropy(prior=prior)(torch.zeros(1, 2), torch.tensor([1]))
    assert float(loss) == pytest.approx(-np.log(0.1))  # a network that says "even" is told that 1 is rare


@pytest.mark.parametrize("weights", [{"dog": 2}, {"a": 0}, {"a": "x"}, {"a": True}])
def test_weights_that_cannot_be_meant_are_refused(weights):
    with pytest.raises(UserError, match="class_weights: "):
        weights_of(weights, [1, 1], ["a", "b"])


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(0, 3), st.sampled_from([1, 2, 3]))
def test_a_balanced_epoch_has_all_classes_alike_whatever_the_processes(counts, epoch, world):
    strata = np.repeat(np.arange(len(counts)), counts)
    orders = []
    for rank in range(world):
        sampler = EpochSampler(len(strata), training=True, seed=5, rank=rank, world_size=world, strata=strata)
        sampler.set_epoch(epoch)
        orders.append(sampler.mine())
    assert len({len(order) for order in orders}) == 1  # each process has its exact share
    whole = EpochSampler(len(strata), training=True, seed=5, strata=strata)
    whole.set_epoch(epoch)
    common = whole.mine()
    together = np.stack(orders, 1).reshape(-1)
    assert np.array_equal(together, common[: len(together)])
    drawn = np.bincount(strata[common], minlength=len(counts))
    assert drawn.sum() == len(strata)
    assert drawn.max() - drawn.min() <= 1
    for label in range(len(counts)):  # of each class its images take turns
        times = np.bincount(common, minlength=len(strata))[strata == label]
        assert times.max() - times.min() <= 1
    whole.fast_forward(epoch, 2)
    assert [sample.i for sample in whole] == common[2:].tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_an_image_that_a_balanced_epoch_repeats_is_augmented_in_another_way_each_time(make_class_folder, world):
    folder = make_class_folder(classes=2, per_class=12)
    for path in sorted((folder / "class_1").iterdir())[1:]:
        path.unlink()
    images = open_splits(str(folder), val_fraction=0.2).train.with_transform(train_transform(16, pad=4))
    rare = int(np.flatnonzero(images.labels == 1)[0])
    for cached in (False, True):
        assert not cached or images.fill_cache()
        seen = []
        for rank in range(world):
            loader = make_loader(images, 2, training=True, rank=rank, world_size=world, strata=images.labels)
            samples = [sample for sample in loader.order if sample.i == rare]
            seen += [image.numpy().tobytes() for image, _ in images.__getitems__(samples)]
        assert len(seen) >= 4
        assert len({*seen}) >= len(seen) - 1  # two may be shifted alike
    again = make_loader(images, 2, training=True, strata=images.labels)
    whole = list(again.order)
    again.fast_forward(0, 2)  # a run that goes on draws the same
    assert list(again.order) == whole[4:]
    assert images[rare][0].equal(images[Sample(rare, 0)][0])  # the first time is as without repeats


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_figures_are_scikit_learns(pairs):
    truth, predicted = map(list, zip(*pairs, strict=True))
    confusion = metrics.confusion_matrix(truth, predicted, labels=range(4))
    found = macro_figures(confusion)
    options: dict[str, Any] = dict(average="macro", zero_division=0)
    recalls = [np.mean([p == t for t, p in pairs if t == label]) for label in sorted(set(truth))]
    assert found["balanced_accuracy"] == pytest.approx(100 * np.mean(recalls))
    assert found["macro_f1"] == pytest.approx(100 * metrics.f1_score(truth, predicted, **options))
    assert found["macro_precision"] == pytest.approx(100 * metrics.precision_score(truth, predicted, **options))
    by_class = class_figures(confusion, list("abcd"))
    assert all((by_class["class_recall"][name] is None) == (i not in truth) for i, name in enumerate("abcd"))


def test_rare_classes_are_told_with_what_to_do():
    labels = {"train": np.repeat([0, 1, 2], [100, 10, 0]), "val": np.array([0, 1])}
    assert remarks_on_classes(labels, ["a", "b", "c"]) == [
        "the train split has no images of 'c'",
        "the val split has no images of 'c'",
        "a has 100 training images, b has 10: --logit_adjustment 1 finds rare classes, and --eval_metric "
        "balanced_accuracy chooses the epoch by all classes alike",
    ]
    assert not remarks_on_classes({"train": np.repeat([0, 1], [99, 10])}, ["a", "b"])


def test_making_up_for_rare_classes_twice_is_told():
    def told(**settings: Any) -> list[str]:
        return remarks_on_balance(TrainSettings(classify=ClassifySettings(**settings)))

    assert told(sampler="balanced") == told(logit_adjustment=1.0, class_weights="sqrt") == []
    assert told(sampler="balanced", class_weights={"a": 2}) == []
    (line,) = told(sampler="balanced", logit_adjustment=1.0, class_weights="balanced")
    assert "with logit_adjustment 1 and class_weights balanced rare ones are made up for twice" in line


def test_a_run_with_all_of_it(make_class_folder, class_image, tmp_path, capsys):
    folder = make_class_folder(classes=2, per_class=3)
    for i in range(30):
        class_image(0, 100 + i).save(folder / "class_0" / f"more{i}.png")
    quick: dict[str, Any] = dict(model="transcnn_test", img_size=16, batch_size=8, precision="32", accelerator="cpu")
    rare = ClassifySettings("focal", 1.0, {"class_1": 4}, 1.0, "balanced")
    settings: dict[str, Any] = dict(**quick, epochs=1, classify=rare, num_workers=0, eval_metric="macro_f1", lr=1e-3)
    result = train(str(folder), **settings, out=str(tmp_path / "run"))
    assert "class_0 has 30 training images, class_1 has 2: --logit_adjustment 1" in capsys.readouterr().err
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert measured["chosen_by"] == "val_macro_f1"
    names = {"balanced_accuracy", "macro_f1", "macro_precision", "auroc", "class_precision", "class_f1", "confusion"}
    assert names <= set(measured)
    assert np.sum(measured["confusion"]) == measured["images"] == result.metrics["images"]
    evaluate(str(tmp_path / "run"))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("balanced accuracy", "macro F1", "macro precision", "AUROC", "precision"))
    header = "macro F1"
    assert header in (tmp_path / "run" / "report" / "index.html").read_text()
    with pytest.raises(UserError, match="no class is named 'dog'"):
        train(str(folder), **quick, classify=ClassifySettings(class_weights={"dog": 2}), quiet=True)


def test_auroc_is_that_of_scikit_learn():
    task = Classify(torch.nn.Identity(), list("abcd"), {})
    task.evaluate_batch((LOGITS[:5], LABELS[:5]), 0)
    task.evaluate_batch((LOGITS[5:], LABELS[5:]), 1)
    expected = metrics.roc_auc_score(LABELS, LOGITS.softmax(1), multi_class="ovr", average="macro")
    assert task._auroc(torch.bincount(LABELS, minlength=4)) == pytest.approx(expected)


def test_a_class_without_images_leaves_the_auroc_alone():
    task = Classify(torch.nn.Identity(), list("abc"), {})
    logits = torch.tensor([[2.0, 1, 0], [1, 2, 0], [3, 1, 0], [0, 2, 1]])
    task.evaluate_batch((logits, torch.tensor([0, 1, 0, 1])), 0)  # a and b are told apart without a fault
    assert task._auroc(torch.tensor([2, 2, 0])) == 1.0
    assert np.isnan(task._auroc(torch.tensor([4, 0, 0])))
