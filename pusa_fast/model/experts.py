"""Wan2.2's two transformers as one denoiser: each step is computed by one of them.

A denoiser (`sampling.sampler.Denoiser`) names the networks it consists of: `WanDiT.networks` is
itself alone, `ExpertPair.networks` is "high" and "low". LoRAs, precision, attention backend and
memory accounting go over that mapping, so that code which handles it handles both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pusa_fast.config import DiTConfig
from pusa_fast.model.dit import WanDiT


class ExpertState(NamedTuple):
    """`switch`: the first step of `low`. `high`, `low`: states for their own steps, or None."""

    switch: int
    high: Any
    low: Any


class ExpertPair(nn.Module):
    """`high` computes the steps whose global sigma is at least `boundary`, `low` those below.

    Condition frames, at whatever level, go through the expert of the step (reference:
    `switch_DiT_boundary`, 0.875). Raises ValueError for a boundary outside [0, 1] and for experts
    that differ in configuration, device or dtype.
    """

    def __init__(self, high: WanDiT, low: WanDiT, boundary: float = 0.875) -> None:
        super().__init__()
        if not 0 <= boundary <= 1:
            raise ValueError(f"boundary is a noise level from 0 to 1; got {boundary!r}")
        for name in ("config", "device", "dtype"):
            first, second = getattr(high, name), getattr(low, name)
            if first != second:
                raise ValueError(
                    f"the two experts must have the same {name}: high has {first}, low has {second}; "
                    "load both transformers of one model, onto one device and in one dtype"
                )
        self.high, self.low, self.boundary = high, low, boundary

    @property
    def networks(self) -> Mapping[str, WanDiT]:
        return {"high": self.high, "low": self.low}

    @property
    def config(self) -> DiTConfig:
        return self.high.config

    @property
    def device(self) -> torch.device:
        return self.high.device

    @property
    def dtype(self) -> torch.dtype:
        return self.high.dtype

    def prepare(self, timesteps: Tensor, contexts_BTE: Tensor, global_sigmas: Tensor | None = None) -> ExpertState:
        """Each expert's `WanDiT.prepare` for its own steps of timesteps [S, F] or [S, B, F].

        `global_sigmas` [S] or [S+1]: the global level of each step (None: largest timestep / 1000).
        """
        levels = timesteps.flatten(1).amax(1) / 1000 if global_sigmas is None else global_sigmas[: timesteps.shape[0]]
        switch = int((levels >= self.boundary).sum())
        parts = ((self.high, timesteps[:switch]), (self.low, timesteps[switch:]))
        return ExpertState(switch, *(dit.prepare(part, contexts_BTE) if len(part) else None for dit, part in parts))

    def denoise(self, x_BCFhw: Tensor, step: int, state: ExpertState) -> Tensor:
        """`WanDiT.denoise` by the expert of this step."""
        if step < state.switch:
            return self.high.denoise(x_BCFhw, step, state.high)
        return self.low.denoise(x_BCFhw, step - state.switch, state.low)
