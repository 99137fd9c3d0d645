"""Residual, LayerNorm and modulation by frame in one pass over memory, and RMSNorm.

In a table [B, F, D] token l of a sequence reads row (first_token + l) // tokens_per_frame. A
sequence may be a part of a clip; without `tokens_per_frame` it is all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.ops.checks import check_residual, check_tensors, shape
from pusa_fast.ops.registry import Grads, Op, accumulator, choose, contiguous_like


def _cast(grad: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else grad.to(like.dtype)


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
    tokens_per_frame: int | None = None,
    first_token: int = 0,
) -> tuple[Tensor, Tensor]:
    """r = x + gate[f] * y; n = LN(r) * (1 + scale[f]) + shift[f], or LN(r) * weight + bias.

    x, y [B, L, D]; gate, scale, shift [B, F, D]; weight, bias [D]. y and gate are optional; scale
    comes with shift, weight with bias, and not both pairs. Token l is of frame
    (first_token + l) // tokens_per_frame, by default l // (L // F). Returns (r, n) in x's dtype.
    Raises ValueError.
    """
    rows = {"scale": scale, "shift": shift, "weight": weight, "bias": bias}
    per_frame = check_residual("residual_norm", x, y, gate, rows, tokens_per_frame, first_token)
    backend = choose(x, y)
    if backend == "reference":
        return reference.residual_norm(x, y, gate, **rows, eps=eps, tokens_per_frame=per_frame, first_token=first_token)
    r, n, _, _ = _residual_norm(backend, x, y, gate, *rows.values(), eps, per_frame, first_token)
    return (x if y is None else r), n


# (r, n, mean, rstd): r empty without y; mean, rstd [B, L], what the derivative needs of the norm.
_residual_norm = Op(
    "residual_norm(Tensor x, Tensor? y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
    "float eps, SymInt tokens_per_frame, SymInt first_token) -> (Tensor, Tensor, Tensor, Tensor)",
    "residual_norm_forward",
)


@_residual_norm.fake
def _(x: Tensor, y: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    stats = (x.new_empty(x.shape[:2], dtype=accumulator(x)) for _ in range(2))
    return x.new_empty(0) if y is None else contiguous_like(x), contiguous_like(x), *stats


# (dx, dy, dgate, dscale, dshift, dweight, dbias), empty if unwanted. Without a gate dy is dx. y is
# read, and needed, only for dgate: training with frozen tables does not save it.
_residual_norm_backward = Op(
    "residual_norm_backward(Tensor? dr, Tensor dn, Tensor r, Tensor? y, Tensor? gate, Tensor? scale, Tensor? weight, "
    "Tensor mean, Tensor rstd, bool want_gate, bool want_modulation, bool want_affine, SymInt tokens_per_frame, "
    "SymInt first_token) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "residual_norm_backward",
)


@_residual_norm_backward.fake
def _(
    dr: Any, dn: Any, r: Tensor, y: Any, gate: Any, scale: Any, weight: Any, mean: Any, rstd: Any, *wanted: Any
) -> tuple[Tensor, ...]:
    want_gate, want_modulation, want_affine = wanted[:3]

    def sums(table: Tensor | None, want: bool) -> Tensor:
        return r.new_empty(table.shape, dtype=accumulator(r)) if want and table is not None else r.new_empty(0)

    dy = r.new_empty(0) if gate is None else contiguous_like(r, None if y is None else y.dtype)
    modulation = (sums(scale, want_modulation) for _ in range(2))
    return contiguous_like(r), dy, sums(gate, want_gate), *modulation, *(sums(weight, want_affine) for _ in range(2))


def _setup_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, gate, scale, shift, weight, bias, _, ctx.tokens_per_frame, ctx.first_token = inputs
    r, _, mean, rstd = output
    needs = ctx.needs_input_grad
    ctx.wants = needs[2], needs[3] or needs[4], needs[5] or needs[6]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.y_dtype = None if y is None else y.dtype
    saved = x if y is None else r, y if ctx.wants[0] else None
    ctx.save_for_backward(*saved, gate, scale, shift, weight, bias, mean, rstd)


def _backward_residual_norm(ctx: Any, dr: Tensor | None, dn: Tensor | None, *_stats: Tensor | None) -> Grads:
    r, y, gate, scale, shift, weight, bias, mean, rstd = ctx.saved_tensors
    dn = torch.zeros_like(r) if dn is None else dn
    # Without y, r went out as x itself, and what reaches it is no gradient of this op.
    dr = None if ctx.y_dtype is None else dr
    rows = r, y, gate, scale, weight, mean, rstd
    results = _residual_norm_backward.operator(dr, dn, *rows, *ctx.wants, ctx.tokens_per_frame, ctx.first_token)
    dx, dy, dgate, dscale, dshift, dweight, dbias = results
    want_gate, want_modulation, want_affine = ctx.wants
    return (
        dx,
        None if ctx.y_dtype is None else (dx if gate is None else dy).to(ctx.y_dtype),
        _cast(dgate, gate) if want_gate else None,
        *((_cast(dscale, scale), _cast(dshift, shift)) if want_modulation else (None, None)),
        *((_cast(dweight, weight), _cast(dbias, bias)) if want_affine else (None, None)),
        *(None, None, None),
    )


_residual_norm.derivative(_setup_residual_norm, _backward_residual_norm)


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    tokens_per_frame: int | None = None,
    first_token: int = 0,
) -> Tensor:
    """x + gate[f] * y, or x + y without a gate, in x's dtype.

    x, y [B, L, D]; gate [B, F, D]; frames as in `residual_norm`. Raises ValueError.
    """
    per_frame = check_residual("gated_residual", x, y, gate, {}, tokens_per_frame, first_token)
    backend = choose(x, y)
    if backend == "reference":
        return reference.gated_residual(x, y, gate, tokens_per_frame=per_frame, first_token=first_token)
    out: Tensor = _gated_residual(backend, x, y, gate, per_frame, first_token)
    return out


_gated_residual = Op(
    "gated_residual(Tensor x, Tensor y, Tensor? gate, SymInt tokens_per_frame, SymInt first_token) -> Tensor",
    "gated_residual_forward",
)
_gated_residual.fake(lambda x, *args: contiguous_like(x))

# (dy, dgate), empty if unwanted; without a gate dy is dr.
_gated_residual_backward = Op(
    "gated_residual_backward(Tensor dr, Tensor? y, Tensor? gate, bool want_gate, SymInt tokens_per_frame, "
    "SymInt first_token) -> (Tensor, Tensor)",
    "gated_residual_backward",
)


@_gated_residual_backward.fake
def _(dr: Tensor, y: Tensor | None, gate: Tensor | None, want_gate: bool, *args: Any) -> tuple[Tensor, Tensor]:
    if gate is None:
        return dr.new_empty(0), dr.new_empty(0)
    dgate = dr.new_empty(gate.shape, dtype=accumulator(dr)) if want_gate else dr.new_empty(0)
    return contiguous_like(dr, None if y is None else y.dtype), dgate


def _setup_gated_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate, ctx.tokens_per_frame, ctx.first_token = inputs
    ctx.want_gate, ctx.y_dtype = ctx.needs_input_grad[2], y.dtype
    ctx.save_for_backward(y if ctx.want_gate else None, gate)


def _backward_gated_residual(ctx: Any, dr: Tensor) -> Grads:
    y, gate = ctx.saved_tensors
    if gate is None:
        return dr, dr.to(ctx.y_dtype), None, None, None
    where = ctx.tokens_per_frame, ctx.first_token
    dy, dgate = _gated_residual_backward.operator(dr, y, gate, ctx.want_gate, *where)
    return dr, dy.to(ctx.y_dtype), _cast(dgate, gate) if ctx.want_gate else None, None, None


_gated_residual.derivative(_setup_gated_residual, _backward_gated_residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., D], weight [D]; returns
    x's dtype."""
    check_tensors("rms_norm", x, weight=weight)
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must match x's last dimension: x {shape(x)}, weight {shape(weight)}")
    backend = choose(x)
    if backend == "reference":
        return reference.rms_norm(x, weight, eps)
    n: Tensor = _rms_norm(backend, x, weight, eps)[0]
    return n


# (n, rstd [...])
_rms_norm = Op("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", "rms_norm_forward")


@_rms_norm.fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), x.new_empty(x.shape[:-1], dtype=accumulator(x))


# (dx, dweight), the latter empty if unwanted.
_rms_norm_backward = Op(
    "rms_norm_backward(Tensor dn, Tensor x, Tensor weight, Tensor rstd, bool want_weight) -> (Tensor, Tensor)",
    "rms_norm_backward",
)


@_rms_norm_backward.fake
def _(dn: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, want_weight: bool) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), x.new_empty(weight.shape, dtype=accumulator(x)) if want_weight else x.new_empty(0)


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward_rms_norm(ctx: Any, dn: Tensor, _rstd: Tensor) -> Grads:
    want_weight = ctx.needs_input_grad[1]
    x, weight, rstd = ctx.saved_tensors  # unpacked once: activation checkpointing allows no second time
    dx, dweight = _rms_norm_backward.operator(dn, x, weight, rstd, want_weight)
    return dx, _cast(dweight, weight) if want_weight else None, None


_rms_norm.derivative(_setup_rms_norm, _backward_rms_norm)
