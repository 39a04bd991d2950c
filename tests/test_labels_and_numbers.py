"""Labels and numbers: what cells are made into, losses that leave out what isn't known, thresholds, figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn import metrics
from timm.loss import AsymmetricLossMultiLabel

from transcnn.checkpoints.arguments import check_task_args
from transcnn.checkpoints.loading import Loaded
from transcnn.data.sources.opening import open_source
from transcnn.data.sources.targets import Classes, Labels, Numbers
from transcnn.errors import UserError
from transcnn.onnx.answers import answers
from transcnn.settings import Augment
from transcnn.tasks import collected
from transcnn.tasks.multilabel import Multilabel, best_thresholds
from transcnn.tasks.regress import Regress

NAN = math.nan
OUTPUTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
TRUTH = torch.tensor([[1, 0, NAN], [0, 0, 1], [1, 1, 1], [0, NAN, 0], [1, 0, 0], [NAN, NAN, NAN]])


@pytest.mark.parametrize(
    ("cells", "separator", "names", "labels"),
    [
        (["sea;sky", "", "sky", " sea ; "], None, ["sea", "sky"], [[1, 1], [0, 0], [0, 1], [1, 0]]),
        (["a|b", "nan", "b"], None, ["a", "b"], [[1, 1], [NAN, NAN], [0, 1]]),
        (["a, b", "New York"], None, ["New York", "a", "b"], [[0, 1, 1], [1, 0, 0]]),
        (["haze primary", "clear"], " ", ["clear", "haze", "primary"], [[0, 1, 1], [1, 0, 0]]),
        (["['sea', \"fog's\"]", '["sea"]', "[]", "nan"], None, ["fog's", "sea"], [[1, 1], [0, 1], [0, 0], [NAN, NAN]]),
        ([["x", "y"], [], None], None, ["x", "y"], [[1, 1], [0, 0], [NAN, NAN]]),
    ],
)
def test_one_column_holds_any_number_of_labels(cells, separator, names, labels):
    found, found_names, missing = Labels().of_cells({"tags": cells}, "t.csv", separator)
    assert found_names == names
    np.testing.assert_array_equal(found, np.array(labels, np.float32))
    assert missing.tolist() == [math.isnan(row[0]) for row in labels]


def test_cells_of_another_table_are_read_as_the_run_read_its_own():
    table = {"separator": " ", "target": ["tags"], "group": "patient"}
    info = {"task_args": {"table": table}, "settings": {"data": "t.csv"}}
    loaded = Loaded(torch.nn.Identity(), "multilabel", ["a"], {}, "x", info)
    assert loaded.table_of("other.csv") == {"separator": " ", "target": ["tags"]}
    assert loaded.table_of("t.csv") == table


def test_labels_that_may_be_meant_otherwise(caplog):
    for cell in ("['sea' 'sky']", "[sea, sky]", "[['sea']]", "[" * 9999 + "]"):
        with pytest.raises(UserError, match="is no list of names in quotes with commas between"):
            Labels().of_cells({"tags": ["['sea']", cell]}, "t.csv")
    assert not caplog.text
    Labels().of_cells({"tags": ["haze primary", "clear primary"]}, "t.csv")
    assert "such as 'clear primary': if spaces stand between labels, give --separator ' '" in caplog.text
    Classes().of_cells({"label": ["Cat", "cat", "dog"]}, "t.csv")
    assert "labels 'Cat', 'cat' differ only in case and are kept apart" in caplog.text


def test_columns_of_zero_and_one_are_labels_and_empty_cells_are_not_known():
    cells = {"cat": ["1", "0", "", "TRUE"], "dog": [0, 1.0, None, False]}
    labels, names, missing = Labels().of_cells(cells, "t.csv")
    assert names == ["cat", "dog"]
    np.testing.assert_array_equal(labels, np.array([[1, 0], [0, 1], [NAN, NAN], [1, 0]], np.float32))
    assert missing.tolist() == [False, False, True, False]
    with pytest.raises(UserError, match="the column 'dog' of a label must hold 0 or 1, got '2'"):
        Labels().of_cells({**cells, "dog": ["0", "2", "", ""]}, "t.csv")


def test_rows_about_one_image_add_up_their_labels():
    np.testing.assert_array_equal(Labels().merged(np.array([[1, 0, NAN], [0, 0, NAN], [NAN, 0, 1]])), [1, 0, 1])


def test_labels_become_those_of_the_model():
    targets = Labels()
    labels, names, _ = targets.of_cells({"tags": ["b;c", "nan", "c"]}, "t.csv")
    found = targets.relabelled(labels, names, ["c", "a", "b"], "t.csv")
    np.testing.assert_array_equal(found, np.array([[1, 0, 1], [NAN] * 3, [1, 0, 0]], np.float32))
    columns = Labels()
    labels, names, _ = columns.of_cells({"b": ["1", "0"]}, "t.csv")
    found = columns.relabelled(labels, names, ["a", "b"], "t.csv")  # of a nothing is known
    np.testing.assert_array_equal(found, np.array([[NAN, 1], [NAN, 0]], np.float32))
    with pytest.raises(UserError, match="labels that the model does not know: 'b'; it knows 1: 'a'"):
        columns.relabelled(labels, names, ["a"], "t.csv")


def test_numbers_are_read_as_people_write_them():
    labels, names, missing = Numbers().of_cells({"p": ["1.5", "2,25", "-3e2", ""], "q": [1, 2.0, None, NAN]}, "t.csv")
    assert names == ["p", "q"]
    np.testing.assert_array_equal(labels, np.array([[1.5, 1], [2.25, 2], [-300, NAN], [NAN, NAN]], np.float32))
    assert missing.tolist() == [False, False, False, True]
    for odd in ("high", "inf", "1 000", "2020_01"):
        with pytest.raises(UserError, match=f"the column 'p' must hold numbers, got '{odd}'"):
            Numbers().of_cells({"p": ["1", odd]}, "t.csv")
    assert Numbers().merged(np.array([[1, 2], [1, 3]])) is None
    np.testing.assert_array_equal(Numbers().merged(np.array([[1, NAN], [1, 3]])), [1, 3])
    np.testing.assert_array_equal(Numbers().merged(np.array([[1, NAN], [1, NAN]])), [1, NAN])
    with pytest.raises(UserError, match="'p' is the same number for all images"):
        Numbers().check(np.array([[2.0], [2.0], [NAN]]), ["p"], "t.csv")


def test_commas_that_may_stand_between_thousands_are_refused():
    for cells in (["1,234", "950", "12,500"], ["-2,000"]):
        with pytest.raises(UserError, match=r"which may be -?\d+\.\d+ or -?\d+; write numbers with a decimal point"):
            Numbers().of_cells({"price": cells}, "t.csv")
    assert Numbers().of_cells({"g": ["1,234", "0,5", "7"]}, "t.csv")[0].ravel().tolist() == pytest.approx(
        [1.234, 0.5, 7]
    )


def test_class_folders_are_labels_and_numbers_too(make_class_folder):
    folder = make_class_folder(classes=2, per_class=1)
    source = open_source(str(folder), None, Labels()).train
    assert source is not None
    assert source.labels.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(UserError, match="its class folders must be named as numbers, got 'class_0', 'class_1'"):
        open_source(str(folder), None, Numbers())
    (folder / "class_0").rename(folder / "nan")
    with pytest.raises(UserError, match="must be named as numbers, got 'class_1', 'nan'"):
        open_source(str(folder), None, Numbers())
    (folder / "nan").rename(folder / "class_0")
    for i, name in enumerate(("2.5", "-1")):
        (folder / f"class_{i}").rename(folder / name)
    source = open_source(str(folder), None, Numbers()).train
    assert source is not None
    assert sorted(source.labels.tolist()) == [[-1.0], [2.5]]


def multilabel(**task_args: Any) -> Multilabel:
    return Multilabel(torch.nn.Identity(), ["a", "b", "c"], {}, task_args=task_args)


def test_what_is_not_known_is_left_out_of_the_loss():
    known = ~TRUTH.isnan()
    expected = F.binary_cross_entropy_with_logits(OUTPUTS[known], TRUTH[known])
    torch.testing.assert_close(multilabel().known_mean(OUTPUTS, TRUTH), expected)
    pairs = AsymmetricLossMultiLabel(reduction="none")(OUTPUTS[known][None], TRUTH[known][None])
    torch.testing.assert_close(multilabel(loss="asl").known_mean(OUTPUTS, TRUTH), pairs.mean())
    outputs = OUTPUTS.clone().requires_grad_()
    multilabel(loss="asl").known_mean(outputs, TRUTH).backward()
    assert outputs.grad is not None
    assert torch.equal(outputs.grad != 0, known)
    assert float(multilabel().known_mean(OUTPUTS, torch.full_like(TRUTH, NAN))) == 0


def test_weights_of_labels_are_images_without_over_with():
    task = multilabel(class_weights="balanced", counts=[1, 50, 0], without=[9, 50, 100])
    assert task.pos_weight.tolist() == [9, 1, 100]  # pyright: ignore
    assert multilabel(class_weights="sqrt", counts=[1, 4], without=[9, 4]).pos_weight.tolist() == [3, 1]  # pyright: ignore


def test_labels_are_mixed_as_timm_does():
    task = Multilabel(torch.nn.Identity(), ["a", "b"], {}, augment=Augment(mixup=1.0))
    images, labels = torch.eye(4)[:, :, None, None], torch.tensor([[1.0, 0], [0, 1], [1, 1], [NAN, 0]])
    mixed, target = task.mixed(images.clone(), labels)
    share = float(mixed[1, 1])
    assert 0 < share < 1
    np.testing.assert_allclose(target[1].tolist(), [(1 - share), 1.0], rtol=1e-5)
    assert target[0].isnan().tolist() == [True, False]  # one of the two isn't known


@hypothesis_settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0, 1, None])), min_size=1, max_size=30))
def test_the_threshold_is_that_of_the_best_f1(pairs):
    scores = np.array([[score / 20] for score, _ in pairs], np.float32)
    labels = np.array([[NAN if truth is None else truth] for _, truth in pairs], np.float32)
    [found] = best_thresholds(scores, labels)
    known = ~np.isnan(labels[:, 0])
    truth, score = labels[known, 0] == 1, scores[known, 0]
    assert 0 <= found <= 1
    if not truth.any() or truth.all():
        assert found == 0.5
        return
    f1 = {t: metrics.f1_score(truth, score >= t, zero_division=0.0) for t in (found, *score)}
    assert f1[found] == pytest.approx(max(f1.values()))


def test_thresholds_may_be_as_small_as_probabilities():
    scores = np.array([[1e-9], [3e-9], [2e-9]], np.float32)
    [found] = best_thresholds(scores, np.array([[0], [1], [0]], np.float32))
    assert found == pytest.approx(2.5e-9)


def scored(task: Any, halves: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The scores of a task after these batches, out of training."""
    monkeypatch.setattr(type(task), "trainer", SimpleNamespace(testing=True), raising=False)
    for batch in halves:
        task.evaluate_batch(batch, 0)
    return task.scores()


