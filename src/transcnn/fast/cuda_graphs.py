"""A network's kernel launches captured once as CUDA graphs and replayed from then on.

A forward pass of a small network is a few hundred launches, a training step a few thousand, and each costs Python and
PyTorch ten and more microseconds: below some hundred images a GPU waits for them most of the time. A graph launches
them all at once. It reads and writes the same memory each time, so it is valid for one shape of input, one set of
parameters and one state of autocast; for each further one another graph is captured, and the least recently used is
dropped.
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

from .dispatch import hooked
from .inference.entry import InferenceOnly

__all__ = ["CapturedInference", "CapturedTraining", "record_training"]

MAX_GRAPHS = 8  # of a network; each keeps the memory of a pass


class CapturedInference(InferenceOnly):
    """A network for inference, ``module``, whose launches are replayed on a GPU.

    A shape is captured when it is seen for the second time. Outputs are copies, which later calls don't change. Weights
    may change in place, and be moved, cast or exchanged by this module's own methods; what ``module`` itself is given
    after a capture, other weights or hooks, is not seen.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._cache = _GraphCache()

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """``module(*inputs)``, replayed for tensors on a GPU."""
        key = _key(inputs)
        if key is None or not self._cache.is_due(key):
            return self.module(*inputs)
        graph = self._cache.get(key) or self._cache.put(key, _Inference(self.module, inputs))
        return graph(inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> CapturedInference:
        self._cache = _GraphCache()  # weights move
        return super()._apply(fn, recurse)  # pyright: ignore

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; with ``assign=True`` weights are others afterwards."""
        self._cache = _GraphCache()
        return super().load_state_dict(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedInference, (self.module,)  # a copy captures its own


class CapturedTraining:
    """Calls a network as ``model(images)`` would, with forward and backward passes replayed on a GPU.

    A shape of input is captured when it is seen for the third time (optimizers have made their state by then), in
    training mode and with gradients on; whatever can't be captured runs eagerly: evaluation, other arguments than
    tensors, inputs that need gradients, networks with hooks, several processes.

    Args:
        model: A network whose forward pass is the same operations each time and asks the GPU for no number
            (``.item()``), as those of this package are. DropPath and dropout draw new random numbers each time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cache = _GraphCache(after=2)

    def __call__(self, *inputs: Any) -> Any:
        """``model(*inputs)``."""
        model = self._model
        eligible = model.training and torch.is_grad_enabled() and not _is_one_of_many()
        key = _key(inputs) if eligible and not any(map(hooked, model.modules())) else None
        if key is None or any(x.requires_grad for x in inputs):
            return model(*inputs)
        key = (key, _state(model))
        if not self._cache.is_due(key):
            return model(*inputs)
        graph = self._cache.get(key) or self._cache.put(key, _Training(model, inputs))
        return graph(inputs)


def record_training(model: nn.Module) -> CapturedTraining:
    """A function that calls ``model`` with its forward and backward passes replayed as CUDA graphs, for one GPU.

        model = transcnn.fast.accelerate_training(model.cuda().to(memory_format=torch.channels_last))
        forward = transcnn.fast.record_training(model)
        loss = criterion(forward(images), labels)  # then loss.backward() and optimizer.step() as without

    A step is some thousand launches, for which a GPU waits while batches are small; replayed they take no time of the
    CPU. Each shape is captured when it is seen for the third time. What can't be captured, evaluation and anything on a
    CPU runs as ``model(images)`` would: :class:`CapturedTraining`.
    """
    return CapturedTraining(model)


class _GraphCache:
    """Graphs by key; the least recently used is dropped where there are too many."""

    def __init__(self, after: int = 1) -> None:
        self._after = after
        self._seen: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()

    def is_due(self, key: Hashable) -> bool:
        """Counts this key; whether it was seen often enough for a capture."""
        if len(self._seen) > 1000:  # images of all sizes: counting starts again
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
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph


def _key(inputs: tuple[Any, ...]) -> Hashable | None:
    """What of the inputs a graph is valid for; None where none can be captured."""
    if not inputs or not all(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        return None
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs), autocast


def _state(model: nn.Module) -> Hashable:
    """Addresses of the parameters, which of them require gradients, and which modules are in training mode."""
    parameters = tuple((p.data_ptr(), p.dtype, p.requires_grad) for p in model.parameters())
    return parameters, tuple(m.training for m in model.modules())


def _is_one_of_many() -> bool:
    """Whether other processes train with this one, whose exchange of gradients can't be captured."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _autocast() -> AbstractContextManager[Any]:
    """Autocast as it is now, but for its cache of cast weights, which would outlive them in a graph."""
    enabled = torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=enabled, cache_enabled=False)


def _static(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies of the inputs, in memory that a graph reads."""
    return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in inputs)


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    try:
        # Threads that load data go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"this network can't be captured as a CUDA graph ({reason}); run it without") from error


