"""The attention packages as one custom op, `pusa_fast::flash_attention(q, k, v, backend)`.

With one fake and one gradient, each works under torch.compile and on meta tensors, and a checkpoint
policy can keep (out, lse) by name. The entry points are those of flash-attn 2.7 and later,
flash_attn_interface (FA3), flash-attn-4 4.0.0b36 and sageattention 1.0.6. None of this has run on
a GPU: it follows their sources; FA4's two calls compile for sm_90a at head dimensions 8 to 256.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

QKV = tuple[Tensor, Tensor, Tensor]
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # dout, q, k, v, out, lse


@dataclass(frozen=True)
class Package:
    """What to import (the last module is called), how to install it, and its two entry points.

    forward(module, q, k, v, scale) -> (out, lse); backward(module, (dout, q, k, v, out, lse),
    (dq, dk, dv), scale, deterministic) fills dq, dk and dv. All are [B, L, H, K], last stride 1,
    the others any; lse is [B, H, Lq] in float32.
    """

    modules: tuple[str, ...]
    install: str
    forward: Callable[[Any, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[[Any, Saved, QKV, float, bool], None] | None = None

    def load(self) -> Any:
        return [importlib.import_module(name) for name in self.modules][-1]


_FA2_OPTIONS = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


def _fa2_forward(fa2: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = fa2._flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=scale, causal=False, return_softmax=False, **_FA2_OPTIONS
    )
    return out, lse


def _fa2_backward(fa2: Any, saved: Saved, grads: QKV, scale: float, deterministic: bool) -> None:
    fa2._flash_attn_backward(
        *saved, *grads, dropout_p=0.0, softmax_scale=scale, causal=False, deterministic=deterministic, **_FA2_OPTIONS
    )


# FA3's arguments for caches, ragged batches, rotary tables and fp8 scales have no defaults in early
# versions, and some were renamed: by position they are the same in all.
_FA3_FORWARD_UNUSED, _FA3_BACKWARD_UNUSED = (None,) * 20, (None,) * 6


def _fa3_forward(fa3: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    causal = False
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, *_FA3_FORWARD_UNUSED, scale, causal)
    return out, lse


def _fa3_backward(fa3: Any, saved: Saved, grads: QKV, scale: float, deterministic: bool) -> None:
    causal = False
    fa3._flash_attn_backward(*saved, *_FA3_BACKWARD_UNUSED, *grads, scale, causal, deterministic=deterministic)


def _fa4_forward(fa4: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = fa4._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
    return out, lse


def _fa4_backward(fa4: Any, saved: Saved, grads: QKV, scale: float, deterministic: bool) -> None:
    (dout, q, k, v, out, lse), (dq, dk, dv) = saved, grads
    fa4._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale, deterministic=deterministic, dq=dq, dk=dk, dv=dv)


def _sage_forward(sage: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # Subtracting the mean key, which softmax ignores, makes int8 keys accurate enough. Sage's own
    # `smooth_k` would do so in place, in the caller's tensor.
    k = k - k.mean(1, keepdim=True)
    out = sage.sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale, smooth_k=False)
    return out, q.new_full((q.shape[0], q.shape[2], q.shape[1]), torch.nan, dtype=torch.float32)


PACKAGES: Mapping[str, Package] = MappingProxyType(
    {
        "fa2": Package(
            ("flash_attn.flash_attn_interface",),
            "pip install flash-attn --no-build-isolation",
            _fa2_forward,
            _fa2_backward,
        ),
        "fa3": Package(
            ("flash_attn_interface",),
            "build the folder hopper of the flash-attention repository",
            _fa3_forward,
            _fa3_backward,
        ),
        # flash-attn 2.8 ships an earlier `flash_attn.cute`: without cutlass that is not FA4.
        "fa4": Package(
            ("cutlass", "flash_attn.cute.interface"),
            "pip install --pre 'flash-attn-4[cu13]' triton",
            _fa4_forward,
            _fa4_backward,
        ),
        "sage": Package(("sageattention",), "pip install sageattention triton", _sage_forward),
    }
)


def _dense_rows(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """Every package needs stride 1 in the head dimension, and takes any other strides."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return q, k, v


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Not every package launches on the device of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.library.custom_op("pusa_fast::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(K)) v by package `backend`, and the log of softmax's denominators.

    q [B, Lq, H, K]; k, v [B, Lk, H, K] of one dtype -> out [B, Lq, H, K] in that dtype, lse
    [B, H, Lq] in float32 (sage: NaN).
    """
    if not q.numel() or not k.numel():
        return torch.zeros_like(q, memory_format=torch.contiguous_format), _empty_lse(q).fill_(-torch.inf)
    package = PACKAGES[backend]
    with on_device(q.device):
        out, lse = package.forward(package.load(), *_dense_rows(q, k, v), q.shape[-1] ** -0.5)
    return out.contiguous(), lse.contiguous()


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@flash_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)


@torch.library.custom_op("pusa_fast::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of q, k, v; reproducible under `torch.use_deterministic_algorithms`."""
    package, (dq, dk, dv) = PACKAGES[backend], _empty_grads(q, k, v)
    if package.backward is None:
        raise RuntimeError(f"attention backend {backend!r} has no backward: use another, or torch.no_grad()")
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    saved = (dout.contiguous(), *_dense_rows(q, k, v), out, lse)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with on_device(q.device):
        package.backward(package.load(), saved, (dq, dk, dv), q.shape[-1] ** -0.5, deterministic)
    return dq, dk, dv


def _empty_grads(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


@flash_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, backend: str) -> QKV:
    return _empty_grads(q, k, v)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    dq, dk, dv = flash_attention_backward(dout, *ctx.saved_tensors, ctx.backend)
    return dq, dk, dv, None


flash_attention.register_autograd(_differentiate, setup_context=_save)
