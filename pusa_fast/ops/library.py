"""`torch.ops.pusa_fast.*`: each op's schema, fake and derivative, once for all implementations.

Bodies call what `backend.launchers` chooses: Triton's (kernels/) or the native CPU code's, which have the same
names and arguments. Arguments are trusted; `pusa_fast.ops` has checked them. A tensor that an op may leave out comes back
empty, since an operator's schema has no optional result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from pusa_fast.ops.backend import launchers

Tensors = tuple[Tensor, ...]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _or_empty(results: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t in results]


def _table_grad(grad: Tensor, frame: Tensor | None, base: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a frame table and of the row added to all of it, from the rows' gradient [B, F, D]."""
    return (
        None if frame is None else grad.to(frame.dtype),
        None if base is None else grad.sum((0, 1)).to(base.dtype),
    )


def _frames(*tables: Tensor | None) -> int:
    return next((t.shape[1] for t in tables if t is not None), 1)


@custom_op("pusa_fast::residual_norm", mutates_args=())
def residual_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_base: Tensor | None,
    scale: Tensor | None,
    scale_base: Tensor | None,
    shift: Tensor | None,
    shift_base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, n, mean, rstd): r empty where y is None; mean and rstd [B, L], what the backward pass needs of the norm."""
    with launchers(x, y) as run:
        r, n, mean, rstd = run.residual_norm_forward(
            x, y, gate, gate_base, scale, scale_base, shift, shift_base, weight, bias, eps
        )
    return (x.new_empty(0) if r is None else r), n, mean, rstd


@residual_norm.register_fake
def _(x: Tensor, y: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = [x.new_empty(x.shape[:2], dtype=_accumulator(x)) for _ in range(2)]
    return (x.new_empty(0) if y is None else _contiguous_like(x)), _contiguous_like(x), stats[0], stats[1]


@custom_op("pusa_fast::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    dr: Tensor | None,
    dn: Tensor,
    r: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_base: Tensor | None,
    scale: Tensor | None,
    scale_base: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_gate: bool,
    want_modulation: bool,
    want_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dgate, dscale, dshift, dweight, dbias), empty where unwanted. Without a gate dy is dx. Tables: rows [B, F, D].

    y is only read, and only given, where the gate's gradient is wanted: training with frozen tables does not save it.
    """
    with launchers(r, y, dn, dr) as run:
        results = run.residual_norm_backward(
            dr,
            dn,
            r,
            y,
            gate,
            gate_base,
            scale,
            scale_base,
            weight,
            mean,
            rstd,
            want_gate,
            want_modulation,
            want_affine,
        )
    dx, dy, dgate, dscale, dshift, dweight, dbias = _or_empty(results, r)
    return dx, dy, dgate, dscale, dshift, dweight, dbias


@residual_norm_backward.register_fake
def _(
    dr: Tensor | None,
    dn: Tensor,
    r: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_base: Tensor | None,
    scale: Tensor | None,
    scale_base: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_gate: bool,
    want_modulation: bool,
    want_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, D, acc = r.shape[0], r.shape[2], _accumulator(r)

    def wanted(condition: bool, *shape: int) -> Tensor:
        return r.new_empty(shape, dtype=acc) if condition else r.new_empty(0)

    gated = gate is not None or gate_base is not None
    return (
        _contiguous_like(r),
        _contiguous_like(r, y.dtype if y is not None else None) if gated else r.new_empty(0),
        wanted(want_gate, B, _frames(gate), D),
        wanted(want_modulation, B, _frames(scale), D),
        wanted(want_modulation, B, _frames(scale), D),
        wanted(want_affine, D),
        wanted(want_affine, D),
    )


_X, _Y, _GATE, _GATE_BASE, _SCALE, _SCALE_BASE, _SHIFT, _SHIFT_BASE, _WEIGHT, _BIAS = range(10)


def _residual_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    x, y, gate, gate_base, scale, scale_base, shift, shift_base, weight, bias, _ = inputs
    r, _, mean, rstd = output
    needs = ctx.needs_input_grad
    ctx.want_gate = needs[_GATE] or needs[_GATE_BASE]
    ctx.want_modulation = any(needs[i] for i in (_SCALE, _SCALE_BASE, _SHIFT, _SHIFT_BASE))
    ctx.want_affine = needs[_WEIGHT] or needs[_BIAS]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.y_dtype = None if y is None else y.dtype
    ctx.gated = gate is not None or gate_base is not None
    ctx.save_for_backward(
        x if y is None else r,
        y if ctx.want_gate else None,
        *(gate, gate_base, scale, scale_base, shift, shift_base, weight, bias),
        *(mean, rstd),
    )


def _residual_norm_backward(
    ctx: Any, dr: Tensor | None, dn: Tensor | None, _mean: Tensor | None, _rstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    r, y, gate, gate_base, scale, scale_base, shift, shift_base, weight, bias, mean, rstd = ctx.saved_tensors
    if dn is None:
        dn = torch.zeros_like(r)
    # Without y, r went out as x itself, and what reaches it is no gradient of this op.
    dr = None if ctx.y_dtype is None else dr
    dx, dy, dgate, dscale, dshift, dweight, dbias = residual_norm_backward(
        *(dr, dn, r, y, gate, gate_base, scale, scale_base, weight, mean, rstd),
        *(ctx.want_gate, ctx.want_modulation, ctx.want_affine),
    )
    grads: list[Tensor | None] = [dx, None, *[None] * 8]
    if ctx.y_dtype is not None:
        grads[_Y] = (dy if ctx.gated else dx).to(ctx.y_dtype)
    if ctx.want_gate:
        grads[_GATE], grads[_GATE_BASE] = _table_grad(dgate, gate, gate_base)
    if ctx.want_modulation:
        grads[_SCALE], grads[_SCALE_BASE] = _table_grad(dscale, scale, scale_base)
        grads[_SHIFT], grads[_SHIFT_BASE] = _table_grad(dshift, shift, shift_base)
    if ctx.want_affine:
        grads[_WEIGHT], grads[_BIAS] = dweight.to(weight.dtype), dbias.to(bias.dtype)
    return *grads, None


residual_norm.register_autograd(_residual_norm_backward, setup_context=_residual_norm_setup)


@custom_op("pusa_fast::gated_residual", mutates_args=())
def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None, gate_base: Tensor | None) -> Tensor:
    """x + (gate[f] + gate_base) * y."""
    with launchers(x, y) as run:
        out: Tensor = run.gated_residual_forward(x, y, gate, gate_base)
    return out


@gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor | None, gate_base: Tensor | None) -> Tensor:
    return _contiguous_like(x)


