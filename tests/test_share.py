"""Folders that timm, transformers and we ourselves load with equal answers; cards; the hub, without the hub."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

from transcnn import from_pretrained
from transcnn import weights as own
from transcnn.checkpoints import hub
from transcnn.checkpoints.hub import model_card, push_to_hub, save_pretrained
from transcnn.checkpoints.loading import load, save_weights
from transcnn.commands import pack_weights
from transcnn.commands.evaluate import evaluate
from transcnn.commands.pack_weights import pack
from transcnn.commands.predict import predict
from transcnn.errors import UserError
from transcnn.plugging.build import build_model
from transcnn.plugging.plug import plug
from transcnn.settings import TrainSettings
from transcnn.training.building import published_start
from transcnn.variants import default_cfgs
from transcnn.weights import NOTES, PACKAGED
from transcnn.weights.labels import CIFAR10, TINY_IMAGENET

NAMES = ["rising", "steep", "falling"]
CONFIG = dict(
    input_size=[3, 32, 32],
    mean=[0.5, 0.4, 0.3],
    std=[0.2, 0.25, 0.3],
    interpolation="bilinear",
    crop_pct=1.0,
    crop_mode="center",
)
IMAGES = torch.linspace(-2, 2, 2 * 3 * 45 * 33).sin().view(2, 3, 45, 33)


def lively(model: nn.Module) -> nn.Module:
    """Random weights large enough that answers differ from image to image, small enough that rounding stays so."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    return model.eval()


def logits(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.inference_mode():
        answer = model(images)
    return getattr(answer, "logits", answer)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run's directory, as far as sharing needs it."""
    folder = tmp_path_factory.mktemp("run")
    model = lively(build_model("transcnn_test", num_classes=3, act_layer="relu"))
    info = {
        "model": "transcnn_test",
        "model_args": {"act_layer": "relu"},
        "class_names": NAMES,
        "data_config": CONFIG,
        "task": "classify",
        "data": "cifar10",
        "epoch": 11,
        "val_top1": 77.7,
        "settings": {
            "epochs": 12,
            "batch_size": 64,
            "lr": 0.01,
            "seed": 0,
            "optim": {"opt": "muon", "clip_grad": None},
        },
    }
    save_weights(folder / "best.safetensors", model, info)
    (folder / "config.yaml").write_text("data: cifar10\n")
    (folder / "metrics.json").write_text(json.dumps({"top1": 81.23456, "top5": 99.0, "images": 10000, "split": "test"}))
    return folder


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    return save_pretrained(run, tmp_path_factory.mktemp("shared") / "folder", licence="apache-2.0")


def test_timm_transformers_and_we_answer_the_same(folder, run):
    transformers = pytest.importorskip("transformers")
    wanted = logits(load(run).model)
    assert (wanted[0] - wanted[1]).abs().max() > 0.05
    for model in (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        from_pretrained(folder),
        load(folder).model,
        transformers.AutoModelForImageClassification.from_pretrained(folder).eval(),
    ):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)


def test_transformers_pipeline_names_what_predict_names(folder, run, class_image, tmp_path):
    transformers = pytest.importorskip("transformers")
    class_image(1, 5, 32).save(tmp_path / "image.png")
    classify = transformers.pipeline("image-classification", model=str(folder), top_k=3)
    theirs = classify(str(tmp_path / "image.png"))
    ours = predict(str(run), [str(tmp_path / "image.png")], accelerator="cpu", quiet=True)[0]["top"]
    assert [row["label"] for row in theirs] == [row["label"] for row in ours]
    assert [row["score"] for row in theirs] == pytest.approx([row["score"] for row in ours], abs=1e-6)


def test_the_folder_keeps_names_and_preprocessing(folder, run):
    loaded = load(folder)
    assert loaded.class_names == NAMES
    assert {key: loaded.preprocessing[key] for key in CONFIG} == CONFIG
    assert loaded.task == "classify"
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert "num_classes" not in config["model_args"]  # transformers fails on it
    assert config["num_classes"] == 3
    assert not {"file", "url", "hf_hub_id"} & set(config["pretrained_cfg"])  # nothing of this machine


