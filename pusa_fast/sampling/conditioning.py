"""Given frames -> a run's starting latents: encode what the conditions need, noise it once.

Shapes: C latent channels, F latent frames, h/w latent size, T/H/W pixel frames and size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pusa_fast.sampling.limits import check_compat
from pusa_fast.sampling.schedule import Schedule
from pusa_fast.sampling.task import Placement, Plan, describe


class LatentEncoder(Protocol):
    """The VAE's encoder."""

    def encode(self, video: Tensor, tiling: Any = None) -> Tensor:
        """Video [1,3,4k+1,H,W] in [-1, 1] -> normalised latent [1,C,k+1,h,w]; own `tiling`."""


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [1,C,F,h,w] from a CPU generator: the reference's on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def to_video(frames_THWC: Tensor, device: torch.device) -> Tensor:
    """uint8 [T,H,W,3] -> float32 [1,3,T,H,W] in [-1, 1]."""
    return frames_THWC.to(device).permute(3, 0, 1, 2)[None].float() * (2 / 255) - 1


def to_frames(video: Tensor, compat: str = "reference") -> Tensor:
    """[1,3,T,H,W] in [-1, 1] -> CPU uint8 [T,H,W,3], truncated as the reference, or rounded."""
    levels = ((video[0].permute(1, 2, 3, 0).float() + 1) * 127.5).clip(0, 255)
    return (levels.round() if check_compat(compat) == "exact" else levels).to(torch.uint8).cpu().contiguous()


def encode_conditions(
    plan: Plan, encoder: LatentEncoder, video: Callable[[int], Tensor], tiling: Any = None
) -> dict[int, Tensor]:
    """The clean latent [C,h,w], float32, of every placement, by latent frame.

    `video(medium)` returns a medium's first `plan.frames_needed[medium]` frames as [1,3,T,H,W] in
    [-1, 1]. Each distinct medium is encoded once, up to its last needed latent: the encoder is
    causal. Raises ValueError if frames are missing.
    """
    encoded: dict[int, Tensor] = {}
    for medium, needed in enumerate(plan.frames_needed):
        frames = video(medium)
        if frames.shape[2] < needed:
            name = describe(plan.media[medium])
            raise ValueError(
                f"{name}: {needed} frames are needed, only {frames.shape[2]} could be read: give a longer clip"
            )
        encoded[medium] = encoder.encode(frames[:, :, :needed], tiling).float()
    return {placement.latent: encoded[placement.medium][0, :, placement.source] for placement in plan.placements}


def initial_latents(
    noise: Tensor, schedule: Schedule, placements: Sequence[Placement], clean: Mapping[int, Tensor]
) -> Tensor:
    """Noise [1,C,F,h,w] with each given latent z at its initial noise level s: (1-s) z + s noise.

    The noise is the run's own at that frame, added only here: later steps denoise the frame with
    the video (reference: FlowMatchSchedulerPusaV2V). At noise level 0 the latent keeps its bits.
    """
    latents = noise.clone()
    for placement in placements:
        frame = placement.latent
        z = clean[frame].to(noise)
        level = schedule.sigmas[0, frame].item()
        latents[0, :, frame] = (1 - level) * z + level * noise[0, :, frame] if level else z
    return latents
