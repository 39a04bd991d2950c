"""8-bit ONNX files: ONNX Runtime's static quantisation, calibrated and scored on real images.

Weights are rounded channel by channel, activations by the range that calibration saw. What that costs and gains was
measured by ``benchmarks/int8.py`` (docs/export.md).
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.loading import Loaded
from ..data.images import BrokenImage
from ..data.sets.classify import open_set
from ..data.sources.opening import columns_for
from ..data.sources.source import abbreviate
from ..errors import UserError
from ..onnx.predict import OnnxModel, to_input
from ..plugging.cost import interleaved_seconds
from ..settings import Table
from ..text import printable
from ..training.data_record import held_back

__all__ = ["note", "quantise", "read", "to_int8", "top1"]

logger = logging.getLogger(__name__)
Run = Callable[[np.ndarray], np.ndarray]
CALIBRATED = 256  # images
SCORED = 2000
OPERATORS = ("Conv", "Gemm", "MatMul")


def to_int8(loaded: Loaded, file: Path, data: str, max_loss: float, threads: int) -> dict[str, Any]:
    """Put an 8-bit file in the place of a classifier's exported one.

    Args:
        loaded: The network.
        file: What was exported; its metadata stay.
        data: Images with classes, as ``transcnn eval`` takes them: some of those to train on calibrate; the test split
            is scored, else the validation split, which is held back as in training where there is none.
        max_loss: Points of top-1 that may be lost.
        threads: That compute when speeds are compared.

    Returns:
        ``top1_before`` and ``top1_after`` in percent, ``test_images``, ``times_as_fast``, ``calibrated_on``.

    Raises:
        UserError: Not a classifier, data that can't be used, or more accuracy lost.
    """
    if loaded.task != "classify":
        raise UserError(f"int8 was measured for classifiers alone, {loaded.source} is for the task {loaded.task}")
    images, labels = read(data, "auto", loaded, SCORED)
    try:
        known, _ = read(data, "train", loaded, CALIBRATED)
    except UserError:  # a part for testing alone
        known = images[:: max(1, len(images) // CALIBRATED)]
    small = file.with_name("int8.onnx")
    quantise(file, small, known)
    runs: dict[str, Run] = {str(path): OnnxModel(path, accelerator="cpu", threads=threads) for path in (file, small)}
    before, after = (top1(run, images, labels) for run in runs.values())
    if before - after > max_loss:
        small.unlink()
        raise UserError(
            f"in 8 bits top-1 is {after:.2f} instead of {before:.2f} % of {len(labels)} images: more lost than "
            f"max_loss={max_loss}"
        )
    calls = {name: partial(run, images[:16]) for name, run in runs.items()}
    interleaved_seconds(calls, 2)  # warm-up
    plain, quick = interleaved_seconds(calls, 7).values()
    gain = statistics.median(slow / fast for slow, fast in zip(plain, quick, strict=True))
    small.replace(file)
    return {
        "top1_before": round(before, 2),
        "top1_after": round(after, 2),
        "test_images": len(labels),
        "times_as_fast": round(gain, 2),
        "calibrated_on": len(known),
    }


def read(data: str, split: str, loaded: Loaded, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A part of a data set as the network takes it, and the labels; ``most`` images are spread evenly over it.

    ``auto`` is never what a network learnt from, or is calibrated on, if anything else is there.
    """
    table = Table(**columns_for(data, loaded.table_of(data)))
    opened = partial(open_set, data, class_names=loaded.class_names, table=table, **held_back(loaded, data))
    part = opened(split)
    if split == "auto" and part.split == "all":
        with suppress(UserError):  # a single image
            part = opened("val")
    part.pixel_range = loaded.preprocessing.get("pixel_range")
    count = len(part) if most is None else min(most, len(part))
    inputs, labels, broken = [], [], []
    for i in np.linspace(0, len(part) - 1, count).astype(int).tolist():
        try:
            image, label, *_ = part.read(i)
        except BrokenImage as error:
            broken.append(f"{printable(part.name(i))} ({error})")
            continue
        if label >= 0:
            inputs.append(to_input(image, loaded.preprocessing))
            labels.append(label)
    if broken:
        logger.warning("left out, for they can't be read: %s", abbreviate(broken))
    if not inputs:
        raise UserError(f"{data!r} has no image that can be read, to calibrate or to be scored on")
    return np.stack(inputs), np.array(labels)


def quantise(
    source: Path, target: Path, images: np.ndarray, method: str = "MinMax", operators: Sequence[str] = OPERATORS
) -> None:
    """Write ``source`` with weights and activations of 8 bits, as QDQ nodes; its metadata go with it.

    Args:
        source: An ONNX file of ``transcnn export``.
        target: The new one.
        images: To calibrate on, (N, C, H, W).
        method: Of ``onnxruntime.quantization.CalibrationMethod``.
        operators: Those that are computed in 8 bits.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=list(operators),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )
    made, kept = onnx.load(target), onnx.load(source, load_external_data=False).metadata_props
    del made.metadata_props[:]
    made.metadata_props.extend(kept)
    onnx.save(made, target)


def note(file: Path, info: dict[str, Any]) -> None:
    """Write ``info`` into an ONNX file's metadata."""
    import onnx

    model = onnx.load(file)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in info.items()})
    onnx.save(model, file)


def top1(run: Run, images: np.ndarray, labels: np.ndarray) -> float:
    """In percent."""
    parts = np.array_split(images, max(1, len(images) // 50))
    return 100 * float((np.concatenate([run(part).argmax(1) for part in parts]) == labels).mean())


def _reader(images: np.ndarray) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(np.array_split(images, max(1, len(images) // 32)))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    return Reader()
