"""Token rows as the row kernels see them: views with any leading strides, and tiles [BR, BD] of whole rows.

In the kernels, `i_b` is a program's sequence, `o_l` [BR, 1] its tokens, `o_d` [1, BD] the columns, of which D are there.
Offsets are int64 before they are multiplied: strides of a packed projection pass 2^31 elements at 720p.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tokens(NamedTuple):
    """A tensor [B, L, D] with unit last stride."""

    data: Tensor
    stride_b: int
    stride_l: int


class Table(NamedTuple):
    """Rows by sequence and frame, [B, F, D] with unit last stride, and a row [D] that is added to each; not both None."""

    data: Tensor | None
    base: Tensor | None
    stride_b: int
    stride_f: int


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def triton_accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def unit_stride(x: Tensor) -> Tensor:
    """x, or a contiguous copy where columns are not neighbours in memory."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def as_row(x: Tensor | None) -> Tensor | None:
    return None if x is None else unit_stride(x)


def as_tokens(x: Tensor | None) -> Tokens | None:
    if x is None:
        return None
    x = unit_stride(x)
    return Tokens(x, x.stride(0), x.stride(1))


def as_table(data: Tensor | None, base: Tensor | None) -> Table | None:
    if data is None:
        return None if base is None else Table(None, unit_stride(base), 0, 0)
    data = unit_stride(data)
    return Table(data, as_row(base), data.stride(0), data.stride(1))


def as_sequences(x: Tensor) -> Tensor:
    """x [..., D] as [B, L, D] with unit last stride and as few sequences as can be: a view if two strides reach all rows."""
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
    # At most 8 neighbours to a thread, 16 bytes of bf16: a store of 16 e4m3 bytes would impose its own layout on all.
    o_d = tl.max_contiguous(tl.arange(0, BD)[None, :], [1, 8])
    # A program's only row is always there. Without that condition the compiler sees which columns need no mask, which
    # saves a quarter of the instructions and nearly half of the registers at D = 5120.
    mask = o_d < D if BR == 1 else (o_l < L) & (o_d < D)
    return i_b, o_l, o_d, mask


# Streams are read once and should leave the cache first, tables serve many rows and should stay.


@triton.jit
def load_tokens(x, i_b, o_l, o_d, mask, acc: tl.constexpr):
    p_x = x.data + i_b * x.stride_b + o_l.to(tl.int64) * x.stride_l + o_d
    return tl.load(p_x, mask, 0.0, eviction_policy="evict_first").to(acc)


@triton.jit
def store_tokens(x, b_x, i_b, o_l, o_d, L, D: tl.constexpr, mask):
    """Into contiguous x [B, L, D]."""
    tl.store(x + (i_b * L + o_l) * D + o_d, b_x.to(x.dtype.element_ty), mask)


@triton.jit
def load_row(x, o_d, mask, acc: tl.constexpr):
    """x [D], as often as the tile has rows: with the tile's shape it gets its layout, and no exchange between threads."""
    return tl.load(tl.broadcast_to(x + o_d, mask.shape), mask, 0.0, eviction_policy="evict_last").to(acc)


@triton.jit
def load_table(table, i_b, i_f, o_d, mask, acc: tl.constexpr):
    """table[i_b, i_f] + base for the frames i_f [BR, 1] of the tile's tokens."""
    if table.data is None:
        b_row = load_row(table.base, o_d, mask, acc)
    else:
        p_row = table.data + i_b * table.stride_b + i_f.to(tl.int64) * table.stride_f + o_d
        b_row = tl.load(p_row, mask, 0.0, eviction_policy="evict_last").to(acc)
        if table.base is not None:
            b_row += load_row(table.base, o_d, mask, acc)
    return b_row
