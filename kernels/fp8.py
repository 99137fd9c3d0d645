"""Rows in e4m3 with one scale each, of x or of its tanh GELU.

    scale = max(amax, 1e-12) / 448, q = x / scale to nearest even

x [..., D] of any float dtype, computed in float32; q float8_e4m3fn [..., D]; scale float32
[..., 1]; q * scale ~ x. No value saturates, since the largest becomes 448. A row with NaN or
infinity comes back as NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pusa_fast.kernels._launch import interpreted, row_launch
from pusa_fast.kernels._tokens import unit_stride

_PER_THREAD = 56  # elements of a row, kept in registers: at D = 13,824 eight warps share it
E4M3_MAX = tl.constexpr(448.0)
MIN_AMAX = tl.constexpr(1e-12)


def check_fp8_device(device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run: e4m3 needs compute capability 8.9.

    The CPU passes under the interpreter, and meta always: kernels are compiled on it without a GPU.
    """
    if device.type == "meta" or (device.type == "cpu" and interpreted()):
        return
    found = str(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 9):
            return
        found = f"{torch.cuda.get_device_name(device)}, {capability[0]}.{capability[1]}"
    raise ValueError(
        f"fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), this is {found}: "
        "use bf16, or ops.use('reference') to emulate it"
    )


@triton.jit
def row_scale(b_x):
    """[BR, BD] float32 -> [BR, 1]"""
    # A maximum passes over NaN; infinity stays.
    b_magnitude = tl.where(b_x == b_x, tl.abs(b_x), float("inf"))
    return tl.div_rn(tl.maximum(tl.max(b_magnitude, 1, keep_dims=True), MIN_AMAX), E4M3_MAX)


@triton.jit
def to_e4m3(b_x, b_scale):
    """b_x / b_scale in e4m3, correctly rounded: a multiplication by the inverse and its correction.

    A division would cost more time than the bytes of its element.
    """
    b_inverse = tl.div_rn(1.0, b_scale)
    b_q = b_x * b_inverse
    return tl.fma(tl.fma(b_q, -b_scale, b_x), b_inverse, b_q).to(tl.float8e4nv)


@triton.jit
def _gelu(b_x):
    """x * (1 + tanh(u)) / 2 as x * sigmoid(2 u), which overflows to x or 0.

    u = sqrt(2 / pi) (x + 0.044715 x^3)
    """
    b_e = tl.exp2(b_x * (-2.302208198 - 0.1029432397 * b_x * b_x))  # exp(-2 u)
    return b_x / (1 + b_e)


@triton.jit(do_not_specialize=["N"])
def quantize_rows_kernel(
    x, q, scale, N, stride,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    i_r = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None]
    i_d = tl.arange(0, BD)[None, :]
    m_r = i_r < N
    # A program's only row always exists: without that condition the compiler drops columns past D.
    m_x = i_d < D if BR == 1 else m_r & (i_d < D)
    i_r = i_r.to(tl.int64)
    b_x = tl.load(x + i_r * stride + i_d, m_x, 0.0, eviction_policy="evict_first").to(tl.float32)
    if GELU:
        b_x = _gelu(b_x)
    b_scale = row_scale(b_x)
    tl.store(scale + i_r, b_scale, m_r)
    tl.store(q + i_r * D + i_d, to_e4m3(b_x, b_scale), m_x)


def _quantize(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    check_fp8_device(x.device)
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        rows = unit_stride(x).reshape(-1, x.shape[-1])
        N, D = rows.shape
        launch = row_launch(N, D, _PER_THREAD)
        quantize_rows_kernel[(launch.programs,)](
            rows, q, scale, N, rows.stride(0),
            D=D, BR=launch.rows, BD=launch.block, GELU=gelu, num_warps=launch.warps,
        )  # fmt: skip
    return q, scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) of x."""
    return _quantize(x, gelu=False)


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) of the tanh GELU of x, without rounding in between."""
    return _quantize(x, gelu=True)
