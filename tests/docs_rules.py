"""How test_docs_run.py runs README and docs: stand-ins for files, smaller sizes, and what can't run and why."""

from __future__ import annotations

TINY = "--model transcnn_test --img_size 32 --epochs 1 --limit_batches 2 --batch_size 4 --quiet true"
DENSE = f"{TINY} --img_size 64 --model_args {{}} --num_workers 0"
DETECT = f"{DENSE} --batch_size 2 --short_side 64 --long_side 96 --fpn_channels 16"

# (a pattern of "PAGE: LINE", what is appended to the command); the first that fits counts, flags given last win.
SMALLER = [
    (
        r"train photos --config recipes/folder_finetune",
        TINY + " --early_stop null --pretrained false",
    ),
    (r"train photos --model resnet18 --plug", "--img_size 64 --epochs 1 --limit_batches 1 --batch_size 2 --quiet true"),
    (r"train photos --img_size 1024", TINY + " --img_size 64 --model_args '{}'"),
    (r"train photos", TINY),
    (r"train shapes --model transcnn_micro", "--epochs 1 --limit_batches 2 --batch_size 8 --quiet true"),
    (r"train (dots/|scenes )", TINY),
    (r"train camvid.tar", DENSE),
    (r"train (bccd.tar|shapes --config)", DETECT),
    (r"compare .*--train", "--models transcnn_test --sizes 32 --batch 2 --rounds 1 --seconds 0.01 --memory false"),
    (r"compare .*--reference", "--models transcnn_tiny --sizes 64 --batch 1 --rounds 1 --seconds 0.01 --memory false"),
    (r"compare", "--models transcnn_test --sizes 32 --batch 2 --rounds 1 --seconds 0.01 --memory false"),
]

# What stands for what, in commands and in Python.
INSTEAD = [
    ("pretrained=True)  # downloads", "pretrained=False)"),
    ('"resnet50", pretrained=True', '"resnet50", pretrained=False'),
    ("--static 224", "--static 32"),
    ("--class_name dog", "--class_name class_1"),
    (".cuda()", ""),
    ("pretrained=True, epochs=8", "pretrained=True, epochs=1, limit_batches=2, batch_size=8, quiet=True"),
]

# Pages, and lines, that take long: run by pytest -m slow. Elsewhere they are parsed.
SLOW = [
    r"^(data|plug|export|share|tutorial|large-images|segmentation|detection)\.md:",
    r"compare",
    r"grad_cam|transcnn_tiny",
]

# What isn't run, and why; our commands among it are parsed, Python is compiled.
NOT_RUN = [
    (r"^(imagenet|faults)\.md:", "ImageNet, or several machines or GPUs"),
    (r": (\.venv/bin/)?(pip|make|apt) |: make$|\.venv/bin/", "installs, or is what CI itself calls"),
    (
        r": python (-m transcnn\.commands\.pack_weights|benchmarks/)",
        "measures for minutes; benchmarks are written to be repeated",
    ),
    (r"HiResCAM", "needs the extra cam, which brings OpenCV; tests/test_explain.py runs the package where it is there"),
    (r": transcnn demo", "serves until it is stopped; tests/test_demo.py does that"),
    (r"(train|eval \S+) torch/", "torchvision's data sets, which must be downloaded"),
    (r"push_to_hub\(", "needs the hub; tests/test_share.py runs it against a stand-in"),
    (r"train imagefolder|FOLDER|IMAGENET", "stands for the reader's own data"),
    (r"transcnn plug resnet50$", "run by tests/test_plug_commands.py"),
]
