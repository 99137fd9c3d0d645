"""Frame-aware flow matching (arXiv 2507.16116, FAFM): noising, and the loss with its gradient.

    x_t = (1 - sigma[f]) * clean + sigma[f] * noise ; target = noise - clean
    loss = sum_bf weight[b, f] * sum_chw (v - target)^2 / N
    d loss / d v = 2 / N * weight[b, f] * (v - target)

clean, noise, v, target [B, C, F, h, w], N elements; sigma, weight [B, F]. The pass that sums the
loss also writes `slope` = weight[b, f] * (v - target) in v's dtype, all that the derivative needs.
The factor 2 / N is applied in the backward pass, because half-precision slopes would underflow with
it. Sums have a fixed order: one for each row and block of its pixels, added by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._launch import interpreted
from pusa_fast.kernels._planes import WARPS, as_planes, plane_launch, plane_pointers, plane_tile
from pusa_fast.kernels._tokens import triton_accumulator

_BLOCK = 1024
_INTERPRETER_BLOCK = 1 << 16


@triton.jit
def noise_and_target_kernel(
    clean, noise, sigma, x_t, target, N, C, F, AREA, BR: tl.constexpr, BD: tl.constexpr, acc: tl.constexpr
):  # fmt: skip
    """N = B * C * F rows of AREA pixels; sigma, x_t and target are contiguous."""
    i_r, i_b, i_c, i_f, o_d, m_r, m = plane_tile(N, C, F, AREA, BR, BD)
    b_sigma = tl.load(sigma + i_b * F + i_f, m_r, 0.0).to(acc)
    b_clean = tl.load(plane_pointers(clean, i_b, i_c, i_f, o_d), m, 0.0).to(acc)
    b_noise = tl.load(plane_pointers(noise, i_b, i_c, i_f, o_d), m, 0.0).to(acc)
    at = i_r.to(tl.int64) * AREA + o_d
    tl.store(x_t + at, ((1 - b_sigma) * b_clean + b_sigma * b_noise).to(x_t.dtype.element_ty), m)
    tl.store(target + at, b_noise - b_clean, m)


@triton.jit
def flow_loss_kernel(
    v, target, weight, sums, slope, N, C, F, AREA, BLOCKS, BR: tl.constexpr, BD: tl.constexpr, acc: tl.constexpr
):  # fmt: skip
    """sums [N, BLOCKS]: squared errors of a row's block. slope and weight are contiguous."""
    i_r, i_b, i_c, i_f, o_d, m_r, m = plane_tile(N, C, F, AREA, BR, BD)
    b_v = tl.load(plane_pointers(v, i_b, i_c, i_f, o_d), m, 0.0).to(acc)
    b_error = b_v - tl.load(plane_pointers(target, i_b, i_c, i_f, o_d), m, 0.0).to(acc)
    if slope is not None:
        b_weight = tl.load(weight + i_b * F + i_f, m_r, 0.0).to(acc)
        tl.store(slope + i_r.to(tl.int64) * AREA + o_d, (b_weight * b_error).to(slope.dtype.element_ty), m)
    b_sum = tl.sum(b_error * b_error, axis=1, keep_dims=True)
    tl.store(sums + i_r.to(tl.int64) * BLOCKS + tl.program_id(1), b_sum, m_r)


@triton.jit
def flow_loss_backward_kernel(slope, dloss, dv, factor: tl.float64, N, BLOCK: tl.constexpr, acc: tl.constexpr):
    """dv = slope * (factor * dloss), N contiguous elements; dloss is a scalar in memory."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = offsets < N
    # In the interpreter factor is a Python number: the multiplication gives it a dtype.
    b_scale = (factor * tl.full((1,), 1.0, tl.float64)).to(acc) * tl.load(dloss).to(acc)
    b_slope = tl.load(slope + offsets, m, 0.0).to(acc)
    tl.store(dv + offsets, (b_slope * b_scale).to(dv.dtype.element_ty), m)


def noise_and_target(clean: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x_t in `dtype`, target in float32, or float64 if an input is), both contiguous."""
    exact = torch.promote_types(torch.promote_types(clean.dtype, noise.dtype), torch.float32)
    x_t = torch.empty(clean.shape, dtype=dtype, device=clean.device)
    target = torch.empty(clean.shape, dtype=exact, device=clean.device)
    if clean.numel():
        launch = plane_launch(clean)
        noise_and_target_kernel[launch.grid](
            as_planes(clean), as_planes(noise), sigma.contiguous(), x_t, target,
            launch.rows, clean.shape[1], clean.shape[2], clean.shape[3] * clean.shape[4],
            BR=launch.BR, BD=launch.BD, acc=triton_accumulator(target), num_warps=WARPS,
        )  # fmt: skip
    return x_t, target


def flow_loss_forward(
    velocity: Tensor, target: Tensor, weight: Tensor, want_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss [], frame_errors [B, F], slope in velocity's dtype or None); NaN without elements."""
    B, C, F, h, w = velocity.shape
    exact = torch.promote_types(torch.promote_types(velocity.dtype, target.dtype), torch.float32)
    launch = plane_launch(velocity)
    sums = torch.empty((B, C, F, launch.blocks), dtype=exact, device=velocity.device)
    slope = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device) if want_slope else None
    if velocity.numel():
        flow_loss_kernel[launch.grid](
            as_planes(velocity), as_planes(target), weight.contiguous(), sums, slope,
            launch.rows, C, F, h * w, launch.blocks,
            BR=launch.BR, BD=launch.BD, acc=triton_accumulator(sums), num_warps=WARPS,
        )  # fmt: skip
    by_frame = sums.sum((1, 3))
    return (weight.to(exact) * by_frame).sum() / velocity.numel(), by_frame / (C * h * w), slope


def flow_loss_backward(slope: Tensor, dloss: Tensor) -> Tensor:
    """d loss / d velocity, given the gradient `dloss` [] of the loss; slope's dtype."""
    dv = torch.empty(slope.shape, dtype=slope.dtype, device=slope.device)
    if count := slope.numel():
        block = _INTERPRETER_BLOCK if interpreted() else _BLOCK
        flow_loss_backward_kernel[(triton.cdiv(count, block),)](
            slope, dloss, dv, 2 / count, count, BLOCK=block, acc=triton_accumulator(dloss), num_warps=WARPS
        )  # fmt: skip
    return dv
