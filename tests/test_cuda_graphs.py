"""Captured networks: what a replay must mind, with a CPU in place of a GPU; where Triton doesn't run."""

import pytest
import timm
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from transcnn.fast import cuda_graphs, dispatch


class Replay:
    """Stands for a CUDA graph: the same operations, on the same memory, each time."""

    def __init__(self, replay) -> None:
        self.replay = replay


def captured(model: nn.Module, x: torch.Tensor) -> cuda_graphs._Training:
    """A capture of ``model`` for inputs like ``x``, as ``_Training`` makes one on a GPU."""
    made = object.__new__(cuda_graphs._Training)
    made.inputs, made.passes = cuda_graphs._static((x,)), 0
    made.parameters = [p for p in model.parameters() if p.requires_grad]
    outputs, made.spec = tree_flatten(model(x))
    made.outputs = [y.detach().clone().requires_grad_(y.requires_grad) for y in outputs]
    made.output_grads = [torch.zeros_like(y) for y in made.outputs if y.requires_grad]
    made.parameter_grads = tuple(torch.zeros_like(p) for p in made.parameters)
    graph: list[torch.Tensor] = []

    def forward() -> None:
        with torch.enable_grad():
            graph[:] = tree_flatten(model(*made.inputs))[0]
        with torch.no_grad():
            for static, y in zip(made.outputs, graph, strict=True):
                static.copy_(y)

    def backward() -> None:
        leaving = [y for y in graph if y.requires_grad]
        grads = torch.autograd.grad(leaving, made.parameters, made.output_grads, retain_graph=True)
        for static, grad in zip(made.parameter_grads, grads, strict=True):
            static.copy_(grad)

    made.forward, made.backward = Replay(forward), Replay(backward)
    return made


class Two(nn.Module):
    """A network with an output that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layer(x)
        return {"logits": y, "class": y.argmax(1)}


@pytest.fixture
def model() -> Two:
    return Two()


def loss(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return outputs["logits"].square().sum()


def gradients(model: nn.Module, forward, *batches: torch.Tensor) -> list[torch.Tensor]:
    for x in batches:
        loss(forward(x)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_answers_and_gradients_are_the_networks(model):
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    graph = captured(model, a)
    first, second = graph((a,)), graph((b,))
    assert torch.equal(first["logits"], model(a)["logits"])  # the second pass has not written over it
    assert torch.equal(second["class"], model(b)["class"])
    assert not second["class"].requires_grad
    found = gradients(model, lambda x: graph((x,)), b)
    model.zero_grad()
    for one, other in zip(found, gradients(model, model, b), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_add_up_over_several_passes(model, to_none):
    batches = [torch.randn(5, 4) for _ in range(3)]
    graph = captured(model, batches[0])
    expected = gradients(model, model, *batches)
    for _ in range(2):
        model.zero_grad(set_to_none=to_none)
        for one, other in zip(gradients(model, lambda x: graph((x,)), *batches), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_backward_pass_of_an_earlier_forward_pass_is_refused(model):
    x = torch.randn(5, 4)
    graph = captured(model, x)
    earlier, _ = graph((x,)), graph((x,))
    with pytest.raises(RuntimeError, match="belongs to an earlier forward pass"):
        loss(earlier).backward()


def test_graphs_are_cached_by_key_and_the_least_recently_used_is_dropped():
    cache = cuda_graphs._GraphCache(after=2)
    assert [cache.is_due("a") for _ in range(4)] == [False, False, True, True]
    for i in range(cuda_graphs.MAX_GRAPHS + 1):
        cache.put(i, f"graph {i}")
        cache.get(0)  # used again and again
    assert cache.get(0) == "graph 0"
    assert cache.get(1) is None
    assert cache.get(cuda_graphs.MAX_GRAPHS) == f"graph {cuda_graphs.MAX_GRAPHS}"


def test_where_triton_does_not_run_its_kernels_are_not_used(caplog):
    if torch.cuda.is_available():
        pytest.skip("it may run here")
    with caplog.at_level("INFO"):
        assert not dispatch._try_triton(0)
    assert caplog.text == "" or "Triton's kernels don't" in caplog.text  # Triton may not be installed at all
    assert not dispatch.fits_triton(torch.zeros(4, 16))


def test_what_a_graph_is_valid_for():
    model = timm.create_model("transcnn_test").train()
    before = cuda_graphs._state(model)
    assert cuda_graphs._state(model) == before
    next(model.parameters()).data.add_(1)  # an optimizer's step
    assert cuda_graphs._state(model) == before
    model.stem.eval()
    assert cuda_graphs._state(model) != before
    model.train()
    model.head.fc.weight.requires_grad_(False)
    assert cuda_graphs._state(model) != before
    assert cuda_graphs._key((torch.zeros(1),)) is None  # on a CPU
    assert cuda_graphs._key(("text",)) is None
    assert not any(map(cuda_graphs.hooked, model.modules()))
    model.stem.register_forward_hook(lambda *a: None)
    assert any(map(cuda_graphs.hooked, model.modules()))


def test_a_capture_leaves_the_parameters_where_they_are():
    """However many names a module or a parameter has."""
    layer, tied = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    tied.weight = layer.weight
    model = nn.Sequential(layer, tied, nn.ModuleList([layer, tied]), nn.Linear(4, 2))
    model.again = model[3]
    model[3].bias.requires_grad_(False)
    run = nn.Sequential(layer, tied, layer, model[3])
    model.forward = run.forward
    x, before = torch.randn(3, 4), dict(model.named_parameters(remove_duplicate=False))
    trainable = [p for p in model.parameters() if p.requires_grad]
    shadows = cuda_graphs._Shadows(model, trainable)
    (y,), _ = shadows.call((x,))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())
    grads = torch.autograd.grad(y.sum(), shadows.parameters)
    assert torch.equal(y, run(x))
    for found, expected in zip(grads, torch.autograd.grad(run(x).sum(), trainable), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("change", ["loaded", "cast"])
def test_a_graph_is_forgotten_with_the_weights_that_it_reads(change):
    network = cuda_graphs.CapturedInference(nn.Linear(4, 3))
    network._cache.put("key", "graph")
    network.load_state_dict(network.state_dict(), assign=True) if change == "loaded" else network.double()
    assert network._cache.get("key") is None
