"""The four stages of a clip, as functions over the models: encode text, encode media, denoise,
decode.

`Pipeline` runs them one after another. Shapes: T frames, F latent frames, C latent channels, H/W
pixels, h/w latent size, L context rows, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pusa_fast.model.text import TextEncoder
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.model.vae.modes import join
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.request import CheckedRequest
from pusa_fast.sampling import conditioning, sampler
from pusa_fast.sampling import schedule as schedules
from pusa_fast.video import fit


def encode_text(encoder: TextEncoder | None, text: str | Tensor, device: torch.device) -> Tensor:
    """Context [1, L, D] on `device`, of a prompt or of embeddings as they are."""
    if isinstance(text, str):
        assert encoder is not None, "Pipeline.run checks it"
        text = encoder.encode([text])
    return text.to(device)


def encode_media(vae: WanVAE, checked: CheckedRequest, tiling: Tiling | None) -> dict[int, Tensor]:
    """The clean latent [C, h, w], float32, of every latent frame that the request gives."""
    settings, plan = checked.settings, checked.plan

    def video(medium: int) -> Tensor:
        frames = checked.media[medium].read(plan.frames_needed[medium])
        return conditioning.to_video(fit(frames, (settings.width, settings.height), settings.fit), vae.device)

    return conditioning.encode_conditions(plan, vae, video, tiling)


def denoise(
    dit: Any,
    checked: CheckedRequest,
    clean: Mapping[int, Tensor],
    context: Tensor,
    negative: Tensor | None,
    mode: str,
    callback: sampler.Callback | None = None,
) -> Tensor:
    """Latents [1, C, F, h, w], float32 on the model's device. `mode`: `sampler.guidance_mode`'s."""
    settings, plan = checked.settings, checked.plan
    grid = schedules.sigma_grid(settings.steps, settings.shift)
    schedule = schedules.lift(grid, plan.multipliers, settings.compat)
    noise = conditioning.initial_noise(settings.seed, checked.latent_shape).to(dit.device)
    latents = conditioning.initial_latents(noise, schedule, plan.placements, clean)
    scale = settings.guidance_scale
    return sampler.sample(dit, latents, schedule, context, negative, scale, mode=mode, callback=callback)


def decode(vae: WanVAE, checked: CheckedRequest, latents: Tensor, tiling: Tiling | None) -> Tensor:
    """Frames, uint8 [T, H, W, 3] on the CPU."""
    pieces = vae.decode_frames(latents, tiling, rounded=checked.settings.compat == "exact")
    return join((piece[0].cpu() for piece in pieces), checked.settings.num_frames)
