"""Residual, LayerNorm and modulation by frame in one pass: reads x and y, writes r and n.

    r = x + gate[f] * y
    n = LN(r) * (1 + scale[f]) + shift[f]    or    LN(r) * weight + bias    or    LN(r)

x, y, r, n [B, L, D], frame-major: token l is of frame f = l // (L / F). gate, scale and shift are each a table [B, F, D]
plus a base row [D], either of which may be absent; weight, bias [D]. LN takes the biased variance, and r before it is
rounded. Backwards, with xhat = (r - mean) * rstd from the r that was stored:

    g = dn * (1 + scale[f])    or    dn * weight    or    dn
    dx = dr + rstd * (g - mean_D(g) - xhat * mean_D(g * xhat)),    dy = gate[f] * dx
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._launch import row_launch
from pusa_fast.kernels._tokens import (
    Table,
    accumulator,
    as_row,
    as_table,
    as_tokens,
    load_row,
    load_table,
    load_tokens,
    store_tokens,
    tile,
    triton_accumulator,
    unit_stride,
)
from pusa_fast.kernels.fp8 import check_fp8_device, to_e4m3
from pusa_fast.kernels.fp8 import row_scale as e4m3_scale
from pusa_fast.kernels.table_grad import frame_moments, frame_products

# Elements of a row in one thread: four warps at D = 5120, and registers for three rows or more at once on an SM.
_PER_THREAD = 40


@triton.jit(do_not_specialize=["L", "tokens_per_frame"])
def residual_norm_forward_kernel(
    x, y, gate, scale, shift, weight, bias, r, n, row_scale, mean, rstd, L, tokens_per_frame,
    eps: tl.constexpr, D: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What is None is absent: without x, r = gate * y; without n, the residual alone; with row_scale, n as e4m3 rows."""
    i_b, o_l, o_d, mask = tile(L, D, BR, BD)
    i_f = o_l // tokens_per_frame
    if y is None:
        b_r = load_tokens(x, i_b, o_l, o_d, mask, acc)
    else:
        b_r = load_tokens(y, i_b, o_l, o_d, mask, acc)
        if gate is not None:
            b_r *= load_table(gate, i_b, i_f, o_d, mask, acc)
        if x is not None:
            b_r += load_tokens(x, i_b, o_l, o_d, mask, acc)
        store_tokens(r, b_r, i_b, o_l, o_d, L, D, mask)
    if n is not None:
        p_row = i_b * L + o_l
        b_mean = tl.sum(b_r, 1, keep_dims=True) / D
        b_n = tl.where(o_d < D, b_r - b_mean, 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_n * b_n, 1, keep_dims=True) / D + eps)
        b_n *= b_rstd
        if scale is not None:
            b_n *= 1 + load_table(scale, i_b, i_f, o_d, mask, acc)
            b_n += load_table(shift, i_b, i_f, o_d, mask, acc)
        if weight is not None:
            b_n *= load_row(weight, o_d, mask, acc)
            b_n += load_row(bias, o_d, mask, acc)
        if mean is not None:
            tl.store(mean + p_row, b_mean, o_l < L)
            tl.store(rstd + p_row, b_rstd, o_l < L)
        if row_scale is not None:
            b_n = b_n.to(tl.float32)
            # Of the maximum alone, which is NaN where r holds one, for then the whole row is NaN.
            b_scale = e4m3_scale(tl.max(tl.abs(b_n), 1, keep_dims=True))
            b_n = to_e4m3(b_n, b_scale)
            tl.store(row_scale + p_row, b_scale, o_l < L)
        store_tokens(n, b_n, i_b, o_l, o_d, L, D, mask)


