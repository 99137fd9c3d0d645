"""Model configurations, and as data every published Wan variant that Pusa runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

# Per-channel statistics of the Wan2.1 VAE's latents (reference: diffsynth/models/wan_video_vae.py).
WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a Wan video transformer.

    Raises ValueError for impossible numbers: `dim` not a multiple of `num_heads`, an odd head
    dimension or `freq_dim`, a size below one.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        for name in (field.name for field in fields(self) if field.type == "int"):
            if getattr(self, name) < 1:
                raise ValueError(f"DiTConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ValueError(f"DiTConfig.dim={self.dim} is not a multiple of num_heads={self.num_heads}")
        if self.head_dim % 2 or self.freq_dim % 2:
            raise ValueError(f"DiTConfig: head_dim={self.head_dim} and freq_dim={self.freq_dim} must be even")
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            needed = "must be (1, h, w): one token row per latent frame"
            raise ValueError(f"DiTConfig.patch_size {needed}; got {self.patch_size}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """Shape of a Wan2.1-layout causal video VAE; `latents_mean/std` have `z_dim` floats each.

    Raises ValueError if the tuples' lengths do not agree.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN_MEAN
    latents_std: tuple[float, ...] = WAN_STD

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            levels = f"one per downsampling between the {len(self.dim_mult)} levels of dim_mult"
            raise ValueError(
                f"VAEConfig.temporal_downsample needs {len(self.dim_mult) - 1} entries, {levels}; "
                f"got {len(self.temporal_downsample)}"
            )
        for name in ("latents_mean", "latents_std"):
            if (count := len(getattr(self, name))) != self.z_dim:
                raise ValueError(f"VAEConfig.{name} needs z_dim={self.z_dim} values, got {count}: give your own")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, along height and width."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame after the first."""
        return int(2 ** sum(self.temporal_downsample))


@dataclass(frozen=True)
class Geometry:
    """How a model's frames, pixels and text become latents and tokens; needs no weights.

    `spatial_factor`: pixels per latent pixel; `temporal_factor`: frames per latent frame after the
    first; `patch`: latents per token (frames, rows, columns); `channels` of a latent; `text_dim`,
    `text_len`: width and most rows of a prompt.
    """

    spatial_factor: int
    temporal_factor: int
    patch: tuple[int, int, int]
    channels: int
    text_dim: int
    text_len: int

    @classmethod
    def of(cls, dit: DiTConfig, vae: VAEConfig, text_len: int = 512) -> Geometry:
        """Of a transformer and a VAE. Raises ValueError if their latents differ in channels."""
        channels = (dit.in_channels, dit.out_channels, vae.z_dim)
        if len(set(channels)) > 1:
            maps = f"the transformer maps {channels[0]} to {channels[1]} channels"
            raise ValueError(f"{maps}, the VAE's latents have {channels[2]}: all three must agree")
        return cls(vae.spatial_factor, vae.temporal_factor, dit.patch_size, vae.z_dim, dit.text_dim, text_len)

    @property
    def multiples(self) -> tuple[int, int]:
        """(height, width) of one token in pixels: a clip's size must be a multiple."""
        return self.spatial_factor * self.patch[1], self.spatial_factor * self.patch[2]

    def clip(self, latents: tuple[int, ...]) -> tuple[int, int, int]:
        """(frames, height, width) in pixels of a clip whose latents are [..., F, h, w]."""
        F, h, w = latents[-3:]
        return 1 + self.temporal_factor * (F - 1), self.spatial_factor * h, self.spatial_factor * w


_WAN_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

# Published variants. A bare checkpoint gets the configuration whose tensor names and shapes match.
MODELS: Mapping[str, DiTConfig | VAEConfig] = MappingProxyType(
    {
        "wan2.1-t2v-14b": _WAN_14B,
        "wan2.1-t2v-1.3b": DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
        "wan2.2-t2v-a14b": _WAN_14B,  # each of the two experts
        "wan2.2-ti2v-5b": DiTConfig(3072, 14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48),
        "wan2.1-vae": VAEConfig(),
    }
)
