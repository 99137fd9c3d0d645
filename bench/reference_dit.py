"""The Pusa reference's transformer in plain torch, for training (docs/reference.md, 1.3 to 1.6):
nothing fused, nothing cached.

A modulation row for every token, each block's own table added to all of it, RMSNorm in float32,
RoPE in complex128 with angles made again for each forward, three matmuls where ours has one.
Parameters carry official Wan names, so PEFT's adapters go on as the reference puts them. Shapes: B
clips, N tokens, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from pusa_fast import DiTConfig, WanDiT
from pusa_fast.model.dit import sinusoid
from pusa_fast.model.rope import rope_tables
from pusa_fast.ops import rope_split
from pusa_fast.weights import keymap


def reference_dit(dit: WanDiT) -> ReferenceDiT:
    """A copy of `dit`'s weights, which must carry no adapters."""
    model = ReferenceDiT(dit.config).to(dit.device, dit.dtype)
    model.load_state_dict(keymap.unpack(dit.state_dict()))
    return model


class _RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        n = x.float()
        return (n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class _Attention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (_RMSNorm(config.dim, config.eps) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, freqs: Tensor | None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        if freqs is not None:
            q, k = _rotate(q, freqs), _rotate(k, freqs)
        out = nnf.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.o(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(3).to(x.dtype)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class _Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.norm1, self.norm2 = (nn.LayerNorm(config.dim, config.eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.self_attn, self.cross_attn = _Attention(config), _Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x: Tensor, context: Tensor, t_mod_B6ND: Tensor, freqs: Tensor) -> Tensor:
        table = self.modulation[:, :, None].to(t_mod_B6ND.dtype) + t_mod_B6ND
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
        n = _modulate(self.norm1(x), shift, scale)
        x = x + gate * self.self_attn(n, n, freqs)
        x = x + self.cross_attn(self.norm3(x), context, None)
        return x + gate_mlp * self.ffn(_modulate(self.norm2(x), shift_mlp, scale_mlp))


class _Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_channels * config.patch_size[1] * config.patch_size[2])
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, t_emb_BND: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, :, None] + t_emb_BND[:, None]).unbind(1)
        return self.head(_modulate(self.norm(x), shift, scale))


class ReferenceDiT(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, D = config, config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, D, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, D), nn.GELU(approximate="tanh"), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.head = _Head(config)

    def forward(self, x: Tensor, timestep_BF: Tensor, context: Tensor) -> Tensor:
        """Velocity in x's shape. x [B, C, F, h, w]."""
        B, _, F, _, _ = x.shape
        t_emb = self.time_embedding(sinusoid(timestep_BF.flatten(), self.config.freq_dim).to(x.dtype))
        t_mod = self.time_projection(t_emb).unflatten(1, (6, -1))
        patches = self.patch_embedding(x)
        grid = (F, patches.shape[3], patches.shape[4])
        per_frame = grid[1] * grid[2]
        t_emb = t_emb.view(B, F, -1).repeat_interleave(per_frame, 1)
        t_mod = t_mod.view(B, F, 6, -1).repeat_interleave(per_frame, 1).transpose(1, 2).contiguous()
        tokens, context = patches.flatten(2).transpose(1, 2).contiguous(), self.text_embedding(context)
        freqs = self._freqs(grid).to(x.device)
        for block in self.blocks:
            tokens = block(tokens, context, t_mod, freqs)
        return self._unpatchify(self.head(tokens, t_emb), grid)

    def _freqs(self, grid: tuple[int, int, int]) -> Tensor:
        """[N, 1, K/2] complex128."""
        width = self.config.head_dim
        cos, sin = rope_tables(width, max(grid))
        angles = torch.complex(cos.double(), sin.double())
        parts, at = [], 0
        for axis, (size, share) in enumerate(zip(grid, rope_split(width), strict=True)):
            table = angles[:size, at : at + share // 2]
            shape = [1, 1, 1, share // 2]
            shape[axis] = size
            parts.append(table.view(shape).expand(*grid, -1))
            at += share // 2
        return torch.cat(parts, -1).reshape(-1, 1, width // 2)

    def _unpatchify(self, out: Tensor, grid: tuple[int, int, int]) -> Tensor:
        _, ph, pw = self.config.patch_size
        out = out.unflatten(2, (ph, pw, -1)).unflatten(1, grid)
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