def test_figures_of_labels_are_scikit_learns_whatever_the_processes(monkeypatch):
    task = multilabel(thresholds=[0.3, 0.5, 0.6])
    found = scored(task, [(OUTPUTS[:4], TRUTH[:4]), (OUTPUTS[4:], TRUTH[4:])], monkeypatch)
    scores, truth = OUTPUTS.sigmoid().numpy(), TRUTH.numpy()
    predicted = scores >= np.array([0.3, 0.5, 0.6])
    expected = {"map": [], "f1": []}
    for i in range(3):
        known = ~np.isnan(truth[:, i])
        expected["map"].append(metrics.average_precision_score(truth[known, i], scores[known, i]))
        expected["f1"].append(metrics.f1_score(truth[known, i], predicted[known, i], zero_division=0.0))
    assert found["map"] == pytest.approx(100 * np.mean(expected["map"]))
    assert found["macro_f1"] == pytest.approx(100 * np.mean(expected["f1"]))
    known = ~np.isnan(truth)
    assert found["micro_f1"] == pytest.approx(100 * metrics.f1_score(truth[known], predicted[known]))
    right = [(row[k] == t[k]).all() for row, t, k in zip(predicted, truth, known, strict=True) if k.any()]
    assert found["exact_match"] == pytest.approx(100 * np.mean(right))
    assert int(found["images"]) == 5  # of one nothing is known
    other = multilabel(thresholds=[0.3, 0.5, 0.6])
    other.evaluate_batch((OUTPUTS[1::2], TRUTH[1::2]), 0)
    second = [np.concatenate(column) for column in zip(*other._rows, strict=True)]
    second[0] = second[0] * 2 + 1
    monkeypatch.setattr(task, "sample_index", lambda nth: 2 * nth)
    monkeypatch.setattr(collected, "gather", lambda mine: [mine, tuple(second)])
    both = scored(task, [(OUTPUTS[::2], TRUTH[::2])], monkeypatch)
    for name in ("map", "macro_f1", "micro_f1", "exact_match", "loss"):
        assert both[name] == pytest.approx(found[name]), name
    assert [entry[0] for entry in both["worst"]] == [entry[0] for entry in found["worst"]]
    text = json.dumps(task.summary({**both, "seconds": 1.0}), allow_nan=False)
    assert "class_ap" in text


