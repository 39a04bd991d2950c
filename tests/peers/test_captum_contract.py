"""What captum asks of a network: gradients with respect to images and to layers, by hooks and without."""

from __future__ import annotations

import pytest
import torch
from contract import SMALL, images, small

captum = pytest.importorskip("captum.attr")

each_kind = pytest.mark.parametrize("kind", SMALL)


def last_map(model):
    """The module that makes the last map."""
    return model.get_submodule(model.feature_info[-1]["module"])


@each_kind
def test_attributions_add_up_to_the_difference_that_they_explain(kind):
    model, x, other = small(kind), images(1, 32), images(1, 32)  # at a black image GroupNorm jumps
    method = captum.IntegratedGradients(model)
    found, delta = method.attribute(x, other, target=1, n_steps=64, return_convergence_delta=True)
    with torch.no_grad():
        explained = (model(x) - model(other))[0, 1]
    assert found.shape == x.shape
    assert abs(found.sum() - explained - delta[0]) < 1e-3
    assert abs(delta[0]) < 0.1 * max(1, abs(explained))


@pytest.mark.filterwarnings("ignore:Setting (forward|backward):UserWarning")
@pytest.mark.filterwarnings("ignore:Input Tensor 0 (did not|has a) :UserWarning")
@each_kind
def test_every_kind_of_attribution_is_had(kind):
    model, x = small(kind), images(2, 32)
    layer = last_map(model)
    for method in ("Saliency", "InputXGradient", "Deconvolution", "GuidedBackprop"):
        found = getattr(captum, method)(model).attribute(x.requires_grad_(), target=0)
        assert found.shape == x.shape, method
        assert found.isfinite().all(), method
    parts = torch.arange(16).view(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    found = captum.FeatureAblation(model).attribute(x, target=0, feature_mask=parts)
    assert (found[..., :8, :8] == found[..., :1, :1]).all()
    noisy = captum.NoiseTunnel(captum.Saliency(model)).attribute(x, target=0, nt_samples=2)
    assert noisy.shape == x.shape
    maps = model.forward_features(x)
    assert captum.LayerActivation(model, layer).attribute(x).shape == maps.shape
    assert captum.LayerGradCam(model, layer).attribute(x, target=0).shape == (2, 1, *maps.shape[2:])
    assert captum.LayerIntegratedGradients(model, layer).attribute(x, target=0, n_steps=2).shape == maps.shape
