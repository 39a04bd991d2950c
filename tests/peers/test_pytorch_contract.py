"""What PyTorch's own tools, and those that count by its classes, do with a network."""

from __future__ import annotations

import copy
import datetime
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract import NETWORKS, SMALL, images, on_meta, shallow, small, without_gradient
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from transcnn.fast import accelerate_training, plain

each = pytest.mark.parametrize("name", NETWORKS)
each_kind = pytest.mark.parametrize("kind", SMALL)


def multiply_adds(model: nn.Module, size: int = 64) -> int:
    device = next(model.parameters()).device.type
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(1, size, device=device))
    return counter.get_total_flops() // 2


@each
def test_the_layers_are_those_that_tools_know_by_their_type(name):
    """Convolutions and linear layers are exactly PyTorch's, whose types tools look up in tables."""
    model = on_meta(name, **shallow(name)).eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    assert {type(m) for m in layers} <= {nn.Conv2d, nn.Linear, nn.BatchNorm2d}
    assert not any(p.is_leaf is False for p in model.parameters())
    own = sum(p.numel() for m in model.modules() for p in m.parameters(recurse=False))
    assert own == sum(p.numel() for p in model.parameters())
    assert multiply_adds(model) > 1_000_000


@each_kind
def test_copies_and_pickles_compute_the_same_and_share_nothing(kind):
    model, x = small(kind), images()
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
            for p in other.parameters():
                p.zero_()
            assert torch.equal(model(x), expected)


@each_kind
def test_hooks_of_the_state_dict_and_of_every_module_run(kind):
    model, x = small(kind), images()
    model.register_state_dict_post_hook(lambda module, state, *_: state.update(extra=torch.tensor(1)))
    assert "extra" in model.state_dict()
    seen: list[str] = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(x).sum().backward()
    own = [name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    assert sorted(seen) == sorted(own)  # each once
    assert without_gradient(model) == []


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # PyTorch's own attention under vmap
@each_kind
def test_functional_calls_and_transforms(kind):
    model, x = small(kind).double(), images(3, 32).double()
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    last = model.get_classifier().weight
    doubled = {name: value * 2 if value is last else value for name, value in values.items()}
    with torch.no_grad():
        assert not torch.allclose(torch.func.functional_call(model, doubled, (x,)), model(x))
        assert torch.equal(torch.func.functional_call(model, values, (x,)), model(x))

    def loss(image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, values, (image[None],))[0, 0]

    each_gradient = torch.func.vmap(torch.func.grad(loss))(x)
    for image, gradient in zip(x, each_gradient, strict=True):
        image = image.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(image), image)[0])


@each_kind
def test_gradients_of_gradients(kind):
    """As a penalty on gradients asks for them; also where kernels have trained, once those are gone."""
    model, x = small(kind), images(2, 32).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other ones have none
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(found) > 0.5 * len(list(model.parameters()))
        accelerate_training(model)
        assert plain(model) is model
        model.zero_grad()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, found, again))


@each_kind
def test_fx_gives_the_same_and_maps_by_name(kind):
    model, x = small(kind), images()
    traced = torch.fx.symbolic_trace(model)
    last = model.feature_info[-1]["module"]
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
        other = images(1, 32)
        assert torch.equal(traced(other), model(other))  # a trace holds for every size
        maps = create_feature_extractor(model, {last: "map"})(x)["map"]
        assert torch.equal(maps, model.forward_features(x))
    pickle.loads(pickle.dumps(traced))


@each_kind
def test_it_is_exported_and_compiled_as_one_graph(kind):
    model, x = small(kind), images()
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
        if kind == next(iter(SMALL)):
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@each_kind
def test_it_is_exported_for_every_size_and_learns_when_compiled(kind):
    model, x = small(kind), images()
    batch, side = torch.export.Dim("batch", max=8), torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 2: side, 3: side},), strict=False)
    with torch.no_grad():
        for y in (x, images(3, 96)):
            torch.testing.assert_close(program.module()(y), model(y), rtol=1e-4, atol=1e-4)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for gradient, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@each_kind
def test_fx_quantization_takes_every_convolution(kind):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    model, x = small(kind), images(4)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,))
    with torch.no_grad():
        prepared(x)
        quantized = quantize_fx.convert_fx(prepared)
        assert not any(type(m) is nn.Conv2d for m in quantized.modules())
        kinds = [type(m).__module__ for m in quantized.modules() if "Conv" in type(m).__name__]
        assert len(kinds) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
        assert all("quantized" in kind for kind in kinds)
        assert torch.nn.functional.cosine_similarity(quantized(x), model(x)).min() > 0.9


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@each_kind
def test_pt2e_quantization_takes_every_convolution(kind):
    pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, x = small(kind), images()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,), strict=False).module(check_guards=False), quantizer)
    with torch.no_grad():
        prepared(x)
        quantized = convert_pt2e(prepared)
        move_exported_model_to_eval(quantized)
        convolutions = [node for node in quantized.graph.nodes if node.target is torch.ops.aten.conv2d.default]
        assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
        assert all("dequantize" in str(node.args[0]) and "dequantize" in str(node.args[1]) for node in convolutions)
        assert torch.nn.functional.cosine_similarity(quantized(x), model(x)).min() > 0.9


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("counter", ["thop", "ptflops"])
@each_kind
def test_counters_by_layer_miss_nothing(kind, counter):
    """All but products of matrices, which they don't know; norms and activations, which PyTorch doesn't count."""
    tool = pytest.importorskip(counter)
    model = small(kind)
    if counter == "thop":
        counted, parameters = tool.profile(copy.deepcopy(model), inputs=(images(1),), verbose=False)
    else:
        counted, parameters = tool.get_model_complexity_info(
            copy.deepcopy(model), (3, 64, 64), as_strings=False, print_per_layer_stat=False, backend="pytorch"
        )
    layers = 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
        nonlocal layers
        layers += y.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    model(images(1))
    assert layers <= counted <= 1.25 * layers
    assert parameters <= sum(p.numel() for p in model.parameters()) <= 1.05 * parameters


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), rank=rank, world_size=2)
    for kind in SMALL:
        model = small(kind)
        model.requires_grad_(False).requires_grad_(True)  # frozen and thawed: each parameter is waited for
        alone = copy.deepcopy(model)
        both, x = DistributedDataParallel(model), images(4)
        for _ in range(2):  # what the first step leaves out ends the second
            both.zero_grad()
            both(x[rank::2]).square().mean().backward()
        alone(x).square().mean().backward()
        worst = max(
            (p.grad - q.grad).norm() / q.grad.norm().clamp_min(1e-3)
            for p, q in zip(model.parameters(), alone.parameters(), strict=True)
        )
        with open(f"{folder}/{rank}.txt", "a") as file:
            file.write(f"{kind} {worst < 1e-3}\n")
    dist.destroy_process_group()


@pytest.mark.usefixtures("forks")
def test_two_processes_learn_what_one_would(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="forkserver")  # pyright: ignore
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text().splitlines() == [f"{kind} True" for kind in SMALL]
