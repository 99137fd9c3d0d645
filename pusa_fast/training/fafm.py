"""The objective of frame-aware flow matching (arXiv 2507.16116): noising, target, weighted loss.

Shapes: B clips, C latent channels, F latent frames, (h, w) latent pixels. Each frame has its own
level sigma in [0, 1]; the network's timestep is 1000 sigma. docs/reference.md, 5.2 describes the
reference's way; `ptss` draws the levels.
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
    """(sigmas, timesteps, weights), float32 [steps], from pure noise to the lowest level above 0.

    Every operation is float32 and in the order of the reference's scheduler,
    `set_timesteps(1000, training=True)`. The weights have a mean of 1. Raises ValueError for steps
    or a shift that no grid has.
    """
    sigmas = sigma_grid(steps, shift)[:-1]
    timesteps = sigmas * 1000
    above = _bell(timesteps)
    above = above - above.min()
    return sigmas, timesteps, above * (steps / above.sum())


def level_weights(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """The reference's w(1000 sigma), float32 in sigma's shape; on `training_grid`, its weights.

    A bell around sigma 1/2, lowered so that its lowest point on the shifted grid is 0, and scaled
    to a mean of 1 over the grid. Raises ValueError for a shift that is not a positive number.
    """
    lowest, scale = _bell_constants(check_shift(shift))
    return (_bell(sigma.to(torch.float32) * 1000) - lowest).clamp_min(0) * scale


def _bell(timesteps: Tensor) -> Tensor:
    return torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)


@functools.lru_cache(maxsize=16)
def _bell_constants(shift: float) -> tuple[float, float]:
    """Lowest value over the training grid, and the scale that makes the mean above it 1."""
    values = _bell(sigma_grid(STEPS, shift)[:-1] * 1000)
    return float(values.min()), float(STEPS / (values - values.min()).sum())


def _reference(sigma_BF: Tensor, shift: float) -> Tensor:
    return level_weights(sigma_BF, shift).mean(dim=1, keepdim=True).expand(sigma_BF.shape)


def _uniform(sigma_BF: Tensor, shift: float) -> Tensor:
    return torch.ones_like(sigma_BF, dtype=torch.float32)


# Name -> (sigma [B, F], shift) -> weights [B, F]. "reference" gives all frames of a clip their mean
# weight, since the reference averages the error before it weights it; "per_frame" follows its
# formula; "uniform" is plain flow matching.
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
    """(x_t, timestep, target): the network's inputs, and the velocity noise - clean that it learns.

    clean, noise [B, C, F, h, w]; sigma [B, F]. x_t in `dtype` (None: clean's), timestep [B, F] =
    1000 sigma, not rounded, target in float32. Raises ValueError.
    """
    x_t, target = ops.noise_and_target(clean, noise, sigma, dtype)
    return x_t, sigma * 1000, target


def loss(
    velocity: Tensor, target: Tensor, sigma: Tensor, weighting: str = "reference", shift: float = SHIFT
) -> tuple[Tensor, Tensor]:
    """(loss, frame_errors): weighted mean squared error with a gradient by velocity, and [B, F].

    velocity, target [B, C, F, h, w]; sigma [B, F]. `frame_errors` are not weighted. A frame at
    level 0 has no weight: its noise cannot be recovered. Computed in float32 for every dtype of
    velocity. Raises ValueError.
    """
    weight = WEIGHTINGS[check_weighting(weighting)](sigma, shift) * (sigma > 0)
    return ops.flow_loss(velocity, target, weight)
