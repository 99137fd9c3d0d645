"""Every op of the transformer, of the VAE and of training in plain torch, for any float dtype.

Each function computes in float32 (float64 for float64 inputs) and rounds once, on return. On
float64 inputs it is the oracle for the kernels' tests; on bf16 it is the fallback that works
everywhere.

Shapes: B batch, F latent frames, L tokens (frame-major), D model width, H heads, K head width,
C channels, (h, w) grid of tokens or latent pixels, P positions in a rotary table.

A sequence may be a shard of a clip. Its token l belongs to frame
(first_token + l) // tokens_per_frame, so a table [B, F, D] must satisfy
first_token + L <= F * tokens_per_frame. tokens_per_frame None means L // F, which needs a whole
sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_frame(
    table_BFD: Tensor, tokens_per_frame: int | None, first_token: int, *tokens_BLD: Tensor
) -> tuple[Tensor, ...]:
    """Rows [B, G, 1, D] of the table, and the tensors as views [B, G, L/G, D].

    A group is a frame if the shard holds whole frames, else a token: rows are then copied.
    """
    L, F = tokens_BLD[0].shape[1], table_BFD.shape[1]
    if tokens_per_frame is None:
        if first_token or L % F:
            raise ValueError(f"pass tokens_per_frame: {L} tokens from token {first_token} on are not {F} whole frames")
        tokens_per_frame = L // F
    per_group = max(1, tokens_per_frame)
    if first_token % per_group or L % per_group:
        per_group = 1
        frame_L = (first_token + torch.arange(L, device=table_BFD.device)) // tokens_per_frame
        rows_BGD = table_BFD.index_select(1, frame_L)
    else:
        rows_BGD = table_BFD.narrow(1, first_token // per_group, L // per_group)
    return rows_BGD.unsqueeze(2), *(torch.unflatten(t, 1, (L // per_group, per_group)) for t in tokens_BLD)


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    tokens_per_frame: int | None = None,
    first_token: int = 0,
) -> Tensor:
    """x + gate[f] * y, or x + y without a gate, in x's dtype. x, y [B, L, D]; gate [B, F, D]."""
    return _residual(x, y, gate, tokens_per_frame, first_token).to(x.dtype)


