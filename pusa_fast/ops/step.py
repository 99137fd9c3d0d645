"""Guidance and the Euler step of the sampler, per frame. Inference only."""

from __future__ import annotations

from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.ops.checks import check_tensors, require, shape
from pusa_fast.ops.registry import Op, choose, contiguous_like


def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """x[f] += (v_neg + guidance * (v - v_neg))[f] * dsigma[f]; frames whose dsigma is 0 keep their
    bits.

    x, v, v_neg [B, C, F, h, w], v_neg None for no guidance; dsigma [F]. Returns x's dtype. Raises
    ValueError.
    """
    op = "guided_euler_step"
    require(x.ndim == 5, op, "x must be [B, C, F, h, w]", x)
    check_tensors(op, x, v=v, v_neg=v_neg, dsigma=dsigma)
    for name, velocity in (("v", v), ("v_neg", v_neg)):
        if velocity is not None and velocity.shape != x.shape:
            raise ValueError(f"{op}: {name} must be {shape(x)}, got {shape(velocity)}")
    if dsigma.shape != x.shape[2:3]:
        raise ValueError(f"{op}: dsigma must be [F={x.shape[2]}], got {shape(dsigma)}")
    backend = choose(x, v, v_neg)
    if backend == "reference":
        return reference.guided_euler_step(x, v, v_neg, guidance, dsigma)
    out: Tensor = _guided_euler_step(backend, x, v, v_neg, float(guidance), dsigma)
    return out


_guided_euler_step = Op(
    "guided_euler_step(Tensor x, Tensor v, Tensor? v_neg, float guidance, Tensor dsigma) -> Tensor",
    "guided_euler_step",
)
_guided_euler_step.fake(lambda x, *args: contiguous_like(x))
