"""Networks as folders that others load: timm, transformers, the Hugging Face hub, and a card that says what is inside.

A folder is timm's: ``config.json`` and ``model.safetensors``, and ``README.md`` for the card. After ``import transcnn``
(timm has no other way to learn of our names) all of these give the same logits::

    timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers.AutoModelForImageClassification.from_pretrained("FOLDER")
    transcnn.from_pretrained("FOLDER")

A plugged CNN has its H-MHSA in ``config.json`` as well, which only :func:`from_pretrained` understands.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from ..data.bands import MOST_OF_PILLOW, is_per_channel
from ..errors import UserError, first_line
from ..plugging.cost import count
from ..plugging.plug import plug_spec
from ..text import json_text, markdown, printable
from .arguments import DENSE, PRIVATE
from .files import atomic_write
from .folders import CONFIG, WEIGHTS
from .loading import Loaded, data_config_of, load

__all__ = ["model_card", "push_to_hub", "save_pretrained"]

CARD = "README.md"
# Of a data set of ours what the hub calls it (None: nothing), and how it is written; folders stay folders.
DATA_SETS: dict[str, tuple[str | None, str]] = {
    "cifar10": ("uoft-cs/cifar10", "CIFAR-10"),
    "cifar100": ("uoft-cs/cifar100", "CIFAR-100"),
    "tiny_imagenet": (None, "Tiny ImageNet"),
}


def save_pretrained(
    source: nn.Module | Loaded | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    licence: str | None = None,
) -> Path:
    """Write a classifier as a folder that timm, transformers and :func:`transcnn.from_pretrained` load.

    Args:
        source: A network, which stays as it is, or anything that :func:`transcnn.checkpoints.loading.load` takes: a run
            directory, a checkpoint, a name. From a run directory the card takes its data, recipe and scores.
        folder: Made if need be; files of these names in it are replaced, all of them or none. Weights are float32.
        class_names: For a network: the names of its outputs in order; else those stored with it.
        data_config: For a network: how its images are made (timm's words); else that of its pretrained_cfg.
        licence: Of the weights, for the card, as the hub writes it (``apache-2.0``); without it the card names none.

    Raises:
        UserError: No such checkpoint, another task than classification, names that aren't as many as the outputs, a
            network that timm didn't make, or a folder that can't be written.
    """
    loaded = _as_loaded(source, class_names, data_config)
    loaded = replace(loaded, model=_to_share(loaded.model, licence))
    spec, ends = plug_spec(loaded.model), loaded.preprocessing.get("pixel_range")
    card = str(model_card(loaded, licence=licence))
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            save_for_hf(
                loaded.model,
                temporary,
                safe_serialization=True,
                model_config={
                    "label_names": loaded.class_names,
                    **({"plug": spec} if spec else {}),
                    **_task_of(loaded),
                    # timm knows nothing of it, and would leave it out.
                    **({"pretrained_cfg": {"pixel_range": ends}} if ends else {}),
                },
                data_config={key: value for key, value in loaded.preprocessing.items() if key != "test_input_size"},
            )
            _mend_config(Path(temporary, CONFIG))
            Path(temporary, CARD).write_text(card, encoding="utf-8")
            for name in (WEIGHTS, CONFIG, CARD):
                path = Path(temporary, name)
                atomic_write(folder / name, partial(os.replace, path))  # which needs no room on the disk any more
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write to {folder}: {getattr(error, 'strerror', None) or error}") from error
    return folder


def _task_of(loaded: Loaded) -> dict[str, Any]:
    """Of another task than classification, which one, and what makes answers of outputs."""
    if loaded.task == "classify":
        return {}
    args = loaded.info.get("task_args") or {}
    return {"task": loaded.task, "task_args": {key: value for key, value in args.items() if key not in PRIVATE}}


def _to_share(model: nn.Module, licence: str | None) -> nn.Module:
    """A copy for evaluation, of float32 on the CPU, that says nothing about weights that these were trained from."""
    model = copy.deepcopy(model).cpu().float()
    model.eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()  # safetensors takes no other; channels_last training leaves others
    cfg: Any = model.pretrained_cfg
    own = {key: value for key, value in cfg.items() if key not in ("license", "description", "notes", "tag")}
    model.pretrained_cfg = {**own, "license": licence} if licence else own  # pyright: ignore
    return model


def push_to_hub(
    source: nn.Module | Loaded | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Add the model",
    **kwargs: Any,
) -> str:
    """:func:`save_pretrained` into a repository on the Hugging Face hub; returns its address.

    The repository is made if there is none. A card that is there already is kept.

    Args:
        source: As for :func:`save_pretrained`.
        repo_id: ``user/name``.
        private: Whether a new repository is.
        token: Of the hub; without it the one that ``hf auth login`` stored.
        commit_message: Of the upload.
        kwargs: As for :func:`save_pretrained`.

    Raises:
        UserError: As :func:`save_pretrained`, or the hub refuses; the message is the hub's.
    """
    api = HfApi(token=token, library_name="transcnn")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(source, folder, **kwargs)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            kept = [CARD] if api.file_exists(repo.repo_id, CARD) else None
            api.upload_folder(
                repo_id=repo.repo_id, folder_path=folder, commit_message=commit_message, ignore_patterns=kept
            )
        except Exception as error:  # the hub's own, and those of the network and the disk on the way to it
            raise UserError(f"the hub refused {repo_id}: {' '.join(str(error).split())}") from error
    return str(repo)


def model_card(
    loaded: Loaded,
    *,
    licence: str | None = None,
    metrics: dict[str, Any] | None = None,
    packaged: str | None = None,
    notes: str = "",
) -> ModelCard:
    """A card for the hub: data, recipe, measured scores, size, and how to use it; only what is known is said.

    ``metrics`` are what ``transcnn eval`` gives; None takes those of the run whose directory the weights are in.
    ``packaged`` is timm's name of weights that come with the package. ``notes`` are Markdown: what there is to know
    about the data, and what the weights are not good for.
    """
    info, metrics = loaded.info, _metrics_of(loaded.source) if metrics is None else metrics
    name = packaged or _architecture(loaded)
    hub_data, data = DATA_SETS.get(str(info.get("data")), (None, markdown(info.get("data") or "")))
    scores = {key: metrics[key] for key in ("top1", "top5") if key in metrics}
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=hub_data or "imagefolder",
            dataset_name=printable(info.get("data")) if hub_data is None else data,
            dataset_split=printable(metrics["split"]) if "split" in metrics else None,
            metric_type="accuracy",
            metric_name={"top1": "top-1 accuracy", "top5": "top-5 accuracy"}[key],
            metric_value=round(value, 2),
        )
        for key, value in scores.items()
    ]
    header = ModelCardData(
        license=licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transcnn", "pytorch"],
        datasets=[hub_data] if hub_data else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [f"# {name}", _about(loaded, name), _size(loaded), _training(info, data), _scores(info, metrics)]
    parts += [f"## Notes\n\n{notes}" if notes else "", _classes(loaded.class_names, None if packaged else 50)]
    parts += [_usage(loaded, packaged), f"## Licence\n\n{licence}" if licence else ""]
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


# --- the folder -------------------------------------------------------------------------------------------------


def _as_loaded(
    source: nn.Module | Loaded | str | os.PathLike[str],
    class_names: Sequence[str] | None,
    data_config: dict[str, Any] | None,
) -> Loaded:
    """Any source as one thing, checked to be a classifier that timm knows how to make again."""
    if isinstance(source, nn.Module):
        cfg = getattr(source, "pretrained_cfg", None) or {}
        classes = int(getattr(source, "num_classes", 0))  # pyright: ignore
        names: list[str] = list(cfg.get("label_names") or ())
        names = names if len(names) == classes else [str(i) for i in range(classes)]
        in_chans = int(getattr(source, "in_chans", 3))
        config = data_config_of(source, in_chans)
        loaded = Loaded(source, "classify", names, config, "", {"model": cfg.get("architecture")})
    else:
        loaded = source if isinstance(source, Loaded) else load(source)
    loaded = replace(
        loaded,
        class_names=list(class_names or loaded.class_names),
        preprocessing={**loaded.preprocessing, **(data_config or {})},
    )
    if loaded.task in DENSE:
        raise UserError(f"only classifiers can be shared so, got a network for {loaded.task}")
    model = loaded.model
    if not (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        raise UserError(f"{type(model).__name__} was not made by timm.create_model, so nobody could make it again")
    channels, ends = loaded.preprocessing["input_size"][0], loaded.preprocessing.get("pixel_range")
    if channels > MOST_OF_PILLOW and not is_per_channel(ends):
        raise UserError(
            f"images of {channels} channels need data_config={{'pixel_range': [[low, high], ...]}}, for each channel "
            "what becomes 0 and 1"
        )
    if len(loaded.class_names) != model.num_classes:
        raise UserError(f"{len(loaded.class_names)} class names for {model.num_classes} outputs")
    return loaded


def _mend_config(path: Path) -> None:
    """Take ``num_classes`` out of ``model_args``: transformers fails there, and timm reads the one outside of it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    text = json_text(config, indent=2) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# --- the card ---------------------------------------------------------------------------------------------------


def _architecture(loaded: Loaded) -> str:
    return str(loaded.info.get("model") or loaded.model.pretrained_cfg["architecture"])  # pyright: ignore


def _metrics_of(source: str) -> dict[str, Any]:
    """The scores of a run's best weights, if ``source`` is a file of a run's directory; none elsewhere."""
    run = Path(source).parent
    path = run / "metrics.json"
    if Path(source).name != "best.safetensors" or not (run / "config.yaml").is_file() or not path.is_file():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"top1": int | float, "top5": int | float, "images": int, "split": str}
        known = metrics if isinstance(metrics, dict) else {}
        return {name: known[name] for name, kind in kinds.items() if isinstance(known.get(name), kind)}
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"can't read {path}: {first_line(error)}") from error


