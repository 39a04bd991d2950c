"""These tests need Triton, and a GPU or ``TRITON_INTERPRET=1``; elsewhere they aren't there."""

import importlib.util
import os

import torch

able = importlib.util.find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
collect_ignore_glob = [] if able else ["test_*.py"]
