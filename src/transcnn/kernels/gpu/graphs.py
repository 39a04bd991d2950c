"""A network's launches recorded once as CUDA graphs and played back from then on.

A forward pass of a small network is a few hundred launches, a training step a few thousand, and each costs Python and
PyTorch ten and more microseconds: below some hundred images a GPU waits for them most of the time. A graph starts them
all at once. It reads and writes the same memory each time, so it holds for one shape of input, one set of parameters
and one state of autocast; for each further one another graph is recorded, and the oldest is given up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..entry import Frozen
from ..parts import hooked

__all__ = ["RecordedInference", "RecordedTraining"]

MOST = 8  # graphs of a network; each keeps the memory of a pass


class RecordedInference(Frozen):
    """A network for inference that plays back its launches on a GPU; what it wraps is ``module``.

    A shape is recorded when it is seen for the second time. Outputs are copies, so they stay as they are. Weights may
    change in place; hooks that are set after a recording don't fire.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._kept = _Kept()

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """What ``module`` gives for tensors on a GPU; anything else goes straight to it."""
        key = _key(inputs)
        if key is None or not self._kept.is_due(key):
            return self.module(*inputs)
        graph = self._kept.get(key) or self._kept.put(key, _Inference(self.module, inputs))
        return graph(inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> RecordedInference:
        self._kept = _Kept()  # weights move
        return super()._apply(fn, recurse)  # pyright: ignore

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordedInference, (self.module,)  # a copy records its own


class RecordedTraining:
    """Calls a network as ``model(images)`` would, forward and backward passes played back on a GPU.

    A shape of input is recorded when it is seen for the third time (optimizers have made their state by then), in
    training mode and with gradients on; whatever can't be recorded runs as ever: evaluation, other arguments than
    tensors, inputs that need gradients, networks with hooks, several processes.

    Args:
        model: A network whose forward pass is the same operations each time and asks the GPU for no number
            (``.item()``), as those of this package are. DropPath and dropout draw anew each time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = _Kept(after=2)

    def __call__(self, *inputs: Any) -> Any:
        """``model(*inputs)``."""
        model = self._model
        usual = model.training and torch.is_grad_enabled() and not _is_one_of_many()
        key = _key(inputs) if usual and not any(map(hooked, model.modules())) else None
        if key is None or any(x.requires_grad for x in inputs):
            return model(*inputs)
        key = (key, _state(model))
        if not self._kept.is_due(key):
            return model(*inputs)
        graph = self._kept.get(key) or self._kept.put(key, _Training(model, inputs))
        return graph(inputs)


class _Kept:
    """Graphs by key, the oldest given up where there are too many."""

    def __init__(self, after: int = 1) -> None:
        self._after = after
        self._seen: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()

    def is_due(self, key: Hashable) -> bool:
        """Whether this key was seen often enough for a recording to pay."""
        if len(self._seen) > 1000:  # images of all sizes: counting goes on from the start
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] > self._after

    def get(self, key: Hashable) -> Any:
        """The graph of this key, or None."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return self._graphs.get(key)

    def put(self, key: Hashable, graph: Any) -> Any:
        """Keep a graph."""
        self._graphs[key] = graph
        if len(self._graphs) > MOST:
            self._graphs.popitem(last=False)
        return graph


def _key(inputs: tuple[Any, ...]) -> Hashable | None:
    """What a recording holds for as to inputs; None where none can be made."""
    if not inputs or not all(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        return None
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs), autocast


def _state(model: nn.Module) -> Hashable:
    """Where the parameters lie, which of them learn, and which modules are in training mode."""
    parameters = tuple((p.data_ptr(), p.dtype, p.requires_grad) for p in model.parameters())
    return parameters, tuple(m.training for m in model.modules())


def _is_one_of_many() -> bool:
    """Whether other processes train with this one, whose exchange of gradients can't be recorded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _autocast() -> AbstractContextManager[Any]:
    """Autocast as it is now, but for its memory of cast weights, which would outlive them in a graph."""
    enabled = torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=enabled, cache_enabled=False)


def _static(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Memory of its own for inputs, with what is in them."""
    return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in inputs)


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    try:
        # Threads that load data go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"this network can't be recorded as a CUDA graph ({reason}); run it without") from error


def _shadows(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters of their own in the same memory."""
    return {name: nn.Parameter(p.detach()) for name, p in parameters.items()}


def _leaving(outputs: list[Tensor]) -> list[Tensor]:
    """The outputs that gradients come back to."""
    return [x for x in outputs if x.requires_grad]


class _Inference:
    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = _static(inputs)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _autocast():
            model(*self._inputs)
        with _capture(self._graph, stream), _autocast():
            self._outputs = model(*self._inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        for static, x in zip(self._inputs, inputs, strict=True):
            static.copy_(x)
        self._graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self._outputs)


class _Training:
    """The forward pass as one graph, the backward pass as another.

    They are recorded with parameters that share the memory of the model's but are new to autograd: the model's own may
    still belong to the step before, on another stream, and a recording must not wait for that.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = _static(inputs)
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(learning.values())
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.passes = 0  # forward passes so far: a backward pass belongs to the last of them
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        buffers = [(b, b.clone()) for b in model.buffers()]
        drawn = torch.cuda.get_rng_state(inputs[0].device)

        with torch.cuda.stream(stream), _autocast():  # once for what is made at the first use on a stream
            shadows = _shadows(learning)
            outputs, _ = tree_flatten(functional_call(model, shadows, self.inputs))
            torch.autograd.grad(_leaving(outputs), list(shadows.values()), _leaving(outputs), allow_unused=True)
            del outputs, shadows
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.cuda.set_rng_state(drawn, inputs[0].device)

        shadows = _shadows(learning)
        with _capture(self.forward, stream), _autocast():
            outputs, self.spec = tree_flatten(functional_call(model, shadows, self.inputs))
        self.outputs: list[Tensor] = outputs
        self.of_outputs = [torch.zeros_like(x) for x in _leaving(outputs)]
        with _capture(self.backward, stream, self.forward.pool()):
            self.of_parameters = torch.autograd.grad(
                _leaving(outputs), list(shadows.values()), self.of_outputs, allow_unused=True
            )

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        return tree_unflatten(list(_Replay.apply(self, *self.parameters)), self.spec)  # pyright: ignore

    def keep_gradients(self) -> None:
        """Gradients that parameters hold from an earlier pass get memory of their own before this graph writes anew."""
        for p, static in zip(self.parameters, self.of_parameters, strict=True):
            if p.grad is not None and static is not None and p.grad.data_ptr() == static.data_ptr():
                p.grad = p.grad.clone()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Training, *parameters: Tensor) -> tuple[Tensor, ...]:
        graph.forward.replay()
        graph.passes += 1
        ctx.graph, ctx.number = graph, graph.passes
        outputs = tuple(x.detach().clone() for x in graph.outputs)
        ctx.mark_non_differentiable(*(y for x, y in zip(graph.outputs, outputs, strict=True) if not x.requires_grad))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        graph: _Training = ctx.graph
        if ctx.number != graph.passes:
            raise RuntimeError(
                "this backward pass belongs to an earlier forward pass than the last, whose activations a recorded "
                "network has written over; call backward before the next forward pass, or train without recording"
            )
        graph.keep_gradients()
        wanted = [grad for grad, x in zip(grads, graph.outputs, strict=True) if x.requires_grad]
        for static, grad in zip(graph.of_outputs, wanted, strict=True):
            static.copy_(grad)
        graph.backward.replay()
        return None, *(None if grad is None else grad.detach() for grad in graph.of_parameters)
