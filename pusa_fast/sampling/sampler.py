"""The sampling loop: Euler steps over a schedule matrix, with guidance.

Shapes: B batch, C channels, F latent frames, h/w latent size, L context length, D text width, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.sampling.schedule import Schedule

# Below this many tokens a clip, one forward of both halves of guidance is faster than two; above, it only costs memory.
BATCH_TOKENS = 4096

Callback = Callable[[int, int, Tensor], None]
Velocity = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


class Denoiser(Protocol):
    """A velocity model: `prepare` makes what repeats over steps, `denoise` is one forward."""

    def prepare(self, timesteps: Tensor, contexts: Tensor) -> Any:
        """State for timesteps [S,F] or [S,B,F] (float32, 0 to 1000, on the CPU) and contexts [B,L,D]."""

    def denoise(self, x: Tensor, step: int, state: Any) -> Tensor:
        """Velocity of x [B,C,F,h,w] at row `step` of the timesteps, in x's dtype."""


class ExpertPair:
    """Wan2.2's two transformers as one denoiser: `low` for steps whose global sigma is below `boundary`, `high` before.

    Condition frames, whatever their own level, go through the expert of their step (reference: `switch_DiT_boundary`, 0.875).
    """

    def __init__(self, high: Any, low: Any, boundary: float = 0.875) -> None:
        if not 0 <= boundary <= 1:
            raise ValueError(f"boundary is a noise level from 0 to 1; got {boundary!r}")
        self.high, self.low, self.boundary = high, low, boundary
        self.config, self.device = high.config, high.device

    def prepare(self, timesteps: Tensor, contexts: Tensor, global_sigmas: Tensor | None = None) -> tuple[int, Any, Any]:
        """(first step of `low`, state of `high`, state of `low`); each expert prepares its own steps only.

        Without `global_sigmas` [S+1] the largest timestep of a step stands for its global level.
        """
        levels = timesteps.flatten(1).amax(1) / 1000 if global_sigmas is None else global_sigmas[: timesteps.shape[0]]
        switch = int((levels >= self.boundary).sum())
        high = self.high.prepare(timesteps[:switch], contexts) if switch else None
        low = self.low.prepare(timesteps[switch:], contexts) if switch < timesteps.shape[0] else None
        return switch, high, low

    def denoise(self, x: Tensor, step: int, state: tuple[int, Any, Any]) -> Tensor:
        switch, high, low = state
        velocity: Tensor = (
            self.high.denoise(x, step, high) if step < switch else self.low.denoise(x, step - switch, low)
        )
        return velocity


def guidance_mode(guidance: float, tokens: int, context: Tensor, negative: Tensor | None) -> str:
    """ "off", "batch" (one forward of both halves) or "two-pass": a function of settings and shapes, never of free memory."""
    if guidance == 1 or negative is None:
        return "off"
    return "batch" if tokens < BATCH_TOKENS and context.shape == negative.shape else "two-pass"


def _prepare(denoiser: Denoiser, schedule: Schedule, contexts: Tensor) -> Any:
    if isinstance(denoiser, ExpertPair):
        return denoiser.prepare(schedule.timesteps, contexts, schedule.global_sigmas)
    return denoiser.prepare(schedule.timesteps, contexts)


def _off(denoiser: Denoiser, schedule: Schedule, context: Tensor, negative: Tensor | None) -> Velocity:
    state = _prepare(denoiser, schedule, context)
    return lambda x, step: (denoiser.denoise(x, step, state), None)


def _two_pass(denoiser: Denoiser, schedule: Schedule, context: Tensor, negative: Tensor | None) -> Velocity:
    assert negative is not None
    states = [_prepare(denoiser, schedule, half) for half in (context, negative)]
    return lambda x, step: (denoiser.denoise(x, step, states[0]), denoiser.denoise(x, step, states[1]))


def _batch(denoiser: Denoiser, schedule: Schedule, context: Tensor, negative: Tensor | None) -> Velocity:
    assert negative is not None
    state = _prepare(denoiser, schedule, torch.cat([context, negative]))

    def velocity(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        positive, opposite = denoiser.denoise(torch.cat([x, x]), step, state).chunk(2)
        return positive, opposite

    return velocity


MODES = {"off": _off, "two-pass": _two_pass, "batch": _batch}


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    latents: Tensor,
    schedule: Schedule,
    context: Tensor,
    negative: Tensor | None = None,
    guidance: float = 1.0,
    mode: str | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Run latents [B,C,F,h,w] through the schedule; float32, on their own device.

    `context`, `negative` [B,L,D]; `mode`: one of `MODES`, as `guidance_mode` gives it (None: two passes where guidance has an effect).
    `callback(done, steps, latents)` runs after each step; what it raises ends the run. Nothing in a step waits for the device.
    """
    if mode is None:
        mode = "off" if guidance == 1 or negative is None else "two-pass"
    velocity = MODES[mode](denoiser, schedule, context, negative)
    deltas = schedule.deltas().to(latents.device)
    x = latents.float()
    for step in range(schedule.steps):
        v, v_neg = velocity(x, step)
        x = ops.guided_euler_step(x, v, v_neg, guidance, deltas[step])
        if callback is not None:
            callback(step + 1, schedule.steps, x)
    return x
