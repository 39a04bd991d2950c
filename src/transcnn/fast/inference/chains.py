"""Layers in a row in the plan of a block that one kernel computes: inverted residuals of any CNN, and perceptrons.

A depthwise convolution alone is the shortest inverted residual.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..cpu.activations import IDENTITY, Activation
from ..cpu.call import KERNEL_SIZES
from ..cpu.inference import Packed
from ..cpu.inverted_residual import InvertedResiduals, Layers, pack_inverted_residual, pack_squeeze
from ..cpu.passes import squeeze as run_squeeze
from ..dispatch import fits_cpu, hooked, to_nchw, to_nhwc
from .activations import kernel_activation
from .convolutions import FastConv2d, FastLinear, needs_gradients
from .plan import Ref, Step, mapped, submodule
from .tracing import Tracer, activation_of, graph_of, passes

__all__ = ["Chain", "Squeeze", "chain_names", "squeeze_of", "with_chains"]

_FEW = 1 << 18  # numbers in a map for which a depthwise convolution alone is as fast as oneDNN's
_CHAINS = re.compile(
    "pds?p|ds?p(?!p(?!d))|mp|pd|pp(?!d)|ll|d"
)  # of kinds, see _kind; of d and pp the latter gains more


class _Squeeze(NamedTuple):
    """Squeeze-and-excitation: the names of its 1x1 convolutions, and the activations after them."""

    reduce: str
    excite: str
    acts: tuple[Activation, Activation]


@dataclass
class Chain:
    """Convolutions of a block by name, None where there is none: 1x1, depthwise, squeeze-and-excitation's two, 1x1.

    Without the depthwise one the two others may be linear layers, of (..., C).
    """

    names: tuple[str | None, ...]
    layers: Layers
    channels: int
    outputs: int

    def __post_init__(self) -> None:
        self._pack = Packed(functools.partial(_packed, self.channels))
        self._alone = len([name for name in self.names if name]) == 1

    def run(self, block: nn.Module, x: Any, other: Any = None, reuse: bool = False) -> Tensor | None:
        """(B, C, H, W) -> (B, C', H', W'), plus ``other`` before the last activation; None where the kernel can't.

        With ``reuse`` the result may be written over ``other``.
        """
        given = [x] if other is None else [x, other]
        if not all(isinstance(t, Tensor) and t.dtype == x.dtype and fits_cpu(t, gemm=False) for t in given):
            return None
        if needs_gradients(*given):
            return None
        layers: list[Any] = [None if name is None else submodule(block, name) for name in self.names]
        weights = [w for layer in layers for w in ((None, None) if layer is None else (layer.weight, layer.bias))]
        if not _alike(weights, x.dtype):
            return None
        linear = isinstance(layers[-1], nn.Linear)
        maps = [_map(t, linear) for t in given]
        if any(t is None for t in maps) or maps[0].shape[3] != self.channels:  # pyright: ignore
            return None
        shape = self._shape(maps[0], layers[1])  # pyright: ignore
        if min(shape) < 1 or (other is not None and maps[1].shape != shape):  # pyright: ignore
            return None  # PyTorch says what is wrong, or broadcasts
        if self._alone and x.numel() > _FEW:
            return None
        packed, squeeze, ready = self._pack(*weights)
        if not ready:
            ready.append(InvertedResiduals(packed, squeeze, self.layers, self.outputs))
        y = ready[0](maps[0])(*maps, out=maps[1] if reuse else None)  # pyright: ignore
        return y.view(*x.shape[:-1], self.outputs) if linear else to_nchw(y)

    def _shape(self, x: Tensor, depthwise: nn.Conv2d | None) -> tuple[int, int, int, int]:
        """The result's, (B, H', W', C')."""
        batch, height, width, _ = x.shape
        if depthwise is not None:
            above, below, before, after = self.layers.padding or (0, 0, 0, 0)
            size, stride = depthwise.kernel_size[0], self.layers.stride
            height, width = (height + above + below - size) // stride + 1, (width + before + after - size) // stride + 1
        return batch, height, width, self.outputs


@dataclass
class Squeeze:
    """Squeeze-and-excitation of a block alone: the names of its 1x1 convolutions, and the activations after them."""

    names: tuple[str, str]
    acts: tuple[Activation, Activation]
    channels: int
    over_input: ClassVar[bool] = True
    _pack: Packed = field(default_factory=lambda: Packed(_packed_squeeze))

    def run(self, block: nn.Module, x: Any, reuse: bool = False) -> Tensor | None:
        """(B, C, H, W) -> (B, C, H, W), written over x if that may be reused; None where the kernel can't."""
        if not (isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == self.channels and fits_cpu(x, gemm=False)):
            return None
        if needs_gradients(x):
            return None
        layers = [submodule(block, name) for name in self.names]
        weights = [w for layer in layers for w in (layer.weight, layer.bias)]
        if not _alike(weights, x.dtype):
            return None
        x = to_nhwc(x)
        return to_nchw(run_squeeze(x, self._pack(*weights), self.acts, x if reuse else None))


