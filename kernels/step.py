"""Classifier-free guidance and a per-frame Euler step in one pass.

    x[f] += (v_neg + guidance * (v - v_neg))[f] * dsigma[f]

x, v, v_neg [B, C, F, h, w]; without v_neg the velocity is v; dsigma [F]. Inference only. A frame
whose dsigma is 0 keeps its bits whatever v holds: v is then not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._planes import WARPS, as_planes, plane_launch, plane_pointers, plane_tile
from pusa_fast.kernels._tokens import triton_accumulator


@triton.jit
def guided_euler_step_kernel(
    x, v, v_neg, out, dsigma, guidance: tl.float64, N, C, F, AREA,
    BR: tl.constexpr, BD: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """N = B * C * F rows of AREA pixels; out is contiguous."""
    i_r, i_b, i_c, i_f, o_d, _, m_x = plane_tile(N, C, F, AREA, BR, BD)
    b_dsigma = tl.load(dsigma + i_f).to(acc)
    frozen = b_dsigma == 0
    b_x = tl.load(plane_pointers(x, i_b, i_c, i_f, o_d), m_x, 0.0)
    b_v = tl.load(plane_pointers(v, i_b, i_c, i_f, o_d), m_x & ~frozen, 0.0).to(acc)
    if v_neg is not None:
        b_neg = tl.load(plane_pointers(v_neg, i_b, i_c, i_f, o_d), m_x & ~frozen, 0.0).to(acc)
        # In the interpreter guidance is a Python number: the multiplication gives it a dtype.
        b_guidance = (guidance * tl.full((1, 1), 1.0, tl.float64)).to(acc)
        b_v = b_neg + b_guidance * (b_v - b_neg)
    b_new = (b_x.to(acc) + b_v * b_dsigma).to(b_x.dtype)
    tl.store(out + i_r.to(tl.int64) * AREA + o_d, tl.where(frozen, b_x, b_new), m_x)


def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """The next x, contiguous, in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    launch = plane_launch(x)
    guided_euler_step_kernel[launch.grid](
        as_planes(x), as_planes(v), None if v_neg is None else as_planes(v_neg), out, dsigma.contiguous(),
        float(guidance), launch.rows, x.shape[1], x.shape[2], x.shape[3] * x.shape[4],
        BR=launch.BR, BD=launch.BD, acc=triton_accumulator(x), num_warps=WARPS,
    )  # fmt: skip
    return out