def test_figures_of_numbers_are_in_the_unit_of_the_data(monkeypatch):
    task = Regress(torch.nn.Identity(), ["price", "age"], {}, task_args={"mean": [100.0, 5.0], "std": [10.0, 2.0]})
    truth = torch.tensor([[110.0, 5], [90, NAN], [105, 9], [130, 1], [NAN, NAN]])
    outputs = torch.tensor([[1.0, 0.5], [0, 0], [0.5, 2], [2, -1], [0, 0]])
    found = scored(task, [(outputs, truth)], monkeypatch)
    said = outputs.numpy() * [10, 2] + [100, 5]
    price, age = ((truth[k, i], said[k.numpy(), i]) for i in range(2) for k in [~truth[:, i].isnan()])
    for name, function in (("mae", metrics.mean_absolute_error), ("r2", metrics.r2_score)):
        assert found[name] == pytest.approx(np.mean([function(*price), function(*age)]), rel=1e-5)
    assert found["table"][0]["of_the_mean"] == pytest.approx(np.abs(price[0].numpy() - 100).mean())
    assert found["table"][0]["spearman"] == pytest.approx(1.0, abs=1e-3)
    assert found["loss"] == pytest.approx(float((((truth - task.mean) / task.std - outputs) ** 2).nanmean()))  # pyright: ignore
    assert answers("regress", outputs.numpy(), ["price", "age"], task.task_args, 5)[0] == {
        "values": {"price": 110.0, "age": 6.0}
    }
    summary = task.summary({**found, "seconds": 1.0})
    json.dumps(summary, allow_nan=False)
    assert not task.warnings_about(found)
    same = scored(task, [(torch.zeros(5, 2), truth)], monkeypatch)
    assert task.warnings_about(same)[0] == "about the same price is predicted for all images, though they differ"


