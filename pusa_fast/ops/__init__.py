"""The memory-bound steps of the transformer, the VAE and training, one function per op: checks its arguments, then calls the chosen backend.

The formulas stand in `pusa_fast.kernels.reference`; the names here are the same. Triton serves CUDA tensors, native code
float32 and bf16 on the CPU, plain torch everything else; `ops.use("reference")` forces one. The first two run as
`torch.ops.pusa_fast.*`, which torch.compile traces without graph breaks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.kernels.reference import rope_split
from pusa_fast.ops import library
from pusa_fast.ops.backend import BACKENDS, backends, chosen, use
from pusa_fast.ops.checks import check_device, check_float, check_residual, require, shape
from pusa_fast.ops.flow import flow_loss, noise_and_target
from pusa_fast.ops.products import gelu, linear, linear_gelu, linear_rows
from pusa_fast.ops.quantize import gelu_quantize_rows, quantize_rows, residual_norm_fp8, scaled_linear
from pusa_fast.ops.vae import vae_act_

__all__ = [
    "BACKENDS",
    "backends",
    "flow_loss",
    "gated_residual",
    "gelu",
    "gelu_quantize_rows",
    "guided_euler_step",
    "linear",
    "linear_gelu",
    "linear_rows",
    "noise_and_target",
    "qk_rope",
    "quantize_rows",
    "residual_norm",
    "residual_norm_fp8",
    "rms_norm",
    "rope_split",
    "scaled_linear",
    "use",
    "vae_act_",
]


def residual_norm(
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
) -> tuple[Tensor, Tensor]:
    """r = x + gate[f] * y ; n = LN(r) * (1 + scale[f]) + shift[f], or LN(r) * weight + bias. Returns (r, n) in x's dtype.

    x, y [B, L, D]; gate, scale, shift [B, F, D] with F a divisor of L (token n is of frame n // (L // F)); weight, bias
    [D]. A `*_base` [D] is added to every row of its table, or stands for the whole of it. y and gate are optional; scale
    comes with shift, weight with bias, and not both pairs. Raises ValueError.
    """
    tables = {"gate": gate, "scale": scale, "shift": shift}
    bases = {"gate_base": gate_base, "scale_base": scale_base, "shift_base": shift_base}
    check_residual("residual_norm", x, y, tables, bases, {"weight": weight, "bias": bias})
    if chosen(x, y) == "reference":
        return reference.residual_norm(x, y, gate, scale=scale, shift=shift, weight=weight, bias=bias, eps=eps, **bases)
    r, n, _, _ = library.residual_norm(x, y, gate, gate_base, scale, scale_base, shift, shift_base, weight, bias, eps)
    return (x if y is None else r), n


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None = None, gate_base: Tensor | None = None) -> Tensor:
    """x + (gate[f] + gate_base) * y, or x + y without either, in x's dtype.

    x, y [B, L, D]; gate [B, F, D] with F a divisor of L; gate_base [D]. Raises ValueError.
    """
    check_residual("gated_residual", x, y, {"gate": gate}, {"gate_base": gate_base}, {})
    if chosen(x, y) == "reference":
        return reference.gated_residual(x, y, gate, gate_base)
    out: Tensor = library.gated_residual(x, y, gate, gate_base)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [..., D], weight [D]; returns x's dtype."""
    check_float("rms_norm", x=x, weight=weight)
    check_device("rms_norm", x, weight=weight)
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must match x's last dimension: x {shape(x)}, weight {shape(weight)}")
    if chosen(x) == "reference":
        return reference.rms_norm(x, weight, eps)
    n: Tensor = library.rms_norm(x, weight, eps)[0]
    return n


def qk_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: tuple[int, int, int],
    eps: float = 1e-6,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of q and of k over the full width H*K, then 3-D rotary embedding of adjacent pairs. Returns (q, k, v).

    qkv [B, L, 3, H, K], K even; weight_q, weight_k [H*K]; cos, sin [P, K/2], P >= max(grid), columns in axis order as
    `rope_split(K)` says; grid (F, h, w) with F*h*w = L. q, k, v are [B, L, H, K] in qkv's dtype; v is a view of qkv. With
    `inplace`, inference only, q and k are too. Raises ValueError.
    """
    op = "qk_rope"
    require(qkv.ndim == 5 and qkv.shape[2] == 3, op, "qkv must be [B, L, 3, H, K]", qkv)
    check_float(op, qkv=qkv, weight_q=weight_q, weight_k=weight_k, cos=cos, sin=sin)
    check_device(op, qkv, weight_q=weight_q, weight_k=weight_k, cos=cos, sin=sin)
    L, H, K = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    if K % 2:
        raise ValueError(f"{op}: the head dimension must be even, got {K}")
    if grid[0] * grid[1] * grid[2] != L:
        raise ValueError(f"{op}: grid {tuple(grid)} does not hold {L} tokens")
    for name, row in (("weight_q", weight_q), ("weight_k", weight_k)):
        require(row.shape == (H * K,), op, f"{name} must be [H*K={H * K}]", row)
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.ndim == 2 and table.shape[0] >= max(grid) and table.shape[1] == K // 2
        require(fits, op, f"{name} must be [P >= {max(grid)}, K/2={K // 2}]", table)
    require(cos.shape == sin.shape, op, f"sin must have cos's shape {shape(cos)}", sin)
    if inplace and any(size > 1 and stride == 0 for size, stride in zip(qkv.shape, qkv.stride(), strict=True)):
        raise ValueError(
            f"{op}: inplace cannot write to expanded memory, where several elements are one: copy qkv first"
        )
    if inplace and torch.is_grad_enabled() and any(t.requires_grad for t in (qkv, weight_q, weight_k)):
        raise ValueError(f"{op}: inplace has no derivative: leave it out, or run under torch.no_grad()")
    if chosen(qkv) == "reference":
        return reference.qk_rope(qkv, weight_q, weight_k, cos, sin, grid, eps, inplace)
    q, k, v = qkv.unbind(2)
    if inplace:
        library.qk_rope_(q, k, weight_q, weight_k, cos, sin, list(grid), eps)
    else:
        q, k, _, _ = library.qk_rope(q, k, weight_q, weight_k, cos, sin, list(grid), eps)
    return q, k, v


def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """x[f] += (v_neg + guidance * (v - v_neg))[f] * dsigma[f]; frames whose dsigma is 0 keep their bits. Inference only.

    x, v, v_neg [B, C, F, h, w], v_neg None for no guidance; dsigma [F]. Returns x's dtype. Raises ValueError.
    """
    op = "guided_euler_step"
    require(x.ndim == 5, op, "x must be [B, C, F, h, w]", x)
    check_float(op, x=x, v=v, v_neg=v_neg, dsigma=dsigma)
    check_device(op, x, v=v, v_neg=v_neg, dsigma=dsigma)
    for name, velocity in (("v", v), ("v_neg", v_neg)):
        require(velocity is None or velocity.shape == x.shape, op, f"{name} must be {shape(x)}", velocity)
    require(dsigma.shape == x.shape[2:3], op, f"dsigma must be [F={x.shape[2]}]", dsigma)
    if chosen(x, v, v_neg) == "reference":
        return reference.guided_euler_step(x, v, v_neg, guidance, dsigma)
    out: Tensor = library.guided_euler_step(x, v, v_neg, float(guidance), dsigma)
    return out
