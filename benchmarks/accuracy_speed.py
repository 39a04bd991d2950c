"""ImageNet top-1 beside speed: results/accuracy_speed.png, from what ratios.py measured.

    python benchmarks/accuracy_speed.py            # needs results/speed_ratios.csv, see ratios.py

Each network is shown by the faster of optimize() and OpenVINO, in fp32 and (where it was timed) bf16, at the size at
which its accuracy was measured; networks that weren't timed at that size are left out. Top-1 wasn't measured here.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
from timm.models import get_pretrained_cfg

from transcnn.variants import PAPER_TOP1

ROOT = Path(__file__).resolve().parent.parent
# Network: its name in the figure, top-1 in percent as timm scored the weights (results-imagenet.csv of timm's
# repository, August 2026), side of the images in pixels, the weights' tag.
PEERS = {
    "resnet50": ("ResNet-50", 80.65, 224, "a1h_in1k"),
    "efficientnet_b0": ("EfficientNet-B0", 77.70, 224, "ra_in1k"),
    "mobilenetv2_100": ("MobileNetV2", 72.91, 224, "ra_in1k"),
    "pvt_v2_b1": ("PVTv2-B1", 78.70, 224, "in1k"),
    "swin_tiny_patch4_window7_224": ("Swin-T", 81.39, 224, "ms_in1k"),
    "convnext_tiny": ("ConvNeXt-T", 82.07, 224, "fb_in1k"),
    "repvit_m1_1": ("RepViT-M1.1, distilled", 80.83, 224, "dist_300e_in1k"),
    "fastvit_t8": ("FastViT-T8", 76.18, 256, "apple_in1k"),
}


# Of names beside their points, which are close.
LEFT, RIGHT, ABOVE = (
    {"xytext": at, "ha": to} for at, to in (((-6, -3), "right"), ((6, -3), "left"), ((0, 7), "center"))
)
PLACES = {"hatnet_medium": RIGHT, "hatnet_large": ABOVE, "resnet50": ABOVE, "swin_tiny_patch4_window7_224": LEFT}


def networks() -> dict[str, tuple[str, float, int]]:
    """Every network's name in the figure, top-1 and size."""
    ours = {}
    for name, top1 in PAPER_TOP1.items():
        design, size = name.split("_")
        shown = {"transcnn": "TransCNN", "hatnet": "HAT-Net"}[design]
        ours[name] = (f"{shown}-{size.title()}", top1, get_pretrained_cfg(name).input_size[1])  # pyright: ignore
    return ours | {name: facts[:3] for name, facts in PEERS.items()}


def fastest(lines: list[dict[str, str]], dtype: str, batch: int) -> dict[str, tuple[float, float, str]]:
    """Images a second, top-1 and engine of every network that was timed at its size."""
    found: dict[str, tuple[float, float, str]] = {}
    facts = networks()
    for line in lines:
        name, speed = line["network"], line["images_per_s"]
        known = name in facts and speed and line["engine"] in ("optimize", "openvino")
        known = known and line["dtype"] == dtype and int(line["batch"]) == batch
        if known and int(line["size"]) == facts[name][2] and float(speed) > found.get(name, (0.0,))[0]:
            found[name] = (float(speed), facts[name][1], line["engine"])
    return found


def draw(lines: list[dict[str, str]], batch: int, path: Path) -> None:
    """A panel a dtype; ours are filled."""
    kinds = [kind for kind in ("fp32", "bf16") if fastest(lines, kind, batch)]
    figure, panels = plt.subplots(1, len(kinds), figsize=(7 * len(kinds), 5), sharey=True, squeeze=False)
    facts = networks()
    for panel, kind in zip(panels[0], kinds, strict=True):
        for name, (speed, top1, engine) in fastest(lines, kind, batch).items():
            ours = name in PAPER_TOP1
            color = "C0" if ours else "C1"
            panel.plot(
                speed, top1, "o" if engine == "optimize" else "^", color=color, fillstyle="full" if ours else "none"
            )
            place = PLACES.get(name, LEFT if ours else RIGHT)
            panel.annotate(facts[name][0], (speed, top1), textcoords="offset points", fontsize=8, color=color, **place)
        panel.set(xscale="log", xlabel=f"images a second, batch {batch}", title=kind)
        panel.set_xticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
        panel.minorticks_off()
        panel.margins(x=0.25, y=0.1)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ImageNet top-1 in percent")
    machine = "; ".join(dict.fromkeys(line["machine"] for line in lines if int(line["batch"]) == batch))
    figure.suptitle(f"circle: optimize() is the faster engine, triangle: OpenVINO ({machine})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=ROOT / "results" / "speed_ratios.csv")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "accuracy_speed.png")
    options = parser.parse_args()
    with options.table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    draw(lines, options.batch, options.out)


if __name__ == "__main__":
    main()
