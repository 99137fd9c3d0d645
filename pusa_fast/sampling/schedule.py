"""The schedule matrix: one noise level per step and latent frame. A task is such a matrix.

Shapes: S steps, F latent frames. Noise levels are sigma in [0, 1]; a timestep is 1000 sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pusa_fast.sampling.limits import check_compat, check_multiplier, check_shift, check_steps


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of one run, float32 on the CPU. Raises ValueError if the shapes do not agree.

    `global_sigmas` [S+1]: the schedule of a freely generated frame. `sigmas` [S+1, F]: the noise
    level of frame f before step s; the last row is each frame's target, 0 if it ends clean.
    `timesteps` [S, F]: the network's input at step s.
    """

    global_sigmas: Tensor
    sigmas: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        rows = self.sigmas.shape[0]
        if self.global_sigmas.shape != (rows,) or self.timesteps.shape != (rows - 1, self.sigmas.shape[-1]):
            raise ValueError(
                "a schedule needs global_sigmas [S+1], sigmas [S+1, F], timesteps [S, F]; got "
                f"{list(self.global_sigmas.shape)}, {list(self.sigmas.shape)}, {list(self.timesteps.shape)}"
            )

    @property
    def steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def latent_frames(self) -> int:
        return self.timesteps.shape[1]

    def deltas(self) -> Tensor:
        """Euler step sizes [S, F], negative; 0 keeps a frame as it is."""
        return self.sigmas[1:] - self.sigmas[:-1]


def sigma_grid(steps: int, shift: float) -> Tensor:
    """Noise levels of a plain flow-matching run: float32 [S+1], from 1 down to 0.

    All in float32 and in the order of the reference's `FlowMatchSchedulerPusa.set_timesteps`: the
    last bit can change an integer timestep. Raises ValueError for fewer than one step or a shift
    that is not a positive number.
    """
    steps, shift = check_steps(steps), check_shift(shift)
    return shifted(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32), shift)


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Noise levels shifted towards 1 (0 and 1 stay): shift * s / (1 + (shift - 1) * s)."""
    return shift * levels / (1 + (shift - 1) * levels)


def lift(global_sigmas: Tensor, multipliers: Sequence[float], compat: str = "reference") -> Schedule:
    """Give frame f the schedule `multipliers[f] * global_sigmas`.

    1 generates a frame, 0 keeps it clean, values between re-synthesise it. `compat="reference"`
    truncates the timesteps to integers, as the reference does, and freezes a condition frame
    (multiplier below 1) from the step whose timestep truncates to 0. `compat="exact"` keeps the
    true noise levels. ValueError: an unknown `compat`, a multiplier outside [0, 1].
    """
    check_compat(compat)
    m_F = torch.tensor([check_multiplier(m) for m in multipliers], dtype=torch.float32)
    sigmas = global_sigmas[:, None] * m_F
    if compat == "exact":
        return Schedule(global_sigmas, sigmas, 1000 * sigmas[:-1])
    timesteps = torch.trunc((global_sigmas[:-1, None] * 1000) * m_F)
    frozen = (timesteps == 0) & (m_F < 1)
    for step in range(timesteps.shape[0]):
        sigmas[step + 1] = torch.where(frozen[step], sigmas[step], sigmas[step + 1])
    return Schedule(global_sigmas, sigmas, timesteps)