@triton.jit(do_not_specialize=["L", "tokens_per_frame"])
def residual_norm_backward_kernel(
    dr, dn, r, gate, scale, weight, mean, rstd, dx, dy, L, tokens_per_frame,
    D: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, o_l, o_d, mask = tile(L, D, BR, BD)
    i_f = o_l // tokens_per_frame
    b_mean = tl.load(mean + i_b * L + o_l, o_l < L, 0.0)
    b_rstd = tl.load(rstd + i_b * L + o_l, o_l < L, 0.0)
    b_xhat = (load_tokens(r, i_b, o_l, o_d, mask, acc) - b_mean) * b_rstd
    b_g = load_tokens(dn, i_b, o_l, o_d, mask, acc)
    if scale is not None:
        b_g *= 1 + load_table(scale, i_b, i_f, o_d, mask, acc)
    if weight is not None:
        b_g *= load_row(weight, o_d, mask, acc)
    # Beyond the row g is 0, whatever xhat is.
    b_gx = tl.sum(b_g * b_xhat, 1, keep_dims=True) / D
    b_dx = (b_g - tl.sum(b_g, 1, keep_dims=True) / D - b_xhat * b_gx) * b_rstd
    if dr is not None:
        b_dx += load_tokens(dr, i_b, o_l, o_d, mask, acc)
    store_tokens(dx, b_dx, i_b, o_l, o_d, L, D, mask)
    if gate is not None:
        b_dx *= load_table(gate, i_b, i_f, o_d, mask, acc)
        store_tokens(dy, b_dx, i_b, o_l, o_d, L, D, mask)


def _frames(*tables: Tensor | None) -> int:
    return next((t.shape[1] for t in tables if t is not None), 1)


def _forward(
    x: Tensor | None,
    y: Tensor | None,
    gate: Table | None,
    scale: Table | None,
    shift: Table | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    frames: int,
    *,
    r: Tensor | None = None,
    n: Tensor | None = None,
    row_scale: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> None:
    """Fills those of r, n, row_scale, mean and rstd that are given."""
    like = y if x is None else x
    assert like is not None
    B, L, D = like.shape
    if like.numel():
        launch = row_launch(L, D, _PER_THREAD)
        residual_norm_forward_kernel[(B * launch.programs,)](
            as_tokens(x), as_tokens(y), gate, scale, shift, as_row(weight), as_row(bias),
            r, n, row_scale, mean, rstd, L, L // frames,
            eps=eps, D=D, acc=triton_accumulator(like), BR=launch.rows, BD=launch.block, num_warps=launch.warps,
        )  # fmt: skip


def residual_norm_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_base: Tensor | None,
    scale: Tensor | None,
    scale_base: Tensor | None,
    shift: Tensor | None,
    shift_base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(r, n, mean, rstd): r None without y; r, n contiguous in x's dtype; mean, rstd [B, L] in the accumulator's."""
    n = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = None if y is None else torch.empty_like(n)
    mean = torch.empty(x.shape[:2], dtype=accumulator(x), device=x.device)
    rstd = torch.empty_like(mean)
    tables = as_table(gate, gate_base), as_table(scale, scale_base), as_table(shift, shift_base)
    _forward(x, y, *tables, weight, bias, eps, _frames(gate, scale, shift), r=r, n=n, mean=mean, rstd=rstd)
    return r, n, mean, rstd


def residual_norm_fp8_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_base: Tensor | None,
    scale: Tensor | None,
    scale_base: Tensor | None,
    shift: Tensor | None,
    shift_base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(r, q, row_scale): n ~ q * row_scale as float8_e4m3fn [B, L, D] and float32 [B, L, 1]; n is never rounded to x's dtype."""
    check_fp8_device(x.device)
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    r = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    row_scale = torch.empty((*x.shape[:2], 1), dtype=torch.float32, device=x.device)
    tables = as_table(gate, gate_base), as_table(scale, scale_base), as_table(shift, shift_base)
    _forward(x, y, *tables, weight, bias, eps, _frames(gate, scale, shift), r=r, n=q, row_scale=row_scale)
    return r, q, row_scale


def residual_norm_backward(
    dr: Tensor | None,
    dn: Tensor,
    r: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_base: Tensor | None,
    scale: Tensor | None,
    scale_base: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_gate: bool,
    want_modulation: bool,
    want_affine: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dy, dgate, dscale, dshift, dweight, dbias), None where absent or unwanted; without a gate dy is dx.

    dx contiguous in r's dtype, dy in y's (r's, where y is not given); gradients of tables [B, F, D], with one F for a base
    row alone, and of weight and bias [D], in the accumulator's dtype. y is read only for dgate.
    """
    B, L, D = r.shape
    dn, r = unit_stride(dn), unit_stride(r)
    rows = as_table(gate, gate_base)
    dx = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    dy = None if rows is None else torch.empty_like(dx, dtype=r.dtype if y is None else y.dtype)
    if r.numel():
        launch = row_launch(L, D, _PER_THREAD)
        residual_norm_backward_kernel[(B * launch.programs,)](
            as_tokens(dr), as_tokens(dn), as_tokens(r), rows, as_table(scale, scale_base), as_row(weight),
            mean, rstd, dx, dy, L, L // _frames(gate, scale),
            D=D, acc=triton_accumulator(r), BR=launch.rows, BD=launch.block, num_warps=launch.warps,
        )  # fmt: skip
    dgate, dscale, dshift, dweight, dbias = [None] * 5
    if want_gate and y is not None:
        dgate = frame_products(dx, y, _frames(gate))
    if want_modulation:
        dscale, dshift = frame_moments(dn, r, _frames(scale), mean, rstd)
    if want_affine:
        dweight, dbias = (t.sum((0, 1)) for t in frame_moments(dn, r, 1, mean, rstd))
    return dx, dy, dgate, dscale, dshift, dweight, dbias


def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor | None, gate_base: Tensor | None) -> Tensor:
    """r = x + gate[f] * y alone, contiguous in x's dtype."""
    r = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward(x, y, as_table(gate, gate_base), None, None, None, None, 0.0, _frames(gate), r=r)
    return r


def gated_residual_backward(
    dr: Tensor, y: Tensor | None, gate: Tensor | None, gate_base: Tensor | None, want_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dy, dgate): dy = gate[f] * dr in y's dtype (dr's, where y is not given), None without a gate; dgate [B, F, D]."""
    dr = unit_stride(dr)
    rows = as_table(gate, gate_base)
    dy = None
    if rows is not None:
        dy = torch.empty(dr.shape, dtype=dr.dtype if y is None else y.dtype, device=dr.device)
        _forward(None, dr, rows, None, None, None, None, 0.0, _frames(gate), r=dy)
    return dy, frame_products(dr, y, _frames(gate)) if want_gate and y is not None else None