@custom_op("pusa_fast::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    dr: Tensor, y: Tensor | None, gate: Tensor | None, gate_base: Tensor | None, want_gate: bool
) -> tuple[Tensor, Tensor]:
    """(dy, dgate as rows [B, F, D]), empty where unwanted; without a gate dy is dr."""
    with launchers(dr, y) as run:
        results = run.gated_residual_backward(dr, y, gate, gate_base, want_gate)
    dy, dgate = _or_empty(results, dr)
    return dy, dgate


@gated_residual_backward.register_fake
def _(
    dr: Tensor, y: Tensor | None, gate: Tensor | None, gate_base: Tensor | None, want_gate: bool
) -> tuple[Tensor, Tensor]:
    gated = gate is not None or gate_base is not None
    dy = _contiguous_like(dr, y.dtype if y is not None else None) if gated else dr.new_empty(0)
    rows = (dr.shape[0], _frames(gate), dr.shape[2])
    return dy, dr.new_empty(rows, dtype=_accumulator(dr)) if want_gate else dr.new_empty(0)


def _gated_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate, gate_base = inputs
    ctx.want_gate = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.y_dtype, ctx.gated = y.dtype, gate is not None or gate_base is not None
    ctx.save_for_backward(y if ctx.want_gate else None, gate, gate_base)


def _gated_residual_backward(ctx: Any, dr: Tensor) -> tuple[Tensor | None, ...]:
    y, gate, gate_base = ctx.saved_tensors
    if not ctx.gated:
        return dr, dr.to(ctx.y_dtype), None, None
    dy, dgate = gated_residual_backward(dr, y, gate, gate_base, ctx.want_gate)
    tables = _table_grad(dgate, gate, gate_base) if ctx.want_gate else (None, None)
    return dr, dy.to(ctx.y_dtype), *tables


gated_residual.register_autograd(_gated_residual_backward, setup_context=_gated_residual_setup)


