"""The sampling loop: Euler steps over a schedule matrix, with guidance.

Shapes: B batch, C channels, F latent frames, h/w latent size, L context length, D text width, S
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast._lazy import lazy_names
from pusa_fast.sampling.schedule import Schedule

# Below this many tokens per clip, one forward for both halves of guidance is faster than two;
# above, it only costs memory.
BATCH_TOKENS = 4096

# Published here first. Loaded when asked for: the sampler must not import models.
__getattr__, __dir__ = lazy_names(__name__, {"ExpertPair": "pusa_fast.model.experts"})

Callback = Callable[[int, int, Tensor], None]
Velocity = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


class Denoiser(Protocol):
    """A velocity model: `prepare` computes what all steps share, `denoise` is one forward."""

    @property
    def config(self) -> Any:
        """Sizes of the model: `in_channels`, `out_channels`, `text_dim`, `patch_size`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and residual stream."""

    @property
    def networks(self) -> Mapping[str, Any]:
        """The networks behind it by name: one, or the experts that take turns."""

    def prepare(self, timesteps: Tensor, contexts: Tensor, global_sigmas: Tensor | None = None) -> Any:
        """State for timesteps [S,F] or [S,B,F] and contexts [B,L,D].

        Timesteps are float32, 0 to 1000, on the CPU. `global_sigmas` [S+1]: the schedule they were
        lifted from (None: unknown).
        """

    def denoise(self, x: Tensor, step: int, state: Any) -> Tensor:
        """Velocity of x [B,C,F,h,w] at row `step` of the timesteps, in x's dtype."""


def guidance_mode(guidance: float, tokens: int, context: Tensor, negative: Tensor | None) -> str:
    """How guidance runs: "off", "batch" (one forward for both halves) or "two-pass".

    A function of settings and shapes, never of free memory.
    """
    if guidance == 1 or negative is None:
        return "off"
    return "batch" if tokens < BATCH_TOKENS and context.shape == negative.shape else "two-pass"


def _prepare(denoiser: Denoiser, schedule: Schedule, contexts: Tensor) -> Any:
    return denoiser.prepare(schedule.timesteps, contexts, schedule.global_sigmas)


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

    `context`, `negative` [B,L,D]; `mode`: one of `MODES`, as `guidance_mode` gives it (None: two
    passes if guidance has an effect). `callback(done, steps, latents)` runs after each step; an
    exception from it ends the run. Nothing in a step waits for the device.
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
