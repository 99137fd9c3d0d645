"""Frame-aware flow matching: noising, target and loss with one noise level per latent frame (paper section 3.2).

Shapes: B clips, C latent channels, F latent frames, h/w latent pixels. sigma in [0, 1]; the network's timestep is 1000 sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_levels(
    batch: int, frames: int, shift: float, generator: torch.Generator, *, synchronous: bool = False
) -> Tensor:
    """Noise levels [B, F] float32, uniform through the sampler's shift: s -> shift s / (1 + (shift - 1) s).

    `synchronous`: one level per clip (text-to-video training); otherwise each frame draws its own (FAFM, p_async = 1).
    """
    u = torch.rand(batch, 1 if synchronous else frames, generator=generator, device=generator.device).expand(batch, frames)
    return shift * u / (1 + (shift - 1) * u)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma_f) x0 + sigma_f e. clean, noise [B, C, F, h, w]; sigma [B, F]."""
    s = sigma[:, None, :, None, None]
    return (1 - s) * clean + s * noise


def fafm_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error against the velocity e - x0, in float32."""
    return torch.nn.functional.mse_loss(velocity.float(), (noise - clean).float())
