"""Frame-aware flow matching's two passes over latents: noising with its target, and the weighted loss with its gradient.

Triton where it serves (CUDA), plain torch with its own derivative elsewhere: there is no native code for these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from pusa_fast.kernels import reference
from pusa_fast.ops.backend import chosen, launchers
from pusa_fast.ops.checks import check_device, check_float, require, shape


def _accumulator(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


@custom_op("pusa_fast::noise_and_target", mutates_args=())
def _noise_and_target(clean: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of data only: no derivative."""
    with launchers(clean, noise) as run:
        x_t, target = run.noise_and_target(clean, noise, sigma, dtype)
    return x_t, target


@_noise_and_target.register_fake
def _(clean: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return clean.new_empty(clean.shape, dtype=dtype), clean.new_empty(clean.shape, dtype=_accumulator(clean, noise))


@custom_op("pusa_fast::flow_loss", mutates_args=())
def _flow_loss(velocity: Tensor, target: Tensor, weight: Tensor, want_slope: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, frame_errors, slope): slope = weight * (velocity - target), from which the backward pass runs; empty if unwanted."""
    with launchers(velocity, target) as run:
        loss, frame_errors, slope = run.flow_loss_forward(velocity, target, weight, want_slope)
    return loss, frame_errors, (velocity.new_empty(0) if slope is None else slope)


@_flow_loss.register_fake
def _(velocity: Tensor, target: Tensor, weight: Tensor, want_slope: bool) -> tuple[Tensor, Tensor, Tensor]:
    acc = _accumulator(velocity, target)
    frames = (velocity.shape[0], velocity.shape[2])
    slope = velocity.new_empty(velocity.shape if want_slope else 0)
    return velocity.new_empty((), dtype=acc), velocity.new_empty(frames, dtype=acc), slope


@custom_op("pusa_fast::flow_loss_backward", mutates_args=())
def _flow_loss_backward(slope: Tensor, dloss: Tensor) -> Tensor:
    """2 / N * dloss * slope, in slope's dtype."""
    if chosen(slope) != "triton":  # forced for the forward pass alone
        return (slope.to(dloss.dtype) * (dloss * (2 / slope.numel()))).to(slope.dtype)
    with launchers(slope) as run:
        dv: Tensor = run.flow_loss_backward(slope, dloss)
    return dv


@_flow_loss_backward.register_fake
def _(slope: Tensor, dloss: Tensor) -> Tensor:
    return slope.new_empty(slope.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, frame_errors, slope = output
    want_slope = inputs[3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((frame_errors, slope) if want_slope else output))
    ctx.save_for_backward(slope)


def _backward(ctx: Any, dloss: Tensor | None, *_others: None) -> tuple[Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    return None if dloss is None else _flow_loss_backward(slope, dloss), None, None, None


_flow_loss.register_autograd(_backward, setup_context=_setup)


def _check(op: str, x: Tensor, name: str, other: Tensor, other_name: str, frames: Tensor, frames_name: str) -> None:
    """Two latents and a number for each of their frames. Raises ValueError."""
    given = {name: x, other_name: other, frames_name: frames}
    require(x.ndim == 5, op, f"{name} must be [B, C, F, h, w]", x)
    check_float(op, **given)
    check_device(op, x, **given)
    require(other.shape == x.shape, op, f"{other_name} must have {name}'s shape {shape(x)}", other)
    B, F = x.shape[0], x.shape[2]
    require(frames.shape == (B, F), op, f"{frames_name} must be [B={B}, F={F}]", frames)


def _check_constant(op: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: there is no derivative by {name}: detach it, or run under torch.no_grad()")


def noise_and_target(
    clean: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x_t = (1 - sigma[f]) * clean + sigma[f] * noise and the velocity to be learnt there, noise - clean. No derivative.

    clean, noise [B, C, F, h, w]; sigma [B, F] in [0, 1]. Returns x_t in `dtype` (None: clean's) and the target in float32
    (float64 where clean or noise is). Raises ValueError.
    """
    op = "noise_and_target"
    _check(op, clean, "clean", noise, "noise", sigma, "sigma")
    _check_constant(op, clean=clean, noise=noise, sigma=sigma)
    dtype = dtype or clean.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype must be a float dtype, got {dtype}")
    if chosen(clean, noise) != "triton":
        return reference.noise_and_target(clean, noise, sigma, dtype)
    x_t, target = _noise_and_target(clean, noise, sigma, dtype)
    return x_t, target


def flow_loss(velocity: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, frame_errors): the weighted mean of (velocity - target)^2, and its plain mean over each frame, without derivative.

    velocity, target [B, C, F, h, w]; weight [B, F]. loss = sum_bf weight[b, f] * sum_chw (velocity - target)^2 / N with N
    elements in all; frame_errors [B, F]. Both are float32 (float64 where velocity or target is), NaN for empty tensors. The
    derivative is by velocity alone, in its dtype; its slope is written by the same pass, and only where it is wanted. Raises
    ValueError.
    """
    op = "flow_loss"
    _check(op, velocity, "velocity", target, "target", weight, "weight")
    _check_constant(op, target=target, weight=weight)
    if chosen(velocity, target) != "triton":
        return reference.flow_loss(velocity, target, weight)
    want_slope = velocity.requires_grad and torch.is_grad_enabled()
    loss, frame_errors, _ = _flow_loss(velocity, target, weight, want_slope)
    return loss, frame_errors
