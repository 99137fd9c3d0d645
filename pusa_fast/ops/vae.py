"""The VAE's convolutions and the memory-bound step between them. Inference only.

Shapes: B batch, T frames, H/W pixels, C channels in, O out; a clip is [B, T, H, W, C], contiguous
where it is a result. Outputs of `vae_act_` are written in place, so that a producer fills the part
of a window that the next convolution reads. Convolutions go through torch's libraries: cuDNN,
oneDNN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.ops.checks import shape
from pusa_fast.ops.registry import Op, choose, onednn_convolves, recording

_OP = "vae_act_"


def vae_act_(
    y: Tensor,
    gamma: Tensor | None = None,
    *,
    out: Tensor | None = None,
    x: Tensor | None = None,
    bias: Tensor | None = None,
    r: Tensor | None = None,
    silu: bool = True,
    upsampled: bool = False,
) -> None:
    """r = y (+ bias) (+ x) ; out = act(r / max(||r||, 1e-12) * sqrt(C) * gamma).

    Whichever of r and out is given is written; act is SiLU or identity.
    out, x, r [B, T, H, W, C], views with a last stride of 1, of one float dtype; y is too, or with
    `upsampled` [B, T, H/2+1, W/2+1, 4*C], the phases of an upsampling convolution (see
    `reference.vae_act`). gamma, bias: C elements of any float dtype and shape; out needs gamma. The
    norm reads r before it is rounded. r may be x or y itself (not y where upsampled); otherwise
    outputs share no memory with inputs or each other. Meta tensors: checked, nothing else.
    Inference only: raises ValueError where autograd would record, or where arguments do not fit.
    """
    like = r if out is None else out
    if like is None:
        raise ValueError(f"{_OP}: give r, out or both")
    if not y.dtype.is_floating_point or like.ndim != 5:
        raise ValueError(f"{_OP}: tensors must be float and [B, T, H, W, C], got {y.dtype}, {shape(like)}")
    B, T, H, W, C = size = like.shape
    if upsampled and (H % 2 or W % 2):
        raise ValueError(f"{_OP}: upsampled outputs have even H and W, got {shape(like)}")
    _check_pixels("y", y, y, (B, T, H // 2 + 1, W // 2 + 1, 4 * C) if upsampled else size)
    for name, t in (("x", x), ("r", r), ("out", out)):
        if t is not None:
            _check_pixels(name, t, y, size)
            if t is not x:
                _check_output(name, t)
    for name, t in (("gamma", gamma), ("bias", bias)):
        if t is not None:
            _check_row(name, t, y, C)
    if out is not None and gamma is None:
        raise ValueError(f"{_OP}: out needs gamma")
    if recording(y, gamma, x, bias, r, out):
        raise ValueError(f"{_OP}: inference only, without a derivative: run it under torch.no_grad()")
    if y.is_meta:
        return
    backend = choose(y)
    if backend != "reference":
        _vae_act_(backend, y, gamma, x, bias, r, out, silu, upsampled)
        return
    if not torch.compiler.is_compiling():
        _check_memory(y, gamma, x, bias, r, out, silu, upsampled)
    r_value, out_value = reference.vae_act(y, None if out is None else gamma, x, bias, silu, upsampled)
    for t, value in ((r, r_value), (out, out_value)):
        if t is not None and value is not None:
            t.copy_(value)


def _check_memory(
    y: Tensor,
    gamma: Tensor | None,
    x: Tensor | None,
    bias: Tensor | None,
    r: Tensor | None,
    out: Tensor | None,
    silu: bool,
    upsampled: bool,
) -> None:
    """No output begins where an input or the other output does, unless r is x or y itself."""
    for name, t in (("x", x), ("y", y), ("r", r)):
        if t is None or not t.numel():
            continue
        if out is not None and out.data_ptr() == t.data_ptr():
            raise ValueError(f"{_OP}: out cannot be the memory of {name}")
        if r is None or r is t or r.data_ptr() != t.data_ptr():
            continue
        if (name == "y" and upsampled) or r.stride() != t.stride():
            raise ValueError(f"{_OP}: r can be {name} only as a whole: same strides, and not upsampled")


def _check_pixels(name: str, t: Tensor, y: Tensor, wanted: tuple[int, ...]) -> None:
    if t.shape != wanted:
        raise ValueError(f"{_OP}: {name} must be {list(wanted)}, got {shape(t)}")
    if t.dtype != y.dtype or t.device != y.device:
        raise ValueError(f"{_OP}: {name} must be {y.dtype} on {y.device} as y is, got {t.dtype} on {t.device}")
    if t.stride(4) != 1 and wanted[4] > 1:
        raise ValueError(f"{_OP}: {name} must have its channels side by side, got a last stride of {t.stride(4)}")


def _check_row(name: str, t: Tensor, y: Tensor, channels: int) -> None:
    if t.numel() != channels:
        raise ValueError(f"{_OP}: {name} must have C={channels} elements, got {shape(t)}")
    if not t.dtype.is_floating_point or t.device != y.device:
        raise ValueError(f"{_OP}: {name} must be a float tensor on {y.device}, got {t.dtype} on {t.device}")


def _check_output(name: str, t: Tensor) -> None:
    if 0 in t.stride() and any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True)):
        raise ValueError(f"{_OP}: {name} cannot be expanded memory, where several elements are one")


_vae_act_ = Op(
    "vae_act_(Tensor y, Tensor? gamma, Tensor? x, Tensor? bias, Tensor(a!)? r, Tensor(b!)? out, bool silu, "
    "bool upsampled) -> ()",
    "vae_act_",
    check=_check_memory,
)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0, stride: tuple[int, int, int] = (1, 1, 1)
) -> Tensor:
    """[B, T, H, W, C] -> [B, T', H', W', O]; weight [O, C, kt, kh, kw].

    `padding` zeros around each frame, none in time.
    A single frame before kt > 1 taps is the start of a clip: the taps before it meet zeros.
    """
    if x.shape[1] == 1:
        return convolve_frames(x, weight[:, :, -1], bias, padding, stride[1])
    pads = (0, padding, padding)
    return _run(x.permute(0, 4, 1, 2, 3), weight, bias, pads, stride).permute(0, 2, 3, 4, 1).contiguous()


def convolve_frames(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0, stride: int = 1) -> Tensor:
    """Each frame for itself: [B, T, H, W, C] -> [B, T, H', W', O]; weight [O, C, kh, kw]."""
    out = _run(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, (padding, padding), (stride, stride))
    return torch.unflatten(out.permute(0, 2, 3, 1).contiguous(), 0, x.shape[:2])


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if can_add(x.device, x.dtype):
        # Asked for by name: on one thread torch would rather unroll small inputs into matrices, 27
        # times their size.
        ones = (1,) * len(padding)
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, ones, 1)
    convolution = nnf.conv2d if x.ndim == 4 else nnf.conv3d
    return convolution(x, weight, bias, stride, padding)


def can_add(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN serves tensors of this kind, and so `convolve_add_` does."""
    return onednn_convolves(device, dtype)


def convolve_add_(into: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> None:
    """into += convolve(x, weight, bias, padding), in the convolution's epilogue, if `can_add`."""
    other, x = into.permute(0, 4, 1, 2, 3), x.permute(0, 4, 1, 2, 3)
    pads = [0, padding, padding]
    if x.shape[2] == 1:
        other, x, weight, pads = other[:, :, 0], x[:, :, 0], weight[:, :, -1].contiguous(), pads[1:]
    ones = [1] * len(pads)
    torch.ops.mkldnn._convolution_pointwise_.binary(
        other, x, weight, bias, pads, ones, ones, 1, "add", 1.0, None, [], None
    )
