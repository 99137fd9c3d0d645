"""The objective of frame-aware flow matching (arXiv 2507.16116, FAFM): noising, target and a loss weighted by noise level.

Shapes: B clips, C latent channels, F latent frames, (h, w) latent pixels. Each frame has a level sigma in [0, 1] of its own; the
network's timestep is 1000 sigma. What the reference does stands in docs/reference.md, 5.2; `ptss` draws the levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.sampling.limits import check_shift
from pusa_fast.sampling.schedule import sigma_grid

SHIFT = 5.0
STEPS = 1000  # of the reference's training grid

Weighting = Callable[[Tensor, float], Tensor]


def training_grid(shift: float = SHIFT, steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """(sigmas, timesteps, weights), float32 [steps], from pure noise down to the last level above 0.

    Every operation is float32 and in the order of the reference's scheduler (`set_timesteps(1000, training=True)`). The weights'
    mean is 1. Raises ValueError for steps or a shift that no grid has.
    """
    sigmas = sigma_grid(steps, shift)[:-1]
    timesteps = sigmas * 1000
    above = _bell(timesteps)
    above = above - above.min()
    return sigmas, timesteps, above * (steps / above.sum())


def level_weights(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """The reference's w(1000 sigma) at any levels, float32 in sigma's shape: that of `training_grid` on its points, 0 at 0 and 1.

    A bell around sigma 1/2, lowered to 0 at its lowest point of the shifted grid and scaled to a mean of 1 over it.
    Raises ValueError for a shift that is not a positive number.
    """
    lowest, scale = _bell_constants(check_shift(shift))
    return (_bell(sigma.to(torch.float32) * 1000) - lowest).clamp_min(0) * scale


def _bell(timesteps: Tensor) -> Tensor:
    return torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)


@functools.lru_cache(maxsize=16)
def _bell_constants(shift: float) -> tuple[float, float]:
    """Lowest value over the training grid, and what makes the mean above it 1."""
    values = _bell(sigma_grid(STEPS, shift)[:-1] * 1000)
    return float(values.min()), float(STEPS / (values - values.min()).sum())


def _reference(sigma_BF: Tensor, shift: float) -> Tensor:
    return level_weights(sigma_BF, shift).mean(dim=1, keepdim=True).expand(sigma_BF.shape)


def _uniform(sigma_BF: Tensor, shift: float) -> Tensor:
    return torch.ones_like(sigma_BF, dtype=torch.float32)


# Name -> (sigma [B, F], shift) -> weights [B, F]. "reference" weights a clip by the mean over its frames, since the reference
# averages the error before it weights it; "per_frame" is what its formula says; "uniform" is plain flow matching.
WEIGHTINGS: Mapping[str, Weighting] = MappingProxyType(
    {"reference": _reference, "per_frame": level_weights, "uniform": _uniform}
)


def check_weighting(name: str) -> str:
    """Raises ValueError naming the choices."""
    if name not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {name!r}: choose one of {', '.join(WEIGHTINGS)}")
    return name


def noised(
    clean: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, timestep, target): what the network gets, and the velocity noise - clean that it is to answer.

    clean, noise [B, C, F, h, w]; sigma [B, F]. x_t in `dtype` (None: clean's), timestep [B, F] = 1000 sigma, not rounded, target in
    float32. Raises ValueError.
    """
    x_t, target = ops.noise_and_target(clean, noise, sigma, dtype)
    return x_t, sigma * 1000, target


def loss(
    velocity: Tensor, target: Tensor, sigma: Tensor, weighting: str = "reference", shift: float = SHIFT
) -> tuple[Tensor, Tensor]:
    """(loss, frame_errors): weighted mean squared error with a derivative by velocity, and each frame's plain one [B, F].

    velocity, target [B, C, F, h, w]; sigma [B, F]. A frame at level 0 weighs nothing: its noise cannot be told from it. Computed
    in float32, whatever velocity's dtype. Raises ValueError.
    """
    weight = WEIGHTINGS[check_weighting(weighting)](sigma, shift) * (sigma > 0)
    return ops.flow_loss(velocity, target, weight)
