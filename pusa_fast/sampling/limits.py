"""The ranges of a run's settings. Imports no torch: requests are checked without a model."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TypeGuard

from pusa_fast.errors import ArgumentError

COMPAT = ("reference", "exact")
MAX_STEPS = 1000  # the reference's training grid
MAX_SEED = 2**63 - 1
MAX_FRAMES = 100_001  # more than an hour: a typing error, not a clip


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_steps(steps: object) -> int:
    if not is_whole(steps) or not 1 <= int(steps) <= MAX_STEPS:
        raise ArgumentError("steps", f" must be a whole number from 1 to {MAX_STEPS}; got {steps!r}")
    return int(steps)


def check_shift(shift: object) -> float:
    if not is_number(shift) or not 0 < float(shift) < math.inf:
        raise ArgumentError("shift", f" must be a positive number (Wan: 5); got {shift!r}")
    return float(shift)


def check_guidance(guidance: object) -> float:
    if not is_number(guidance) or not 0 <= float(guidance) < math.inf:
        raise ArgumentError("guidance_scale", f" must be a number, at least 0 (1: none); got {guidance!r}")
    return float(guidance)


def check_seed(seed: object) -> int:
    if not is_whole(seed) or not 0 <= seed <= MAX_SEED:
        raise ArgumentError("seed", f" must be a whole number from 0 to {MAX_SEED}; got {seed!r}")
    return int(seed)


def check_compat(compat: str) -> str:
    if compat not in COMPAT:
        raise ValueError(f"unknown compat {compat!r}: choose one of {', '.join(COMPAT)}")
    return compat


def check_multiplier(noise: object) -> float:
    if not is_number(noise) or not 0 <= float(noise) <= 1:  # NaN compares false
        raise ValueError(f"noise must be a number from 0 (keep the frame) to 1 (generate it new); got {noise!r}")
    return float(noise)


def check_size(name: str, size: object, multiple: int) -> int:
    """`size` in pixels, which must be a multiple of `multiple`."""
    if not is_whole(size) or size < 1 or size % multiple:
        below = size // multiple * multiple if is_whole(size) and size > 0 else 0
        nearest = f"{below} or {below + multiple}" if below else str(multiple)
        raise ArgumentError(name, f"={size!r} is not a multiple of {multiple} pixels: use {nearest}")
    return int(size)


def latent_count(num_frames: object, temporal_factor: int) -> int:
    """Latent frames of `num_frames` = k*n + 1; ArgumentError for others names the nearest."""
    if not is_whole(num_frames) or not 1 <= num_frames <= MAX_FRAMES:
        raise ArgumentError("num_frames", f" must be a whole number from 1 to {MAX_FRAMES}; got {num_frames!r}")
    whole, rest = divmod(int(num_frames) - 1, temporal_factor)
    if rest:
        below = whole * temporal_factor + 1
        nearest = f"use {below} or {below + temporal_factor}"
        raise ArgumentError("num_frames", f"={num_frames} is not {temporal_factor}n+1 (the VAE's chunks): {nearest}")
    return whole + 1