def test_changes_while_loading(folder):
    assert logits(from_pretrained(folder, num_classes=5)).shape == (2, 5)
    features = from_pretrained(folder, features_only=True)(IMAGES)
    assert [tuple(f.shape[1:]) for f in features] == [(8, 12, 9), (16, 6, 5), (16, 3, 3), (32, 2, 2)]


def test_a_network_in_memory_with_one_channel(tmp_path):
    model = lively(timm.create_model("transcnn_test", num_classes=2, in_chans=1)).to(memory_format=torch.channels_last)
    save_pretrained(model, tmp_path / "grey", class_names=["a", "b"])
    loaded = load(tmp_path / "grey")
    assert loaded.class_names == ["a", "b"]
    assert loaded.preprocessing["input_size"][0] == 1
    torch.testing.assert_close(logits(loaded.model, IMAGES[:, :1]), logits(model, IMAGES[:, :1]), rtol=0, atol=1e-5)
    assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)  # the caller's is left alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_a_network_in_memory_stays_as_it_is(tmp_path, dtype, training):
    model = lively(timm.create_model("transcnn_test", num_classes=3)).to(dtype).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cfg = dict(model.pretrained_cfg)
    save_pretrained(model, tmp_path / "shared", class_names=NAMES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert model.pretrained_cfg == cfg
    wanted = logits(model.double().eval(), IMAGES.double()).float()
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "shared")), wanted, rtol=1e-4, atol=1e-4)


def test_a_card_claims_neither_scores_nor_a_licence_that_it_does_not_know(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.json").write_text('{"top1": 99.9}')  # of anything
    (tmp_path / "config.yaml").write_text("data: cifar10\n")
    loaded = load(run)
    save_weights(tmp_path / "other.safetensors", loaded.model, {**loaded.info, "val_top1": 12.3})
    model = timm.create_model("transcnn_nano", num_classes=3)  # its published weights have a licence
    for source in (model, "other.safetensors", loaded.model, "./other.safetensors"):
        folder = save_pretrained(source, tmp_path / "shared", class_names=NAMES)
        card = ModelCard.load(folder / "README.md")
        assert "99.9" not in card.text
        assert card.data.license is None
        assert "icence" not in card.text
        config = json.loads((folder / "config.json").read_text())
        assert "license" not in config["pretrained_cfg"]
    assert "apache-2.0" in str(ModelCard.load(save_pretrained(model, "x", licence="apache-2.0") / "README.md"))
    (tmp_path / "metrics.json").write_text('{"top1": "x", "top5": [1], "images": null, "split": "[a](http://b)<b>"}')
    save_weights(tmp_path / "best.safetensors", loaded.model, loaded.info)
    assert "http://b" not in ModelCard.load(save_pretrained(tmp_path, tmp_path / "y") / "README.md").text
    (tmp_path / "metrics.json").write_text("{")
    save_weights(tmp_path / "best.safetensors", loaded.model, loaded.info)
    with pytest.raises(UserError, match=r"can't read .*metrics.json: "):
        save_pretrained(tmp_path, tmp_path / "y")


def test_a_folder_is_replaced_whole_or_not_at_all(run, tmp_path, monkeypatch):
    folder = save_pretrained(run, tmp_path / "shared")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="class names for 3 outputs"):
        save_pretrained(run, folder, class_names=["a"])

    def full(*args, **kwargs):
        Path(args[1], "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "save_for_hf", full)
    with pytest.raises(UserError, match=r"can't write to .*shared: No space left on device"):
        save_pretrained(run, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_names_in_a_card_are_text_alone(tmp_path):
    names = ["<img src=x onerror=alert(1)>", "[a](http://b)", "a|b\n\n# c"]
    model = timm.create_model("transcnn_test", num_classes=3)
    text = (save_pretrained(model, tmp_path / "shared", class_names=names) / "README.md").read_text()
    for bad in ("<img", "](http", "\n# c"):
        assert bad not in text
    assert load(tmp_path / "shared").class_names == names


def test_the_public_names():
    import transcnn

    for name in ("from_pretrained", "save_pretrained", "push_to_hub"):
        assert callable(getattr(transcnn, name))
        assert name in transcnn.__all__


def test_a_plugged_cnn_comes_back_plugged(tmp_path):
    model = lively(timm.create_model("test_resnet", num_classes=3))
    plug(model, at="layer2,layer3", example=torch.zeros(1, 3, 48, 48))
    nn.init.constant_(model.layer2.get_submodule("hmhsa").scale, 0.5)
    save_pretrained(model, tmp_path / "plugged", class_names=NAMES)
    wanted = logits(model)
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "plugged")), wanted, rtol=0, atol=0)
    card = (tmp_path / "plugged" / "README.md").read_text()
    assert "plugged in after `layer2`, `layer3`" in card
    assert "hf-hub" not in card  # timm can't make it


