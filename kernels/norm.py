"""RMSNorm over the last dimension: n = x * rstd * weight, rstd = 1 / sqrt(mean_D(x^2) + eps).

x [..., D], often a strided half of a packed projection; weight [D]. Backward, with xhat = x * rstd
and g = dn * weight:

    dx = rstd * (g - xhat * mean_D(g * xhat)),    dweight = sum over rows of dn * xhat
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
    as_sequences,
    load_row,
    load_tokens,
    store_tokens,
    tile,
    triton_accumulator,
    unit_stride,
)
from pusa_fast.kernels.table_grad import frame_products

_PER_THREAD = 40  # elements, as in residual_norm.py


@triton.jit(do_not_specialize=["L"])
def rms_norm_forward_kernel(
    x, weight, n, rstd, L,
    eps: tl.constexpr, D: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, o_l, o_d, mask = tile(L, D, BR, BD)
    b_x = load_tokens(x, i_b, o_l, o_d, mask, acc)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / D + eps)
    tl.store(rstd + i_b * L + o_l, b_rstd, o_l < L)
    store_tokens(n, b_x * b_rstd * load_row(weight, o_d, mask, acc), i_b, o_l, o_d, L, D, mask)


@triton.jit(do_not_specialize=["L"])
def rms_norm_backward_kernel(
    dn, x, weight, rstd, dx, L,
    D: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, o_l, o_d, mask = tile(L, D, BR, BD)
    b_rstd = tl.load(rstd + i_b * L + o_l, o_l < L, 0.0)
    b_xhat = load_tokens(x, i_b, o_l, o_d, mask, acc) * b_rstd
    b_g = load_tokens(dn, i_b, o_l, o_d, mask, acc) * load_row(weight, o_d, mask, acc)
    b_dx = (b_g - b_xhat * (tl.sum(b_g * b_xhat, 1, keep_dims=True) / D)) * b_rstd
    store_tokens(dx, b_dx, i_b, o_l, o_d, L, D, mask)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(n, rstd): n [..., D] contiguous in x's dtype, rstd [...] in the accumulator's."""
    n = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=accumulator(x), device=x.device)
    x = as_sequences(x)
    B, L, D = x.shape
    if x.numel():
        launch = row_launch(L, D, _PER_THREAD)
        rms_norm_forward_kernel[(B * launch.programs,)](
            as_rows(x), as_row(weight), n, rstd, L,
            eps=eps, D=D, acc=triton_accumulator(x), BR=launch.rows, BD=launch.block, num_warps=launch.warps,
        )  # fmt: skip
    return n, rstd


def rms_norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx [..., D] contiguous in x's dtype, dweight [D] in the accumulator's or None)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = as_sequences(x)
    dn = unit_stride(dn.reshape(x.shape))
    B, L, D = x.shape
    if x.numel():
        launch = row_launch(L, D, _PER_THREAD)
        rms_norm_backward_kernel[(B * launch.programs,)](
            as_rows(dn), as_rows(x), as_row(weight), rstd, dx, L,
            D=D, acc=triton_accumulator(x), BR=launch.rows, BD=launch.block, num_warps=launch.warps,
        )  # fmt: skip
    return dx, frame_products(dn, x, 1, L, 0, rstd).sum((0, 1)) if want_weight else None
