"""e4m3 rows with one scale each, and the matmul that takes them. Lossy: nothing calls these unless
fp8 is asked for.

The kernels need compute capability 8.9 or later. Elsewhere plain torch emulates them, which is for
measuring what the rounding costs, not for speed: `pusa_fast.weights.load_dit(..., precision="fp8")`
refuses such a device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.ops.checks import check_residual, check_tensors, require
from pusa_fast.ops.registry import Op, choose, contiguous_like, fp8_reason


def _emulated(x: Tensor) -> bool:
    return choose(x, only="triton") != "triton" or (x.is_cuda and fp8_reason(x.device) is not None)


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    return contiguous_like(x, torch.float8_e4m3fn), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) with x ~ q * scale: x [..., D]; q float8_e4m3fn [..., D]; scale float32 [..., 1].
    No derivative.

    scale is max(amax, 1e-12) / 448.
    """
    check_tensors("quantize_rows", x)
    require(x.ndim > 0, "quantize_rows", "x must be [..., D]", x)
    if _emulated(x):
        return reference.quantize_rows(x)
    q, scale = _quantize_rows("triton", x)
    return q, scale


_quantize_rows = Op("quantize_rows(Tensor x) -> (Tensor, Tensor)", "quantize_rows")
_quantize_rows.fake(_quantized)


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the tanh GELU of x, without rounding in between."""
    check_tensors("gelu_quantize_rows", x)
    require(x.ndim > 0, "gelu_quantize_rows", "x must be [..., D]", x)
    if _emulated(x):
        return reference.gelu_quantize_rows(x)
    q, scale = _gelu_quantize_rows("triton", x)
    return q, scale


_gelu_quantize_rows = Op("gelu_quantize_rows(Tensor x) -> (Tensor, Tensor)", "gelu_quantize_rows")
_gelu_quantize_rows.fake(_quantized)


def residual_norm_fp8(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    tokens_per_frame: int | None = None,
    first_token: int = 0,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`residual_norm` whose normalised tensor leaves as e4m3 rows: (r, (q, row_scale)). No
    derivative."""
    rows = {"scale": scale, "shift": shift, "weight": weight, "bias": bias}
    per_frame = check_residual("residual_norm_fp8", x, y, gate, rows, tokens_per_frame, first_token)
    if _emulated(x):
        r, n = reference.residual_norm(x, y, gate, **rows, eps=eps, tokens_per_frame=per_frame, first_token=first_token)
        return r, reference.quantize_rows(n)
    r, q, row_scale = _residual_norm_fp8("triton", x, y, gate, *rows.values(), eps, per_frame, first_token)
    return (x if y is None else r), (q, row_scale)


# (r, q, row_scale); r empty without y.
_residual_norm_fp8 = Op(
    "residual_norm_fp8(Tensor x, Tensor? y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
    "float eps, SymInt tokens_per_frame, SymInt first_token) -> (Tensor, Tensor, Tensor)",
    "residual_norm_fp8_forward",
)


@_residual_norm_fp8.fake
def _(x: Tensor, y: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(0) if y is None else contiguous_like(x), *_quantized(x)


def scaled_linear(rows: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """(q * scale) @ (w * w_scale)^T + bias in bf16: rows of `quantize_rows` times a weight
    quantised likewise.

    q [..., I], scale [..., 1]; w [O, I] float8_e4m3fn, w_scale [O, 1]; bias [O]. One scaled_mm
    where the device multiplies fp8; elsewhere both are expanded to float32 first.
    """
    (q, scale), (w, w_scale) = rows, weight
    if q.is_cpu or (q.is_cuda and fp8_reason(q.device) is not None):
        out = nnf.linear(q.float() * scale, w.float() * w_scale, None if bias is None else bias.float())
        return out.to(torch.bfloat16)
    flat: Tensor = torch._scaled_mm(
        q.flatten(0, -2),
        w.t(),
        scale_a=scale.flatten(0, -2),
        scale_b=w_scale.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return torch.unflatten(flat, 0, q.shape[:-1])
