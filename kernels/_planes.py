"""Latents [B, C, F, h, w] as one-pass kernels read them: a row is one frame of one channel.

B, C and F may have any strides. A program takes BR rows of BD pixels. Offsets are int64 before they
are multiplied.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._launch import interpreted, power_of_2

WARPS = 4

_MAX_BLOCK = 1024
_TILE = 1024
_INTERPRETER_TILE = 1 << 16  # the interpreter pays per program, not per element


Planes = tuple[Tensor, int, int, int]  # a tensor whose frames are contiguous; strides of B, C and F


class PlaneLaunch(NamedTuple):
    """`rows` in all, `BR` x `BD` pixels to a program, `blocks` programs to a row."""

    rows: int
    BR: int
    BD: int
    blocks: int

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.rows, self.BR), self.blocks


@triton.jit
def plane_tile(N, C, F, AREA, BR: tl.constexpr, BD: tl.constexpr):
    """(i_r, i_b, i_c, i_f, o_d, m_r, m_x): rows (N = B * C * F), pixels, masks of rows and both."""
    i_r = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None]
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    return i_r, i_r // F // C, i_r // F % C, i_r % F, o_d, i_r < N, (i_r < N) & (o_d < AREA)


@triton.jit
def plane_pointers(x, i_b, i_c, i_f, o_d):
    data, stride_b, stride_c, stride_f = x
    return data + i_b.to(tl.int64) * stride_b + i_c.to(tl.int64) * stride_c + i_f.to(tl.int64) * stride_f + o_d


def as_planes(x: Tensor) -> Planes:
    """x, or a contiguous copy if a frame's pixels are not contiguous."""
    h, w = x.shape[3:]
    if (w > 1 and x.stride(4) != 1) or (h > 1 and x.stride(3) != w):
        x = x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


def plane_launch(x: Tensor) -> PlaneLaunch:
    """A launch that covers every pixel of x [B, C, F, h, w] once."""
    rows, area = x.shape[0] * x.shape[1] * x.shape[2], x.shape[3] * x.shape[4]
    block = max(16, min(_MAX_BLOCK, power_of_2(max(area, 1))))
    tile = _INTERPRETER_TILE if interpreted() else _TILE
    return PlaneLaunch(rows, max(1, min(tile // block, power_of_2(max(rows, 1)))), block, triton.cdiv(area, block))
