"""The Wan2.1 causal video VAE: 8x8x4 compression, 16 latent channels, any clip length by streaming.

Shapes: B batch, C channels, T frames (4k+1 pixels, or latent frames F = 1 + (T-1)/4), H/W pixels, h/w latent pixels.
Frame t sees frames <= t only, so a clip may be fed in chunks of any length: each causal layer keeps the last frames of
the previous chunk in a `TemporalCache`. Without a cache the clip is one chunk, which is what training uses.
Source: Wan2.1 wan/modules/vae.py; parameter names are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pusa_fast.config import VAEConfig
from pusa_fast.model.tiling import Tiling, blend_tiles

# Latent pixels of one chunk: small clips go whole, 480p and above one latent frame at a time. A function of shape only.
_CHUNK_LATENT_PIXELS = 4096


class TemporalCache(dict[nn.Module, Tensor]):
    """Frames that each causal layer must remember between the chunks of one clip."""


class CausalConv3d(nn.Conv3d):
    """Convolution whose temporal padding lies entirely in the past: zeros, or the cached end of the previous chunk."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        k = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        super().__init__(in_channels, out_channels, k, padding=(0, k[1] // 2, k[2] // 2))
        self.past = k[0] - 1

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]."""
        history = cache.get(self) if cache is not None else None
        if cache is not None and self.past:
            tail = x[:, :, -self.past :]
            if history is not None and tail.shape[2] < self.past:
                tail = torch.cat([history, tail], dim=2)[:, :, -self.past :]
            cache[self] = tail.clone()
        if history is None and x.shape[2] == 1:  # a picture: all taps but the last would meet zeros
            picture = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])
            return picture[:, :, None]
        if self.past:
            missing = self.past - (0 if history is None else history.shape[2])
            x = x if history is None else torch.cat([history, x], dim=2)
            x = F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x
        return F.conv3d(x, self.weight, self.bias, padding=self.padding)


class RMSNorm(nn.Module):
    """L2 normalisation over the channels, times sqrt(C) and a gain; statistics in at least float32."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        # The factor stays in float32: it overflows half precision where a pixel's channels are near zero.
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

    def forward(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        return _run(self.shortcut, x, cache) + _run(self.residual, x, cache)


class FrameAttention(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: TemporalCache | None = None) -> Tensor:
        B, C, T, H, W = x.shape
        frames = _to_frames(x)
        # Fused attention wants a dense last dimension.
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous()[:, None].chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(B * T, C, H, W)
        return x + _from_frames(self.proj(out), B)


class Downsample(nn.Module):
    """Halves height and width; with `temporal` also the frames after the first."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        x = _from_frames(self.resample(_to_frames(x)), x.shape[0])
        if self.time_conv is None:
            return x
        history = cache.get(self) if cache is not None else None
        if cache is not None:
            cache[self] = x[:, :, -1:].clone()
        if history is not None:
            return _run(self.time_conv, torch.cat([history, x], dim=2), None)
        # The clip's first frame passes as it is; each later pair is merged with the frame before it.
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], _run(self.time_conv, x, None)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with `temporal` also doubles the frames after the first."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(x, cache)
        return _from_frames(self.resample(_to_frames(x)), x.shape[0])

    def _double_frames(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        started = cache is not None and self in cache
        if cache is not None:
            cache[self] = x.new_empty(0)  # a mark: the first frame has gone by
        # The first frame of the clip is not doubled, nor is it part of the history of those after it.
        first, rest = (x[:, :, :0], x) if started else (x[:, :, :1], x[:, :, 1:])
        if rest.shape[2] == 0:
            return first
        assert self.time_conv is not None
        pairs = torch.unflatten(self.time_conv(rest, cache), 1, (2, -1))  # [B, 2, C, T, H, W]: the two frames of each pair
        doubled = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat([first, doubled], dim=2) if first.shape[2] else doubled


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
        self.head = nn.Sequential(RMSNorm(top), nn.SiLU(), CausalConv3d(top, 2 * cfg.z_dim, 3))

    def forward(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        for stage in (self.conv1, self.downsamples, self.middle, self.head):
            x = _run(stage, x, cache)
        return x


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
        self.head = nn.Sequential(RMSNorm(dims[-1]), nn.SiLU(), CausalConv3d(dims[-1], 3, 3))

    def forward(self, x: Tensor, cache: TemporalCache | None) -> Tensor:
        for stage in (self.conv1, self.middle, self.upsamples, self.head):
            x = _run(stage, x, cache)
        return x


class WanVAE(nn.Module):
    """Video <-> normalised latents. `encode` and `decode` stream; `encode_moments`/`decode_whole` are for training."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = cfg = config or VAEConfig()
        self.encoder = Encoder(cfg)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, 1)
        self.decoder = Decoder(cfg)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv1.weight.device

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of `frames` frames; ValueError unless frames = 4k+1 (temporal factor 4)."""
        factor = self.config.temporal_factor
        if frames < 1 or (frames - 1) % factor:
            below = max(1, (frames - 1) // factor * factor + 1)
            raise ValueError(f"a clip needs {factor}k+1 frames, got {frames}: use {below} or {below + factor}")
        return 1 + (frames - 1) // factor

    @torch.no_grad()
    def encode(self, video: Tensor, tiling: Tiling | None = None) -> Tensor:
        """Mean of the posterior, normalised per channel.

        video [B, 3, T, H, W] in [-1, 1], T = 4k+1, H and W multiples of 8 -> [B, z_dim, F, H/8, W/8] in video's dtype.
        Raises ValueError for other shapes. With `tiling`, overlapping tiles (sizes in latent units) are blended.
        """
        s = self.config.spatial_factor
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"encode takes a video [B, 3, T, H, W], got {tuple(video.shape)}")
        if video.shape[3] % s or video.shape[4] % s or not video.shape[3] * video.shape[4]:
            raise ValueError(f"height and width must be multiples of {s}, got {video.shape[3]}x{video.shape[4]}")
        frames = self.latent_frames(video.shape[2])
        size = (frames, video.shape[3] // s, video.shape[4] // s)
        x = video.to(self.device, self.dtype)
        if tiling is None:
            mu = self._encode_stream(x)
        else:
            mu = blend_tiles(x, self._encode_stream, size, tiling, in_scale=s, out_scale=1, channels=self.config.z_dim)
        mean, std = self._statistics()
        return ((mu - mean) / std).to(video.dtype)

    @torch.no_grad()
    def decode(self, z: Tensor, tiling: Tiling | None = None) -> Tensor:
        """[B, z_dim, F, h, w] normalised latents -> video [B, 3, 1 + 4(F-1), 8h, 8w], clamped to [-1, 1], in z's dtype.

        Raises ValueError for another number of channels or an empty clip.
        """
        cfg = self.config
        if z.ndim != 5 or z.shape[1] != cfg.z_dim or not z.shape[2] * z.shape[3] * z.shape[4]:
            raise ValueError(f"decode takes latents [B, {cfg.z_dim}, F, h, w], got {tuple(z.shape)}")
        mean, std = self._statistics()
        x = self.conv2((z.to(self.device) * std + mean).to(self.dtype))
        if tiling is None:
            video = self._decode_stream(x)
        else:
            size = (1 + cfg.temporal_factor * (z.shape[2] - 1), z.shape[3], z.shape[4])
            video = blend_tiles(x, self._decode_stream, size, tiling, in_scale=1, out_scale=cfg.spatial_factor, channels=3)
        return video.to(z.dtype).clamp_(-1, 1)

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, not normalised, of a clip [B, 3, T, H, W] in one piece, with gradients."""
        mu, logvar = self.conv1(self.encoder(video, None)).chunk(2, dim=1)
        return mu, logvar

    def decode_whole(self, z: Tensor) -> Tensor:
        """Video of latents that are not normalised, in one piece, with gradients, not clamped."""
        out: Tensor = self.decoder(self.conv2(z), None)
        return out

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, [1, C, 1, 1, 1] in float32: half-precision latents are promoted by them."""
        both = (self.config.latents_mean, self.config.latents_std)
        mean, std = (torch.tensor(s, device=self.device, dtype=torch.float32).view(1, -1, 1, 1, 1) for s in both)
        return mean, std

    def _encode_stream(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] -> mean before normalisation, chunk by chunk."""
        cfg, cache = self.config, TemporalCache()
        out: Tensor | None = None
        pixels = video.shape[3] * video.shape[4] // cfg.spatial_factor**2
        for start, stop in _chunks(self.latent_frames(video.shape[2]), pixels):
            a, b = (0 if i == 0 else 1 + cfg.temporal_factor * (i - 1) for i in (start, stop))
            mu: Tensor = self.conv1(self.encoder(video[:, :, a:b], cache))[:, : cfg.z_dim]
            if out is None:
                out = mu.new_empty(*mu.shape[:2], self.latent_frames(video.shape[2]), *mu.shape[3:])
            out[:, :, start:stop] = mu
        assert out is not None
        return out

    def _decode_stream(self, z: Tensor) -> Tensor:
        """Latents after conv2 -> pixels, chunk by chunk."""
        factor, cache = self.config.temporal_factor, TemporalCache()
        out: Tensor | None = None
        for start, stop in _chunks(z.shape[2], z.shape[3] * z.shape[4]):
            frames: Tensor = self.decoder(z[:, :, start:stop], cache)
            if out is None:
                out = frames.new_empty(*frames.shape[:2], 1 + factor * (z.shape[2] - 1), *frames.shape[3:])
            a = 0 if start == 0 else 1 + factor * (start - 1)
            out[:, :, a : a + frames.shape[2]] = frames
        assert out is not None
        return out


def _chunks(frames: int, pixels: int) -> Iterator[tuple[int, int]]:
    """Ranges of latent frames to run together."""
    step = max(1, _CHUNK_LATENT_PIXELS // pixels)
    for start in range(0, frames, step):
        yield start, min(frames, start + step)


def _run(layer: nn.Module, x: Tensor, cache: TemporalCache | None) -> Tensor:
    """Run a layer, handing the cache to those that remember."""
    if isinstance(layer, nn.Sequential):
        for sub in layer:
            x = _run(sub, x, cache)
        return x
    takes_cache = isinstance(layer, (CausalConv3d, ResidualBlock, FrameAttention, Downsample, Upsample))
    out: Tensor = layer(x, cache) if takes_cache else layer(x)
    return out


def _to_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _from_frames(x: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]."""
    return torch.unflatten(x, 0, (batch, -1)).transpose(1, 2)
