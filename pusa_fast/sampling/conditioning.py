"""Given frames -> the latents that a run starts from: encode what the conditions need, noise it once.

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
        """Video [1,3,T,H,W] in [-1, 1], T = 4k+1 -> normalised latent [1,C,k+1,h,w]; `tiling` is the encoder's own affair."""


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [1,C,F,h,w] from a CPU generator: the same on every device, and the reference's."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def to_video(frames_THWC: Tensor, device: torch.device) -> Tensor:
    """uint8 [T,H,W,3] -> float32 [1,3,T,H,W] in [-1, 1]."""
    return frames_THWC.to(device).permute(3, 0, 1, 2)[None].float() * (2 / 255) - 1


def to_frames(video: Tensor, compat: str = "reference") -> Tensor:
    """[1,3,T,H,W] in [-1, 1] -> uint8 [T,H,W,3] on the CPU: truncated as the reference does, or rounded for "exact"."""
    levels = ((video[0].permute(1, 2, 3, 0).float() + 1) * 127.5).clip(0, 255)
    return (levels.round() if check_compat(compat) == "exact" else levels).to(torch.uint8).cpu().contiguous()


def encode_conditions(
    plan: Plan, encoder: LatentEncoder, video: Callable[[int], Tensor], tiling: Any = None
) -> dict[int, Tensor]:
    """The clean latent [C,h,w], float32, of every placement, by latent frame.

    `video(medium)` gives the first `plan.frames_needed[medium]` frames of a medium as [1,3,T,H,W] in [-1, 1]. Each distinct medium is
    encoded once, and no further than its last needed latent: the encoder is causal. Raises ValueError where frames are missing.
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
    """Noise [1,C,F,h,w] with each given latent in its place, brought to its own starting level s: (1-s) z + s noise.

    The noise is the run's own at that frame, and it is added this once: later steps denoise the frame along with the video
    (reference: FlowMatchSchedulerPusaV2V). At level 0 the latent is copied bit for bit.
    """
    latents = noise.clone()
    for placement in placements:
        frame = placement.latent
        z = clean[frame].to(noise)
        level = schedule.sigmas[0, frame].item()
        latents[0, :, frame] = (1 - level) * z + level * noise[0, :, frame] if level else z
    return latents
