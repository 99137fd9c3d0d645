"""Matrix products and the activation behind them, through the fastest exact entry of torch for each device.

Where autograd records, all of them are torch's plain functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast.ops import library, native
from pusa_fast.ops.backend import chosen
from pusa_fast.ops.checks import check_float


def _onednn_bf16() -> bool:
    """Whether oneDNN multiplies bf16 here, and this torch lets one call its linear layer directly."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


ONEDNN_BF16 = _onednn_bf16()


def _recording(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling():  # inductor picks products itself, and knows this one with constant weights only
        return False
    bf16 = x.dtype == weight.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)
    fits = x.is_cpu and x.numel() > 0 and x.shape[-1] == weight.shape[-1]
    allowed = ONEDNN_BF16 and torch._C._get_mkldnn_enabled() and not _autocasts(x)
    return allowed and bf16 and fits and chosen(x) == "native"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. x [..., I], weight [O, I], bias [O].

    In bf16 on the CPU oneDNN adds the bias itself: torch's addmm writes the bias first and adds the product to it.
    """
    if _takes_onednn(x, weight, bias) and not _recording(x, weight, bias):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return nnf.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x @ weight^T + bias), tanh form. x [..., I], weight [O, I], bias [O].

    On CUDA, and in bf16 on the CPU, the activation rides in the product's epilogue: no pass over memory of its own.
    """
    recording = _recording(x, weight, bias)
    if not recording and chosen(x) == "triton" and not x.is_cpu and not _autocasts(x):
        rows: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return torch.unflatten(rows, 0, x.shape[:-1])
    if not recording and _takes_onednn(x, weight, bias):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return out
    return gelu(nnf.linear(x, weight, bias), inplace=not recording)


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias in float32 or better, each row of x as if it came alone. x [R, I], weight [O, I], bias [O].

    A product of several rows rounds by how many there are; this one does not. Inference only.
    """
    if chosen(x) == "native" and x.dtype == torch.float32:
        out: Tensor = library.linear_rows(x, weight, bias)
        return out
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    # Clones begin where memory is aligned: MKL's product of one row rounds by where the row lies.
    return torch.cat([nnf.linear(row.clone(), weight, bias) for row in torch.split(x, 1)])


def gelu(x: Tensor, inplace: bool = False) -> Tensor:
    """GELU in its tanh form, x's dtype. With `inplace` the result may take x's memory where autograd does not record: use what returns."""
    check_float("gelu", x=x)
    if inplace and not _recording(x) and chosen(x) == "native" and native.supports(x) and x.is_contiguous():
        library.gelu_(x)
        return x
    if _recording(x) and chosen(x) == "native" and native.supports(x):
        out: Tensor = library.gelu(x)
        return out
    return nnf.gelu(x, approximate="tanh")
