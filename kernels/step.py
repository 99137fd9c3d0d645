"""Classifier-free guidance and a per-frame Euler step in one pass: x[f] += (v_neg + guidance * (v - v_neg))[f] * dsigma[f].

x, v, v_neg [B, C, F, h, w], v_neg None for v as it is; dsigma [F]. Inference only. A frame whose dsigma is 0 keeps its bits
whatever v holds, which is then not read.

A program takes BR rows of BD pixels; a row is one frame of one channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._launch import interpreted
from pusa_fast.kernels._tokens import triton_accumulator

_MAX_BLOCK = 1024
_TILE = 1024
_WARPS = 4
_INTERPRETER_TILE = 1 << 16  # the interpreter pays per program, not per element


class Planes(NamedTuple):
    """A tensor [B, C, F, h, w] whose frames are contiguous; B, C and F may have any strides."""

    data: Tensor
    stride_b: int
    stride_c: int
    stride_f: int


@triton.jit
def _pointers(x, i_b, i_c, i_f, o_d):
    return x.data + i_b.to(tl.int64) * x.stride_b + i_c.to(tl.int64) * x.stride_c + i_f.to(tl.int64) * x.stride_f + o_d


@triton.jit
def guided_euler_step_kernel(
    x, v, v_neg, out, dsigma, guidance: tl.float64, N, C, F, AREA,
    BR: tl.constexpr, BD: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """N = B * C * F rows of AREA pixels; out is contiguous."""
    i_r = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None]
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    i_f, i_c, i_b = i_r % F, i_r // F % C, i_r // F // C
    m_x = (i_r < N) & (o_d < AREA)
    b_dsigma = tl.load(dsigma + i_f).to(acc)
    frozen = b_dsigma == 0
    b_x = tl.load(_pointers(x, i_b, i_c, i_f, o_d), m_x, 0.0)
    b_v = tl.load(_pointers(v, i_b, i_c, i_f, o_d), m_x & ~frozen, 0.0).to(acc)
    if v_neg is not None:
        b_neg = tl.load(_pointers(v_neg, i_b, i_c, i_f, o_d), m_x & ~frozen, 0.0).to(acc)
        # Under the interpreter guidance is a Python number: the product gives it a dtype.
        b_guidance = (guidance * tl.full((1, 1), 1.0, tl.float64)).to(acc)
        b_v = b_neg + b_guidance * (b_v - b_neg)
    b_new = (b_x.to(acc) + b_v * b_dsigma).to(b_x.dtype)
    tl.store(out + i_r.to(tl.int64) * AREA + o_d, tl.where(frozen, b_x, b_new), m_x)


def _as_planes(x: Tensor) -> Planes:
    h, w = x.shape[3:]
    if (w > 1 and x.stride(4) != 1) or (h > 1 and x.stride(3) != w):
        x = x.contiguous()
    return Planes(x, x.stride(0), x.stride(1), x.stride(2))


def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """The next x, contiguous, in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    B, C, F, h, w = x.shape
    rows, area = B * C * F, h * w
    block = max(16, min(_MAX_BLOCK, triton.next_power_of_2(area)))
    tile = _INTERPRETER_TILE if interpreted() else _TILE
    per_program = max(1, min(tile // block, triton.next_power_of_2(rows)))
    guided_euler_step_kernel[(triton.cdiv(rows, per_program), triton.cdiv(area, block))](
        _as_planes(x), _as_planes(v), None if v_neg is None else _as_planes(v_neg), out, dsigma.contiguous(),
        float(guidance), rows, C, F, area, BR=per_program, BD=block, acc=triton_accumulator(x), num_warps=_WARPS,
    )  # fmt: skip
    return out