@custom_op("pusa_fast::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(n, rstd [...])."""
    with launchers(x) as run:
        n, rstd = run.rms_norm_forward(x, weight, eps)
    return n, rstd


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _contiguous_like(x), x.new_empty(x.shape[:-1], dtype=_accumulator(x))


@custom_op("pusa_fast::rms_norm_backward", mutates_args=())
def rms_norm_backward(dn: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, want_weight: bool) -> tuple[Tensor, Tensor]:
    """(dx, dweight), the latter empty where unwanted."""
    with launchers(x, dn) as run:
        dx, dweight = _or_empty(run.rms_norm_backward(dn, x, weight, rstd, want_weight), x)
    return dx, dweight


@rms_norm_backward.register_fake
def _(dn: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, want_weight: bool) -> tuple[Tensor, Tensor]:
    return _contiguous_like(x), x.new_empty(weight.shape, dtype=_accumulator(x)) if want_weight else x.new_empty(0)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_backward(ctx: Any, dn: Tensor, _rstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    want_weight = ctx.needs_input_grad[1]
    dx, dweight = rms_norm_backward(dn, x, weight, rstd, want_weight)
    return dx, dweight.to(weight.dtype) if want_weight else None, None


rms_norm.register_autograd(_rms_norm_backward, setup_context=_rms_norm_setup)


@custom_op("pusa_fast::qk_rope", mutates_args=())
def qk_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, rstd_q, rstd_k) from the q and k views [B, L, H, K] of a packed projection; statistics [B, L]."""
    with launchers(q) as run:
        q_out, k_out, rstd_q, rstd_k = run.qk_rope_forward(q, k, weight_q, weight_k, cos, sin, tuple(grid), eps, False)
    return q_out, k_out, rstd_q, rstd_k


@qk_rope.register_fake
def _(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = [q.new_empty(q.shape[:2], dtype=_accumulator(q)) for _ in range(2)]
    return _contiguous_like(q), _contiguous_like(k), stats[0], stats[1]


@custom_op("pusa_fast::qk_rope_", mutates_args=("q", "k"))
def qk_rope_(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: list[int],
    eps: float,
) -> None:
    """`qk_rope` that writes into q and k: the inference twin, without a derivative."""
    with launchers(q) as run:
        run.qk_rope_forward(q, k, weight_q, weight_k, cos, sin, tuple(grid), eps, True)


@qk_rope_.register_fake
def _(q: Tensor, k: Tensor, *args: Any) -> None:
    return None


@custom_op("pusa_fast::qk_rope_backward", mutates_args=())
def qk_rope_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: list[int],
    rstd_q: Tensor,
    rstd_k: Tensor,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dweight_q, dweight_k) with respect to the inputs of `qk_rope`; the last two empty where unwanted."""
    with launchers(q, dq, dk) as run:
        results = run.qk_rope_backward(
            dq, dk, q, k, weight_q, weight_k, cos, sin, tuple(grid), rstd_q, rstd_k, want_weights
        )
    dq_in, dk_in, dweight_q, dweight_k = _or_empty(results, q)
    return dq_in, dk_in, dweight_q, dweight_k


@qk_rope_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: list[int],
    rstd_q: Tensor,
    rstd_k: Tensor,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = [
        q.new_empty(w.shape, dtype=_accumulator(q)) if want_weights else q.new_empty(0) for w in (weight_q, weight_k)
    ]
    return _contiguous_like(q), _contiguous_like(k), weights[0], weights[1]


def _qk_rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, weight_q, weight_k, cos, sin, ctx.grid, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(q, k, weight_q, weight_k, cos, sin, *output[2:])


def _qk_rope_backward(ctx: Any, dq: Tensor, dk: Tensor, *_stats: Tensor) -> tuple[Tensor | None, ...]:
    q, k, weight_q, weight_k, cos, sin, rstd_q, rstd_k = ctx.saved_tensors
    want_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dq_in, dk_in, dweight_q, dweight_k = qk_rope_backward(
        dq, dk, q, k, weight_q, weight_k, cos, sin, ctx.grid, rstd_q, rstd_k, want_weights
    )
    weights = (dweight_q.to(weight_q.dtype), dweight_k.to(weight_k.dtype)) if want_weights else (None, None)
    return dq_in, dk_in, *weights, None, None, None, None


qk_rope.register_autograd(_qk_rope_backward, setup_context=_qk_rope_setup)


@custom_op("pusa_fast::guided_euler_step", mutates_args=())
def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """Inference only: no derivative."""
    with launchers(x, v, v_neg) as run:
        out: Tensor = run.guided_euler_step(x, v, v_neg, guidance, dsigma)
    return out


@guided_euler_step.register_fake
def _(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    return _contiguous_like(x)


@custom_op("pusa_fast::gelu_", mutates_args=("x",))
def gelu_(x: Tensor) -> None:
    """Tanh GELU in place; native code only (CUDA has it in the product's epilogue)."""
    with launchers(x) as run:
        run.gelu_(x)


@gelu_.register_fake
def _(x: Tensor) -> None:
    return None


@custom_op("pusa_fast::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """Tanh GELU with a derivative; native code only."""
    with launchers(x) as run:
        out: Tensor = run.gelu_forward(x)
    return out


@gelu.register_fake
def _(x: Tensor) -> Tensor:
    return _contiguous_like(x)


@custom_op("pusa_fast::gelu_backward", mutates_args=())
def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient by x."""
    with launchers(x, dy) as run:
        dx: Tensor = run.gelu_backward(dy, x)
    return dx


@gelu_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return _contiguous_like(x)


gelu.register_autograd(
    lambda ctx, dy: gelu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@custom_op("pusa_fast::linear_rows", mutates_args=())
def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, I] W^T + b in float32, each row by itself; native code only. Inference only."""
    with launchers(x) as run:
        out: Tensor = run.linear_rows(x, weight, bias)
    return out


@linear_rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
