"""The layers of the Wan2.1 VAE: official parameter names, and a plain forward with gradients.

Shapes: B batch, C channels, T frames, H/W pixels. Every layer is causal in time: frame t sees
frames <= t only. Inference runs the same parameters through `vae_stream`, piece by piece. Source:
Wan2.1 wan/modules/vae.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from pusa_fast.config import VAEConfig


class CausalConv3d(nn.Conv3d):
    """Convolution with its temporal padding in the past. [B, C, T, H, W] -> [B, C', T, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        k = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        super().__init__(in_channels, out_channels, k, padding=(0, k[1] // 2, k[2] // 2))
        self.past = k[0] - 1

    def forward(self, x: Tensor) -> Tensor:
        x = nnf.pad(x, (0, 0, 0, 0, self.past, 0)) if self.past else x
        return nnf.conv3d(x, self.weight, self.bias, padding=self.padding)


class RMSNorm(nn.Module):
    """L2 norm over the channels, times sqrt(C) and a gain; statistics in at least float32."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        # The factor stays in float32: it overflows half precision where a pixel's channels are near
        # zero.
        normed: Tensor = (x * (x.shape[1] ** 0.5 / norm.clamp_min(1e-12))).to(x.dtype)
        return normed * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_channels), nn.SiLU(), CausalConv3d(in_channels, out_channels, 3),
            RMSNorm(out_channels), nn.SiLU(), nn.Identity(), CausalConv3d(out_channels, out_channels, 3),
        )  # fmt: skip
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.residual(x)
        return out

    @property
    def parts(self) -> tuple[RMSNorm, CausalConv3d, RMSNorm, CausalConv3d]:
        """The layers of `residual` that have parameters, in order."""
        parts: Any = tuple(self.residual[i] for i in (0, 2, 3, 6))
        return cast("tuple[RMSNorm, CausalConv3d, RMSNorm, CausalConv3d]", parts)


class FrameAttention(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, T, H, W = x.shape
        frames = _to_frames(x)
        # Fused attention wants a dense last dimension.
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous()[:, None].chunk(3, dim=-1)
        out = nnf.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(B * T, C, H, W)
        return x + _from_frames(self.proj(out), B)


class Downsample(nn.Module):
    """Halves height and width; with `temporal` also the frames after the first."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    @property
    def convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.resample[1])

    def forward(self, x: Tensor) -> Tensor:
        x = _from_frames(self.resample(_to_frames(x)), x.shape[0])
        # The clip's first frame passes as it is; each later pair is merged with the frame before
        # it.
        if self.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels; `temporal`: also doubles later frames."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    @property
    def convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.resample[1])

    def forward(self, x: Tensor) -> Tensor:
        if self.time_conv is not None and x.shape[2] > 1:
            # The clip's first frame is not doubled, nor is it part of the history of those after
            # it.
            pairs = torch.unflatten(
                self.time_conv(x[:, :, 1:]), 1, (2, -1)
            )  # [B, 2, C, T, H, W]: the two frames of each
            x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
        return _from_frames(self.resample(_to_frames(x)), x.shape[0])


class Head(nn.Sequential):
    """The last convolution of each half, behind norm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(RMSNorm(in_channels), nn.SiLU(), CausalConv3d(in_channels, out_channels, 3))

    @property
    def norm(self) -> RMSNorm:
        return cast(RMSNorm, self[0])

    @property
    def convolution(self) -> CausalConv3d:
        return cast(CausalConv3d, self[2])


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        dims = [cfg.base_dim * m for m in (1, *cfg.dim_mult)]
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(dims)):
            layers += [ResidualBlock(c_in if j == 0 else c_out, c_out) for j in range(cfg.num_res_blocks)]
            if i < len(cfg.temporal_downsample):
                layers.append(Downsample(c_out, cfg.temporal_downsample[i]))
        top = dims[-1]
        self.conv1 = CausalConv3d(3, dims[0], 3)
        self.downsamples = nn.Sequential(*layers)
        self.middle = nn.Sequential(ResidualBlock(top, top), FrameAttention(top), ResidualBlock(top, top))
        self.head = Head(top, 2 * cfg.z_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.downsamples(self.conv1(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        dims = [cfg.base_dim * m for m in (cfg.dim_mult[-1], *cfg.dim_mult[::-1])]
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(dims)):
            c_in = c_in // 2 if i else c_in  # the upsampling before it halved the channels
            layers += [ResidualBlock(c_in if j == 0 else c_out, c_out) for j in range(cfg.num_res_blocks + 1)]
            if i < len(cfg.temporal_downsample):
                layers.append(Upsample(c_out, cfg.temporal_downsample[::-1][i]))
        self.conv1 = CausalConv3d(cfg.z_dim, dims[0], 3)
        self.middle = nn.Sequential(
            ResidualBlock(dims[0], dims[0]), FrameAttention(dims[0]), ResidualBlock(dims[0], dims[0])
        )
        self.upsamples = nn.Sequential(*layers)
        self.head = Head(dims[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.upsamples(self.middle(self.conv1(x))))
        return out


def _to_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _from_frames(x: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]."""
    return torch.unflatten(x, 0, (batch, -1)).transpose(1, 2)
