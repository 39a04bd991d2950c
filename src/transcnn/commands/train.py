"""``transcnn train``: from images to a run directory with a trained network, on Lightning's Trainer."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

from ..distributed.processes import first_decides, launch
from ..distributed.runtime import quiet_libraries
from ..settings import Augment, Detect, Distill, Ema, Optim, Segment
from ..training.faults import GoBack
from ..training.given import find_resumed, find_start, plain, resumed_settings
from ..training.run import TrainResult, _run

__all__ = ["train"]


def train(
    data: str | None = None,
    *,
    task: Literal["classify", "segment", "detect"] = "classify",
    model: str = "transcnn_nano",
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-3,
    img_size: int | None = None,
    in_chans: int | None = None,
    out: str | None = None,
    seed: int = 0,
    precision: Literal["auto", "32", "bf16", "16"] = "auto",
    resume: str | None = None,
    init_from: str | None = None,
    pretrained: bool = False,
    plug: str | None = None,
    model_args: dict[str, Any] | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float = 0.0,
    optim: Optim = Optim(),  # noqa: B008  (never changed; so written, each field becomes a flag)
    augment: Augment = Augment(),  # noqa: B008
    ema: Ema = Ema(),  # noqa: B008
    distill: Distill = Distill(),  # noqa: B008
    segment: Segment = Segment(),  # noqa: B008
    detect: Detect = Detect(),  # noqa: B008
    val_fraction: float = 0.1,
    strict_data: bool = False,
    num_workers: int | None = None,
    eval_metric: str | None = None,
    early_stop: int | None = None,
    save_every: int | None = None,
    nonfinite: Literal["halve", "stop"] = "halve",
    max_nonfinite: int = 10,
    grad_checkpointing: bool = False,
    channels_last: bool = True,
    cuda_graphs: bool = False,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    dry_run: bool = False,
    limit_batches: int | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train a network on images; the run's directory then holds its weights, figures and report.

    The best epoch is chosen on the validation part; the test part, if there is one, is looked at once at the end.

    Args:
        data: A folder of class folders (or of train/ with val/ or test/ that hold them), a Parquet file or a folder of
            them, what transcnn pack wrote, the URL of either (https, s3, hf://datasets/OWNER/NAME, ...), torch/...,
            hfds/..., wds/... as timm's readers know them; without it, the embedded handwritten digits.
            To segment, a folder or tar of images/{train,val,test}/ and labels/{train,val,test}/; to detect,
            of images/ and annotations/{train,val,test}.json in COCO's format, or of Pascal VOC's.
        task: What is learnt.
        model: A network of this package (see transcnn models) or any other of timm's.
        epochs: Times that the training images are gone through.
        batch_size: Images a step, of all processes together; each of N takes batch_size / N. (In timm and Lightning it
            is the batch of one process.) So results don't depend on N, nor does what lr has to be.
        lr: Learning rate (see lr_batch).
        img_size: Side of the images that the network is given; without it, what the network was made for. To segment,
            side of the parts of images that are learnt from; whole images are evaluated.
        in_chans: Channels of the images, 1 to 4; without it 1 for grey images, else 3.
        out: The run's directory, new or empty; without it runs/DATE-TIME-MODEL-DATA.
        seed: Of the weights, the split, the order and the augmentation.
        precision: auto is bf16 where the processor has it, else 32; 16 needs a GPU.
        resume: A run's directory or last.ckpt: go on exactly where it stopped, with its settings. ``epochs`` may be
            others than before; the schedule is then that of all of them.
        init_from: Weights to start from: a run's directory, a checkpoint of ours or a published one. To segment or
            detect, those of a classifier (or of another decoder) are taken for the backbone.
        pretrained: Start from the model's published weights.
        plug: Put H-MHSA after these modules of any CNN, with commas, patterns, or auto (see transcnn plug MODEL).
        model_args: Further arguments of the model, such as {stem_stride: 1}.
        drop_rate: Dropout before the last layer; without it the model's own.
        drop_path_rate: Stochastic depth of the last block, growing from 0 at the first.
        optim: How the weights are learnt.
        augment: How training images are varied.
        ema: The average of the weights that is scored and kept.
        distill: Whose answers are learnt as well.
        segment: What is peculiar to segmentation.
        detect: What is peculiar to detection.
        val_fraction: Share of the training images held back where the data has no validation part.
        strict_data: Stop at the first image that can't be read, instead of leaving it out.
        num_workers: Processes that read images; without it, one for each core but one, and none for images in memory.
        eval_metric: The validation figure that chooses the best epoch; without it top1, miou or map. ``loss`` tells
            epochs apart where a small validation part gives many the same score.
        early_stop: Stop after this many epochs without a better one.
        save_every: Write last.ckpt each this many updates, not only after each epoch.
        nonfinite: What to do about max_nonfinite updates in a row whose gradients are not finite: go back to the last
            checkpoint with half the learning rate (three times at most), or stop; nonfinite.json then holds the cause.
        max_nonfinite: Fewer such updates in a row are left out, counted and noted in faults.log.
        grad_checkpointing: Less memory for about a third more time.
        channels_last: The memory format that is usually quicker.
        cuda_graphs: On one GPU, record the launches of a step and play them back: up to three times as fast where
            batches are small. For classify and segment.
        accelerator: cpu, gpu, or auto.
        devices: Processes on this machine, each with a device of its own. Under torchrun or Slurm theirs count.
        num_nodes: Machines; the same command runs on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
        strategy: What each of several processes holds: the whole network (ddp), or a part of its weights and of the
            optimizer's state (fsdp); auto is fsdp for transcnn_large and larger ones on several GPUs.
        dry_run: Build everything, take two steps on made-up data, and print what the run would take (memory, time,
            disk) and where each setting came from. Data for classification needn't be there.
        limit_batches: Only this many batches an epoch, for trying out.
        quiet: Print nothing but errors.

    Returns:
        The run's directory and what was measured.

    Raises:
        UserError: Data, model or settings that can't be used, or a run directory that can't be written to.
        KeyboardInterrupt: The run was asked to stop (``callbacks.Interrupted``), after a checkpoint.
    """
    settings = plain(dict(locals()))
    with quiet_libraries():
        launch(accelerator, devices, num_nodes)
        resumed = first_decides(lambda: find_start(resume, out))
        if resumed:
            defaults = plain({name: p.default for name, p in inspect.signature(train).parameters.items()})
            settings = resumed_settings(settings, defaults, resumed)
        lr_factor = None
        while True:
            try:
                return _run(SimpleNamespace(**settings), resumed, lr_factor)
            except GoBack as back:  # noqa: PERF203  (three times at most)
                lr_factor = back.lr_factor
                resumed = first_decides(partial(find_resumed, str(back.run_dir)))