def test_the_card_says_what_was_measured(folder, run):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "timm"
    assert card.data.datasets == ["uoft-cs/cifar10"]
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {"top-1 accuracy": 81.23, "top-5 accuracy": 99.0}
    parameters = sum(p.numel() for p in load(run).model.parameters())
    for text in (f"{parameters:,}", "multiply-adds", "32x32", "CIFAR-10", "opt muon", "top-1 81.23 %", "10,000 images"):
        assert text in card.text, text
    assert "clip_grad" not in card.text
    for name in NAMES:
        assert name in card.text


def test_a_card_without_a_run_claims_nothing():
    loaded = hub._as_loaded(lively(timm.create_model("transcnn_test", num_classes=3)), None, None)
    card = model_card(loaded)
    assert card.data.eval_results is None
    assert "Measured" not in card.text
    assert "Training" not in card.text


class Hub:
    """What push_to_hub asks of huggingface_hub.HfApi, kept instead of sent."""

    def __init__(self, has_card: bool) -> None:
        self.has_card = has_card
        self.calls: list[tuple] = []

    def __call__(self, token, library_name):
        self.calls.append(("api", token, library_name))
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def file_exists(self, repo_id, name):
        assert (repo_id, name) == ("me/stripes", "README.md")
        return self.has_card

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        files = sorted(file.name for file in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, files, ignore_patterns))
        torch.testing.assert_close(logits(from_pretrained(folder_path)), self.wanted, rtol=0, atol=0)


@pytest.mark.parametrize("has_card", [False, True])
def test_push_to_hub_sends_the_folder(monkeypatch, run, has_card):
    api = Hub(has_card)
    api.wanted = logits(load(run).model)
    monkeypatch.setattr(hub, "HfApi", api)
    push_to_hub(run, "stripes", private=True, token="secret")
    files = ["README.md", "config.json", "model.safetensors"]
    assert api.calls == [
        ("api", "secret", "transcnn"),
        ("create", "stripes", True, True),
        ("upload", "me/stripes", files, ["README.md"] if has_card else None),
    ]


def test_push_to_hub_passes_the_hubs_refusal_on(monkeypatch, run):
    from huggingface_hub.errors import HFValidationError

    def refuse(*args, **kwargs):
        raise HFValidationError("Repo id must be in the form 'namespace/repo_name'")

    api = Hub(False)
    monkeypatch.setattr(api, "create_repo", refuse)
    monkeypatch.setattr(hub, "HfApi", api)
    with pytest.raises(UserError, match=r"the hub refused a/b/c: Repo id must be in the form"):
        push_to_hub(run, "a/b/c")


@pytest.mark.parametrize(
    "error", [httpx.ReadError("cut off"), OSError(28, "No space left on device"), httpx.ConnectTimeout("")]
)
def test_a_hub_that_is_cut_off_is_one_line(monkeypatch, run, error):
    def cut(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", cut)
    with pytest.raises(UserError, match=r"a/b is no folder, and the hub doesn't give it: .+"):
        from_pretrained("a/b")
    api = Hub(False)
    monkeypatch.setattr(api, "create_repo", cut)
    monkeypatch.setattr(hub, "HfApi", api)
    with pytest.raises(UserError, match="the hub refused a/b: "):
        push_to_hub(run, "a/b")


def test_a_disk_that_is_full_leaves_the_folder_as_it_was(monkeypatch, run, tmp_path):
    """Weights are written once, beside their place; from then on nothing more is written, but put in place."""
    folder = save_pretrained(run, tmp_path / "x")
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("copyfile", "copyfileobj", "copy"):
        monkeypatch.setattr(f"shutil.{name}", full)
    save_pretrained(run, folder)
    assert not {path.stat().st_ino for path in folder.iterdir()} & {*before.values()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        after = {path.name: path.stat().st_ino for path in folder.iterdir()}
        with pytest.raises(UserError, match="No space left"):
            save_pretrained(run, folder)
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == after


def test_clear_errors(run, tmp_path):
    with pytest.raises(UserError, match="2 class names for 3 outputs"):
        save_pretrained(run, tmp_path / "x", class_names=["a", "b"])
    with pytest.raises(UserError, match=r"Linear was not made by timm.create_model"):
        save_pretrained(nn.Linear(3, 3), tmp_path / "x")
    with pytest.raises(UserError, match=r"holds no config.json"):
        from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"nobody/nothing is no folder, and the hub doesn't give it"):
        from_pretrained("nobody/nothing")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="doesn't name a network of timm"):
        load(tmp_path)


