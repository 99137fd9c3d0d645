"""The VAE's memory-bound step between convolutions: bias, residual, RMS norm over channels and SiLU in one pass.

Outputs are written in place, so that a producer fills the part of a window that the next convolution reads. Inference only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.ops.backend import chosen, launchers
from pusa_fast.ops.checks import shape

_OP = "vae_act_"


def _check_memory(y: Tensor, x: Tensor | None, r: Tensor | None, out: Tensor | None, upsampled: bool) -> None:
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


def _run(
    y: Tensor,
    gamma: Tensor | None,
    x: Tensor | None,
    bias: Tensor | None,
    r: Tensor | None,
    out: Tensor | None,
    silu: bool,
    upsampled: bool,
) -> None:
    _check_memory(y, x, r, out, upsampled)
    with launchers(y) as run:
        run.vae_act_(y, gamma, x, bias, r, out, silu, upsampled)


# By hand and not by `custom_op`, whose wrappers around an op that mutates take 40 microseconds a call: a small model's pixels
# take less. There is no derivative to wrap, and no version to count: `vae_act_` refuses to run where autograd records.
_LIBRARY: Any = torch.library.Library("pusa_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "vae_act_(Tensor y, Tensor? gamma, Tensor? x, Tensor? bias, Tensor(a!)? r, Tensor(b!)? out, bool silu, bool upsampled)"
    " -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("vae_act_", _run, _key)
_LIBRARY.impl("vae_act_", lambda *args: None, "Meta")
_vae_act_ = torch.ops.pusa_fast.vae_act_.default


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
    """r = y (+ bias) (+ x) ; out = act(r / max(||r||, 1e-12) * sqrt(C) * gamma), act SiLU or identity, where r and out are given.

    out, x, r [B, T, H, W, C], views with a last stride of 1, of one float dtype; y is too, or with `upsampled`
    [B, T, H/2+1, W/2+1, 4*C], the phases of an upsampling convolution (see `reference.vae_act`). gamma, bias: C elements of
    any float dtype and shape; out needs gamma. The norm reads r before it is rounded. r may be x or y itself (not y where
    upsampled); otherwise outputs share no memory with inputs or each other. Meta tensors: checked, nothing else. Inference
    only: raises ValueError where autograd would record, or where arguments do not fit.
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
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, gamma, x, bias, r, out)):
        raise ValueError(f"{_OP}: inference only, without a derivative: run it under torch.no_grad()")
    if y.is_meta:
        return
    if chosen(y) != "reference":
        _vae_act_(y, gamma, x, bias, r, out, silu, upsampled)
        return
    if not torch.compiler.is_compiling():
        _check_memory(y, x, r, out, upsampled)
    r_value, out_value = reference.vae_act(y, None if out is None else gamma, x, bias, silu, upsampled)
    for t, value in ((r, r_value), (out, out_value)):
        if t is not None and value is not None:
            t.copy_(value)