def test_a_column_without_labels_is_left_out_of_the_means(monkeypatch):
    """Else a validation split that lacks a column's numbers has no score, and no epoch is the best."""
    args = {"mean": [0.0] * 3, "std": [1.0] * 3}
    task = Regress(torch.nn.Identity(), ["known", "unknown", "once"], {}, task_args=args)
    truth = torch.tensor([[1.0, NAN, 7], [2, NAN, NAN], [4, NAN, NAN]])
    outputs = torch.tensor([[2.0, 9, 5], [3, 9, 5], [4, 9, 5]])
    found = scored(task, [(outputs, truth)], monkeypatch)
    assert found["mae"] == pytest.approx((2 / 3 + 2) / 2)
    assert found["r2"] == pytest.approx(metrics.r2_score([1, 2, 4], [2, 3, 4]))
    assert found["spearman"] == pytest.approx(1, abs=1e-4)
    same = scored(task, [(torch.ones(3, 3), truth)], monkeypatch)
    assert np.isnan(same["spearman"])  # of predictions that are all alike there is none
    none = scored(task, [(outputs, torch.full((3, 3), NAN))], monkeypatch)
    assert all(np.isnan(none[name]) for name in ("mae", "rmse", "r2", "spearman"))


def test_outputs_that_are_not_numbers_end_no_training(monkeypatch):
    """Of a run that has diverged: the loss tells, and no epoch of it is the best."""
    numbers = Regress(torch.nn.Identity(), ["x", "y"], {}, task_args={"mean": [0.0, 0], "std": [1.0, 1]})
    outputs, truth = torch.tensor([[1.0, NAN], [2, 1], [3, -math.inf]]), torch.tensor([[1.0, 0], [2, 1], [3, NAN]])
    found = scored(numbers, [(outputs, truth)], monkeypatch)
    assert np.isnan(found["mae"])
    assert found["table"][0]["mae"] == 0
    assert "the loss is nan" in numbers.warnings_about(found)[0]
    labels = multilabel()
    monkeypatch.setattr(type(labels), "trainer", SimpleNamespace(testing=False), raising=False)
    labels.evaluate_batch((torch.full((3, 3), NAN), TRUTH[:3]), 0)
    found = labels.scores()
    assert "the loss is nan" in labels.warnings_about(found)[0]
    assert all(math.isfinite(found[name]) for name in ("map", "macro_f1", "micro_f1", "exact_match"))


