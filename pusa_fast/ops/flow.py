"""Frame-aware flow matching's two passes over latents: noising with its target, and the weighted
loss with its gradient.

Triton where it serves (CUDA), plain torch with its own derivative elsewhere: there is no native
code for these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.ops.checks import check_tensors, require, shape
from pusa_fast.ops.registry import Grads, Op, accumulator, choose, contiguous_like, recording


def _exact(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(accumulator(x), y.dtype)


def _check(op: str, x: Tensor, name: str, other: Tensor, other_name: str, frames: Tensor, frames_name: str) -> None:
    """Two latents and a number for each of their frames. Raises ValueError."""
    require(x.ndim == 5, op, f"{name} must be [B, C, F, h, w]", x)
    check_tensors(op, x, **{name: x, other_name: other, frames_name: frames})
    require(other.shape == x.shape, op, f"{other_name} must have {name}'s shape {shape(x)}", other)
    B, F = x.shape[0], x.shape[2]
    require(frames.shape == (B, F), op, f"{frames_name} must be [B={B}, F={F}]", frames)


def _check_constant(op: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if recording(x):
            raise ValueError(f"{op}: there is no derivative by {name}: detach it, or run under torch.no_grad()")


def noise_and_target(
    clean: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x_t = (1 - sigma[f]) * clean + sigma[f] * noise and the velocity to be learnt there, noise -
    clean. No derivative.

    clean, noise [B, C, F, h, w]; sigma [B, F] in [0, 1]. Returns x_t in `dtype` (None: clean's) and
    the target in float32 (float64 where clean or noise is). Raises ValueError.
    """
    op = "noise_and_target"
    _check(op, clean, "clean", noise, "noise", sigma, "sigma")
    _check_constant(op, clean=clean, noise=noise, sigma=sigma)
    dtype = dtype or clean.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype must be a float dtype, got {dtype}")
    backend = choose(clean, noise, only="triton")
    if backend == "reference":
        return reference.noise_and_target(clean, noise, sigma, dtype)
    x_t, target = _noise_and_target(backend, clean, noise, sigma, dtype)
    return x_t, target


_noise_and_target = Op(
    "noise_and_target(Tensor clean, Tensor noise, Tensor sigma, ScalarType dtype) -> (Tensor, Tensor)",
    "noise_and_target",
)


@_noise_and_target.fake
def _(clean: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return contiguous_like(clean, dtype), contiguous_like(clean, _exact(clean, noise))


def flow_loss(velocity: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, frame_errors): the weighted mean of (velocity - target)^2, and its plain mean over
    each frame.

    velocity, target [B, C, F, h, w]; weight [B, F]. loss = sum_bf weight[b, f] * sum_chw (velocity
    - target)^2 / N with N elements in all; frame_errors [B, F] has no derivative. Both are float32
    (float64 where velocity or target is), NaN for empty tensors. The derivative is by velocity
    alone, in its dtype; the same pass writes its slope, and only where it is wanted. Raises
    ValueError.
    """
    op = "flow_loss"
    _check(op, velocity, "velocity", target, "target", weight, "weight")
    _check_constant(op, target=target, weight=weight)
    backend = choose(velocity, target, only="triton")
    if backend == "reference":
        return reference.flow_loss(velocity, target, weight)
    loss, frame_errors, _ = _flow_loss(backend, velocity, target, weight, recording(velocity))
    return loss, frame_errors


# (loss, frame_errors, slope): slope = weight * (velocity - target), from which the backward pass
# runs; empty if unwanted.
_flow_loss = Op(
    "flow_loss(Tensor velocity, Tensor target, Tensor weight, bool want_slope) -> (Tensor, Tensor, Tensor)",
    "flow_loss_forward",
)


@_flow_loss.fake
def _(velocity: Tensor, target: Tensor, weight: Tensor, want_slope: bool) -> tuple[Tensor, Tensor, Tensor]:
    acc = _exact(velocity, target)
    frames = (velocity.shape[0], velocity.shape[2])
    slope = contiguous_like(velocity) if want_slope else velocity.new_empty(0)
    return velocity.new_empty((), dtype=acc), velocity.new_empty(frames, dtype=acc), slope


_flow_loss_backward = Op("flow_loss_backward(Tensor slope, Tensor dloss) -> Tensor", "flow_loss_backward")
_flow_loss_backward.fake(lambda slope, dloss: contiguous_like(slope))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, frame_errors, slope = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((frame_errors, slope) if inputs[3] else output))
    ctx.save_for_backward(slope)


def _backward(ctx: Any, dloss: Tensor | None, *_others: None) -> Grads:
    """2 / N * dloss * slope, in slope's dtype."""
    (slope,) = ctx.saved_tensors
    dv = None
    if dloss is not None and choose(slope, only="triton") == "triton":
        dv = _flow_loss_backward.operator(slope, dloss)
    elif dloss is not None:  # Triton was forced for the forward pass alone
        dv = (slope.to(dloss.dtype) * (dloss * (2 / slope.numel()))).to(slope.dtype)
    return dv, None, None, None


_flow_loss.derivative(_setup, _backward)