def _alike(weights: list[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether a kernel that computes in this dtype can take all of these."""
    alike = all(w is None or (w.dtype == dtype and w.is_cpu and not w.is_inference()) for w in weights)
    return alike and not needs_gradients(*weights)


def _packed_squeeze(*weights: Tensor | None) -> Any:
    (reduce, reduce_bias, excite, excite_bias) = weights
    return pack_squeeze(reduce.flatten(1), reduce_bias, excite.flatten(1), excite_bias)  # pyright: ignore


def _map(x: Tensor, linear: bool) -> Tensor | None:
    """A map (B, C, H, W), or the input of a linear layer, as (B, H, W, C)."""
    if linear:
        return x.contiguous().view(1, 1, -1, x.shape[-1]) if x.ndim > 1 else None
    return to_nhwc(x) if x.ndim == 4 else None


def _packed(channels: int, *weights: Tensor | None) -> Any:
    """What the kernel takes of the layers' weights and biases, and room for its calls with them."""
    expand, depthwise, reduce, excite, project = (
        (weight if i == 1 or weight is None else weight.flatten(1), bias)
        for i, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True))
    )
    if expand[0] is None and depthwise[0] is not None and project[0] is not None:
        outputs = torch.arange(len(depthwise[0]), device="cpu")
        order = outputs.view(channels, -1).t().flatten()  # several of each input
        depthwise = depthwise[0][order], None if depthwise[1] is None else depthwise[1][order]
        project = project[0][:, order], project[1]
    squeeze = None if reduce[0] is None or excite[0] is None else pack_squeeze(*reduce, *excite)  # pyright: ignore
    return pack_inverted_residual(*expand, *depthwise, *project), squeeze, []  # pyright: ignore


def with_chains(steps: list[Step], output: Any, modules: dict[str, nn.Module]) -> list[Step]:
    """The steps, with those that one kernel computes as one."""
    reads: Counter[int] = Counter()
    for given in (*((list(step.args), step.kwargs) for step in steps), output):
        mapped(given, lambda one: reads.update([one.number]) if isinstance(one, Ref) else None)
    layers = [_layer(step, modules) for step in steps]
    squeezes = [
        None if layer is None or len(step.args) != 1 else squeeze_of(layer)
        for step, layer in zip(steps, layers, strict=True)
    ]
    kinds = "".join("s" if squeeze else _kind(layer) for squeeze, layer in zip(squeezes, layers, strict=True))
    made: list[Step] = []
    i = 0
    while i < len(steps):
        end = i + 1
        while end < len(steps) and _follows(steps[end - 1], steps[end], reads):
            end += 1
        found = _CHAINS.match(kinds, i, end)
        if found and found[0].endswith("d") and len(steps[found.end() - 1].args) > 1:  # only a projection can add
            found = _CHAINS.match(kinds, i, found.end() - 1)
        step = steps[i]
        if found:
            parts = steps[i : found.end()]
            args = [step.args[0], *parts[-1].args[1:]]
            squeeze = next(filter(None, squeezes[i : found.end()]), None)
            step = Step(
                "chain",
                _chain(parts, found[0], modules, squeeze),
                args,
                {},
                parts[-1].number,
                parts=parts,
                by_kernel=True,
            )
        elif (alone := squeezes[i]) is not None:
            step = Step(
                "chain", _squeeze_alone(step, alone, modules), step.args, {}, step.number, parts=[step], by_kernel=True
            )
        made.append(step)
        i = found.end() if found else i + 1
    return made


def chain_names(step: Step, modules: dict[str, nn.Module]) -> list[str]:
    """The modules that this step doesn't call, for it is a chain."""
    names = [str(part.target) for part in step.parts]
    return [name for top in names for name in modules if name == top or name.startswith(f"{top}.")]


def _follows(before: Step, step: Step, reads: Counter[int]) -> bool:
    """Whether a step reads the one before, which nothing else does, and which adds no other map."""
    return list(step.args[:1]) == [Ref(before.number)] and reads[before.number] == len(before.args) == 1


def _layer(step: Step, modules: dict[str, nn.Module]) -> nn.Module | None:
    """What a step calls of one map, where a kernel may compute it; None of all else."""
    module = modules.get(str(step.target)) if step.kind in ("fused", "call_module") else None
    known = module is not None and not step.kwargs and not hooked(module)
    return module if known and kernel_activation(step.act) is not None else None