def test_transformers_segmenter_on_our_features():
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(
        backbone="transcnn_test", use_pretrained_backbone=False, out_indices=[0, 1, 2, 3]
    )
    backbone = transformers.TimmBackbone(config).eval()
    theirs = timm.create_model("transcnn_test", features_only=True).eval()
    theirs.load_state_dict(backbone._backbone.state_dict())
    with torch.inference_mode():
        for ours, wanted in zip(backbone(IMAGES).feature_maps, theirs(IMAGES), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    segmenter = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=config, hidden_size=16, num_labels=4, use_auxiliary_head=False, pool_scales=[1, 2]
        )
    )
    answer = segmenter(pixel_values=torch.randn(2, 3, 64, 96), labels=torch.randint(0, 4, (2, 64, 96)))
    assert answer.logits.shape == (2, 4, 64, 96)
    answer.loss.backward()
    assert segmenter.backbone._backbone.stem_0.weight.grad.abs().sum() > 0


def test_transformers_detr_on_our_features():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(
        backbone="transcnn_test", use_pretrained_backbone=False, out_indices=[0, 1, 2, 3]
    )
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_labels=3)
    config = transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, **sizes, **heads
    )
    detector = transformers.DetrForObjectDetection(config)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    answer = detector(pixel_values=torch.randn(2, 3, 64, 96), labels=labels)
    assert answer.logits.shape == (2, 5, 4)
    assert answer.pred_boxes.shape == (2, 5, 4)
    answer.loss.backward()
    stem = dict(detector.named_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for name, p in stem.items() if "stem" in name)


def test_pack_halves_the_weights_and_says_what_it_costs(run, make_class_folder, tmp_path, capsys):
    data = make_class_folder(classes=3, per_class=10, splits=("train", "test"))
    for part in ("train", "test"):
        for i, name in enumerate(NAMES):
            (data / part / f"class_{i}").rename(data / part / name)
    file = pack(str(run), str(data), name="transcnn_test.stripes", folder=str(tmp_path))
    assert file == tmp_path / "transcnn_test.stripes.safetensors"
    assert file.stat().st_size < 0.75 * (run / "best.safetensors").stat().st_size
    assert sorted(path.name for path in tmp_path.glob("transcnn*")) == [
        "transcnn_test.stripes.md",
        "transcnn_test.stripes.safetensors",
    ]
    wanted, found = logits(load(run).model), logits(load(file).model)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    top1 = evaluate(str(file), str(data), split="test", quiet=True)["top1"]
    assert f"{top1} % as 16-bit floats" in capsys.readouterr().out
    assert f"top-1 {top1:.2f} %" in file.with_suffix(".md").read_text()
    assert "out" not in load(file).info["settings"]
    assert "## Notes" not in file.with_suffix(".md").read_text()


def test_packed_weights_go_to_the_packages_own_and_their_card_says_what_to_know(
    run, make_class_folder, tmp_path, monkeypatch
):
    assert (pack_weights.WEIGHTS / "__init__.py").samefile(own.__file__ or "")
    data = make_class_folder(classes=3, per_class=10, splits=("train", "test"))
    scores = [{"top1": 52.5, "top5": 77.0, "split": "test", "images": 30}] * 2
    monkeypatch.setattr("transcnn.commands.pack_weights.evaluate", lambda *_, **__: scores.pop())
    monkeypatch.setattr("transcnn.commands.pack_weights.WEIGHTS", tmp_path)
    card = pack(str(run), str(data), name="transcnn_micro.tiny_imagenet").with_suffix(".md").read_text()
    assert (tmp_path / "transcnn_micro.tiny_imagenet.safetensors").is_file()
    assert "non-commercial research" in card
    assert "Not good for" in card


