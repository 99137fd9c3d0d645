"""Token rows as the row kernels read them: views with any leading strides, tiles of whole rows.

In the kernels, a tile is [BR, BD], `i_b` its sequence, `o_l` [BR, 1] its tokens, `o_d` [1, BD] its
columns, of which D exist. Offsets are int64 before they are multiplied: strides of a packed
projection pass 2^31 elements at 720p. A tensor goes in as a plain tuple of pointer and strides: a
NamedTuple costs 2 us more at every launch. None of these holds None: Triton 3.6 fails to compile
`is not None` for a tuple that does.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

Rows = tuple[Tensor, int, int]  # [B, L, D] or [B, F, D] with unit last stride; strides of sequences and rows


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def triton_accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def unit_stride(x: Tensor) -> Tensor:
    """x, or a contiguous copy where columns are not neighbours in memory."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def as_row(x: Tensor | None) -> Tensor | None:
    return None if x is None else unit_stride(x)


def as_rows(x: Tensor | None) -> Rows | None:
    """Tokens [B, L, D], or a table [B, F, D]."""
    if x is None:
        return None
    x = unit_stride(x)
    return x, x.stride(0), x.stride(1)


def as_sequences(x: Tensor) -> Tensor:
    """x [..., D] as [B, L, D] with unit last stride: a view if two strides reach all rows."""
    x = unit_stride(x)
    for leading in range(max(1, x.ndim - 1)):
        try:
            return x.view(math.prod(x.shape[:leading]), math.prod(x.shape[leading:-1]), x.shape[-1])
        except RuntimeError:  # no such view
            continue
    return x.reshape(1, -1, x.shape[-1])


@triton.jit
def tile(L, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """(i_b, o_l, o_d, mask) of this program, one of cdiv(L, BR) for each sequence."""
    programs = tl.cdiv(L, BR)
    i_b = (tl.program_id(0) // programs).to(tl.int64)
    o_l = tl.program_id(0) % programs * BR + tl.arange(0, BR)[:, None]
    # At most 8 neighbours to a thread, 16 bytes of bf16: a store of 16 e4m3 bytes would impose its
    # own layout on all.
    o_d = tl.max_contiguous(tl.arange(0, BD)[None, :], [1, 8])
    # A program's only row always exists. Without that condition the compiler sees which columns
    # need no mask: at D = 5120 a quarter fewer instructions and nearly half the registers.
    mask = o_d < D if BR == 1 else (o_l < L) & (o_d < D)
    return i_b, o_l, o_d, mask


# Streams are read once and should leave the cache first; tables serve many rows and should stay.


@triton.jit
def load_tokens(x, i_b, o_l, o_d, mask, acc: tl.constexpr):
    data, stride_b, stride_l = x
    p_x = data + i_b * stride_b + o_l.to(tl.int64) * stride_l + o_d
    return tl.load(p_x, mask, 0.0, eviction_policy="evict_first").to(acc)


@triton.jit
def load_table(table, i_b, i_f, o_d, mask, acc: tl.constexpr):
    """Rows of the frames i_f [BR, 1] of the tile's tokens."""
    data, stride_b, stride_f = table
    p_row = data + i_b * stride_b + i_f.to(tl.int64) * stride_f + o_d
    return tl.load(p_row, mask, 0.0, eviction_policy="evict_last").to(acc)


@triton.jit
def load_row(x, o_d, mask, acc: tl.constexpr):
    """x [D] in the tile's shape, and so in its layout: threads need not exchange elements."""
    return tl.load(tl.broadcast_to(x + o_d, mask.shape), mask, 0.0, eviction_policy="evict_last").to(acc)


@triton.jit
def store_tokens(x, b_x, i_b, o_l, o_d, L, D: tl.constexpr, mask):
    """Into contiguous x [B, L, D]."""
    tl.store(x + (i_b * L + o_l) * D + o_d, b_x.to(x.dtype.element_ty), mask)