def test_a_constant_prediction_has_no_rank_correlation(monkeypatch):
    task = Regress(torch.nn.Identity(), ["x"], {}, task_args={"mean": [0.1], "std": [1.0]})
    found = scored(task, [(torch.zeros(3, 1), torch.tensor([[1.0], [2], [4]]))], monkeypatch)
    assert np.isnan(found["spearman"])  # though the mean of three 0.1 is not 0.1


def test_numbers_of_which_none_differ_in_the_training_split_are_told(tmp_path, class_image):
    rows = [("file", "size", "rare"), *((f"{i}.png", i, 1 if i == 4 else 0 if i == 3 else "") for i in range(10))]
    for name, *_ in rows[1:]:
        class_image(0, 0).save(tmp_path / name)
    (tmp_path / "t.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    opened: dict[str, Any] = dict(val_fraction=0.5, strict=False, in_chans=None)
    args = {"table": {"target": ["size", "rare"]}}
    told = Regress.open_data(str(tmp_path / "t.csv"), dict(args), seed=2, **opened).task_args
    assert min(told["std"]) > 0
    with pytest.raises(UserError, match="the training split: 'rare' is the same number for all images"):
        Regress.open_data(str(tmp_path / "t.csv"), dict(args), seed=0, **opened)


def test_an_outlier_pulls_huber_less():
    truth, outputs = torch.tensor([[0.0], [10.0]]), torch.zeros(2, 1)
    loss = {
        kind: float(
            Regress(torch.nn.Identity(), ["x"], {}, task_args={"mean": [0.0], "std": [1.0], "loss": kind}).known_mean(
                outputs, truth
            )
        )
        for kind in ("mse", "l1", "huber")
    }
    assert loss == {"mse": 50.0, "l1": 5.0, "huber": 4.75}


def test_labels_that_hold_are_told_the_most_probable_first():
    logits = np.array([[2.0, -1.0, 3.0], [-3, -3, -3]])
    first, second = answers("multilabel", logits, ["a", "b", "c"], {"thresholds": [0.5, 0.2, 0.99]}, 2)
    assert first["labels"] == ["a", "b"]
    assert [entry["label"] for entry in first["top"]] == ["c", "a"]
    assert second["labels"] == []


@pytest.mark.parametrize(
    ("task", "args", "message"),
    [
        ("multilabel", {"thresholds": [0.5]}, "thresholds must have one entry for each of 2 classes"),
        ("multilabel", {"thresholds": [0.5, 2]}, "thresholds must have one entry"),
        ("multilabel", {"table": {"images": "x", "run": "y"}}, "table must be names with values"),
        ("regress", {"mean": [0.0, 1.0]}, "std is missing"),
        ("regress", {"mean": [0.0, 1.0], "std": [1.0, 0.0]}, "std must have one entry"),
        ("classify", {"class_weights": "log"}, "class_weights must be none, balanced, sqrt"),
    ],
)
def test_what_a_file_says_of_its_answers_is_checked(task: str, args: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        check_task_args(task, args, 2)
