"""Exact attention on [B, L, H, K], by a table of backends. Strided views are accepted: no backend asks for a copy.

`auto` takes the best backend of the device (table.py: ORDER) that is there and works; SageAttention, which quantises, only
runs when asked for by name. Only `sdpa` on the CPU has run so far: the others are written from their sources (flash.py).
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from pusa_fast.attention.table import BACKENDS, ORDER, chosen, refusal
from pusa_fast.device import default_dtype, parse_device

__all__ = ["BACKENDS", "ORDER", "attention", "backends", "resolve"]


def backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend by name, with the reason `device` (None: the GPU where there is one) cannot use it, or None where it can.

    Each one found is tried on a small forward at head dimension 128, in bfloat16 on a GPU.
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
    """The name of the backend that `backend` ("auto" included) stands for on `device` (None: the GPU where there is one).

    `dtype` None: bfloat16 on a GPU, float32 elsewhere. `grad`: gradients are wanted. Raises ValueError for a name that is
    unknown, and for a backend asked for by name that cannot be used there.
    """
    where = parse_device(device)
    return chosen(
        backend, where, dtype or default_dtype(where), head_dim, grad, torch.are_deterministic_algorithms_enabled()
    )


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v, full and unmasked. q [B, Lq, H, K]; k, v [B, Lk, H, K]; returns [B, Lq, H, K].

    Raises ValueError for shapes or dtypes that do not agree, and for a backend that is unknown or unusable here.
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
    head_dim = operator.index(of_q[3])  # torch.compile takes a head dimension for a constant, even among dynamic shapes
    return BACKENDS[chosen(backend, device, dtype, head_dim, grad, deterministic)].run(q, k, v)
