"""Which implementation of a layer runs, and why: PyTorch's operations, C++ kernels on a CPU, Triton kernels on a GPU.

Whatever traces, compiles, exports or transforms a network is given PyTorch's operations.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from ..attention import grid_attention
from ..grids import channels_first, channels_last
from .cpu import support

__all__ = [
    "HALF_DTYPES",
    "autocast_dtype",
    "autotune",
    "eager_cpu",
    "fits_cpu",
    "fits_triton",
    "globally_hooked",
    "hooked",
    "interpreted",
    "onednn_has_bf16",
    "own_nchw",
    "to_nchw",
    "to_nhwc",
    "traced",
    "uses_triton_grids",
]

HALF_DTYPES = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (*HALF_DTYPES, torch.float32)
_best: dict[Hashable, int] = {}  # of autotuned implementations, by shapes and dtypes
_works: dict[int | None, bool] = {}  # whether Triton's kernels run, by the GPU's index
_log = logging.getLogger(__name__)


@functools.cache
def onednn_has_bf16() -> bool:
    """Whether oneDNN convolves bf16 on this CPU, with sums in fp32; without it PyTorch adds in bf16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def hooked(module: nn.Module) -> bool:
    """Whether this very module has hooks, or a forward method set on the instance, which a replacement wouldn't run."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def globally_hooked() -> bool:
    """Whether hooks want to see the call of every module there is."""
    return bool(nn_module._has_any_global_hook())


def autocast_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What autocast casts both to before a convolution; None where it leaves them, as it does in double precision."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    known = all(t.is_floating_point() and t.dtype != torch.double for t in (x, weight))
    return torch.get_autocast_dtype(device) if known else None


def eager_cpu(x: Tensor) -> bool:
    """Whether this runs on a CPU, operation by operation."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def traced() -> bool:
    """Whether operations are being traced or transformed, by torch.jit, make_fx, torch.func or forward-mode AD."""
    transformed = torch._C._are_functorch_transforms_active()  # whose tensors have no memory of their own
    transformed = transformed or forward_ad._current_level >= 0
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0 or transformed


def to_nhwc(x: Tensor) -> Tensor:
    """(B, C, *S) -> (B, *S, C), a copy only if the memory isn't channels-last."""
    return channels_last(x).contiguous()


def to_nchw(x: Tensor) -> Tensor:
    """(B, *S, C) -> (B, C, *S), never a copy: the memory is channels-last."""
    return channels_first(x)


def own_nchw(x: Tensor) -> Tensor:
    """:func:`to_nchw` as a tensor of its own, though of the same memory: what custom Functions must return.

    PyTorch lets nothing change the result of a custom Function in place if it is a view, and where the view is taken
    outside of the Function, the gradient of such a change is several copies of the map.
    """
    y = to_nchw(x)
    return x.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


# --- C++ kernels on a CPU ---------------------------------------------------------------------------------------------


def fits_cpu(x: Tensor, *channels: int, gemm: bool = True) -> bool:
    """Whether the C++ kernels run on tensors like this one, and on maps and heads of so many channels each.

    They take 16 channels at a time, in bf16 at least 32, but for kernels without matrix products (``gemm=False``).
    """
    if not eager_cpu(x):  # first of all: torch.compile would stumble over what follows
        return False
    least = 32 if gemm and x.dtype == torch.bfloat16 else 16
    plain = type(x) in (Tensor, nn.Parameter) and x.numel() > 0 and x.layout == torch.strided and not x.is_neg()
    return plain and not traced() and not any(n % 16 or n < least for n in channels) and support.supports(x.dtype)


# --- Triton kernels on a GPU ------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is how they are tested."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fits_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run on tensors like this one, which must be on the current GPU."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    here = x.device.index == torch.cuda.current_device() if x.device.type == "cuda" else interpreted()
    return here and not traced() and x.dtype in TRITON_DTYPES and x.numel() > 0 and _triton_works(x.device.index)


def autotune(key: Hashable, make: Callable[[], Sequence[Callable[[], object]]]) -> int:
    """Which of the implementations that ``make`` gives is the fastest on the current GPU, timed once for each ``key``.

    That costs some milliseconds (and a second where a kernel has to be compiled). One that raises can't be the
    fastest. While a CUDA graph is captured nothing can be timed: the last one, which has to be PyTorch's own, runs
    then.
    """
    if interpreted():
        return 0
    key = (torch.cuda.current_device(), key)
    if key not in _best:
        implementations = make()
        if torch.cuda.is_current_stream_capturing():
            return len(implementations) - 1
        times = [_milliseconds(run) for run in implementations]
        _best[key] = times.index(min(times))
    return _best[key]


def _milliseconds(run: Callable[[], object], times: int = 5) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    try:
        for i in range(3 + times):
            if i == 3:
                start.record()
            run()
        end.record()
        torch.cuda.synchronize()
    except Exception:  # an old GPU, too little shared memory, a Triton that doesn't fit: another one always runs
        return float("inf")
    return start.elapsed_time(end)


def _triton_works(device: int | None) -> bool:
    """Whether kernels run there; tried once, but not while a CUDA graph is captured, which a trial would break."""
    if device not in _works:
        if not interpreted() and torch.cuda.is_current_stream_capturing():
            return False
        _works[device] = _try_triton(device)
    return _works[device]


def _try_triton(device: int | None) -> bool:
    """Whether Triton compiles and runs a kernel there, for which it wants a C compiler and a GPU that isn't too old."""
    if importlib.util.find_spec("triton") is None:
        return False
    if interpreted():
        return True
    try:
        from .triton.norms import affine_silu

        x = torch.ones(4, 16, device=f"cuda:{device}")
        return bool((affine_silu(x, x[0], x[0], silu=False) == 2).all())
    except Exception as problem:  # whatever a driver, a compiler or Triton may say
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        _log.info("PyTorch's own operations run on the GPU, for Triton's kernels don't: %s", reason)
        return False


def uses_triton_grids(like: Tensor, head_dim: int, size: int) -> bool:
    """Whether the Triton kernel computes the attention inside grids of maps (B, H, W, C) like this one.

    It and PyTorch's operations are autotuned, with the backward pass where gradients are on.
    """
    if not fits_triton(like):
        return False
    from .triton.local_attention import supports

    if not supports(like.dtype, head_dim, size):
        return False
    key = ("grids", tuple(like.shape), like.dtype, head_dim, size, torch.is_grad_enabled())
    return autotune(key, lambda: _grid_implementations(like, head_dim, size)) == 0


def _grid_implementations(like: Tensor, head_dim: int, size: int) -> list[Callable[[], object]]:
    """The kernel and PyTorch's operations, on zeros."""
    from .triton import local_attention

    batch, height, width, channels = like.shape
    qkv = torch.zeros(batch, height, width, 3 * channels, dtype=like.dtype, device=like.device)
    qkv.requires_grad_(torch.is_grad_enabled())
    residual = torch.zeros_like(qkv[..., :channels])

    def run(attend: Callable[[], Tensor]) -> None:
        out = attend()
        if qkv.requires_grad:
            torch.autograd.grad(out, qkv, out.detach())

    def plain() -> Tensor:
        return residual + grid_attention(to_nchw(qkv), head_dim, size).permute(0, 2, 3, 1)

    return [lambda: run(lambda: local_attention.grid_attention(qkv, head_dim, size, residual)), lambda: run(plain)]
