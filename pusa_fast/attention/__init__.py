"""Exact attention on [B, L, H, K] through a table of backends; strided views need no copy.

`auto` takes the device's best working backend (table.py: ORDER); SageAttention, which quantises,
runs only when named. Only `sdpa` on the CPU has run so far; flash.py says what the others rest on.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from pusa_fast.attention.table import BACKENDS, ORDER, chosen, refusal
from pusa_fast.device import default_dtype, parse_device

__all__ = ["BACKENDS", "ORDER", "attention", "backends", "resolve"]


def backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Each backend by name, and why `device` (None: the GPU, if any) cannot use it, or None.

    Each one found runs a small forward at head dimension 128, in bfloat16 on a GPU.
    """
    where = parse_device(device)
    refusals = {name: refusal(name, where, default_dtype(where), 128, False, False) for name in BACKENDS}
    return {name: found.reason if found else None for name, found in refusals.items()}


def resolve(
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int = 128,
    grad: bool = False,
) -> str:
    """The backend that `backend`, "auto" included, selects on `device` (None: the GPU, if any).

    `dtype` None: bfloat16 on a GPU, float32 elsewhere. `grad`: gradients are wanted. Raises
    ValueError for an unknown name, and for a named backend that cannot be used there.
    """
    where = parse_device(device)
    return chosen(
        backend, where, dtype or default_dtype(where), head_dim, grad, torch.are_deterministic_algorithms_enabled()
    )


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v, unmasked. q [B, Lq, H, K]; k, v [B, Lk, H, K] -> [B, Lq, H, K].

    ValueError: shapes, dtypes or devices that do not agree; a backend that is unknown or unusable.
    """
    of_q, of_k = q.shape, k.shape
    if len(of_q) != 4 or len(of_k) != 4 or of_k != v.shape or of_q[0] != of_k[0] or of_q[2:] != of_k[2:]:
        raise ValueError(
            f"attention needs q [B, Lq, H, K] and k, v [B, Lk, H, K], got {list(of_q)}, {list(of_k)}, {list(v.shape)}"
        )
    device, dtype = q.device, q.dtype
    if not dtype == k.dtype == v.dtype or not device == k.device == v.device:
        raise ValueError(
            "attention needs q, k and v of one dtype on one device, got "
            + ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        )
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    deterministic = torch.are_deterministic_algorithms_enabled()
    head_dim = operator.index(of_q[3])  # a constant to torch.compile, even with dynamic shapes
    return BACKENDS[chosen(backend, device, dtype, head_dim, grad, deterministic)].run(q, k, v)
