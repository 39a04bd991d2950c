"""What transformers asks of a network of timm: its wrapper for classification and its backbone."""

from __future__ import annotations

import pytest
import torch
from contract import NETWORKS, SMALL, images, shallow, without_gradient

transformers = pytest.importorskip("transformers")

each = pytest.mark.parametrize("name", NETWORKS)
each_kind = pytest.mark.parametrize("kind", SMALL)


def classifier(name, **options):
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=3, model_args=options)
    return transformers.TimmWrapperForImageClassification(config)


@each
def test_the_wrapper_classifies_and_learns(name):
    with torch.device("meta"):
        model = classifier(name, **shallow(name))
    assert model.supports_gradient_checkpointing
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # the newer name first
    labels = torch.zeros(2, dtype=torch.long, device="meta")
    answer = model(images(device="meta"), labels=labels, output_hidden_states=True)
    assert answer.logits.shape == (2, 3)
    assert [state.ndim for state in answer.hidden_states] == [4] * len(answer.hidden_states)
    answer.loss.backward()
    assert without_gradient(model) == []


@each_kind
def test_the_wrapper_comes_back_from_a_folder(kind, tmp_path):
    name, options = SMALL[kind]
    torch.manual_seed(0)
    model, x = classifier(name, **options).eval(), images()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
        found = again(x)
        assert torch.equal(found.logits, expected.logits)
        last = model(x, output_hidden_states=[0, 1]).hidden_states
        assert all(map(torch.equal, last, expected.hidden_states[:2]))
        features = transformers.AutoModel.from_pretrained(tmp_path).eval()(x)
    assert features.pooler_output.shape[0] == features.last_hidden_state.shape[0] == 2
    assert features.last_hidden_state.shape[1] == model.timm_model.num_features


@each_kind
def test_the_backbone_gives_the_maps_asked_for(kind):
    name, _ = SMALL[kind]
    for indices in ([0, 2], [-1]):
        config = transformers.TimmBackboneConfig(
            backbone=name, use_pretrained_backbone=False, out_indices=indices, freeze_batch_norm_2d=True
        )
        with torch.device("meta"):
            model = transformers.TimmBackbone(config)
        answer = model(images(device="meta"))  # hidden states it has of no network whose stages timm flattens
        assert [m.shape[1] for m in answer.feature_maps] == model.channels
        assert len(answer.feature_maps) == len(indices) == len(model.out_features)
        sum(m.sum() for m in answer.feature_maps).backward()
        assert without_gradient(model) == []
