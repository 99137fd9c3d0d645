"""Residual, LayerNorm and modulation by frame in one pass: reads x and y, writes r and n.

    r = x + gate[f] * y
    n = LN(r) * (1 + scale[f]) + shift[f]    or    LN(r) * weight + bias    or    LN(r)

x, y, r, n [B, L, D]; gate, scale, shift [B, F, D]; weight, bias [D]. Token l belongs to frame
f = (first_token + l) // tokens_per_frame. LN takes the biased variance, and reads r before it is
rounded. Backward, with xhat = (r - mean) * rstd of the stored r:

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
    accumulator,
    as_row,
    as_rows,
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

# Elements of a row in one thread: four warps at D = 5120, and three rows or more on an SM.
_PER_THREAD = 40


@triton.jit(do_not_specialize=["L", "tokens_per_frame", "first_token"])
def residual_norm_forward_kernel(
    x, y, gate, scale, shift, weight, bias, r, n, row_scale, mean, rstd,
    L, tokens_per_frame, first_token,
    eps: tl.constexpr, D: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Without x, r = gate * y; without n, the residual alone; with row_scale, n is in e4m3."""
    i_b, o_l, o_d, mask = tile(L, D, BR, BD)
    i_f = (first_token + o_l) // tokens_per_frame
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
            # Of the maximum alone: where r holds NaN, the whole row and so the maximum is NaN.
            b_scale = e4m3_scale(tl.max(tl.abs(b_n), 1, keep_dims=True))
            b_n = to_e4m3(b_n, b_scale)
            tl.store(row_scale + p_row, b_scale, o_l < L)
        store_tokens(n, b_n, i_b, o_l, o_d, L, D, mask)


@triton.jit(do_not_specialize=["L", "tokens_per_frame", "first_token"])
def residual_norm_backward_kernel(
    dr, dn, r, gate, scale, weight, mean, rstd, dx, dy, L, tokens_per_frame, first_token,
    D: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, o_l, o_d, mask = tile(L, D, BR, BD)
    i_f = (first_token + o_l) // tokens_per_frame
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


def _forward(
    x: Tensor | None, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, tokens_per_frame: int, first_token: int, *,
    r: Tensor | None, n: Tensor | None = None, row_scale: Tensor | None = None,
    mean: Tensor | None = None, rstd: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills those of r, n, row_scale, mean and rstd that are given."""
    like = y if x is None else x
    assert like is not None
    B, L, D = like.shape
    if like.numel():
        launch = row_launch(L, D, _PER_THREAD)
        residual_norm_forward_kernel[(B * launch.programs,)](
            as_rows(x), as_rows(y), as_rows(gate), as_rows(scale), as_rows(shift), as_row(weight), as_row(bias),
            r, n, row_scale, mean, rstd, L, tokens_per_frame, first_token,
            eps=eps, D=D, acc=triton_accumulator(like), BR=launch.rows, BD=launch.block, num_warps=launch.warps,
        )  # fmt: skip


def residual_norm_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, tokens_per_frame: int, first_token: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """(r, n, mean, rstd): r (None without y) and n contiguous in x's dtype.

    mean, rstd [B, L] are in the accumulator's dtype.
    """
    n = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = None if y is None else torch.empty_like(n)
    mean = torch.empty(x.shape[:2], dtype=accumulator(x), device=x.device)
    rstd = torch.empty_like(mean)
    operands = x, y, gate, scale, shift, weight, bias, eps, tokens_per_frame, first_token
    _forward(*operands, r=r, n=n, mean=mean, rstd=rstd)
    return r, n, mean, rstd


def residual_norm_fp8_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, tokens_per_frame: int, first_token: int,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(r, q, row_scale): n ~ q * row_scale, q float8_e4m3fn [B, L, D], row_scale float32 [B, L, 1].

    n is not rounded to x's dtype in between.
    """
    check_fp8_device(x.device)
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    r = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    row_scale = torch.empty((*x.shape[:2], 1), dtype=torch.float32, device=x.device)
    operands = x, y, gate, scale, shift, weight, bias, eps, tokens_per_frame, first_token
    _forward(*operands, r=r, n=q, row_scale=row_scale)
    return r, q, row_scale


def residual_norm_backward(
    dr: Tensor | None,
    dn: Tensor,
    r: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_gate: bool,
    want_modulation: bool,
    want_affine: bool,
    tokens_per_frame: int,
    first_token: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dy, dgate, dscale, dshift, dweight, dbias), None where absent or unwanted.

    Without a gate dy is None: it equals dx. dx is contiguous in r's dtype, dy in y's (r's if y is
    None). Gradients of tables [B, F, D], 0 for frames without tokens here, and of weight and bias
    [D] are in the accumulator's dtype. y is read only for dgate.
    """
    B, L, D = r.shape
    dn, r = unit_stride(dn), unit_stride(r)
    dx = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    dy = None if gate is None else torch.empty_like(dx, dtype=r.dtype if y is None else y.dtype)
    if r.numel():
        launch = row_launch(L, D, _PER_THREAD)
        residual_norm_backward_kernel[(B * launch.programs,)](
            as_rows(dr), as_rows(dn), as_rows(r), as_rows(gate), as_rows(scale), as_row(weight),
            mean, rstd, dx, dy, L, tokens_per_frame, first_token,
            D=D, acc=triton_accumulator(r), BR=launch.rows, BD=launch.block, num_warps=launch.warps,
        )  # fmt: skip
    dgate, dscale, dshift, dweight, dbias = [None] * 5
    if want_gate and gate is not None and y is not None:
        dgate = frame_products(dx, y, gate.shape[1], tokens_per_frame, first_token)
    if want_modulation and scale is not None:
        dscale, dshift = frame_moments(dn, r, scale.shape[1], tokens_per_frame, first_token, mean, rstd)
    if want_affine:
        dweight, dbias = (t.sum((0, 1)) for t in frame_moments(dn, r, 1, L, 0, mean, rstd))
    return dx, dy, dgate, dscale, dshift, dweight, dbias


def gated_residual_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, tokens_per_frame: int, first_token: int
) -> Tensor:
    """r = x + gate[f] * y alone, contiguous in x's dtype."""
    r = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward(x, y, gate, None, None, None, None, 0.0, tokens_per_frame, first_token, r=r)
    return r


def gated_residual_backward(
    dr: Tensor, y: Tensor | None, gate: Tensor | None, want_gate: bool, tokens_per_frame: int, first_token: int
) -> tuple[Tensor | None, Tensor | None]:
    """(dy = gate[f] * dr in y's dtype, or dr's without y; dgate [B, F, D]), None ungated."""
    if gate is None:
        return None, None
    dr = unit_stride(dr)
    dy = torch.empty(dr.shape, dtype=dr.dtype if y is None else y.dtype, device=dr.device)
    _forward(None, dr, gate, None, None, None, None, 0.0, tokens_per_frame, first_token, r=dy)
    if not want_gate or y is None:
        return dy, None
    return dy, frame_products(dr, y, gate.shape[1], tokens_per_frame, first_token)