def _about(loaded: Loaded, name: str) -> str:
    count = len(loaded.class_names)
    kind = {
        "multilabel": f"a network that says which of {count} labels an image has",
        "regress": f"a network that estimates {', '.join(map(markdown, loaded.class_names[:20]))} of an image",
    }.get(loaded.task, f"an image classifier for {count} classes")
    text = f"`{name}`, {kind}, made with the Python package `transcnn`"
    spec = plug_spec(loaded.model)
    if spec:
        places = ", ".join(f"`{line['at']}`" for line in spec)
        return f"{text}: H-MHSA (arXiv 2106.03180) plugged in after {places}."
    return f"{text}: hierarchical multi-head self-attention (H-MHSA, arXiv 2106.03180) in a convolutional network."


def _size(loaded: Loaded) -> str:
    """Parameters and multiply-adds, counted now."""
    channels, height, width = loaded.preprocessing["input_size"]
    dtype = next(loaded.model.parameters()).dtype
    counts = count(loaded.model, torch.empty(1, channels, height, width, device="meta", dtype=dtype))
    return (
        f"- parameters: {counts.params:,}\n"
        f"- multiply-adds: {counts.macs / 1e6:,.1f} M for one image of {height}x{width}\n"
        f"- input: {channels} channels, trained at {height}x{width}; any other size works"
    )


