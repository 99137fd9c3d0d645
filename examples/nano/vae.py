"""Stage 1 of nano: the VAE. Single frames first, then clips; small crops around the shape."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import data
import muon
import stage
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pusa_fast.config import VAEConfig
from pusa_fast.data import sprites
from pusa_fast.model.vae.layers import CausalConv3d, Downsample, Upsample
from pusa_fast.model.vae.model import WanVAE

KL_WEIGHT = 1e-6  # 1e-4 stalls at 20 dB
# The decoder trains on latents with up to this much noise, in their standard deviations, since a
# transformer's latents are not exact.
NOISE = 0.4
ARCHITECTURE = {"base_dim": 8, "dim_mult": (1, 2, 4, 8), "num_res_blocks": 1}


@dataclass(frozen=True)
class Phase:
    steps: int
    batch: int
    frames: int
    crop: int


PHASES = (Phase(900, 64, 1, 32), Phase(900, 16, 9, 32), Phase(200, 4, 17, 64))


def build(seed: int) -> WanVAE:
    """A new VAE whose temporal taps start at "this frame" and "mean of the pair"."""
    torch.manual_seed(seed)
    vae = WanVAE(VAEConfig(**ARCHITECTURE))
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CausalConv3d):
                module.weight[:, :, :-1] = 0
            if isinstance(module, (Downsample, Upsample)) and module.time_conv is not None:
                weight, bias = module.time_conv.weight, module.time_conv.bias
                eye = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
                weight.zero_()
                nn.init.zeros_(bias)
                taps = (1, 2) if isinstance(module, Downsample) else (2,)
                for tap in taps:
                    weight[:, :, tap, 0, 0] = eye / len(taps)
    return vae


def batch(
    phase: Phase, generator: torch.Generator, held_out: bool = False, photo_share: float = data.PHOTO_SHARE
) -> Tensor:
    """Random crops [N, 3, T, crop, crop] in [-1, 1], most of them around the shape."""
    samples = [data.draw(generator, held_out, photo_share) for _ in range(phase.batch)]
    clips = data.render(samples, phase.frames)
    if phase.crop < sprites.SIZE:
        jitter = torch.randn(len(samples), 2, generator=generator) * 6
        centers = torch.stack([s.scene.centers(phase.frames).mean(0) for s in samples])
        corners = (centers - phase.crop / 2 + jitter).round().clamp(0, sprites.SIZE - phase.crop).int().tolist()
        clips = torch.stack(
            [c[:, y : y + phase.crop, x : x + phase.crop] for c, (x, y) in zip(clips, corners, strict=True)]
        )
    return to_signal(clips)


def steps(scale: float) -> int:
    return sum(max(1, round(phase.steps * scale)) for phase in PHASES)


def to_signal(clips: Tensor) -> Tensor:
    """uint8 [N, T, H, W, 3] -> float [N, 3, T, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def psnr(vae: WanVAE, clips: Tensor) -> float:
    """PSNR in dB of clips [N, 3, T, H, W] after encode and decode."""
    with torch.no_grad():
        error = F.mse_loss(vae.decode_whole(vae.encode_moments(clips)[0]).clamp(-1, 1), clips)
    return 10 * math.log10(4 / float(error))


def train(run: Path, seed: int, scale: float, begun: WanVAE | None = None, start: int = 0) -> WanVAE:
    """Train, then measure the latents' statistics over whole clips; returns the VAE with both.

    `begun`: a VAE that stopped after `start` steps, to continue with new optimisers.
    """
    vae = begun or build(seed)
    optimizers = muon.split(vae, lr=0.01, adam_lr=2e-3)
    ends = list(itertools.accumulate(max(1, round(phase.steps * scale)) for phase in PHASES))
    held_out = {
        f"{name}{f}": batch(Phase(0, 16, f, 64), torch.Generator().manual_seed(seed + 77), True, share)
        for f in (1, 9) for name, share in (("psnr", 0.0), ("photo", 1.0))
    }  # fmt: skip
    for kernel in vae.parameters():
        if kernel.ndim == 5:  # convolutions are 1.5 times as fast in this layout
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last_3d)

    def loss_fn(step: int) -> Tensor:
        phase = next(p for p, end in zip(PHASES, ends, strict=True) if step < end)
        generator = stage.step_generator(seed, step)
        clips = batch(phase, generator).contiguous(memory_format=torch.channels_last_3d)
        mu, logvar = vae.encode_moments(clips)
        logvar = logvar.clamp(-20, 10)
        level = NOISE * torch.rand(len(mu), 1, 1, 1, 1, generator=generator) * mu.std((0, 2, 3, 4), keepdim=True)
        z = mu + torch.randn(mu.shape, generator=generator) * (torch.exp(0.5 * logvar) + level)
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(vae.decode_whole(z), clips) + KL_WEIGHT * kl

    def validate() -> dict[str, float]:
        return {name: round(psnr(vae, clips), 2) for name, clips in held_out.items()}

    stage.train("vae", {"vae": vae}, optimizers, loss_fn, steps(scale), run,
                plan=f"seed {seed}, {steps(scale)} steps", validate=validate, start=start)  # fmt: skip
    return with_statistics(vae, seed)


def with_statistics(vae: WanVAE, seed: int, clips: int = 256) -> WanVAE:
    """The same weights with measured latents_mean and latents_std, so latents have unit scale."""
    generator = torch.Generator().manual_seed(seed + 1)
    phase = Phase(0, 16, sprites.FRAMES, sprites.SIZE)
    with torch.no_grad():
        mu = torch.cat([vae.encode_moments(batch(phase, generator))[0] for _ in range(clips // phase.batch)])
    std, mean = torch.std_mean(mu, dim=(0, 2, 3, 4))
    config = VAEConfig(**ARCHITECTURE, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    measured = WanVAE(config)
    measured.load_state_dict(vae.state_dict())
    return measured
