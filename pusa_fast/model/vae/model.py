"""The causal video VAE: 8x8x4 compression, any clip length, whole or in tiles.

Shapes: B batch, C channels, T frames of pixels (4k+1), F = 1 + (T-1)/4 latent frames, H/W pixels,
h/w latent pixels. Frame t sees frames <= t only, so a clip passes in pieces of any length with the
same result (`stages`), and frames leave while later ones are still to come. Source: Wan2.1
wan/modules/vae.py; parameter names are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pusa_fast.config import VAEConfig
from pusa_fast.device import total_memory
from pusa_fast.model.vae import memory as vae_memory
from pusa_fast.model.vae.layers import CausalConv3d, Decoder, Encoder
from pusa_fast.model.vae.modes import MODES, Clip, Finish, Runner, join
from pusa_fast.model.vae.stages import decoder_stages, encoder_stages
from pusa_fast.model.vae.stream import pointwise
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.ops.vae import can_add

# The largest activation of a piece. On the CPU it should stay in the caches, and be small enough
# for malloc to reuse; on a GPU it should keep all processors busy at latent resolution.
_CHUNK_BYTES_CPU = 32 << 20
_CHUNK_SHARE_CUDA = 64
_MOST_ELEMENTS = 1 << 30  # beyond 2^31 elements cuDNN falls back to slow code


class WanVAE(nn.Module):
    """Video <-> normalised latents.

    `encode` and `decode` stream; `encode_moments` and `decode_whole` are for training.
    `chunk_bytes`: size of the largest activation of a piece, which decides how many frames run
    together. None: 32 MiB on the CPU, 1/64 of a GPU's memory. Results are the same for any.
    """

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = cfg = config or VAEConfig()
        self.encoder = Encoder(cfg)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, 1)
        self.decoder = Decoder(cfg)
        self.chunk_bytes: int | None = None
        self.adds: bool | None = None  # None: as the device can (`ops.vae.can_add`)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv1.weight.device

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip. ValueError unless frames = 4k+1 (temporal factor 4)."""
        factor = self.config.temporal_factor
        if frames < 1 or (frames - 1) % factor:
            below = max(1, (frames - 1) // factor * factor + 1)
            raise ValueError(f"a clip needs {factor}k+1 frames, got {frames}: use {below} or {below + factor}")
        return 1 + (frames - 1) // factor

    @torch.no_grad()
    def encode(self, video: Tensor, tiling: Tiling | None = None) -> Tensor:
        """Mean of the posterior, normalised per channel.

        video [B, 3, T, H, W] in [-1, 1], T = 4k+1, H and W multiples of 8 -> [B, z_dim, F, H/8,
        W/8] in video's dtype. Raises ValueError for other shapes. `tiling`: see `Tiling`.
        """
        s = self.config.spatial_factor
        if video.ndim != 5 or video.shape[1] != 3 or not video.shape[0]:
            raise ValueError(f"encode takes a video [B, 3, T, H, W], got {tuple(video.shape)}")
        if video.shape[3] % s or video.shape[4] % s or not video.shape[3] * video.shape[4]:
            raise ValueError(f"height and width must be multiples of {s}, got {video.shape[3]}x{video.shape[4]}")
        clip = Clip(self.latent_frames(video.shape[2]), (video.shape[3] // s, video.shape[4] // s))
        mean, std = self._statistics()

        def normalised(head: Tensor) -> Tensor:
            return ((pointwise(self.conv1, head, self.config.z_dim) - mean) / std).to(video.dtype)

        tiling = self.resolve("encode", tuple(video.shape), tiling)
        x = video.to(self.device).permute(0, 2, 3, 4, 1)
        z = join(self._run("encode", x, clip, tiling, Finish(self.dtype), normalised), clip.latents)
        return z.permute(0, 4, 1, 2, 3).contiguous()

    @torch.no_grad()
    def decode(self, z: Tensor, tiling: Tiling | None = None) -> Tensor:
        """Normalised latents [B, z_dim, F, h, w] -> video [B, 3, 1 + 4(F-1), 8h, 8w] in [-1, 1].

        The result has z's dtype and is channels-last in memory. Raises ValueError for another
        number of channels or an empty clip.
        """
        sums = torch.promote_types(self.dtype, torch.float32)
        dtype = z.dtype if z.dtype.itemsize < sums.itemsize else sums
        pieces = self._decode(z, tiling, Finish(dtype, clamp=True))
        video = join(pieces, 1 + self.config.temporal_factor * (z.shape[2] - 1))
        return video.to(z.dtype).permute(0, 4, 1, 2, 3)

    def decode_frames(self, z: Tensor, tiling: Tiling | None = None, rounded: bool = False) -> Iterator[Tensor]:
        """As `decode`, but uint8 frames [B, t, 8h, 8w, 3] piece by piece, on the VAE's device.

        (x + 1) * 127.5, truncated as in the reference, or `rounded`. In tiles there is one piece,
        the whole clip.
        """
        return self._decode(z, tiling, Finish(torch.uint8, rounded=rounded), frames=True)

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, not normalised, of a clip [B, 3, T, H, W], with gradients."""
        mu, logvar = self.conv1(self.encoder(video)).chunk(2, dim=1)
        return mu, logvar

    def decode_whole(self, z: Tensor) -> Tensor:
        """Video of latents that are not normalised, in one piece, with gradients, not clamped."""
        out: Tensor = self.decoder(self.conv2(z))
        return out

    def runner(self, kind: str) -> Runner:
        """The "encode" or "decode" runner for `modes`."""
        stages = encoder_stages(self.encoder) if kind == "encode" else decoder_stages(self.decoder)
        adds = can_add(self.device, self.dtype) if self.adds is None else self.adds
        chunk_bytes = min(self.chunk_bytes or default_chunk_bytes(self.device), _MOST_ELEMENTS * self.dtype.itemsize)
        return Runner(stages, adds, self.dtype.itemsize, chunk_bytes)

    def _decode(self, z: Tensor, tiling: Tiling | None, finish: Finish, frames: bool = False) -> Iterator[Tensor]:
        cfg = self.config
        if z.ndim != 5 or z.shape[1] != cfg.z_dim or not z.numel():
            raise ValueError(f"decode takes latents [B, {cfg.z_dim}, F, h, w], got {tuple(z.shape)}")
        clip = Clip(z.shape[2], (z.shape[3], z.shape[4]))
        tiling = self.resolve("decode", tuple(z.shape), tiling, frames)
        with _alone(self.device):
            mean, std = self._statistics()
            x = pointwise(self.conv2, (z.to(self.device).permute(0, 2, 3, 4, 1) * std + mean).to(self.dtype))
        return self._run("decode", x, clip, tiling, finish)

    def _run(
        self,
        kind: str,
        x: Tensor,
        clip: Clip,
        tiling: Tiling | None,
        finish: Finish,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        pieces = MODES["whole" if tiling is None else tiling.mode](self.runner(kind), x, clip, tiling, finish)
        pieces = pieces if then is None else map(then, pieces)
        while True:
            with _alone(self.device):  # for each piece: between them the caller's modes are in force
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece
            del piece

    def resolve(self, kind: str, shape: tuple[int, ...], tiling: Tiling | None, frames: bool = False) -> Tiling | None:
        """What `tiling` means for "encode" or "decode" of this shape: None (whole), or tiles.

        See `memory.resolve`.
        """
        return vae_memory.resolve(self, kind, shape, tiling, frames)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, [C]; in float32, to promote latents."""
        mean, std = (
            torch.tensor(s, device=self.device, dtype=torch.float32)
            for s in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast and inference mode.

    A piece may be made in one of the caller's contexts and used in another.
    """
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def default_chunk_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _CHUNK_BYTES_CPU
    return total_memory(device) // _CHUNK_SHARE_CUDA