def test_a_packaged_card_names_every_class(run):
    loaded = replace(load(run), class_names=[f"kind {i}" for i in range(60)])
    loaded.info["data"] = "tiny_imagenet"
    card = str(model_card(loaded, packaged="transcnn_micro.tiny_imagenet", metrics={"top1": 50.0}))
    assert "kind 59" in card
    assert "| data | Tiny ImageNet |" in card
    assert "and 10 more in `config.json`" in str(model_card(loaded))


def test_pack_refuses_what_has_become_worse(run, make_class_folder, tmp_path, monkeypatch):
    scores = iter([{"top1": 90.0}, {"top1": 89.9}])
    monkeypatch.setattr("transcnn.commands.pack_weights.evaluate", lambda *_, **__: next(scores))
    with pytest.raises(UserError, match=r"16-bit weights are at 89.9 % instead of 90.0 %: not packed"):
        pack(str(run), "cifar10", folder=str(tmp_path))
    assert not any(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_the_packages_own_weights(class_image, tmp_path, capsys):
    weights = Path(default_cfgs["transcnn_nano"].cfgs["cifar10"].file)
    if not weights.is_file():
        pytest.skip("these sources come without the weights; commands/pack_weights.py makes them")
    assert weights.stat().st_size <= 4_000_000
    assert NOTES["transcnn_nano.cifar10"] in weights.with_suffix(".md").read_text()
    model = timm.create_model("transcnn_nano", pretrained=True).eval()
    assert model.pretrained_cfg["tag"] == "cifar10"
    assert (logits(model)[0] - logits(model)[1]).abs().max() > 0.1
    photo = tmp_path / "photo.jpg"
    class_image(0, 0, (90, 60)).save(photo)
    top = predict(str(photo), accelerator="cpu")[0]["top"]
    assert {row["label"] for row in top} < set(CIFAR10)
    told = capsys.readouterr().err  # which ten classes it knows
    assert all(name in told for name in CIFAR10)
    assert top == predict(PACKAGED, [str(photo)], accelerator="cpu", quiet=True)[0]["top"]
    assert np.isclose(sum(row["score"] for row in top), 1, atol=0.5)


def test_the_packages_weights_of_200_classes(class_image, tmp_path):
    weights = Path(default_cfgs["transcnn_micro"].cfgs["tiny_imagenet"].file)
    if not weights.is_file():
        pytest.skip("these sources come without the weights; commands/pack_weights.py makes them")
    assert weights.stat().st_size <= 9_000_000
    assert NOTES["transcnn_micro.tiny_imagenet"] in weights.with_suffix(".md").read_text()
    assert len(set(TINY_IMAGENET)) == 200
    assert load(weights).class_names == list(TINY_IMAGENET)
    model = timm.create_model("transcnn_micro", pretrained=True).eval()
    assert (logits(model)[0] - logits(model)[1]).abs().max() > 0.1
    few = timm.create_model("transcnn_micro", pretrained=True, num_classes=3)  # a fresh head on the same features
    assert torch.equal(few.stem[0].weight, model.stem[0].weight)
    photo = tmp_path / "photo.jpg"
    class_image(0, 0, (90, 60)).save(photo)
    top = predict("transcnn_micro.tiny_imagenet", [str(photo)], accelerator="cpu", quiet=True)[0]["top"]
    assert {row["label"] for row in top} < set(TINY_IMAGENET)


def test_training_says_which_published_weights_it_starts_from():
    settings = partial(TrainSettings, data="photos", model="transcnn_micro", pretrained=True)
    assert published_start(settings(), 4) == (
        "transcnn_micro.tiny_imagenet: weights of 200 classes from the package; the head for 4 outputs starts anew"
    )
    assert published_start(settings(), 200).endswith("the head of 200 classes included")
    dense = published_start(settings(model="resnet18.a1_in1k", task="segment"), 4)
    assert dense.startswith("resnet18.a1_in1k: weights of 1000 classes from hf-hub:timm/resnet18.a1_in1k; ")
    assert dense.endswith("they are the backbone's, all else starts anew")
