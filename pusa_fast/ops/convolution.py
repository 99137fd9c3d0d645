"""Convolutions over channels-last clips, through torch's libraries: cuDNN, oneDNN. Inference only.

Shapes: B batch, T frames, H/W pixels, C channels in, O out; a clip is [B, T, H, W, C], contiguous where it is a result.
On the meta device results take the memory that they take elsewhere (torch's own rule there may pick another layout).
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast.ops.products import ONEDNN_BF16

_HAS_BINARY = hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0, stride: tuple[int, int, int] = (1, 1, 1)
) -> Tensor:
    """`padding` zeros around each frame, none in time: [B, T, H, W, C] -> [B, T', H', W', O]; weight [O, C, kt, kh, kw].

    A single frame before kt > 1 taps is the start of a clip: the taps before it meet zeros.
    """
    if x.shape[1] == 1:
        return convolve_frames(x, weight[:, :, -1], bias, padding, stride[1])
    pads = (0, padding, padding)
    if x.is_meta:
        return _empty(x, weight, x.shape[1:4], pads, stride)
    return _run(x.permute(0, 4, 1, 2, 3), weight, bias, pads, stride).permute(0, 2, 3, 4, 1).contiguous()


def convolve_frames(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0, stride: int = 1) -> Tensor:
    """Each frame for itself: [B, T, H, W, C] -> [B, T, H', W', O]; weight [O, C, kh, kw]."""
    if x.is_meta:
        return _empty(x, weight[:, :, None], x.shape[1:4], (0, padding, padding), (1, stride, stride))
    out = _run(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, (padding, padding), (stride, stride))
    return torch.unflatten(out.permute(0, 2, 3, 1).contiguous(), 0, x.shape[:2])


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if can_add(x.device, x.dtype):
        # Asked for by name: on one thread torch would rather unroll small inputs into matrices, 27 times their size.
        ones = (1,) * len(padding)
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, ones, 1)
    convolution = nnf.conv2d if x.ndim == 4 else nnf.conv3d
    return convolution(x, weight, bias, stride, padding)


def can_add(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN serves tensors of this kind, and so `convolve_add_` does."""
    supported = dtype == torch.float32 or (dtype == torch.bfloat16 and ONEDNN_BF16)
    return device.type == "cpu" and _HAS_BINARY and supported and bool(torch._C._get_mkldnn_enabled())


def convolve_add_(into: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> None:
    """into += convolve(x, weight, bias, padding), in the convolution's own epilogue, where `can_add` says so."""
    if x.is_meta:
        _meanwhile = weight[:, :, -1].contiguous() if x.shape[1] == 1 else None
        return
    other, x = into.permute(0, 4, 1, 2, 3), x.permute(0, 4, 1, 2, 3)
    pads = [0, padding, padding]
    if x.shape[2] == 1:
        other, x, weight, pads = other[:, :, 0], x[:, :, 0], weight[:, :, -1].contiguous(), pads[1:]
    ones = [1] * len(pads)
    torch.ops.mkldnn._convolution_pointwise_.binary(
        other, x, weight, bias, pads, ones, ones, 1, "add", 1.0, None, [], None
    )


def _empty(x: Tensor, weight: Tensor, size: torch.Size, pads: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    _meanwhile = torch.empty_like(weight)  # torch lays weights out channels-last for the call
    out = ((n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, pads, weight.shape[2:], stride, strict=True))
    return x.new_empty(x.shape[0], *out, weight.shape[0])
