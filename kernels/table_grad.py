"""Gradients of rows that many tokens share: sums over a frame's tokens, in a fixed order.

    product[b, f] = sum over tokens l of frame f of a[b, l] * (b[b, l] - mean[b, l]) * rstd[b, l]
    total[b, f] = sum over tokens l of frame f of a[b, l]

Token l belongs to frame (first_token + l) // tokens_per_frame; a frame without tokens sums to 0.
mean and rstd are optional. dscale and dshift are product and total of dn and r, dgate is the
product of dx and y; with one frame for a whole sequence the same sums are the gradients of weights.
There are two stages, so that no atomic makes the result depend on timing: one sum per segment of a
frame, then torch adds the segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._launch import interpreted, power_of_2
from pusa_fast.kernels._tokens import accumulator, as_rows, load_tokens, triton_accumulator

# Tokens a program: enough that the second stage is small, few enough for thousands of programs.
_SEGMENT = 128
_BLOCK = 512  # columns a program
_TILE = 2_048  # elements a step
_INTERPRETER_BLOCK = 1 << 14  # the interpreter pays per program


@triton.jit(do_not_specialize=["L", "frames", "tokens_per_frame", "first_token", "segments"])
def frame_products_kernel(
    a, b, mean, rstd, product, total, L, frames, tokens_per_frame, first_token, segments,
    SEGMENT: tl.constexpr, D: tl.constexpr, acc: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_out = tl.program_id(0)  # of the partial sums [B, F, segments]
    i_frame = i_out // segments
    i_b = (i_frame // frames).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    frame_start = i_frame % frames * tokens_per_frame - first_token
    start = frame_start + i_out % segments * SEGMENT
    end = tl.minimum(tl.minimum(start + SEGMENT, frame_start + tokens_per_frame), L)
    start = tl.maximum(start, 0)
    b_product = tl.zeros((BR, BD), acc)
    b_total = tl.zeros((BR, BD), acc)
    for i_l in range(start, end, BR):
        o_l = i_l + tl.arange(0, BR)[:, None]
        mask = (o_l < end) & (o_d < D)
        b_a = load_tokens(a, i_b, o_l, o_d, mask, acc)
        b_b = load_tokens(b, i_b, o_l, o_d, mask, acc)
        if mean is not None:
            b_b -= tl.load(mean + i_b * L + o_l, o_l < end, 0.0)
        if rstd is not None:
            b_b *= tl.load(rstd + i_b * L + o_l, o_l < end, 0.0)
        b_product += b_a * b_b
        b_total += b_a
    p_out = i_out.to(tl.int64) * D + o_d
    tl.store(product + p_out, tl.sum(b_product, 0, keep_dims=True), o_d < D)
    if total is not None:
        tl.store(total + p_out, tl.sum(b_total, 0, keep_dims=True), o_d < D)


def _launch(
    a: Tensor, b: Tensor, frames: int, tokens_per_frame: int, first_token: int,
    mean: Tensor | None, rstd: Tensor | None, outputs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, L, D = b.shape
    segments = triton.cdiv(tokens_per_frame, _SEGMENT)
    partial = torch.empty((outputs, B, frames, segments, D), dtype=accumulator(b), device=b.device)
    if partial.numel():
        block = min(power_of_2(D), _INTERPRETER_BLOCK if interpreted() else _BLOCK)
        frame_products_kernel[(B * frames * segments, triton.cdiv(D, block))](
            as_rows(a), as_rows(b), mean, rstd, partial[0], partial[1] if outputs > 1 else None,
            L, frames, tokens_per_frame, first_token, segments,
            SEGMENT=_SEGMENT, D=D, acc=triton_accumulator(b), BR=max(1, _TILE // block), BD=block, num_warps=4,
        )  # fmt: skip
    return tuple(t.sum(2) for t in partial)  # no views of one tensor: operators must not return those


def frame_products(
    a: Tensor, b: Tensor, frames: int, tokens_per_frame: int, first_token: int, rstd: Tensor | None = None
) -> Tensor:
    """Sums of a * b * rstd, [B, F, D] in b's accumulator dtype. a, b [B, L, D]; rstd [B, L]."""
    return _launch(a, b, frames, tokens_per_frame, first_token, None, rstd, 1)[0]


def frame_moments(
    a: Tensor, b: Tensor, frames: int, tokens_per_frame: int, first_token: int, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of a * (b - mean) * rstd and of a, as `frame_products`."""
    product, total = _launch(a, b, frames, tokens_per_frame, first_token, mean, rstd, 2)
    return product, total
