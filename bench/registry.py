"""What is measured, as data: shapes, the tensors that ops read, and each op with the bytes that one
pass has to move.

Sizes: L tokens = F*h*w, D width, H heads, K head width, I width of the feed-forward; the VAE's
pixels are [1, F, 8h, 8w, 96], its widest ones, as many frames at half the clip's height and width.
A new op is one row of `OPS`, its competitors rows of `formulations.py` and `public_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.model.rope import rope_tables

EPS = 1e-6
Inputs = dict[str, Any]  # tensors by the names of `TENSORS`, and "grid"
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """A clip's tokens (grid: frames, rows, columns) and a model's widths."""

    name: str
    grid: tuple[int, int, int]
    dim: int
    heads: int
    ffn: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def latent(self) -> tuple[int, int, int, int, int]:
        frames, rows, columns = self.grid
        return 1, 16, frames, 2 * rows, 2 * columns


_14B = {"dim": 5120, "heads": 40, "ffn": 13824}
_1B = {"dim": 1536, "heads": 12, "ffn": 8960}
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("14b-480p", (21, 30, 52), **_14B),
            Shape("14b-720p", (21, 45, 80), **_14B),
            Shape("1.3b-480p", (21, 30, 52), **_1B),
            Shape("1.3b-2k", (4, 16, 32), **_1B),
            Shape("tiny", (2, 4, 8), 256, 2, 512),
        )
    }
)
DEFAULT_SHAPES: Mapping[str, tuple[str, ...]] = {"cuda": ("14b-480p", "14b-720p", "1.3b-480p"), "cpu": ("1.3b-2k",)}
QUICK_SHAPES: Mapping[str, tuple[str, ...]] = {"cuda": ("14b-480p",), "cpu": ("tiny",)}
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_DTYPES: Mapping[str, tuple[str, ...]] = {"cuda": ("bf16",), "cpu": ("fp32", "bf16")}


@dataclass(frozen=True)
class Spec:
    """How a tensor is drawn: its size, the axis of its frames ("tokens", "frames", "latent",
    "step", None), its law."""

    size: Callable[[Shape], tuple[int, ...]]
    axis: str | None = "tokens"
    dtype: torch.dtype | None = None  # None: the dtype of the run
    scale: float = 1.0
    mean: float = 0.0


def _activation(s: Shape) -> tuple[int, ...]:
    return 1, s.tokens, s.dim


def _heads(s: Shape) -> tuple[int, ...]:
    return 1, s.tokens, s.heads, s.dim // s.heads


def _width(s: Shape) -> tuple[int, ...]:
    return (s.dim,)


def _table(s: Shape) -> tuple[int, ...]:
    return 1, s.grid[0], 6, s.dim


CHANNELS, _PAST = 96, 2  # of the VAE's widest pixels; frames of history in a window


def _pixels(s: Shape, past: int = 0) -> tuple[int, ...]:
    frames, rows, columns = s.grid
    return 1, past + frames, 8 * rows, 8 * columns, CHANNELS


TENSORS: Mapping[str, Spec] = {
    **dict.fromkeys(("x", "y", "dr", "dn"), Spec(_activation)),
    "qkv": Spec(lambda s: (1, s.tokens, 3, s.heads, s.dim // s.heads)),
    **dict.fromkeys(("dq", "dk", "dv"), Spec(_heads)),
    "hidden": Spec(lambda s: (1, s.tokens, s.ffn)),
    "t_mod": Spec(_table, "frames", torch.float32, 0.5),
    "base": Spec(lambda s: (6, s.dim), None, None, 0.5),  # a block's own modulation table
    **dict.fromkeys(("weight", "weight_q", "weight_k"), Spec(_width, None, None, 0.2, 1.0)),
    "bias": Spec(_width, None),
    **dict.fromkeys(("latent", "v", "v_neg"), Spec(lambda s: s.latent, "latent", torch.float32)),
    "dsigma": Spec(lambda s: (s.grid[0],), "step", torch.float32, 0.1, -0.25),
    "levels": Spec(lambda s: (1, s.grid[0]), "frames", torch.float32, 0.1, 0.5),
    **dict.fromkeys(("pixels", "shortcut", "sum"), Spec(_pixels, "frames")),
    "window": Spec(lambda s: _pixels(s, _PAST), "frames"),
    "gamma": Spec(lambda s: (CHANNELS,), None, None, 0.2, 1.0),
    "channel_bias": Spec(lambda s: (CHANNELS,), None),
    "table": Spec(_table, "frames", torch.float32),  # t_mod + base, as the kernels take it
}
_ROPE = ("cos", "sin")
_UNPACKED = ("q", "k")


def draw(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random tensor of `TENSORS`, the same for a name, shape and device."""
    if name in _ROPE:
        return rope_tables(shape.dim // shape.heads, max(shape.grid), device)[_ROPE.index(name)]
    spec = TENSORS[name]
    generator = torch.Generator(device).manual_seed(list(TENSORS).index(name))
    values = torch.randn(spec.size(shape), generator=generator, device=device)
    return (values * spec.scale + spec.mean).to(spec.dtype or dtype)


class Drawn(dict[str, Any]):
    """`Inputs` of one shape and dtype, each tensor drawn when first asked for; q and k are
    contiguous copies of qkv's."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, given: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__({"grid": shape.grid, **(given or {})})
        self.shape, self.dtype, self.device = shape, dtype, device

    def __missing__(self, name: str) -> Tensor:
        if name in _UNPACKED:
            made: Tensor = self["qkv"][:, :, _UNPACKED.index(name)].contiguous()
        elif name == "table":
            made = self["t_mod"] + self["base"].float()
        else:
            made = draw(name, self.shape, self.dtype, self.device)
        self[name] = made
        return made

    def replaced(self, **tensors: Tensor) -> Drawn:
        """The same inputs, but for these."""
        return Drawn(self.shape, self.dtype, self.device, {**self, **tensors})


def frame_of(name: str, value: Tensor, frame: int, grid: tuple[int, int, int]) -> Tensor:
    """The part of an input that one latent frame sees; its rotary tables hold that frame's angles
    at position 0."""
    if name in _ROPE:
        columns = reference.rope_split(2 * value.shape[1])[0] // 2
        moved = value.clone()
        moved[0, :columns] = value[frame, :columns]
        return moved
    return along(TENSORS[name].axis, value, frame, grid)


def along(axis: str | None, value: Tensor, frame: int, grid: tuple[int, int, int]) -> Tensor:
    """A frame's part of a tensor whose frames are on `axis`."""
    per_frame = grid[1] * grid[2]
    if axis == "tokens":
        return value[:, frame * per_frame : (frame + 1) * per_frame]
    if axis == "frames":
        return value[:, frame : frame + 1]
    if axis == "latent":
        return value[:, :, frame : frame + 1]
    return value[frame : frame + 1] if axis == "step" else value


def units(shape: Shape, itemsize: int) -> dict[str, int]:
    """Bytes of what `Op.moves` counts in."""
    L, D, (F, rows, columns) = shape.tokens, shape.dim, shape.grid
    return {
        "u": L * D * itemsize,  # an activation
        "hidden": L * shape.ffn * itemsize,
        "e4m3": L * D,
        "hidden_e4m3": L * shape.ffn,
        "per_token": L * 4,  # one float32 of each token: statistics, scales
        "frame_row": F * D * 4,  # a float32 row of each frame
        "row": D * itemsize,
        "angles": max(shape.grid) * (D // shape.heads) * 4,  # cos and sin
        "latent": 16 * F * 2 * rows * 2 * columns * 4,
        "step": F * 4,
        "pixels": F * 8 * rows * 8 * columns * CHANNELS * itemsize,
        "channels": CHANNELS * itemsize,
    }


@dataclass(frozen=True)
class Op:
    """`body(implementation, inputs)` calls the op as `pusa_fast.ops` and `kernels/reference.py`
    both name it.

    `moves`: what one pass reads and writes, in `units`. `outputs`: the axis of each output's
    frames. `leaves`: with it the derivative is measured, by these inputs, for the output gradients
    `grads`. `mutates`: inputs that the call overwrites. `oracle` and `view`: what replaces the
    body in float64, and how outputs become comparable with it.
    """

    name: str
    kernel: str
    formula: str
    body: Callable[[Any, Inputs], Outputs]
    moves: Mapping[str, float]
    reads: tuple[str, ...]
    outputs: tuple[str | None, ...] = ("tokens",)
    leaves: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    oracle: Callable[[Inputs], Outputs] | None = None
    view: Callable[[Outputs], Outputs] = tuple
    fp8: bool = False
    native: bool = True  # there is native code for it

    def bytes(self, shape: Shape, itemsize: int) -> int:
        sizes = units(shape, itemsize)
        return int(sum(count * sizes[unit] for unit, count in self.moves.items()))


# First word of `Op.kernel` -> the file in kernels/ that computes it on a GPU.
FILES: Mapping[str, str] = {
    **dict.fromkeys(("K1", "K3", "K5"), "residual_norm.py"),
    "K2": "qk_rope.py",
    "K4": "norm.py",
    "step": "step.py",
    "fp8": "fp8.py",
    "VAE": "vae_act.py",
    "FAFM": "flow.py",
    "GELU": "in the product's epilogue",
}


def modulation(t: Inputs, kind: str) -> dict[str, Tensor]:
    """The rows of K1 or K5 as the transformer passes them: views of the block's frame table."""
    shift, scale = {"K1": (0, 1), "K5": (3, 4)}[kind]
    return {"scale": t["table"][:, :, scale], "shift": t["table"][:, :, shift], "eps": EPS}


def k1(impl: Any, t: Inputs) -> Outputs:
    """The last residual of the block before (gate 5), then the norm of self-attention."""
    out: Outputs = impl.residual_norm(t["x"], t["y"], t["table"][:, :, 5], **modulation(t, "K1"))
    return out


def k3(impl: Any, t: Inputs) -> Outputs:
    gate = t["table"][:, :, 2]
    out: Outputs = impl.residual_norm(t["x"], t["y"], gate, weight=t["weight"], bias=t["bias"], eps=EPS)
    return out


def k5(impl: Any, t: Inputs) -> Outputs:
    out: Outputs = impl.residual_norm(t["x"], t["y"], **modulation(t, "K5"))
    return out


def rms_norm(impl: Any, t: Inputs) -> Outputs:
    return (impl.rms_norm(t["x"], t["weight"], EPS),)


def qk_rope(impl: Any, t: Inputs, inplace: bool = False) -> Outputs:
    q, k, _ = impl.qk_rope(t["qkv"], t["weight_q"], t["weight_k"], t["cos"], t["sin"], t["grid"], EPS, inplace)
    return q, k


def qk_rope_inplace(impl: Any, t: Inputs) -> Outputs:
    return qk_rope(impl, t, inplace=True)


def qkv_rope(impl: Any, t: Inputs) -> Outputs:
    out: Outputs = impl.qk_rope(t["qkv"], t["weight_q"], t["weight_k"], t["cos"], t["sin"], t["grid"], EPS)
    return out


def guided_euler_step(impl: Any, t: Inputs) -> Outputs:
    return (impl.guided_euler_step(t["latent"], t["v"], t["v_neg"], 5.0, t["dsigma"]),)


def noise_and_target(impl: Any, t: Inputs) -> Outputs:
    out: Outputs = impl.noise_and_target(t["latent"], t["v"], t["levels"])
    return out


def flow_loss(impl: Any, t: Inputs) -> Outputs:
    """The loss's gradient, times the number of frames: a frame's part is then the same beside
    others and alone."""
    v = t["v"].detach().requires_grad_()
    with torch.enable_grad():
        loss, _ = impl.flow_loss(v, t["latent"], t["levels"])
        return torch.autograd.grad(loss * t["grid"][0], v)


def vae_act(impl: Any, t: Inputs) -> Outputs:
    """Into the window of the next convolution, behind its history."""
    if impl is reference:
        out = impl.vae_act(t["pixels"], t["gamma"], bias=t["channel_bias"])[1]
    else:
        impl.vae_act_(t["pixels"], t["gamma"], bias=t["channel_bias"], out=(out := t["window"][:, _PAST:]))
    return (out,)


def vae_act_residual(impl: Any, t: Inputs) -> Outputs:
    y, gamma, inputs = t["pixels"], t["gamma"], {"x": t["shortcut"], "bias": t["channel_bias"]}
    if impl is reference:
        made: Outputs = impl.vae_act(y, gamma, **inputs)
        return made
    impl.vae_act_(y, gamma, **inputs, r=t["sum"], out=(out := t["window"][:, _PAST:]))
    return t["sum"], out


def gelu(impl: Any, t: Inputs) -> Outputs:
    return (impl.gelu(t["hidden"]),)


def quantize_rows(impl: Any, t: Inputs) -> Outputs:
    out: Outputs = impl.quantize_rows(t["x"])
    return out


def gelu_quantize_rows(impl: Any, t: Inputs) -> Outputs:
    out: Outputs = impl.gelu_quantize_rows(t["hidden"])
    return out


def residual_norm_fp8(impl: Any, t: Inputs) -> Outputs:
    """Plain torch has no such op: the norm, then the rounding."""
    if impl is reference:
        r, n = k1(impl, t)
        return r, *impl.quantize_rows(n)
    r, rows = impl.residual_norm_fp8(t["x"], t["y"], t["table"][:, :, 5], **modulation(t, "K1"))
    return r, *rows


def _expanded(rows: Outputs) -> Outputs:
    """(..., q, scale) -> (..., q * scale): what the rows mean."""
    *others, q, scale = rows
    return *others, q.float() * scale


_MODULATED = ("x", "y", "table")
_AFFINE = (*_MODULATED, "weight", "bias")
_ROTATED = ("qkv", "weight_q", "weight_k", *_ROPE)
_BOTH = ("tokens", "tokens")
_R = "r = x + gate[f]*y"
OPS: Mapping[str, Op] = MappingProxyType(
    {
        op.name: op
        for op in (
            Op(
                "residual_norm_k1",
                "K1",
                f"{_R}; LN(r)*(1+scale[f])+shift[f]",
                k1,
                {"u": 4, "frame_row": 3},
                _MODULATED,
                _BOTH,
            ),
            Op(
                "residual_norm_k3",
                "K3",
                f"{_R}; LN(r)*weight+bias",
                k3,
                {"u": 4, "frame_row": 1, "row": 2},
                _AFFINE,
                _BOTH,
            ),
            Op(
                "residual_norm_k5",
                "K5",
                "r = x + y; LN(r)*(1+scale[f])+shift[f]",
                k5,
                {"u": 4, "frame_row": 2},
                _MODULATED,
                _BOTH,
            ),
            Op("rms_norm", "K4", "x/rms(x)*weight", rms_norm, {"u": 2, "row": 1}, ("x", "weight")),
            Op(
                "qk_rope",
                "K2",
                "RMSNorm of q and k, 3-D RoPE",
                qk_rope,
                {"u": 4, "row": 2, "angles": 1},
                _ROTATED,
                _BOTH,
            ),
            Op(
                "qk_rope_inplace",
                "K2",
                "the same, in place",
                qk_rope_inplace,
                {"u": 4, "row": 2, "angles": 1},
                _ROTATED,
                _BOTH,
                mutates=("qkv",),
            ),
            Op(
                "guided_euler_step",
                "step",
                "x[f] += (v_neg + g*(v-v_neg))[f]*dsigma[f]",
                guided_euler_step,
                {"latent": 4, "step": 1},
                ("latent", "v", "v_neg", "dsigma"),
                ("latent",),
            ),
            Op(
                "noise_and_target",
                "FAFM",
                "(1-s[f])*x + s[f]*e; e - x",
                noise_and_target,
                {"latent": 4, "step": 1},
                ("latent", "v", "levels"),
                ("latent", "latent"),
                native=False,
            ),
            Op(
                "flow_loss",
                "FAFM",
                "mean w[f]*(v-target)^2, and dv",
                flow_loss,
                {"latent": 3, "step": 1},
                ("latent", "v", "levels"),
                ("latent",),
                native=False,
            ),
            Op(
                "vae_act",
                "VAE",
                "SiLU(norm(y + bias)*gamma)",
                vae_act,
                {"pixels": 2, "channels": 2},
                ("pixels", "gamma", "channel_bias"),
                ("frames",),
                mutates=("window",),
            ),
            Op(
                "vae_act_residual",
                "VAE",
                "r = y + bias + x; SiLU(norm(r)*gamma)",
                vae_act_residual,
                {"pixels": 4, "channels": 2},
                ("pixels", "gamma", "channel_bias", "shortcut"),
                ("frames", "frames"),
                mutates=("window", "sum"),
            ),
            Op("gelu", "GELU", "tanh GELU", gelu, {"hidden": 2}, ("hidden",)),
            Op(
                "quantize_rows",
                "fp8",
                "e4m3 rows, a scale each",
                quantize_rows,
                {"u": 1, "e4m3": 1, "per_token": 1},
                ("x",),
                oracle=lambda t: (t["x"],),
                view=_expanded,
                fp8=True,
            ),
            Op(
                "gelu_quantize_rows",
                "fp8",
                "e4m3 rows of GELU(x)",
                gelu_quantize_rows,
                {"hidden": 1, "hidden_e4m3": 1, "per_token": 1},
                ("hidden",),
                oracle=lambda t: gelu(reference, t),
                view=_expanded,
                fp8=True,
            ),
            Op(
                "residual_norm_fp8",
                "K1 fp8",
                "K1, its norm as e4m3 rows",
                residual_norm_fp8,
                {"u": 3, "e4m3": 1, "per_token": 1, "frame_row": 3},
                _MODULATED,
                _BOTH,
                oracle=lambda t: k1(reference, t),
                view=_expanded,
                fp8=True,
            ),
            Op(
                "residual_norm_backward",
                "K1 bwd",
                "dx, dy; tables frozen",
                k1,
                {"u": 5, "per_token": 2, "frame_row": 2},
                (*_MODULATED, "dr", "dn"),
                _BOTH,
                ("x", "y"),
                ("dr", "dn"),
            ),
            Op(
                "residual_norm_backward_full",
                "K1 bwd",
                "dx, dy, and the frame table's gradient",
                k1,
                {"u": 6, "per_token": 2, "frame_row": 5},
                (*_MODULATED, "dr", "dn"),
                (*_BOTH, "frames"),
                ("x", "y", "table"),
                ("dr", "dn"),
            ),
            Op(
                "rms_norm_backward",
                "K4 bwd",
                "dx; weight frozen",
                rms_norm,
                {"u": 3, "per_token": 1, "row": 1},
                ("x", "weight", "dn"),
                ("tokens",),
                ("x",),
                ("dn",),
            ),
            Op(
                "qk_rope_backward",
                "K2 bwd",
                "dqkv, packed; weights frozen",
                qkv_rope,
                {"u": 8, "per_token": 2, "row": 2, "angles": 1},
                (*_ROTATED, "dq", "dk", "dv"),
                _BOTH,
                ("qkv",),
                ("dq", "dk", "dv"),
            ),
        )
    }
)
