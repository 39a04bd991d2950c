"""``transcnn eval``: a trained model's scores on a data set."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.available import check_resizable
from ..checkpoints.files import make_folder
from ..checkpoints.loading import Loaded, load
from ..checkpoints.memory import check_forward
from ..data.paths import StrPath, as_text, check_data_exists, is_fetched
from ..data.sources.opening import columns_for
from ..data.sources.source import check_fraction
from ..distributed.processes import first_decides, first_here, gather_lists, launch, rank, world
from ..distributed.runtime import PRECISIONS, check_accelerator, choose_precision, quiet_libraries
from ..errors import MAX_SEED, MAX_SIDE, UserError, check_range
from ..tasks import get_task
from ..text import printable
from ..training.data_record import held_back, names_and_sizes
from ..training.evaluation import measure, say_what_is_off, write_results

__all__ = ["evaluate"]

VIEWS = {
    "window": ("segment",),
    "flip": ("classify", "segment"),
}  # how images are evaluated, by task


def evaluate(
    checkpoint: StrPath,
    data: StrPath | None = None,
    *,
    model: str | None = None,
    images: StrPath | None = None,
    target: list[str] | None = None,
    split: Literal["auto", "train", "val", "test", "all"] = "auto",
    batch_size: int = 128,
    img_size: int | None = None,
    precision: Literal["auto", "32", "bf16", "16"] | None = None,
    accelerator: str = "auto",
    optimize: bool = True,
    devices: int = 1,
    num_nodes: int = 1,
    val_fraction: float | None = None,
    seed: int | None = None,
    strict_data: bool = False,
    num_workers: int | None = None,
    window: int | None = None,
    flip: bool = False,
    out: StrPath | None = None,
    report: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a trained network on images, print the figures and write them to metrics.json.

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of this package, or the name of a published model.
        data: As for transcnn train; without it, what the network was trained on.
        model: The network that a file of weights is for which doesn't say so, such as the authors' .pth files.
        images: Of a table of files: the folder that they are relative to; without it, the table's own.
        target: Of a table: its columns of labels; without it, those that the network learnt from.
        split: The split to score on; auto is the test split, else the validation split (of data that a run was trained
            on, the images that it held back), else everything.
        batch_size: Images at a time, of all processes together, as for transcnn train.
        img_size: Another size than the network was trained at; not to segment or detect.
        precision: Arithmetic; 32 is exact, auto is bf16 where the CPU has it. Without it, what the run was scored
            with, else 32.
        accelerator: cpu, gpu, or auto.
        optimize: For more than a few images, run the network as transcnn.optimize makes it: the same scores up to
            rounding, several times as fast.
        devices: Processes on this machine, each with a device and a share of the images. Under torchrun or Slurm
            theirs count.
        num_nodes: Machines; the same command runs on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
        val_fraction: Where data has no validation split: the share that is held back; without it the run's, else 0.1.
        seed: The seed that it is held back with; without it the run's, else 0.
        strict_data: Stop at the first image that can't be read, instead of leaving it out.
        num_workers: Processes that read images; without it, threads of this one do, one for each core; 0 reads and
            computes in turn.
        window: To segment: evaluate in overlapping windows of this side, otherwise than training did.
        flip: To classify or segment: evaluate images also mirrored, and average; twice the time.
        out: Directory for metrics.json; without it the run's eval/, or none where there is no run.
        report: Also draw the report.
        quiet: Print nothing but errors.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: No such checkpoint or data, or data of other classes.
    """
    images = as_text(images)
    check_range(1, batch_size=batch_size)
    check_range(0, num_workers=num_workers)
    check_range(0, MAX_SEED, seed=seed)
    check_range(1, MAX_SIDE, img_size=img_size, window=window)
    if val_fraction is not None:
        check_fraction(val_fraction)
    folder = Path(out) if out else Path(checkpoint) / "eval" if Path(checkpoint).is_dir() else None
    if report and folder is None:
        raise UserError(f"{checkpoint} is no run, which the report could be written to: give --out FOLDER")
    check_accelerator(accelerator)
    with quiet_libraries():
        launch(accelerator, devices, num_nodes)
        each = -(-batch_size // world())  # images at a time of a process
        loaded = _network(checkpoint, model, img_size, each)
        views = _set_views(loaded, window=window, flip=flip)
        chosen = _data_of(loaded, checkpoint, data)
        _set_table(loaded, chosen, images, target)
        held = held_back(loaded, chosen, val_fraction, seed)
        part = first_here(lambda: _open(loaded, chosen, split, **held, strict=strict_data))
        if not quiet:
            _say_if_learnt(loaded, chosen, part, part.split or split)
        if folder is not None:
            first_decides(partial(make_folder, folder, "metrics.json"))
        learner, scores, part = measure(
            loaded,
            part,
            batch_size=each,
            num_workers=num_workers,
            precision=precision or _precision_of(loaded.info, accelerator),
            accelerator=accelerator,
            optimize=optimize,
            bar=not quiet,
        )
    if not int(scores["images"]):
        raise UserError(f"nothing can be scored on {chosen or 'digits'}: no image of the split has a label that counts")
    how = {name: scores[name] for name in ("precision", "device", "path")}
    where = {"split": part.split or split, "data": chosen or "digits", "checkpoint": loaded.source}
    metrics = {**learner.summary(scores), **views, **how, **where}
    broken = list(dict.fromkeys(gather_lists(part.broken)))
    if rank() > 0:
        return metrics
    if folder is not None:
        write_results(folder, learner, scores, part, metrics, broken, report=report)
    if not quiet:
        _print(learner, scores, metrics, broken, folder)
    return metrics


def _network(checkpoint: StrPath, model: str | None, img_size: int | None, images: int) -> Loaded:
    """The network, for images of its size or another, so many of which the memory has room for."""
    loaded = load(checkpoint, model)
    check_resizable(loaded, img_size)
    loaded.resize_input(img_size)
    check_forward(loaded, images, chosen=img_size is not None)
    return loaded


def _print(learner: Any, scores: Any, metrics: dict[str, Any], broken: Any, folder: Path | None) -> None:
    say_what_is_off(learner, scores, broken, folder)
    learner.print_table(metrics)
    if folder is not None:
        print(f"written: {printable(folder / 'metrics.json')}")


def _set_views(loaded: Loaded, **given: Any) -> dict[str, Any]:
    """How images are to be looked at, other than training did; the network's information says so from now on."""
    views = {name: value for name, value in given.items() if value}
    for name in views:
        if loaded.task not in VIEWS[name]:
            tasks = " and ".join(VIEWS[name])
            raise UserError(f"{name} is for {tasks} alone; {loaded.source} is for the task {loaded.task}")
    loaded.info["task_args"] = {**(loaded.info.get("task_args") or {}), **views}
    return views


def _data_of(loaded: Loaded, checkpoint: StrPath, data: StrPath | None) -> str | None:
    """The data that were given, or those that the network was trained on if they are on this machine."""
    trained = loaded.info.get("settings") or {}
    chosen: str | None = trained["data"] if data is None and "data" in trained else as_text(data)
    if data is None and chosen is not None and is_fetched(chosen):
        raise UserError(
            f"{loaded.source} names data from elsewhere, {chosen!r}; if that may be fetched, give it: "
            f"transcnn eval {checkpoint} {chosen}"
        )
    if data is None and chosen is not None:
        try:
            check_data_exists(chosen)
        except UserError as error:
            where = f"{loaded.source} learnt from {chosen!r}, which isn't here"
            raise UserError(f"{where}: give the data, transcnn eval {checkpoint} DATA") from error
    return chosen


def _say_if_learnt(loaded: Loaded, data: str | None, part: Any, split: str) -> None:
    """A line on standard error where a run learnt from the images that are scored, or seems to have."""
    if rank() > 0:
        return
    if loaded.learnt_from(data) and split in ("train", "all"):
        line = f"the run learnt from these images ({split}): scores of new ones are lower"
        print(f"transcnn: {line}", file=sys.stderr)
        return
    source = Path(loaded.source)  # of published weights a name, which lies in no folder
    learnt = names_and_sizes(source.parent, "train") if source.is_file() else {}
    if len({*learnt.values()}) > len(learnt) / 2:  # else sizes say little: of images without compression they are equal
        entries = (part.entry(i) for i in range(len(part)))
        if count := sum(learnt.get(name) == size > 0 for name, _, size in entries):
            line = f"{count:,} of these {len(part):,} images have names and sizes of images that the run learnt from"
            print(f"transcnn: {line}: if they are the same, scores of new ones are lower", file=sys.stderr)


def _set_table(loaded: Loaded, data: str | None, images: str | None, target: list[str] | None) -> None:
    """Which columns of a table are what: as in training, but for what is given."""
    table = columns_for(data, loaded.table_of(data))
    loaded.info["task_args"].pop("table", None)
    table |= {name: value for name, value in (("images", images), ("target", target)) if value is not None}
    if table and loaded.task in ("segment", "detect"):
        raise UserError(f"images and target are for tables of labelled images; {loaded.source} is to {loaded.task}")
    if table:
        loaded.info["task_args"]["table"] = table


def _open(loaded: Loaded, data: str | None, split: str, **settings: Any) -> Any:
    """The split; ``auto`` of data that a run was trained on is never what it learnt from."""
    task_args = loaded.info.get("task_args") or {}
    open_split = get_task(loaded.task).open_split
    part = open_split(data, split, loaded.class_names, task_args, **settings)
    if split == "auto" and part.split == "all" and loaded.learnt_from(data):
        part = open_split(data, "val", loaded.class_names, task_args, **settings)
    return part


def _precision_of(info: dict[str, Any], accelerator: str) -> str:
    """What a run was scored with, as far as this machine has it; 32 of other weights."""
    words = {theirs: ours for ours, theirs in PRECISIONS.items()}
    wanted = words.get(info.get("precision", "")) or (info.get("settings") or {}).get("precision") or "32"
    try:
        choose_precision(wanted, accelerator)
    except UserError:  # 16 without a GPU
        return "32"
    return wanted
