"""Our networks answer what the published ones do, on the same weights and images (../shared/parity)."""

import importlib.util

import numpy as np
import pytest
import timm
import torch

import transcnn  # noqa: F401  (registers the models)
from transcnn.checkpoints.published import convert_state_dict

SIZES = {"transcnn_tiny": 256, "hatnet_tiny": 224}


@pytest.fixture(scope="module")
def weights(shared):
    """The module parity/weights.py."""
    spec = importlib.util.spec_from_file_location("parity_weights", shared / "parity" / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("name", SIZES)
def test_logits_and_stages_equal_the_published_models(name, dtype, tolerance, shared, weights, record_property):
    model = timm.create_model(name).eval()
    published = {key: torch.from_numpy(value) for key, value in weights.state_dict(name, seed=0).items()}
    model.load_state_dict(convert_state_dict(published, model))
    images = torch.from_numpy(weights.images(2, SIZES[name], SIZES[name], 0)).to(dtype)
    with torch.inference_mode():
        last, stages = model.to(dtype).forward_intermediates(images)
        answers = {"logits": model.forward_head(last)}
    for i, stage in enumerate(stages):
        answers |= {f"stage{i + 1}_mean": stage.mean((2, 3)), f"stage{i + 1}_corner": stage[:, :, 0, 0]}

    goldens = np.load(shared / "parity" / "goldens.npz")
    expected = {key.split("/")[1]: goldens[key] for key in goldens.files if key.startswith(f"{name}/")}
    assert set(answers) == set(expected)
    errors = {
        key: float(np.linalg.norm(answer.double().numpy() - expected[key]) / np.linalg.norm(expected[key]))
        for key, answer in answers.items()
    }
    print(f"{name} {dtype}: " + ", ".join(f"{key} {error:.1e}" for key, error in errors.items()))
    record_property("relative_errors", errors)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("name", ["transcnn", "hatnet"])
@pytest.mark.parametrize("size", ["tiny", "small", "medium", "large"])
def test_every_published_tensor_has_its_place(name, size, weights):
    name = f"{name}_{size}"
    with torch.device("meta"):
        model = timm.create_model(name)
        published = {key: torch.empty(shape) for key, shape in weights.LAYOUTS[name]}
    converted = convert_state_dict(published, model)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
