"""The same ops as others compute them: what the fused kernels are compared with.

"reference": the Pusa reference implementation (docs/reference.md, 1.3 to 1.6): a modulation row for
each token, the block's own table added to all of it, RMSNorm in float32 with two roundings, RoPE in
complex128. "per-token": diffusers 0.42 (models/transformers/transformer_wan.py, WanTransformerBlock
with a timestep per token, as Wan2.2 5B runs): the same rows per token in float32. "diffusers": its
VAE between two convolutions (models/autoencoders/autoencoder_kl_wan.py, WanResidualBlock,
WanRMS_norm, WanCausalConv3d), channels first, with the copies that pad a clip and put its history
before it; the convolution adds its bias. The first two hold q and k as tensors of their own. Each
entry prepares what its model prepares once per forward (not timed: per-token tables, angles per
token) and returns what runs in every block.

Shapes: L tokens, D width, H heads, K head width, R = 6 rows of a modulation table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from bench.registry import EPS, Inputs, Outputs
from pusa_fast.ops import rope_split

Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Formulation:
    """`leaves`: the inputs by which its derivative is taken, where they differ from the op's."""

    make: Callable[[Inputs], Call]
    leaves: tuple[str, ...] | None = None


def _per_token(t: Inputs, rows: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows of the frame table, repeated for each token of their frame: [1, L, rows, D]."""
    per_frame = t["grid"][1] * t["grid"][2]
    return t["t_mod"][:, :, rows].to(dtype).repeat_interleave(per_frame, dim=1)


# The Pusa reference implementation.


def _reference_rows(t: Inputs, rows: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """A block adds its own table to the rows of all tokens [1, R, L, D], in the model's dtype."""
    table = _per_token(t, rows, t["x"].dtype).transpose(1, 2).contiguous()
    own = t["base"][list(rows)][None, :, None].to(table.dtype)
    return lambda: tuple(part.squeeze(1) for part in (own + table).chunk(len(rows), dim=1))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return nnf.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS)).to(x.dtype) * weight


def _reference_k1(t: Inputs) -> Call:
    rows = _reference_rows(t, (0, 1, 5))

    def call() -> Outputs:
        shift, scale, gate = rows()
        r = t["x"] + gate * t["y"]
        return r, _modulate(_norm(r), shift, scale)

    return call


def _reference_k3(t: Inputs) -> Call:
    rows = _reference_rows(t, (2,))

    def call() -> Outputs:
        (gate,) = rows()
        r = t["x"] + gate * t["y"]
        return r, _norm(r, t["weight"], t["bias"])

    return call


def _reference_k5(t: Inputs) -> Call:
    rows = _reference_rows(t, (3, 4))

    def call() -> Outputs:
        shift, scale = rows()
        r = t["x"] + t["y"]
        return r, _modulate(_norm(r), shift, scale)

    return call