def _residual(
    x: Tensor, y: Tensor | None, gate: Tensor | None, tokens_per_frame: int | None, first_token: int
) -> Tensor:
    """`gated_residual`, or x without y, in the accumulator's dtype."""
    acc = _accumulator(x.dtype)
    if y is None:
        return x.to(acc)
    if gate is None:
        return x.to(acc) + y.to(acc)
    rows, x, y = _by_frame(gate.to(acc), tokens_per_frame, first_token, x.to(acc), y.to(acc))
    return torch.addcmul(x, y, rows).flatten(1, 2)


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
    tokens_per_frame: int | None = None,
    first_token: int = 0,
) -> tuple[Tensor, Tensor]:
    """r = x + gate[f] * y; n = LN(r) * (1 + scale[f]) + shift[f], or LN(r) * weight + bias.

    x, y [B, L, D]; gate, scale, shift [B, F, D]; weight, bias [D]. Without y, r is x itself;
    without gate it is x + y. The norm reads r before it is rounded to x's dtype. Returns (r, n) in
    x's dtype.
    """
    acc = _accumulator(x.dtype)
    r = _residual(x, y, gate, tokens_per_frame, first_token)
    weight, bias = (None if t is None else t.to(acc) for t in (weight, bias))
    n = nnf.layer_norm(r, r.shape[-1:], weight, bias, eps)
    if scale is not None and shift is not None:
        factor, n_BGTD = _by_frame(1 + scale.to(acc), tokens_per_frame, first_token, n)
        offset, _ = _by_frame(shift.to(acc), tokens_per_frame, first_token, n)
        n = torch.addcmul(offset, n_BGTD, factor).flatten(1, 2)
    return (x if y is None else r.to(x.dtype)), n.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean_D(x^2) + eps) * weight. x [..., D]; weight [D]; returns x's dtype."""
    acc = _accumulator(x.dtype)
    return nnf.rms_norm(x.to(acc), x.shape[-1:], weight.to(acc), eps).to(x.dtype)


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Columns of a head rotated by frame, row and column: official Wan's split, each even."""
    third = 2 * (head_dim // 6)
    return head_dim - 2 * third, third, third


def _token_table(table_PK: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Per-axis table [P, K/2] -> [F*h*w, 1, K/2]: columns by the token's frame, row and column."""
    f, h, w = grid
    by_f, by_h, by_w = torch.split(table_PK, [d // 2 for d in rope_split(2 * table_PK.shape[1])], dim=1)
    parts = by_f[:f, None, None], by_h[None, :h, None], by_w[None, None, :w]
    return torch.cat([part.expand(f, h, w, -1) for part in parts], dim=-1).flatten(0, 2).unsqueeze(1)


def qk_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: tuple[int, int, int],
    eps: float = 1e-6,
    inplace: bool = False,
    *,
    first_token: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of q and of k over all heads, then 3-D rotary embedding of adjacent pairs (2j, 2j+1).

    qkv [B, L, 3, H, K]; weight_q, weight_k [H*K]; cos, sin [P, K/2] with P >= max(grid); grid
    (F, h, w) of the whole clip, of which qkv holds the L tokens from first_token on. Returns
    (q, k, v), each [B, L, H, K] in qkv's dtype. v is a view of qkv; with `inplace`, so are q and k.
    """
    acc = _accumulator(qkv.dtype)
    tables = (_token_table(table.to(acc), grid) for table in (cos, sin))
    cos_L1K, sin_L1K = (table.narrow(0, first_token, qkv.shape[1]) for table in tables)

    def rotate(x_BLHK: Tensor, weight: Tensor) -> Tensor:
        n = nnf.rms_norm(x_BLHK.to(acc).flatten(2), weight.shape, weight.to(acc), eps)
        re, im = torch.unflatten(n, -1, (x_BLHK.shape[2], x_BLHK.shape[3] // 2, 2)).unbind(-1)
        out = torch.stack((re * cos_L1K - im * sin_L1K, re * sin_L1K + im * cos_L1K), dim=-1)
        return out.flatten(-2).to(qkv.dtype)

    # One unbind writes the packed gradient once; three indexings would each fill and add one.
    q, k, v = qkv.unbind(2)
    q_out, k_out = rotate(q, weight_q), rotate(k, weight_k)
    return (q.copy_(q_out), k.copy_(k_out), v) if inplace else (q_out, k_out, v)


def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """x[f] += (v_neg + guidance * (v - v_neg))[f] * dsigma[f]: guidance and a per-frame Euler step.

    x, v, v_neg [B, C, F, h, w]; dsigma [F]. Without v_neg the velocity is v. A frame whose dsigma
    is 0 keeps its bits whatever v holds. Returns x's dtype.
    """
    acc = _accumulator(x.dtype)
    velocity = v.to(acc)
    if v_neg is not None:
        velocity = v_neg.to(acc) + guidance * (velocity - v_neg.to(acc))
    dsigma_F11 = dsigma.to(acc)[:, None, None]
    return torch.where(dsigma_F11 == 0, x, (x.to(acc) + velocity * dsigma_F11).to(x.dtype))


def noise_and_target(
    clean: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(x_t, target): x_t = (1 - sigma[f]) * clean + sigma[f] * noise, target = noise - clean.

    clean, noise [B, C, F, h, w]; sigma [B, F]. x_t in `dtype` (None: clean's), target in float32,
    or float64 if clean or noise is.
    """
    acc = _accumulator(torch.promote_types(clean.dtype, noise.dtype))
    x, e, s = clean.to(acc), noise.to(acc), sigma.to(acc)[:, None, :, None, None]
    return ((1 - s) * x + s * e).to(dtype or clean.dtype), e - x


def flow_loss(velocity: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, frame_errors): loss = sum_bf weight[b, f] * sum_chw (velocity - target)^2 / N.

    velocity, target [B, C, F, h, w], N elements; weight [B, F]. frame_errors [B, F], each frame's
    mean squared error, is not differentiable. Both in float32, or float64 if velocity or target is.
    """
    acc = _accumulator(torch.promote_types(velocity.dtype, target.dtype))
    sums_BF = (velocity.to(acc) - target.to(acc)).square().sum((1, 3, 4))
    per_frame = velocity.shape[1] * velocity.shape[3] * velocity.shape[4]
    return (weight.to(acc) * sums_BF).sum() / velocity.numel(), sums_BF.detach() / per_frame


def gelu(x: Tensor, inplace: bool = False) -> Tensor:
    """Tanh GELU, x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2, in x's dtype."""
    out = nnf.gelu(x, approximate="tanh")
    return x.copy_(out) if inplace else out


def _phases(y_BTHWC: Tensor) -> Tensor:
    """[B, T, H/2+1, W/2+1, 4*C] -> [B, T, H, W, C]; see `vae_act`."""
    h, w = y_BTHWC.shape[2] - 1, y_BTHWC.shape[3] - 1
    y = torch.unflatten(y_BTHWC, -1, (2, 2, y_BTHWC.shape[-1] // 4))
    rows = [torch.stack([y[:, :, a : a + h, e : e + w, a, e] for e in (0, 1)], dim=4) for a in (0, 1)]
    return torch.stack(rows, dim=3).flatten(4, 5).flatten(2, 3)


def vae_act(
    y: Tensor,
    gamma: Tensor | None = None,
    x: Tensor | None = None,
    bias: Tensor | None = None,
    silu: bool = True,
    upsampled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """r = y (+ bias) (+ x); out = act(r / max(||r||, 1e-12) * sqrt(C) * gamma).

    act is SiLU or identity. x, r, out [B, T, H, W, C], the norm over C. y has the same shape, or
    with `upsampled` [B, T, H/2+1, W/2+1, 4*C]: the four phases of a convolution after a nearest 2x
    upsampling, r[2i+a, 2j+e, c] = y[i+a, j+e, (2a+e)*C + c]. gamma, bias: C elements of any shape.
    out is None without gamma. The norm reads r before it is rounded to y's dtype. Returns (r, out).
    """
    acc = _accumulator(y.dtype)
    s = _phases(y.to(acc)) if upsampled else y.to(acc)
    for term in (None if bias is None else bias.flatten(), x):
        s = s if term is None else s + term.to(acc)
    if gamma is None:
        return s.to(y.dtype), None
    n = nnf.normalize(s, dim=-1, eps=1e-12) * s.shape[-1] ** 0.5 * gamma.flatten().to(acc)
    return s.to(y.dtype), (nnf.silu(n) if silu else n).to(y.dtype)


E4M3_MAX = 448.0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale): rows in e4m3 with one scale each, x ~ q * scale. Not differentiable.

    x [..., D]; q float8_e4m3fn [..., D]; scale float32 [..., 1] = max(amax, 1e-12) / 448. q is
    x / scale, clamped to +-448 and rounded to nearest even.
    """
    x = x.to(torch.float32)
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the tanh GELU of x, without rounding in between."""
    return quantize_rows(nnf.gelu(x.to(torch.float32), approximate="tanh"))
