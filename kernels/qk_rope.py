"""RMSNorm of q and of k over all heads, then 3-D rotary embedding, in one pass over packed QKV.

    n = x * rstd * weight,  rstd = 1 / sqrt(mean_HK(x^2) + eps)
    out[2j] = n[2j] * cos - n[2j+1] * sin,  out[2j+1] = n[2j] * sin + n[2j+1] * cos

x is q or k, [B, L, H, K]; weight [H*K]. Token l has the position (t // (h*w), t // w % h, t % w),
t = first_token + l, in the whole clip's grid (F, h, w). Pair j takes its angle from row p of cos,
sin [P, K/2]; p is the token's frame, row or column as `rope_split(K)` says. Backward, with dn the
gradient of n (dout rotated back), g = dn * weight and xhat = x * rstd:

    dx = rstd * (g - xhat * mean_HK(g * xhat)),  dweight = sum over tokens of dn * xhat

A program takes whole tokens as tiles [BT, BH, BK] of tokens, heads and columns, so that a token's
angles are fetched once for all heads. `i_b` is its sequence, `i_t` [BT, 1, 1] its tokens, `i_h`
[1, BH, 1] and `i_k` [1, 1, BK] heads and columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._launch import power_of_2, row_launch
from pusa_fast.kernels._tokens import accumulator, as_row, triton_accumulator, unit_stride
from pusa_fast.kernels.reference import rope_split

# Elements of q, and as many of k, in one thread. With fewer, most instructions would compute
# addresses, angles and sums, and instructions, not bytes, would limit the speed.
_PER_THREAD = 40
# Programs that add up weight gradients: about what runs at once on the largest GPUs. A constant, so
# that the order of additions does not depend on the card.
_PARTIAL_SUMS = 256


@triton.jit
def _tile(i, L, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """(i_b, i_t, i_h, i_k, m_t, m_w, m_x) of the i-th tile: masks of tokens, weights and both."""
    tiles = tl.cdiv(L, BT)
    i_b = (i // tiles).to(tl.int64)
    i_t = (i % tiles * BT + tl.arange(0, BT))[:, None, None]
    i_h, i_k = tl.arange(0, BH)[None, :, None], tl.arange(0, BK)[None, None, :]
    m_w = (i_h < H) & (i_k < K)
    # A program's only token always exists: without that condition the compiler drops heads past H.
    m_t = i_t < L
    m_x = m_w if BT == 1 else m_t & m_w
    return i_b, i_t, i_h, i_k, m_t, m_w, m_x


@triton.jit
def _pointers(x, i_b, i_t, i_h, i_k):
    data, stride_b, stride_l, stride_h = x
    return data + i_b * stride_b + i_t.to(tl.int64) * stride_l + i_h.to(tl.int64) * stride_h + i_k


@triton.jit
def _angles(cos, sin, i_t, m_t, h, w, FRAME: tl.constexpr, ROW: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, acc):
    """cos, sin [BT, 1, BK/2] of the clip's tokens i_t.

    Pairs below FRAME rotate by the frame, the next ROW by the row, the rest by the column.
    """
    i_p = tl.arange(0, BK // 2)[None, None, :]
    i_fh = i_t // w
    i_f = i_fh // h
    i_position = tl.where(i_p < FRAME, i_f, tl.where(i_p < FRAME + ROW, i_fh - i_f * h, i_t - i_fh * w))
    p_angle = i_position * (K // 2) + i_p
    m_p = (i_p < K // 2) & m_t  # a token past the end may be past the table
    return tl.load(cos + p_angle, m_p, 0.0).to(acc), tl.load(sin + p_angle, m_p, 0.0).to(acc)


@triton.jit
def _rotate(b_x, b_cos, b_sin):
    b_re, b_im = tl.split(b_x.reshape(b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2))
    return tl.join(b_re * b_cos - b_im * b_sin, b_re * b_sin + b_im * b_cos).reshape(b_x.shape)


@triton.jit
def _token_mean(b_x, D: tl.constexpr):
    """[BT, BH, BK] -> [BT, 1, 1]"""
    return (tl.sum(b_x.reshape(b_x.shape[0], b_x.shape[1] * b_x.shape[2]), 1) / D)[:, None, None]


@triton.jit
def _norm_rotate(b_x, b_w, b_cos, b_sin, eps, D: tl.constexpr):
    b_rstd = tl.rsqrt(_token_mean(b_x * b_x, D) + eps)
    return _rotate(b_x * b_w, b_cos * b_rstd, b_sin * b_rstd), b_rstd


@triton.jit(do_not_specialize=["L", "first_token", "h", "w"])
def qk_rope_forward_kernel(
    q, k, q_out, k_out, weight_q, weight_k, cos, sin, rstd_q, rstd_k, L, first_token, h, w,
    eps: tl.constexpr, H: tl.constexpr, K: tl.constexpr, FRAME: tl.constexpr, ROW: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    i_b, i_t, i_h, i_k, m_t, m_w, m_x = _tile(tl.program_id(0), L, H, K, BT, BH, BK)
    p_row, p_w = i_b * L + i_t, i_h * K + i_k
    # Read once, while weights and angles serve every token: these go first from the cache.
    b_q = tl.load(_pointers(q, i_b, i_t, i_h, i_k), m_x, 0.0, eviction_policy="evict_first")
    b_k = tl.load(_pointers(k, i_b, i_t, i_h, i_k), m_x, 0.0, eviction_policy="evict_first")
    b_cos, b_sin = _angles(cos, sin, first_token + i_t, m_t, h, w, FRAME, ROW, K, BK, acc)
    b_w = tl.load(weight_q + p_w, m_w, 0.0).to(acc)
    b_out, b_rstd = _norm_rotate(b_q.to(acc), b_w, b_cos, b_sin, eps, H * K)
    tl.store(_pointers(q_out, i_b, i_t, i_h, i_k), b_out.to(b_q.dtype), m_x)
    tl.store(rstd_q + p_row, b_rstd, m_t)
    b_w = tl.load(weight_k + p_w, m_w, 0.0).to(acc)
    b_out, b_rstd = _norm_rotate(b_k.to(acc), b_w, b_cos, b_sin, eps, H * K)
    tl.store(_pointers(k_out, i_b, i_t, i_h, i_k), b_out.to(b_k.dtype), m_x)
    tl.store(rstd_k + p_row, b_rstd, m_t)


# per_program is specialised: where it is 1, the loop goes.
@triton.jit(do_not_specialize=["tiles", "L", "first_token", "h", "w"])
def qk_rope_backward_kernel(
    dout, x, dx, weight, cos, sin, rstd, partial, tiles, per_program, L, first_token, h, w,
    H: tl.constexpr, K: tl.constexpr, FRAME: tl.constexpr, ROW: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """For q or for k; dx is contiguous. A program takes `per_program` of `tiles` tiles.

    It writes the sum of their dn * xhat to its row of partial [programs, H*K], if given.
    """
    i_first = tl.program_id(0) * per_program
    b_sum = tl.zeros((BT, BH, BK), acc)
    for i in range(i_first, min(tiles, i_first + per_program)):
        i_b, i_t, i_h, i_k, m_t, m_w, m_x = _tile(i, L, H, K, BT, BH, BK)
        p_row, p_w = i_b * L + i_t, i_h * K + i_k
        b_dout = tl.load(_pointers(dout, i_b, i_t, i_h, i_k), m_x, 0.0, eviction_policy="evict_first").to(acc)
        b_x = tl.load(_pointers(x, i_b, i_t, i_h, i_k), m_x, 0.0, eviction_policy="evict_first").to(acc)
        b_rstd = tl.load(rstd + p_row, m_t, 0.0)
        b_cos, b_sin = _angles(cos, sin, first_token + i_t, m_t, h, w, FRAME, ROW, K, BK, acc)
        b_dn = _rotate(b_dout, b_cos, -b_sin)
        if partial is not None:
            # For a plain sum the compiler would keep registers of zeros for the heads beyond H.
            b_sum = tl.where(m_x, b_sum + b_dn * (b_x * b_rstd), b_sum)
        b_g = b_dn * tl.load(weight + p_w, m_w, 0.0).to(acc)
        b_slope = b_rstd * b_rstd * _token_mean(b_g * b_x, H * K)
        b_dx = (b_g - b_x * b_slope) * b_rstd
        tl.store(dx + p_row * (H * K) + p_w, b_dx.to(dx.dtype.element_ty), m_x)
    if partial is not None:
        i_h, i_k = tl.arange(0, BH)[None, :, None], tl.arange(0, BK)[None, None, :]
        p_sum = partial + tl.program_id(0).to(tl.int64) * (H * K) + i_h * K + i_k
        tl.store(p_sum, tl.sum(b_sum, 0, keep_dims=True), (i_h < H) & (i_k < K))


def _as_heads(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Tensor and strides of x [B, L, H, K]: a view of a packed projection, or a gradient."""
    x = unit_stride(x)
    return x, x.stride(0), x.stride(1), x.stride(2)


