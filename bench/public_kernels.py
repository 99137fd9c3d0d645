"""Public kernels for the same ops, used where they can be imported; torch supplies what they lack
(a gate per frame, say).

Written from their sources and documentation: liger-kernel, quack-kernels, flash-attn (its Triton
norms and rotary).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.formulations import Call, Formulation, token_angles
from bench.registry import EPS, Inputs, Outputs


@dataclass(frozen=True)
class Library:
    """`modules` must all import; `entries`: its formulation by op."""

    modules: tuple[str, ...]
    install: str
    entries: Mapping[str, Formulation]

    def reason(self) -> str | None:
        """Why it cannot be used here, or None."""
        if not torch.cuda.is_available():
            return "no CUDA device"
        for name in self.modules:
            try:
                importlib.import_module(name)
            except Exception as error:
                first = next(iter(str(error).splitlines()), "")
                return f"{name} does not import ({type(error).__name__}: {first}): {self.install}"
        return None


def _gated(t: Inputs) -> Tensor:
    """gate[f] * y of K3, which no public norm takes."""
    rows = t["table"][:, :, 2]
    frames = t["y"].unflatten(1, (rows.shape[1], -1))
    return (frames * rows.unsqueeze(2).to(frames.dtype)).flatten(1, 2)


def _liger_rms(t: Inputs) -> Call:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda: (liger_rms_norm(t["x"], t["weight"], EPS, in_place=False),)


def _liger_k3(t: Inputs) -> Call:
    from liger_kernel.transformers.functional import liger_layer_norm

    def call() -> Outputs:
        r = t["x"] + _gated(t)
        return r, liger_layer_norm(r, t["weight"], t["bias"], EPS)

    return call


def _quack_rms(t: Inputs) -> Call:
    from quack import rmsnorm

    return lambda: (rmsnorm(t["x"].flatten(0, 1), t["weight"], eps=EPS).view_as(t["x"]),)


def _flash_rms(t: Inputs) -> Call:
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda: (rms_norm_fn(t["x"], t["weight"], None, eps=EPS),)


def _flash_k3(t: Inputs) -> Call:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def call() -> Outputs:
        n, r = layer_norm_fn(_gated(t), t["weight"], t["bias"], residual=t["x"], eps=EPS, prenorm=True)
        return r, n

    return call


def _flash_rope(t: Inputs) -> Call:
    from flash_attn.layers.rotary import apply_rotary_emb
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    cos, sin = token_angles(t)

    def rotate(x_BLHK: Tensor, weight: Tensor) -> Tensor:
        n = rms_norm_fn(x_BLHK.flatten(2), weight, None, eps=EPS).view_as(x_BLHK)
        out: Tensor = apply_rotary_emb(n, cos, sin, interleaved=True)
        return out

    return lambda: (rotate(t["q"], t["weight_q"]), rotate(t["k"], t["weight_k"]))


def _rows(rms: Callable[[Inputs], Call], **more: Formulation) -> dict[str, Formulation]:
    return {**{name: Formulation(rms) for name in ("rms_norm", "rms_norm_backward")}, **more}


_FLASH_ROPE = Formulation(_flash_rope, ("q", "k"))
LIBRARIES: Mapping[str, Library] = {
    "liger": Library(
        ("liger_kernel.transformers.functional",),
        "pip install liger-kernel",
        _rows(_liger_rms, residual_norm_k3=Formulation(_liger_k3)),
    ),
    "quack": Library(("quack",), "pip install quack-kernels", _rows(_quack_rms)),
    "flash-attn": Library(
        ("flash_attn.ops.triton.layer_norm", "flash_attn.layers.rotary"),
        "pip install flash-attn --no-build-isolation",
        _rows(
            _flash_rms,
            residual_norm_k3=Formulation(_flash_k3),
            **dict.fromkeys(("qk_rope", "qk_rope_inplace", "qk_rope_backward"), _FLASH_ROPE),
        ),
    ),
}
