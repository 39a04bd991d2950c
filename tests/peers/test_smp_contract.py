"""What segmentation-models-pytorch asks of an encoder, by its ``tu-`` names for networks of timm."""

from __future__ import annotations

import pytest
import torch
from contract import NETWORKS, SMALL, images, shallow, shared, small, without_gradient
from torch import nn

smp = pytest.importorskip("segmentation_models_pytorch")

# Each with what an encoder of four maps from stride 4 on needs.
ARCHITECTURES = {
    "Unet": {},
    "UnetPlusPlus": {},
    "MAnet": {},
    "Linknet": {},
    "FPN": {},
    "PSPNet": dict(encoder_depth=3),
    "PAN": dict(encoder_output_stride=16),
    "DeepLabV3": dict(encoder_output_stride=8),
    "DeepLabV3Plus": dict(encoder_output_stride=16),
    "UPerNet": {},
    "Segformer": {},
    "DPT": dict(encoder_depth=4, decoder_readout="ignore"),
}
# It makes each network in full to look at its strides; the larger ones differ from the tiny ones in numbers alone.
LARGER = ("_small", "_medium", "_large")
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.endswith(LARGER) else ()) for name in NETWORKS]
)
each_kind = pytest.mark.parametrize("kind", SMALL)


def largest_depth(name: str) -> int:
    return max(info["reduction"] for info in shared(name).feature_info).bit_length() - 1


@each
def test_a_segmenter_of_each_network_learns_in_every_parameter(name):
    """Its encoder gives the image and a map of each stride."""
    depth = largest_depth(name)
    with torch.device("meta"):
        model = smp.Unet(
            f"tu-{name}",
            encoder_depth=depth,
            decoder_channels=(32, 16, 16, 8, 8)[:depth],
            encoder_weights=None,
            in_channels=4,
            classes=2,
            aux_params={"classes": 3, "pooling": "avg"},
            **shallow(name),
        )
    maps: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda *call: maps.extend(call[2]))
    masks, labels = model(images(channels=4, device="meta"))
    assert [m.shape[1] for m in maps] == model.encoder.out_channels
    assert [64 // m.shape[-1] for m in maps] == [2**i for i in range(depth + 1)]
    assert model.encoder.output_stride == 2**depth
    assert masks.shape == (2, 2, 64, 64)
    assert labels.shape == (2, 3)
    (masks.sum() + labels.sum()).backward()
    assert without_gradient(model) == []


@each_kind
def test_an_encoder_of_fewer_maps(kind):
    name, options = SMALL[kind]
    for depth in (2, 3, 4):
        with torch.device("meta"):
            encoder = smp.encoders.get_encoder(f"tu-{name}", depth=depth, weights=None, **options).eval()
        maps = encoder(images(device="meta"))
        assert [m.shape[1] for m in maps] == encoder.out_channels
        assert [64 // m.shape[-1] for m in maps] == [2**i for i in range(depth + 1)]


def segmenter(architecture: str, kind: str, **kwargs) -> nn.Module:
    name, options = SMALL[kind]
    torch.manual_seed(0)
    settings = {"encoder_weights": None, "classes": 2, **ARCHITECTURES[architecture], **options, **kwargs}
    return smp.create_model(architecture, f"tu-{name}", **settings).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_decoder_fits(architecture):
    with torch.device("meta"):
        model = segmenter(architecture, next(iter(SMALL)))
    assert model(images(size=128, device="meta")).shape == (2, 2, 128, 128)


@each_kind
def test_a_frozen_encoder_stays_as_it_is_and_thaws(kind):
    model = segmenter("FPN", kind).train()
    model.freeze_encoder()
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    assert not any(p.requires_grad for p in model.encoder.parameters())
    model(images()).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())
    model.unfreeze_encoder()
    model.train()
    model(images()).sum().backward()
    assert without_gradient(model) == []


@each_kind
def test_a_segmenter_is_saved_and_comes_back(kind, tmp_path):
    model, x = segmenter("FPN", kind), images()
    model.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path, **SMALL[kind][1]).eval()
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


@each_kind
def test_the_encoder_takes_the_weights_of_a_classifier(kind):
    model, x = small(kind), images()
    encoder = segmenter("FPN", kind).encoder
    flat = encoder.model.state_dict()
    state = {next((key for key in (name, name.replace(".", "_", 1)) if key in flat), name): value
             for name, value in model.state_dict().items()}  # fmt: skip
    encoder.model.load_state_dict({key: state[key] for key in flat})
    with torch.no_grad():
        assert torch.equal(encoder(x)[-1], model.forward_features(x))