def _launch(x: Tensor) -> tuple[int, dict[str, Any]]:
    """(programs a sequence, the kernels' constants) for x [B, L, H, K]."""
    _, L, H, K = x.shape
    launch = row_launch(L, H * K, _PER_THREAD)
    frame, row, _ = rope_split(K)
    constants = {"H": H, "K": K, "FRAME": frame // 2, "ROW": row // 2, "acc": triton_accumulator(x)}
    tile = {"BT": launch.rows, "BH": power_of_2(H), "BK": power_of_2(K), "num_warps": launch.warps}
    return launch.programs, constants | tile


def qk_rope_forward(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    grid: tuple[int, int, int], first_token: int, eps: float, inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(q_out, k_out, rstd_q, rstd_k): [B, L, H, K], q and k themselves if `inplace`, and [B, L].

    rstd is in the accumulator's dtype.
    """
    B, L = q.shape[:2]
    rstd_q, rstd_k = (torch.empty((B, L), dtype=accumulator(q), device=q.device) for _ in range(2))
    sources = _as_heads(q), _as_heads(k)
    # In place means in the copy, where one had to be taken.
    q_out, k_out = (x[0] if inplace else torch.empty(q.shape, dtype=q.dtype, device=q.device) for x in sources)
    if q.numel():
        programs, constants = _launch(q)
        qk_rope_forward_kernel[(B * programs,)](
            *sources, _as_heads(q_out), _as_heads(k_out), as_row(weight_q), as_row(weight_k),
            cos.contiguous(), sin.contiguous(), rstd_q, rstd_k, L, first_token, grid[1], grid[2], eps=eps, **constants,
        )  # fmt: skip
    if not inplace:
        return q_out, k_out, rstd_q, rstd_k
    for x, out in ((q, q_out), (k, k_out)):
        if out is not x:
            x.copy_(out)
    return q, k, rstd_q, rstd_k


def qk_rope_backward(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    grid: tuple[int, int, int], first_token: int, rstd_q: Tensor, rstd_k: Tensor, want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq_in, dk_in, dweight_q, dweight_k) from the outputs' gradients and the forward's inputs.

    dq_in, dk_in [B, L, H, K] contiguous in q's dtype; weight gradients [H*K] in the accumulator's,
    always added up in the same order, None unless `want_weights`.
    """
    B, L, H, K = q.shape
    inputs, weights = [], []
    for dout, x, weight, rstd in ((dq, q, weight_q, rstd_q), (dk, k, weight_k, rstd_k)):
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        partial = rstd.new_empty((0, H * K)) if want_weights else None
        if x.numel():
            programs, constants = _launch(x)
            tiles = B * programs
            per_program = triton.cdiv(tiles, _PARTIAL_SUMS) if want_weights else 1
            programs = triton.cdiv(tiles, per_program)
            partial = rstd.new_empty((programs, H * K)) if want_weights else None
            qk_rope_backward_kernel[(programs,)](
                _as_heads(dout), _as_heads(x), dx, as_row(weight), cos.contiguous(), sin.contiguous(), rstd, partial,
                tiles, per_program, L, first_token, grid[1], grid[2], **constants,
            )  # fmt: skip
        inputs.append(dx)
        weights.append(None if partial is None else partial.sum(0))
    return inputs[0], inputs[1], weights[0], weights[1]
