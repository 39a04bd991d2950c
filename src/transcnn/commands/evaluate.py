"""``transcnn eval``: a trained model's scores on a data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.files import make_folder
from ..checkpoints.loading import load
from ..distributed.processes import first_decides, gather_lists, launch, rank
from ..distributed.runtime import quiet_libraries
from ..errors import UserError
from ..tasks import get_task
from ..text import printable
from ..training.evaluation import measure, write_results

__all__ = ["evaluate"]

VIEWS = {
    "window": ("segment",),
    "flip": ("classify", "segment"),
}  # how images are evaluated, by task


def evaluate(
    checkpoint: str,
    data: str | None = None,
    *,
    model: str | None = None,
    split: Literal["auto", "train", "val", "test", "all"] = "auto",
    batch_size: int = 128,
    img_size: int | None = None,
    precision: Literal["auto", "32", "bf16", "16"] = "32",
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict_data: bool = False,
    num_workers: int = 0,
    window: int | None = None,
    flip: bool = False,
    out: str | None = None,
    report: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a trained network on images, print the figures and write them to metrics.json.

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of ours, or the name of a published model.
        data: As for transcnn train; without it, what the network was trained on.
        model: The network that a file of weights is for which doesn't say so, such as the authors' .pth files.
        split: The part to score on; auto is the test part, else the validation part, else everything.
        batch_size: Images at a time, in each process.
        img_size: Another size than the network was trained at.
        precision: Arithmetic; 32 is exact, auto is bf16 where the processor has it.
        accelerator: cpu, gpu, or auto.
        devices: Processes on this machine, each with a device and a share of the images. Under torchrun or Slurm
            theirs count.
        num_nodes: Machines; the same command runs on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
        val_fraction: Where data has no validation part: the share that training held back.
        seed: And the seed it was held back with.
        strict_data: Stop at the first image that can't be read, instead of leaving it out.
        num_workers: Processes that read images.
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
    with quiet_libraries():
        launch(accelerator, devices, num_nodes)
        loaded = load(checkpoint, model)
        loaded.resize_input(img_size)
        views = {name: value for name, value in (("window", window), ("flip", flip)) if value}
        for name in views:
            if loaded.task not in VIEWS[name]:
                tasks = " and ".join(VIEWS[name])
                raise UserError(f"{name} is for {tasks} alone; {loaded.source} is for the task {loaded.task}")
        loaded.info["task_args"] = {**(loaded.info.get("task_args") or {}), **views}
        trained = loaded.info.get("settings") or {}
        if data is None and "data" in trained:
            data = trained["data"]
            val_fraction, seed = trained.get("val_fraction", val_fraction), trained.get("seed", seed)
        part = get_task(loaded.task).open_split(
            data,
            split,
            loaded.class_names,
            loaded.info.get("task_args") or {},
            val_fraction=val_fraction,
            seed=seed,
            strict=strict_data,
        )
        target = Path(out) if out else Path(checkpoint) / "eval" if Path(checkpoint).is_dir() else None
        if target is not None:
            first_decides(partial(make_folder, target, "metrics.json"))
        learner, scores = measure(
            loaded,
            part,
            batch_size=batch_size,
            num_workers=num_workers,
            precision=precision,
            accelerator=accelerator,
            bar=not quiet,
        )
    if not int(scores["images"]):
        raise UserError(f"nothing can be scored on {data or 'digits'}: no image of the split has a label that counts")
    metrics = {
        **learner.summary(scores),
        **views,
        "split": part.split or split,
        "data": data or "digits",
        "checkpoint": loaded.source,
    }
    broken = list(dict.fromkeys(gather_lists(part.broken)))
    if rank() > 0:
        return metrics
    if target is not None:
        write_results(target, learner, scores, part, metrics, broken, report=report)
    if not quiet:
        learner.print_table(metrics)
        if target is not None:
            print(f"written: {printable(target / 'metrics.json')}")
    return metrics
