"""e4m3 rows with one scale each, and the products that take them. Lossy: nothing calls these unless fp8 is asked for.

The kernels need compute capability 8.9 or later. Elsewhere plain torch emulates them, which is for measuring what the
rounding costs, not for speed: `pusa_fast.weights.load_dit(..., precision="fp8")` refuses such a device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.library import custom_op

from pusa_fast.kernels import reference
from pusa_fast.ops.backend import chosen, launchers
from pusa_fast.ops.checks import check_float, check_residual, require


def fp8_reason(device: torch.device) -> str | None:
    """Why this device cannot multiply e4m3 rows, or None where it can."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return f"fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return None
    name = torch.cuda.get_device_name(device)
    return f"fp8 needs compute capability 8.9 or later (Ada, Hopper, Blackwell); {name} has {capability[0]}.{capability[1]}"


def _emulated(x: Tensor) -> bool:
    return chosen(x) != "triton" or (x.is_cuda and fp8_reason(x.device) is not None)


def _row_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return q, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@custom_op("pusa_fast::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    with launchers(x) as run:
        q, scale = run.quantize_rows(x)
    return q, scale


@custom_op("pusa_fast::gelu_quantize_rows", mutates_args=())
def _gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    with launchers(x) as run:
        q, scale = run.gelu_quantize_rows(x)
    return q, scale


@custom_op("pusa_fast::residual_norm_fp8", mutates_args=())
def _residual_norm_fp8(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_base: Tensor | None,
    scale: Tensor | None,
    scale_base: Tensor | None,
    shift: Tensor | None,
    shift_base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, q, row_scale); r empty where y is None."""
    with launchers(x, y) as run:
        r, q, row_scale = run.residual_norm_fp8_forward(
            x, y, gate, gate_base, scale, scale_base, shift, shift_base, weight, bias, eps
        )
    return (x.new_empty(0) if r is None else r), q, row_scale


_quantize_rows.register_fake(_row_outputs)
_gelu_quantize_rows.register_fake(_row_outputs)


@_residual_norm_fp8.register_fake
def _(x: Tensor, y: Tensor | None, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(0) if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device), *_row_outputs(x)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] ~ q * scale: q float8_e4m3fn [..., D], scale = max(amax, 1e-12) / 448, float32 [..., 1]. No derivative."""
    check_float("quantize_rows", x=x)
    require(x.ndim > 0, "quantize_rows", "x must be [..., D]", x)
    if _emulated(x):
        return reference.quantize_rows(x)
    q, scale = _quantize_rows(x)
    return q, scale


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the tanh GELU of x, which is not rounded in between."""
    check_float("gelu_quantize_rows", x=x)
    require(x.ndim > 0, "gelu_quantize_rows", "x must be [..., D]", x)
    if _emulated(x):
        return reference.gelu_quantize_rows(x)
    q, scale = _gelu_quantize_rows(x)
    return q, scale


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
    gate_base: Tensor | None = None,
    scale_base: Tensor | None = None,
    shift_base: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`residual_norm` whose normalised tensor leaves as e4m3 rows: (r, (q, row_scale)). No derivative."""
    tables = {"gate": gate, "scale": scale, "shift": shift}
    bases = {"gate_base": gate_base, "scale_base": scale_base, "shift_base": shift_base}
    check_residual("residual_norm_fp8", x, y, tables, bases, {"weight": weight, "bias": bias})
    if _emulated(x):
        r, n = reference.residual_norm(x, y, gate, scale=scale, shift=shift, weight=weight, bias=bias, eps=eps, **bases)
        return r, reference.quantize_rows(n)
    r, q, row_scale = _residual_norm_fp8(x, y, gate, gate_base, scale, scale_base, shift, shift_base, weight, bias, eps)
    return (x if y is None else r), (q, row_scale)


def scaled_linear(rows: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """(q * scale) @ (w * w_scale)^T + bias in bf16: rows of `quantize_rows` times a weight quantised likewise.

    q [..., I], scale [..., 1]; w [O, I] float8_e4m3fn, w_scale [O, 1]; bias [O]. One scaled_mm where the device has fp8 products;
    elsewhere both are expanded to float32 first.
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
