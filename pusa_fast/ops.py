"""The transformer's memory-bound steps, one function per op: validates its arguments, then calls the chosen backend.

The formulas stand in `pusa_fast.kernels.reference`; the names here are the same. `ops.use("reference")` forces a backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.kernels.reference import rope_split

__all__ = ["BACKENDS", "guided_euler_step", "qk_rope", "residual_norm", "rms_norm", "rope_split", "use"]


class Backend(Protocol):
    """What a backend module provides; see `kernels/reference.py` for the formulas."""

    def residual_norm(
        self,
        x: Tensor,
        y: Tensor | None = None,
        gate: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor: ...

    def qk_rope(
        self,
        qkv: Tensor,
        weight_q: Tensor,
        weight_k: Tensor,
        cos: Tensor,
        sin: Tensor,
        grid: tuple[int, int, int],
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]: ...

    def guided_euler_step(
        self, x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor
    ) -> Tensor: ...


BACKENDS: Mapping[str, Backend] = MappingProxyType({"reference": reference})

_forced = "reference"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force the backend `name` inside this context, for the whole process: a switch for tests and measurements.

    Raises ValueError for an unknown or unavailable backend.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"ops backend {name!r} does not exist: choose one of {', '.join(BACKENDS)}")
    # A plain global, since torch.compile guards on one and breaks its graph at a ContextVar.
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _backend() -> Backend:
    return BACKENDS[_forced]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(x: Tensor | None) -> list[int] | None:
    return None if x is None else list(x.shape)


def _check_float(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be a float tensor, got {x.dtype}")


def residual_norm(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """r = x + gate[f] * y ; n = LN(r) * (1 + scale[f]) + shift[f], or LN(r) * weight + bias. Returns (r, n) in x's dtype.

    x, y [B, L, D]; gate, scale, shift [B, F, D] with F a divisor of L (token n is of frame n // (L // F)); weight, bias
    [D]. y and gate are optional; scale comes with shift, weight with bias, and not both pairs. Raises ValueError.
    """
    op = "residual_norm"
    _check(x.ndim == 3, f"{op}: x must be [B, L, D], got {_shape(x)}")
    B, L, D = x.shape
    _check_float(op, x=x, y=y, gate=gate, scale=scale, shift=shift, weight=weight, bias=bias)
    _check(y is None or y.shape == x.shape, f"{op}: y must have x's shape {_shape(x)}, got {_shape(y)}")
    _check(gate is None or y is not None, f"{op}: gate given without y: there is nothing to gate")
    _check((scale is None) == (shift is None), f"{op}: scale and shift go together, give both or neither")
    _check((weight is None) == (bias is None), f"{op}: weight and bias go together, give both or neither")
    _check(scale is None or weight is None, f"{op}: give scale and shift, or weight and bias, not both pairs")
    frames = {t.shape[1] for t in (gate, scale, shift) if t is not None and t.ndim == 3}
    for name, rows in (("gate", gate), ("scale", scale), ("shift", shift)):
        if rows is not None and (rows.ndim != 3 or (rows.shape[0], rows.shape[2]) != (B, D) or len(frames) > 1):
            raise ValueError(f"{op}: {name} must be [B={B}, F, D={D}] with one F for all tables, got {_shape(rows)}")
    for F in frames:
        _check(F > 0 and L % F == 0, f"{op}: {L} tokens do not divide into {F} frames")
    for name, row in (("weight", weight), ("bias", bias)):
        _check(row is None or row.shape == (D,), f"{op}: {name} must be [D={D}], got {_shape(row)}")
    return _backend().residual_norm(x, y, gate, scale=scale, shift=shift, weight=weight, bias=bias, eps=eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., D], weight [D]; returns x's dtype."""
    _check_float("rms_norm", x=x, weight=weight)
    _check(
        x.ndim > 0 and weight.shape == x.shape[-1:],
        f"rms_norm: weight must match x's last dimension: x {_shape(x)}, weight {_shape(weight)}",
    )
    return _backend().rms_norm(x, weight, eps)


def qk_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: tuple[int, int, int],
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and of k over the full width H*K, then 3-D rotary embedding of adjacent pairs.

    qkv [B, L, 3, H, K], K even; weight_q, weight_k [H*K]; cos, sin [P, K/2], P >= max(grid), columns in axis order as
    `rope_split(K)` says; grid (F, h, w) with F*h*w = L. Returns (q, k), each [B, L, H, K] in qkv's dtype. Raises ValueError.
    """
    op = "qk_rope"
    _check(qkv.ndim == 5 and qkv.shape[2] == 3, f"{op}: qkv must be [B, L, 3, H, K], got {_shape(qkv)}")
    _check_float(op, qkv=qkv, weight_q=weight_q, weight_k=weight_k, cos=cos, sin=sin)
    L, H, K = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    _check(K % 2 == 0, f"{op}: the head dimension must be even, got {K}")
    _check(grid[0] * grid[1] * grid[2] == L, f"{op}: grid {tuple(grid)} does not hold {L} tokens")
    for name, row in (("weight_q", weight_q), ("weight_k", weight_k)):
        _check(row.shape == (H * K,), f"{op}: {name} must be [H*K={H * K}], got {_shape(row)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 2 or table.shape[0] < max(grid) or table.shape[1] != K // 2:
            raise ValueError(f"{op}: {name} must be [P >= {max(grid)}, K/2={K // 2}], got {_shape(table)}")
    return _backend().qk_rope(qkv, weight_q, weight_k, cos, sin, grid, eps)


def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """x[f] += (v_neg + guidance * (v - v_neg))[f] * dsigma[f]; frames whose dsigma is 0 keep their bits.

    x, v, v_neg [B, C, F, h, w], v_neg None for no guidance; dsigma [F]. Returns x's dtype. Raises ValueError.
    """
    op = "guided_euler_step"
    _check(x.ndim == 5, f"{op}: x must be [B, C, F, h, w], got {_shape(x)}")
    _check_float(op, x=x, v=v, v_neg=v_neg, dsigma=dsigma)
    for name, velocity in (("v", v), ("v_neg", v_neg)):
        _check(
            velocity is None or velocity.shape == x.shape, f"{op}: {name} must be {_shape(x)}, got {_shape(velocity)}"
        )
    _check(dsigma.shape == x.shape[2:3], f"{op}: dsigma must be [F={x.shape[2]}], got {_shape(dsigma)}")
    return _backend().guided_euler_step(x, v, v_neg, guidance, dsigma)
