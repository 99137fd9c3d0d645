"""Exact attention on [B, L, H, K], by a table of backends. Strided views are accepted: no backend asks for a copy.

Only `sdpa` on the CPU has run so far; `cudnn`, `fa2`, `fa3` and `fa4` are written from their documentation and have never
run, since no GPU has been at hand. `auto` is `sdpa` until they have been measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Backend:
    """`probe` says why this machine cannot use it (None: it can); `half_on_cuda`: fp16 and bf16 on CUDA only."""

    probe: Callable[[], str | None]
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    half_on_cuda: bool = False


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _probe_cuda() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device: run on a machine with an NVIDIA GPU, or use sdpa"


def _probe_cudnn() -> str | None:
    available: Callable[[], bool] = torch.backends.cudnn.is_available
    return _probe_cuda() or (None if available() else "this torch has no cuDNN: install a CUDA build of torch")


@cache
def _import_reason(module: str, install: str) -> str | None:
    try:
        importlib.import_module(module).flash_attn_func  # noqa: B018
    except ModuleNotFoundError:
        return f"{module} is not installed: {install}"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{module} is installed but does not load ({error}): for torch {torch.__version__}, {install}"
    return None


def _flash(module: str, install: str) -> Backend:
    """A generation of FlashAttention: each has `flash_attn_func` on [B, L, H, K]; some return (out, lse)."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = importlib.import_module(module).flash_attn_func(q, k, v)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    return Backend(lambda: _probe_cuda() or _import_reason(module, install), run, half_on_cuda=True)


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "sdpa": Backend(lambda: None, _sdpa),
        "cudnn": Backend(_probe_cudnn, _cudnn, half_on_cuda=True),
        "fa2": _flash("flash_attn", "pip install flash-attn --no-build-isolation"),
        "fa3": _flash("flash_attn_interface", "build the folder hopper of the flash-attention repository"),
        "fa4": _flash("flash_attn.cute", "pip install --pre 'flash-attn-4[cu13]' triton"),
    }
)


def backends() -> dict[str, str | None]:
    """Every backend by name, with the reason this machine cannot use it, or None where it can."""
    return {name: backend.probe() for name, backend in BACKENDS.items()}


def resolve(backend: str) -> str:
    """The name of the backend that `backend` ("auto" included) stands for. Raises ValueError where it is unusable."""
    name = "sdpa" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} does not exist: choose one of auto, {', '.join(BACKENDS)}")
    if reason := BACKENDS[name].probe():
        raise ValueError(f"attention backend {backend!r} cannot be used: {reason}")
    return name


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v, full and unmasked. q [B, Lq, H, K]; k, v [B, Lk, H, K]; returns [B, Lq, H, K].

    Raises ValueError for shapes or dtypes that do not agree, and for a backend that is unknown or unusable here.
    """
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention needs q [B, Lq, H, K] and k, v [B, Lk, H, K], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            "attention needs q, k and v of one dtype on one device, got "
            + ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        )
    name = resolve(backend)
    chosen = BACKENDS[name]
    if chosen.half_on_cuda and (q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16)):
        raise ValueError(
            f"attention backend {name!r} takes fp16 and bf16 on CUDA, got {q.dtype} on {q.device}: use sdpa"
        )
    return chosen.run(q, k, v)