def _training(info: dict[str, Any], data: str | None) -> str:
    """The data and the recipe, from what training stored beside the weights."""
    settings = info.get("settings")
    if not settings:
        return ""
    groups = (settings.get(name) for name in ("optim", "augment"))
    optim, augment = (group if isinstance(group, dict) else {} for group in groups)
    idle = {"scale", "ratio"} if augment.get("policy") == "small" else set()  # what others don't switch on
    idle |= set() if augment.get("reprob") else {"remode"}
    idle |= set() if augment.get("mixup") or augment.get("cutmix") else {"mix_prob"}
    rows = {
        "data": data,
        "epochs": markdown(settings.get("epochs", "")),
        "weights kept": f"those of epoch {info['epoch']}" if "epoch" in info else None,
        "batch size": markdown(settings.get("batch_size", "")),
        "learning rate": markdown(settings.get("lr", "")),
        "optimizer": ", ".join(f"{key} {markdown(value)}" for key, value in optim.items() if value is not None),
        "augmentation": ", ".join(
            f"{key} {markdown(value)}" for key, value in augment.items() if value and key not in idle
        ),
        "started from": markdown(_start(settings)),
        "seed": markdown(settings.get("seed", "")),
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value not in (None, "")]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines])


def _start(settings: dict[str, Any]) -> str:
    if settings.get("init_from"):
        return Path(str(settings["init_from"])).name
    return "published weights" if settings.get("pretrained") else "scratch"


def _scores(info: dict[str, Any], metrics: dict[str, Any]) -> str:
    if "top1" in metrics:
        figures = [f"top-1 {metrics['top1']:.2f} %"]
        figures += [f"top-5 {metrics['top5']:.2f} %"] if "top5" in metrics else []
        where = f"on {metrics['images']:,} images" if "images" in metrics else ""
        split = f"({markdown(metrics['split'])} split)" if "split" in metrics else ""
        return f"## Measured\n\n{', '.join(figures)} {where} {split}".rstrip()
    if "val_top1" in info:
        return f"## Measured\n\ntop-1 {info['val_top1']:.2f} % on the validation images that chose these weights"
    return ""


def _classes(names: Sequence[str], shown: int | None) -> str:
    """The names, at most ``shown`` of them where a configuration beside the card holds the rest."""
    rest = "" if shown is None or len(names) <= shown else f", and {len(names) - shown} more in `config.json`"
    return f"## Classes\n\n{', '.join(map(markdown, names[:shown]))}{rest}"


def _usage(loaded: Loaded, packaged: str | None) -> str:
    lines = ["import transcnn  # registers this package's networks in timm", ""]
    command = f"transcnn predict {packaged or 'FOLDER'} photo.jpg"
    if packaged:
        lines += ["import timm", "", f'model = timm.create_model("{packaged}", pretrained=True).eval()']
    elif plug_spec(loaded.model) or loaded.task != "classify":
        lines += ['model = transcnn.from_pretrained("THIS REPOSITORY OR FOLDER")']
    else:
        lines += [
            "import timm",
            "from transformers import pipeline",
            "",
            'model = timm.create_model("hf-hub:THIS REPOSITORY", pretrained=True).eval()',
            'classify = pipeline("image-classification", model="THIS REPOSITORY")',
        ]
    body = "\n".join(lines)
    return f"## How to use it\n\n```python\n{body}\n```\n\nOr: `{command}`."
