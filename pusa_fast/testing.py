"""Error budgets against a float64 oracle, and seeded inputs; shared by tests and benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def max_error(value: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference in float64; 0 if empty, NaN if any. ValueError: shapes differ."""
    if value.shape != oracle.shape:
        raise ValueError(f"cannot compare shape {tuple(value.shape)} with {tuple(oracle.shape)}")
    if not value.numel():
        return 0.0
    return float((value.detach().double() - oracle.detach().double().to(value.device)).abs().max())


def error_budget(low: Tensor, oracle: Tensor) -> float:
    """The largest absolute error a kernel may have: `2 * (err + eps * max|oracle|)`.

    `low` is plain torch's result in the kernel's dtype, `err` its largest error, `eps` its dtype's
    epsilon; `oracle` is the same formula in float64 on the same (already rounded) inputs. A kernel
    must be about as good as torch; no tolerance is chosen by hand. Raises ValueError where shapes
    differ or `oracle` is not float64.
    """
    if oracle.dtype != torch.float64:
        raise ValueError(f"the oracle must be computed in float64, got {oracle.dtype}")
    largest = float(oracle.detach().abs().max()) if oracle.numel() else 0.0
    return 2 * (max_error(low, oracle) + torch.finfo(low.dtype).eps * largest)


def assert_within_budget(candidate: Tensor, low: Tensor, oracle: Tensor, what: str = "result") -> None:
    """Raises AssertionError, with the figures, if `candidate` exceeds `error_budget(low, oracle)`.

    NaN fails. Raises ValueError if `candidate` and `low` differ in shape or dtype.
    """
    if candidate.dtype != low.dtype:
        raise ValueError(f"{what}: the budget is for {low.dtype}, the candidate is {candidate.dtype}")
    error, budget = max_error(candidate, oracle), error_budget(low, oracle)
    if not error <= budget:
        raise AssertionError(
            f"{what}: largest error {error:.3e} exceeds the budget {budget:.3e} ({candidate.dtype}, "
            f"shape {tuple(candidate.shape)}; plain torch is off by {max_error(low, oracle):.3e})"
        )


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference, in float64. ValueError: shapes differ."""
    if value.shape != reference.shape:
        raise ValueError(f"cannot compare shape {tuple(value.shape)} with {tuple(reference.shape)}")
    exact = reference.detach().double()
    difference = float((value.detach().double().to(exact.device) - exact).norm())
    norm = float(exact.norm())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def make_input(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
    padded: bool = False,
) -> Tensor:
    """Normal deviates, a function of shape and seed: drawn in float64 on the CPU, scaled and cast.

    `padded` adds three NaNs after each row (last axis): strides are not contiguous, and a kernel
    that reads beyond a row shows it.
    """
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    if not padded:
        return values.to(device)
    room = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype, device=device)
    view = room[..., : shape[-1]]
    view.copy_(values)
    return view