def token_angles(t: Inputs) -> tuple[Tensor, Tensor]:
    """cos and sin of every token [L, K/2], in the tables' dtype."""
    f, h, w = t["grid"]

    def expand(table_PK: Tensor) -> Tensor:
        by_f, by_h, by_w = table_PK.split([d // 2 for d in rope_split(2 * table_PK.shape[1])], dim=1)
        parts = by_f[:f, None, None], by_h[None, :h, None], by_w[None, None, :w]
        return torch.cat([part.expand(f, h, w, -1) for part in parts], dim=-1).flatten(0, 2)

    return expand(t["cos"]), expand(t["sin"])


def _reference_rope(t: Inputs) -> Call:
    cos, sin = token_angles(t)
    angles = torch.complex(cos.double(), sin.double())[:, None]

    def rotate(x_BLHK: Tensor, weight: Tensor) -> Tensor:
        n = _rms(x_BLHK.flatten(2), weight).view_as(x_BLHK)
        pairs = torch.view_as_complex(n.to(torch.float64).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * angles).flatten(3).to(x_BLHK.dtype)

    return lambda: (rotate(t["q"], t["weight_q"]), rotate(t["k"], t["weight_k"]))


def _plain_step(t: Inputs) -> Call:
    def call() -> Outputs:
        v = t["v_neg"] + 5.0 * (t["v"] - t["v_neg"])
        return (t["latent"] + v * t["dsigma"][:, None, None],)

    return call


def _plain_noising(t: Inputs) -> Call:
    """`add_noise` and `training_target` of its scheduler."""

    def call() -> Outputs:
        sigma = t["levels"][:, None, :, None, None]
        return (1 - sigma) * t["latent"] + sigma * t["v"], t["v"] - t["latent"]

    return call


def _plain_loss(t: Inputs) -> Call:
    """Weighted frame by frame; the reference itself averages the error over the clip first."""
    v = t["v"].detach().requires_grad_()

    def call() -> Outputs:
        with torch.enable_grad():
            error = nnf.mse_loss(v, t["latent"], reduction="none")
            loss = (error * t["levels"][:, None, :, None, None]).mean()
            return torch.autograd.grad(loss * t["grid"][0], v)

    return call


# diffusers with a timestep per token.


def _diffusers_rows(t: Inputs, rows: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """temb [1, L, R, D] in the model's dtype, widened and added in every block; the table is kept
    in float32."""
    temb = _per_token(t, rows, t["x"].dtype)
    own = t["base"][list(rows)].float()[None]
    return lambda: tuple(part.squeeze(2) for part in (own.unsqueeze(0) + temb.float()).chunk(len(rows), dim=2))


def _diffusers_k1(t: Inputs) -> Call:
    rows = _diffusers_rows(t, (0, 1, 5))

    def call() -> Outputs:
        shift, scale, gate = rows()
        r = (t["x"].float() + t["y"].float() * gate).type_as(t["x"])
        return r, (_norm(r.float()) * (1 + scale) + shift).type_as(r)

    return call


def _diffusers_k3(t: Inputs) -> Call:
    rows = _diffusers_rows(t, (2,))
    weight, bias = t["weight"].float(), t["bias"].float()

    def call() -> Outputs:
        (gate,) = rows()
        r = (t["x"].float() + t["y"] * gate).type_as(t["x"])
        return r, _norm(r.float(), weight, bias).type_as(r)

    return call


def _diffusers_k5(t: Inputs) -> Call:
    rows = _diffusers_rows(t, (3, 4))

    def call() -> Outputs:
        shift, scale = rows()
        r = t["x"] + t["y"]
        return r, (_norm(r.float()) * (1 + scale) + shift).type_as(r)

    return call


def _diffusers_rms(t: Inputs) -> Call:
    return lambda: (nnf.rms_norm(t["x"], t["weight"].shape, t["weight"], EPS),)


def _diffusers_rope(t: Inputs) -> Call:
    freqs_cos, freqs_sin = (table.repeat_interleave(2, dim=1)[None, :, None].float() for table in token_angles(t))

    def rotate(x_BLHK: Tensor, weight: Tensor) -> Tensor:
        n = nnf.rms_norm(x_BLHK.flatten(2), weight.shape, weight, EPS).unflatten(2, (x_BLHK.shape[2], -1))
        x1, x2 = n.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
        out = torch.empty_like(n)
        out[..., 0::2] = x1 * cos - x2 * sin
        out[..., 1::2] = x1 * sin + x2 * cos
        return out.type_as(n)

    return lambda: (rotate(t["q"], t["weight_q"]), rotate(t["k"], t["weight_k"]))


# diffusers' VAE.


def _diffusers_vae(t: Inputs, residual: bool) -> Call:
    """Between one convolution and the next, both of which see [B, C, T, H, W]."""
    first = (0, 4, 1, 2, 3)
    h = (t["pixels"] + t["channel_bias"]).permute(first).contiguous()
    x = t["shortcut"].permute(first).contiguous() if residual else None
    gamma, scale = t["gamma"].view(-1, 1, 1, 1), t["gamma"].numel() ** 0.5
    history = torch.zeros_like(h[:, :, :2])

    def last(z: Tensor) -> Tensor:
        return z.permute(0, 2, 3, 4, 1)

    def call() -> Outputs:
        r = h if x is None else h + x
        normalized = nnf.normalize(r if r.dtype == torch.float32 else r.float(), dim=1).to(r.dtype)
        n = nnf.silu(normalized * scale * gamma + 0.0)
        padded = nnf.pad(torch.cat([history, n], dim=2), (1, 1, 1, 1, 0, 0))
        out = last(padded[:, :, 2:, 1:-1, 1:-1])
        return (last(r), out) if residual else (out,)

    return call


def _plain_rms(t: Inputs) -> Call:
    return lambda: (_rms(t["x"], t["weight"]),)


def _family(k1: Any, k3: Any, k5: Any, rms: Any, rope: Any) -> dict[str, Formulation]:
    """One formulation's entries for every op that computes the same thing forward or backward."""
    apart = Formulation(rope, ("q", "k"))
    return {
        **{name: Formulation(k1) for name in ("residual_norm_k1", "residual_norm_backward")},
        "residual_norm_k3": Formulation(k3),
        "residual_norm_k5": Formulation(k5),
        **{name: Formulation(rms) for name in ("rms_norm", "rms_norm_backward")},
        **dict.fromkeys(("qk_rope", "qk_rope_inplace", "qk_rope_backward"), apart),
    }


FORMULATIONS: Mapping[str, Mapping[str, Formulation]] = {
    "reference": {
        **_family(_reference_k1, _reference_k3, _reference_k5, _plain_rms, _reference_rope),
        "guided_euler_step": Formulation(_plain_step),
        "noise_and_target": Formulation(_plain_noising),
        "flow_loss": Formulation(_plain_loss),
    },
    "per-token": _family(_diffusers_k1, _diffusers_k3, _diffusers_k5, _diffusers_rms, _diffusers_rope),
    "diffusers": {
        "vae_act": Formulation(lambda t: _diffusers_vae(t, residual=False)),
        "vae_act_residual": Formulation(lambda t: _diffusers_vae(t, residual=True)),
    },
}