def _kind(layer: nn.Module | None) -> str:
    """p for a 1x1 convolution, d a depthwise one, m one with several outputs of each input, l a linear layer.

    A dot for all else.
    """
    if type(layer) is FastLinear:
        return "l"
    if type(layer) is not FastConv2d:
        return "."
    if _is_pointwise(layer):
        return "p"
    if not _is_depthwise(layer):
        return "."
    if layer.out_channels == layer.in_channels:
        return "d"
    return "." if layer.in_channels % 16 else "m"


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return set(conv.kernel_size) == set(conv.stride) == {1} and not any(conv.padding) and conv.groups == 1


def _is_depthwise(conv: nn.Conv2d) -> bool:
    size, *others = {*conv.kernel_size}
    fits = not others and size in KERNEL_SIZES and conv.stride in ((1, 1), (2, 2)) and conv.dilation == (1, 1)
    fits = fits and conv.groups == conv.in_channels
    return fits and all(int(n) < size for n in conv.padding)


def squeeze_of(module: nn.Module) -> _Squeeze | None:
    """What this is as squeeze-and-excitation: x * gate(conv(act(conv(mean of x)))); None of any other module."""
    if sum(type(child) is FastConv2d and _is_pointwise(child) for child in module.children()) != 2:
        return None
    if any(map(hooked, module.modules())):
        return None
    graph = graph_of(module, Tracer())
    if graph is None:
        return None
    modules = dict(module.named_modules())
    *inputs, output = (node for node in graph.nodes if node.op in ("placeholder", "output"))
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output") and not passes(node, modules)]
    if len(inputs) != 1 or len(nodes) != 6:
        return None
    mean, reduce, act, excite, gate, product = nodes

    def read(node: torch.fx.Node) -> list[Any]:
        """What a node reads, beyond those that do nothing."""
        sources = list(node.args)
        while any(isinstance(s, torch.fx.Node) and s not in nodes and s not in inputs for s in sources):
            sources = [s.args[0] if isinstance(s, torch.fx.Node) and s not in (*nodes, *inputs) else s for s in sources]
        return sources

    pools = mean.op == "call_module" and getattr(modules[str(mean.target)], "output_size", 0) in (1, (1, 1))
    pools = pools and type(modules[str(mean.target)]) is nn.AdaptiveAvgPool2d and read(mean) == inputs
    means = mean.op == "call_method" and mean.target == "mean" and mean.kwargs == {"keepdim": True}
    means = means and read(mean) in ([*inputs, (2, 3)], [*inputs, [2, 3]])
    convs = all(node.op == "call_module" and type(modules[str(node.target)]) is FastConv2d for node in (reduce, excite))
    scales = product.op == "call_function" and product.target in (operator.mul, torch.mul) and not product.kwargs
    scales = scales and read(product) in ([*inputs, gate], [gate, *inputs]) and read(output) == [product]
    row = all(read(node) == [before] for before, node in itertools.pairwise(nodes[:5]))
    acts = [activation_of(node, modules) for node in (act, gate)]
    known = [None if act is None else kernel_activation(act) for act in acts]
    if not ((pools or means) and convs and scales and row) or None in known:
        return None
    return _Squeeze(str(reduce.target), str(excite.target), tuple(known))  # pyright: ignore


def _chain(parts: list[Step], kinds: str, modules: dict[str, nn.Module], squeeze: _Squeeze | None) -> Chain:
    middle = max(kinds.find("d"), kinds.find("m"))
    depthwise = parts[middle] if middle >= 0 else None
    expand = None if middle == 0 else parts[0]
    project = None if kinds[-1] == "d" else parts[-1]
    first, last = modules[parts[0].target], modules[parts[-1].target]
    acts = tuple(IDENTITY if part is None else kernel_activation(part.act) for part in (expand, depthwise, project))
    layers = Layers(_outputs(first), acts=acts)  # pyright: ignore
    squeezed: tuple[str | None, str | None] = None, None
    if squeeze is not None:
        name = parts[kinds.index("s")].target
        squeezed = f"{name}.{squeeze.reduce}", f"{name}.{squeeze.excite}"
        layers = layers._replace(squeeze_acts=squeeze.acts)
    if depthwise is not None:
        conv: Any = modules[depthwise.target]
        above, before = conv.padding
        layers = layers._replace(stride=conv.stride[0], padding=(above, above, before, before))
    names = (expand and expand.target, depthwise and depthwise.target, *squeezed, project and project.target)
    return Chain(names, layers, _inputs(first), _outputs(last))


def _squeeze_alone(step: Step, found: _Squeeze, modules: dict[str, nn.Module]) -> Squeeze:
    names = f"{step.target}.{found.reduce}", f"{step.target}.{found.excite}"
    return Squeeze(names, found.acts, _outputs(modules[names[1]]))


def _inputs(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