class _Shadows:
    """New parameters that share the memory of a network's trainable ones, and calls of it with these."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        self._model = model
        made = {id(p): nn.Parameter(p.detach()) for p in parameters}
        self.parameters = list(made.values())
        # By one name of each module: functional_call's own ties would exchange those of a module with several names
        # once for each, and so leave the network with the new parameters.
        self._named: dict[str, Tensor] = {
            f"{name}.{key}".lstrip("."): made[id(p)]
            for name, part in model.named_modules()
            for key, p in part.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in made
        }

    def call(self, inputs: tuple[Tensor, ...]) -> tuple[list[Any], Any]:
        """The network's output, flattened, and what :func:`tree_unflatten` takes to restore it."""
        return tree_flatten(functional_call(self._model, self._named, inputs, tie_weights=False))


def _differentiable(outputs: list[Tensor]) -> list[Tensor]:
    """The outputs that require gradients."""
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

    They are captured with parameters that share the memory of the model's but are new to autograd: the model's own may
    still belong to the step before, on another stream, and a capture must not wait for that.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = _static(inputs)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.passes = 0  # forward passes so far: a backward pass belongs to the last of them
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        buffers = [(b, b.clone()) for b in model.buffers()]
        rng_state = torch.cuda.get_rng_state(inputs[0].device)

        with torch.cuda.stream(stream), _autocast():  # once for what is made at the first use on a stream
            shadows = _Shadows(model, self.parameters)
            outputs, _ = shadows.call(self.inputs)
            torch.autograd.grad(
                _differentiable(outputs), shadows.parameters, _differentiable(outputs), allow_unused=True
            )
            del outputs, shadows
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.cuda.set_rng_state(rng_state, inputs[0].device)

        shadows = _Shadows(model, self.parameters)
        with _capture(self.forward, stream), _autocast():
            outputs, self.spec = shadows.call(self.inputs)
        self.outputs: list[Tensor] = outputs
        self.output_grads = [torch.zeros_like(x) for x in _differentiable(outputs)]
        with _capture(self.backward, stream, self.forward.pool()):
            self.parameter_grads = torch.autograd.grad(
                _differentiable(outputs), shadows.parameters, self.output_grads, allow_unused=True
            )

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        return tree_unflatten(list(_Replay.apply(self, *self.parameters)), self.spec)  # pyright: ignore

    def clone_gradients(self) -> None:
        """Clones gradients from an earlier pass that this graph would write over."""
        for p, static in zip(self.parameters, self.parameter_grads, strict=True):
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
                "this backward pass belongs to an earlier forward pass than the last, whose activations "
                "were overwritten; call backward before the next forward pass, or train without CUDA graphs"
            )
        graph.clone_gradients()
        wanted = [grad for grad, x in zip(grads, graph.outputs, strict=True) if x.requires_grad]
        for static, grad in zip(graph.output_grads, wanted, strict=True):
            static.copy_(grad)
        graph.backward.replay()
        return None, *(None if grad is None else grad.detach() for grad in graph.parameter_grads)
