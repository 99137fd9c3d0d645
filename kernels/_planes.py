"""Latents [B, C, F, h, w] as kernels of one pass see them: rows are frames of one channel, with any strides of B, C and F.

A program takes BR rows of BD pixels. Offsets are int64 before they are multiplied.
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


class Planes(NamedTuple):
    """A tensor [B, C, F, h, w] whose frames are contiguous; B, C and F may have any strides."""

    data: Tensor
    stride_b: int
    stride_c: int
    stride_f: int


class PlaneLaunch(NamedTuple):
    """`rows` frames of one channel in all, `BR` x `BD` pixels a program, `blocks` of these programs side by side."""

    rows: int
    BR: int
    BD: int
    blocks: int

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.rows, self.BR), self.blocks


@triton.jit
def plane_pointers(x, i_b, i_c, i_f, o_d):
    return x.data + i_b.to(tl.int64) * x.stride_b + i_c.to(tl.int64) * x.stride_c + i_f.to(tl.int64) * x.stride_f + o_d


def as_planes(x: Tensor) -> Planes:
    """x, or a contiguous copy where a frame's pixels do not follow each other."""
    h, w = x.shape[3:]
    if (w > 1 and x.stride(4) != 1) or (h > 1 and x.stride(3) != w):
        x = x.contiguous()
    return Planes(x, x.stride(0), x.stride(1), x.stride(2))


def plane_launch(x: Tensor) -> PlaneLaunch:
    """A launch that covers every pixel of x [B, C, F, h, w] once."""
    rows, area = x.shape[0] * x.shape[1] * x.shape[2], x.shape[3] * x.shape[4]
    block = max(16, min(_MAX_BLOCK, power_of_2(max(area, 1))))
    tile = _INTERPRETER_TILE if interpreted() else _TILE
    return PlaneLaunch(rows, max(1, min(tile // block, power_of_2(max(rows, 1)))), block, triton.cdiv(area, block))
