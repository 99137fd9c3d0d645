"""The VAE between two convolutions: bias, residual, RMS norm over channels and SiLU in one pass.

    r   = y + bias + x
    out = act(r / max(||r||, 1e-12) * sqrt(C) * gamma)        act: SiLU or identity

x, r, out [B, T, H, W, C] are views with a last stride of 1: parts of the windows that convolutions
read. y has the same shape, or is the result of a convolution at half the resolution,
[B, T, H/2+1, W/2+1, 4*C], whose channels (2a+e)*C .. at (i+a, j+e) are pixel (2i+a, 2j+e) of r.
gamma, bias [C]. bias, x, and one of r and out are optional; r may be the memory of x or y. The norm
reads r before it is rounded. Inference only.

A program takes BR pixels. Axes are joined where strides allow it, so that W is usually all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._launch import power_of_2, row_launch
from pusa_fast.kernels._tokens import load_row, triton_accumulator

# Elements of a program in one thread: 32 keep four loads of 16 bytes of bf16 in flight for each
# tensor and leave registers for y, x and their sum. Every pixel needs its own offsets, so a program
# takes at most _PIXELS, however narrow they are.
_PER_THREAD = 32
_TILE = 4096
_PIXELS = 32
_MAX_PIXELS = 2**31 - _TILE  # the last program counts beyond them


@triton.jit
def _load(x, o_x, mask, acc: tl.constexpr):
    return tl.load(x[0] + o_x, mask, 0.0, eviction_policy="evict_first").to(acc)


@triton.jit
def _store(x, o_x, b_x, mask):
    tl.store(x[0] + o_x, b_x.to(x[0].dtype.element_ty), mask)


@triton.jit
def _offsets(x, i_b, i_t, i_h, i_w, FLAT: tl.constexpr):
    """In int64: a clip has more elements than 2^31. FLAT: x steps along W alone."""
    _, stride_b, stride_t, stride_h, stride_w = x
    o_x = i_w.to(tl.int64) * stride_w
    if not FLAT:
        o_x += i_b.to(tl.int64) * stride_b + i_t.to(tl.int64) * stride_t + i_h.to(tl.int64) * stride_h
    return o_x


@triton.jit(do_not_specialize=["P", "T", "H", "W"])
def vae_act_kernel(
    y, x, bias, gamma, r, out, P, T, H, W,
    C: tl.constexpr, SILU: tl.constexpr, UPSAMPLED: tl.constexpr, FLAT: tl.constexpr, acc: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """P = B * T * H * W pixels, fewer than 2^31; FLAT: B, T and H are 1.

    y, x, r, out: pointer and strides of B, T, H, W of a tensor [B, T, H, W, C].
    """
    i_p = tl.program_id(0) * BR + tl.arange(0, BR)[:, None]
    o_c = tl.max_contiguous(tl.arange(0, BD)[None, :], [1, 8])  # 16 bytes of bf16 to a thread
    mask = (i_p < P) & (o_c < C)
    if FLAT:
        i_b, i_t, i_h, i_w = i_p, i_p, i_p, i_p
    else:
        i_w, i_h, i_t, i_b = i_p % W, i_p // W % H, i_p // W // H % T, i_p // W // H // T
    if UPSAMPLED:
        lower, right = i_h & 1, i_w & 1
        o_y = _offsets(y, i_b, i_t, (i_h >> 1) + lower, (i_w >> 1) + right, False) + (2 * lower + right) * C
    else:
        o_y = _offsets(y, i_b, i_t, i_h, i_w, FLAT)
    b_s = _load(y, o_y + o_c, mask, acc)
    if bias is not None:
        b_s += load_row(bias, o_c, mask, acc)
    if x is not None:
        b_s += _load(x, _offsets(x, i_b, i_t, i_h, i_w, FLAT) + o_c, mask, acc)
    if r is not None:
        _store(r, _offsets(r, i_b, i_t, i_h, i_w, FLAT) + o_c, b_s, mask)
    if out is not None:
        b_norm = tl.sqrt(tl.sum(b_s * b_s, 1, keep_dims=True))
        b_norm = tl.where(b_norm < 1e-12, 1e-12, b_norm)  # NaN stays
        ROOT: tl.constexpr = C**0.5
        b_n = b_s * (ROOT / b_norm) * load_row(gamma, o_c, mask, acc)
        if SILU:
            b_n *= tl.sigmoid(b_n)
        _store(out, _offsets(out, i_b, i_t, i_h, i_w, FLAT) + o_c, b_n, mask)


def _joined(size: list[int], strides: list[list[int]]) -> None:
    """Joins axes B, T, H, W, from W outwards, along which all of `strides` step evenly.

    In place; unused axes get size 1.
    """
    last = 3
    for axis in (2, 1, 0):
        outer, inner = size[axis], size[last]
        even = all(outer == 1 or inner == 1 or s[axis] == inner * s[last] for s in strides)
        last -= not even
        for s in strides:
            if not even or (inner == 1 and outer != 1):
                s[last] = s[axis]
        size[last] = outer * inner if even else outer
    for axis in range(last):
        size[axis] = 1
        for s in strides:
            s[axis] = 0


def vae_act_(
    y: Tensor,
    gamma: Tensor | None,
    x: Tensor | None,
    bias: Tensor | None,
    r: Tensor | None,
    out: Tensor | None,
    silu: bool,
    upsampled: bool,
) -> None:
    """Fills those of r and out that are given. Raises ValueError: too many channels or pixels."""
    like = r if out is None else out
    assert like is not None
    if not like.numel():
        return
    given = [t for t in (y, x, r, out) if t is not None]
    size, strides = list(like.shape[:4]), [list(t.stride()[:4]) for t in given]
    if not upsampled:
        _joined(size, strides)
    views = iter([(t, *s) for t, s in zip(given, strides, strict=True)])
    p_y, p_x, p_r, p_out = (None if t is None else next(views) for t in (y, x, r, out))
    channels, pixels = like.shape[4], size[0] * size[1] * size[2] * size[3]
    if pixels >= _MAX_PIXELS:
        raise ValueError(f"vae_act_ takes fewer than {_MAX_PIXELS} pixels, got {pixels}: split the clip")
    tile = min(_TILE, _PIXELS * power_of_2(channels))
    launch = row_launch(pixels, channels, _PER_THREAD, _PER_THREAD, tile)
    rows = (None if t is None else t.reshape(channels).contiguous() for t in (bias, gamma))
    vae_act_kernel[(launch.programs,)](
        p_y, p_x, *rows, p_r, p_out, pixels, *size[1:],
        C=channels, SILU=silu, UPSAMPLED=upsampled, FLAT=not upsampled and size[:3] == [1, 1, 1],
        acc=triton_accumulator(y), BR=launch.rows, BD=launch.block, num_warps=launch.warps,
    )  # fmt: skip
