"""Matmuls and the activation after them, through the fastest exact entry of torch for each device.

Where autograd records, all of them are torch's plain functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast.ops.registry import Op, choose, choose_matmul, contiguous_like, recording


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. x [..., I], weight [O, I], bias [O].

    In bf16 on the CPU oneDNN adds the bias itself: torch's addmm writes the bias first and adds the
    matmul to it.
    """
    if choose_matmul(x, weight, bias) == "onednn":
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return nnf.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x @ weight^T + bias), tanh form. x [..., I], weight [O, I], bias [O].

    On CUDA, and in bf16 on the CPU, the matmul's epilogue applies the activation: no pass over
    memory of its own.
    """
    way = choose_matmul(x, weight, bias)
    if way == "cublaslt":
        flat: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return torch.unflatten(flat, 0, x.shape[:-1])
    if way == "onednn":
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return out
    return gelu(nnf.linear(x, weight, bias), inplace=not recording(x, weight, bias))


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias in float32 or better, each row of x as if it came alone. x [R, I], weight
    [O, I], bias [O].

    A matmul of several rows rounds by how many there are; this one does not. Inference only.
    """
    if x.dtype == torch.float32 and choose(x) == "native":
        out: Tensor = _linear_rows("native", x, weight, bias)
        return out
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    # Clones are aligned: MKL's matmul of one row rounds by its address.
    return torch.cat([nnf.linear(row.clone(), weight, bias) for row in torch.split(x, 1)])


_linear_rows = Op("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor", "linear_rows")


@_linear_rows.fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def gelu(x: Tensor, inplace: bool = False) -> Tensor:
    """GELU in its tanh form, x's dtype.

    With `inplace` the result may take x's memory where autograd does not record: use what returns.
    """
    if not x.is_floating_point():
        raise ValueError(f"gelu: x must be a float tensor, got {x.dtype}")
    records = recording(x)
    if (records or (inplace and x.is_contiguous())) and choose(x, only="native") == "native":
        if not records:
            _gelu_("native", x)
            return x
        out: Tensor = _gelu("native", x)
        return out
    return nnf.gelu(x, approximate="tanh")


_gelu_ = Op("gelu_(Tensor(a!) x) -> ()", "gelu_")  # CUDA has it in the matmul's epilogue
_gelu = Op("gelu(Tensor x) -> Tensor", "gelu_forward")
_gelu.fake(lambda x: contiguous_like(x))
_gelu_backward = Op("gelu_backward(Tensor dy, Tensor x) -> Tensor", "gelu_backward")
_gelu_backward.fake(lambda dy, x: contiguous_like(x))
_gelu.derivative(
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, dy: _gelu_backward.operator(dy, *ctx.saved_tensors),
)
