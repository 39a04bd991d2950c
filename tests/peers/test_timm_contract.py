"""What timm asks of a network that it registers."""

from __future__ import annotations

import pytest
import timm
import torch
from contract import NETWORKS, SMALL, images, on_meta, shallow, shared, small, without_gradient
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3, freeze, unfreeze

each = pytest.mark.parametrize("name", NETWORKS)
each_kind = pytest.mark.parametrize("kind", SMALL)


@each
def test_its_cfg_says_all_that_there_is_to_know(name):
    model = shared(name)
    cfg = model.pretrained_cfg
    assert timm.is_model(name)
    assert name in timm.list_models(name.split("_")[0] + "*")
    assert cfg is model.default_cfg
    assert cfg["architecture"] == name
    for key in ("url", "num_classes", "input_size", "pool_size", "crop_pct", "interpolation", "mean", "std"):
        assert key in cfg, key
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0] == 3
    assert cfg["interpolation"] in ("bilinear", "bicubic")
    assert 0 < cfg["crop_pct"] <= 1
    state = model.state_dict()
    first, last = (cfg[key] if isinstance(cfg[key], str) else cfg[key][0] for key in ("first_conv", "classifier"))
    assert state[f"{first}.weight"].shape[1] == 3
    assert state[f"{last}.weight"].shape[0] == model.num_classes == cfg["num_classes"]
    assert isinstance(model.get_classifier(), torch.nn.Linear)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == cfg["input_size"]
    stride = model.feature_info[-1]["reduction"]
    assert tuple(cfg["pool_size"]) == tuple(side // stride for side in cfg["input_size"][1:])


@each
def test_its_parts_make_the_whole(name):
    """forward is forward_features and forward_head; a map, features without a head, and logits."""
    model, x = on_meta(name, **shallow(name)).eval(), images(device="meta")
    maps = model.forward_features(x)
    assert maps.shape == (2, model.num_features, 64 // model.feature_info[-1]["reduction"], maps.shape[-1])
    assert model.forward_head(maps).shape == (2, model.num_classes)
    assert model.forward_head(maps, pre_logits=True).shape == (2, model.head_hidden_size)
    final, each_map = model.forward_intermediates(x)
    assert final.shape == maps.shape
    stages = [f for f in model.feature_info if any(m.shape[1] == f["num_chs"] for m in each_map)]
    assert [m.shape[1] for m in each_map][-len(stages) :] == [stage["num_chs"] for stage in stages]
    assert model.forward_intermediates(x, intermediates_only=True, indices=[0, -1])[1].shape == maps.shape
    with pytest.raises((ValueError, AssertionError)):
        model.forward_intermediates(x, indices=[len(each_map)])


@each
def test_learning_reaches_every_parameter(name):
    """Also with gradients checkpointed, with dropout and with stochastic depth."""
    model = on_meta(name, num_classes=7, drop_rate=0.1, drop_path_rate=0.1, **shallow(name)).train()
    model.set_grad_checkpointing()
    y = model(images(device="meta"))
    assert y.shape == (2, 7)
    y.sum().backward()
    assert without_gradient(model) == []


@each
def test_its_head_is_replaced(name):
    model, x = on_meta(name, num_classes=9, **shallow(name)).eval(), images(device="meta")
    maps = torch.empty(2, model.num_features, 2, 2, device="meta")
    model.reset_classifier(3)
    assert model.forward_head(maps).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert model.forward_head(maps).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model.forward_head(maps).shape == maps.shape
    model.reset_classifier(4, "max")
    assert model.forward_head(maps).shape == (2, 4)
    model.prune_intermediate_layers([0])
    first = model.forward_features(x)
    assert first.shape == model(x).shape == model.forward_intermediates(x)[1][-1].shape
    model.reset_classifier(6, "avg")
    assert model(x).shape == (2, 6)


@each_kind
def test_a_new_head_is_where_and_what_the_network_is(kind):
    model = small(kind).to(torch.float64)
    model.reset_classifier(0)
    model.reset_classifier(3)
    assert model(images().double()).dtype == torch.float64
    assert model.get_classifier().weight.device == images().device


@each
def test_its_parameters_fall_into_layers(name):
    model = shared(name)
    names = {key for key, _ in model.named_parameters()}
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(p for group in groups.values() for p in group) == sorted(names)
        assert len(groups) > (2 if coarse else 4)
    assert set(model.no_weight_decay()) <= names if hasattr(model, "no_weight_decay") else True
    for groups in (param_groups_layer_decay(model, layer_decay=0.7), param_groups_weight_decay(model, 0.05)):
        assert sum(len(group["params"]) for group in groups) == len(names)
    scales = {id(p): group["lr_scale"] for group in param_groups_layer_decay(model) for p in group["params"]}
    assert scales[id(model.get_classifier().weight)] == max(scales.values())


@each
def test_features_only_gives_its_maps(name):
    model = on_meta(name, features_only=True, num_classes=0, **shallow(name))
    maps = model(images(device="meta"))
    info = model.feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    assert [64 // m.shape[-1] for m in maps] == info.reduction()
    assert info.reduction() == sorted(info.reduction())
    assert all(module in dict(shared(name).named_modules()) for module in info.module_name())
    assert model.feature_info.out_indices == tuple(range(len(maps)))


@each_kind
@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride(kind, output_stride):
    name, options = SMALL[kind]
    model = on_meta(name, features_only=True, output_stride=output_stride, **options)
    maps = model(images(device="meta"))
    assert model.feature_info.reduction()[-1] == 64 // maps[-1].shape[-1] == output_stride


@each_kind
def test_every_way_to_its_maps_gives_the_same(kind):
    model, x = small(kind), images()
    name, options = SMALL[kind]
    state = model.state_dict()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        assert torch.equal(model.forward_head(final), model(x))
        for i in range(-2, 0):
            chosen = model.forward_intermediates(x, indices=[i], intermediates_only=True)
            assert torch.equal(chosen[0], maps[i])
        for indices in ([1, 2], [-2, -1]):
            features = timm.create_model(name, features_only=True, out_indices=indices, **options).eval()
            flat = {key.replace(".", "_", 1) if key.replace(".", "_", 1) in features.state_dict() else key: value
                    for key, value in state.items()}  # fmt: skip
            features.load_state_dict({key: flat[key] for key in features.state_dict()})
            found = features(x)
            counts = [f["num_chs"] for f in model.feature_info]
            assert [m.shape[1] for m in found] == [counts[i] for i in indices]
            same = [any(torch.equal(m, other) for other in maps) for m in found]
            assert all(same)


@each_kind
def test_its_state_comes_back(kind, tmp_path):
    model, x = small(kind), images()
    torch.save(model.state_dict(), tmp_path / "state.pth")
    name, options = SMALL[kind]
    again = timm.create_model(name, checkpoint_path=str(tmp_path / "state.pth"), num_classes=5, **options).eval()
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
        assert model(images(channels=3, size=33)).isfinite().all()
    one = timm.create_model(name, in_chans=1, global_pool="max", **options).eval()
    with torch.no_grad():
        assert one(images(channels=1)).isfinite().all()


@each_kind
def test_timms_utilities_take_it(kind):
    """Freezing and thawing a part and its norms, synchronized norms, averaged weights, statistics by name."""
    model, x = small(kind), images()
    with torch.no_grad():
        expected = model(x)
    part = model.feature_info[0]["module"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model.train(), part)
    model(x).square().mean().backward()
    inside = [name for name, _ in model.named_parameters() if name.startswith(f"{part}.")]
    assert sorted(name for name, p in model.named_parameters() if p.grad is None) == sorted(inside)
    frozen = {name: value for name, value in model.state_dict().items() if name.startswith(f"{part}.")}
    assert all(torch.equal(value, state[name]) for name, value in frozen.items() if "num_batches" not in name)
    unfreeze(model, part)
    model(x).square().mean().backward()
    assert without_gradient(model) == []
    model.load_state_dict(state)
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
        average.update(model)
        for name, p in average.module.named_parameters():
            torch.testing.assert_close(p, 1.5 * state[name], msg=name)
        model.load_state_dict(state)
        synchronized = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.eval())
        torch.testing.assert_close(synchronized(x), expected, rtol=1e-4, atol=1e-4)
