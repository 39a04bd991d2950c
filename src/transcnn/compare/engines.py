"""The same network run by different engines, as callables that ``transcnn compare`` times."""

from __future__ import annotations

import ast
import copy
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.published import convert_state_dict
from ..errors import UserError, require
from ..fast import accelerate_training, optimize
from .peers import PEERS

__all__ = ["ENGINES", "build", "load_reference", "prepare", "prepare_training", "same_weights"]

Run = Callable[[Tensor], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Skipped(Exception):
    """This engine can't run that; the message says why."""


def build(spec: str, size: int) -> nn.Module:
    """A network with fresh weights for images of side ``size``, in evaluation mode.

    ``spec`` is a name of ours, timm's, torchvision's or :mod:`.peers`, and arguments if need be:
    ``NAME:KEY=VALUE:KEY=VALUE``.
    """
    import timm
    from torchvision.models import get_model
    from torchvision.models import list_models as torchvision_models

    from ..backbone import TransCNN
    from ..variants import VARIANTS_ND

    name, *pairs = spec.split(":")
    given = [pair.partition("=") for pair in pairs]
    arguments = {key: _value(value) for key, _, value in given}
    torch.manual_seed(0)
    if timm.is_model(name):
        if any(value == "auto" for value in arguments.values()):
            arguments.setdefault("img_size", size)
        fixed = timm.get_pretrained_cfg(name)
        if fixed is not None and fixed.fixed_input_size:
            arguments.setdefault("img_size", size)
        model = timm.create_model(name, **arguments)
    elif name in torchvision_models():
        model = get_model(name, weights=None, **arguments)
    elif name in PEERS:
        model = PEERS[name](size, **arguments)
    elif name in VARIANTS_ND:
        raise UserError(f"{name} takes no images, which is what is compared here; benchmarks/dimensions.py measures it")
    else:
        raise UserError(
            f"neither transcnn, timm nor torchvision has a network called {name!r}, nor is it one of {', '.join(PEERS)}"
        )
    if isinstance(model, TransCNN):
        randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    """Give every layer weights that matter: with fresh ones all outputs are the last layer's bias."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5 / p[0].numel() ** 0.5)
        elif name.endswith("weight"):
            nn.init.uniform_(p, 0.4, 0.8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.4, 0.8)


def load_reference(spec: str) -> nn.Module:
    """The network that ``FILE.py:FACTORY`` makes, in evaluation mode."""
    path, _, factory = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"reference must be FILE.py:FACTORY with an existing file, got {spec!r}")
    # A name that no other module has; and among sys.modules, where timm's registry and dataclasses look for it.
    module_spec = importlib.util.spec_from_file_location(f"_transcnn_reference_{Path(path).stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, factory, None)):
        raise UserError(f"{path} has no function called {factory!r}")
    model = getattr(module, factory)()
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec} must make a torch.nn.Module, got {type(model).__name__}")
    model.eval()
    return model


def same_weights(reference: nn.Module, model: nn.Module) -> bool:
    """Give ``model`` and ``reference`` the same random weights; False if their layouts don't match."""
    randomise(reference)
    try:
        model.load_state_dict(convert_state_dict(reference.state_dict(), model))
    except (RuntimeError, ValueError, KeyError):
        return False
    return True


def prepare(engine: str, model: nn.Module, dtype: str, example: Tensor) -> Run:
    """A function of images (B, 3, H, W) that runs ``model`` by ``engine``; it raises :class:`Skipped` if it can't."""
    return ENGINES[engine](copy.deepcopy(model), dtype, example)


def prepare_training(model: nn.Module, dtype: str, channels_last: bool = True, accelerate: bool = True) -> Run:
    """A function of images that takes one training step: forward, cross-entropy, backward, AdamW.

    ``accelerate`` has what is ours in the network train with kernels of our own, as ``transcnn train`` does.
    """
    model = copy.deepcopy(model)
    model.train()
    if accelerate:
        accelerate_training(model)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run(images: Tensor) -> Tensor:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with _autocast(images, dtype):
            logits = model(images).float()
            labels = torch.arange(len(images), device=images.device) % logits.shape[1]
            loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def _eager(model: nn.Module, dtype: str, example: Tensor, channels_last: bool = False) -> Run:
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore

    def run(images: Tensor) -> Tensor:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), _autocast(images, dtype):
            return model(images)

    return run


def _optimized(model: nn.Module, dtype: str, example: Tensor, compile: bool = False) -> Run:
    fast = optimize(model, DTYPES[dtype], compile=compile)

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return fast(images)

    return run


def _compiled(model: nn.Module, dtype: str, example: Tensor) -> Run:
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore
    model.compile(options={"freezing": True} if example.device.type == "cpu" else None)
    return _eager(model, dtype, example, channels_last=True)


def _onnxruntime(model: nn.Module, dtype: str, example: Tensor) -> Run:
    if dtype != "fp32":
        raise Skipped("ONNX Runtime computes these networks in fp32 only")
    ort = require("onnxruntime", "export")
    require("onnxscript", "export")
    buffer = io.BytesIO()
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    program.save(buffer)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _openvino(model: nn.Module, dtype: str, example: Tensor) -> Run:
    if dtype == "fp16":
        raise Skipped("OpenVINO has no fp16 on CPUs")
    openvino = require("openvino", "export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(torch.export.export(model, (example,)))
    hints = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(converted, "CPU", hints)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


ENGINES: dict[str, Callable[[nn.Module, str, Tensor], Run]] = {
    "eager": _eager,
    "channels_last": partial(_eager, channels_last=True),
    "optimize": _optimized,
    "compile": _compiled,
    "optimize_compile": partial(_optimized, compile=True),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _autocast(images: Tensor, dtype: str) -> Any:
    return nullcontext() if dtype == "fp32" else torch.autocast(images.device.type, DTYPES[dtype])


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
