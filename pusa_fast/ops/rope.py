"""RMSNorm of q and k and their rotary embedding, on a packed QKV projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.ops.checks import check_tensors, require, shape
from pusa_fast.ops.registry import Grads, Op, accumulator, choose, contiguous_like, recording


def qk_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: tuple[int, int, int],
    eps: float = 1e-6,
    inplace: bool = False,
    *,
    first_token: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of q and of k over all heads, then 3-D rotary embedding of adjacent pairs. Returns
    (q, k, v).

    qkv [B, L, 3, H, K], K even; weight_q, weight_k [H*K]; cos, sin [P, K/2], P >= max(grid),
    columns in axis order as `rope_split(K)` says; grid (F, h, w) of the whole clip, of which qkv
    holds the L tokens from first_token on. q, k, v are [B, L, H, K] in qkv's dtype; v is a view of
    qkv. With `inplace`, inference only, q and k are too. Raises ValueError.
    """
    op = "qk_rope"
    require(qkv.ndim == 5 and qkv.shape[2] == 3, op, "qkv must be [B, L, 3, H, K]", qkv)
    check_tensors(op, qkv, weight_q=weight_q, weight_k=weight_k, cos=cos, sin=sin)
    _, L, _, H, K = qkv.shape
    if K % 2:
        raise ValueError(f"{op}: the head dimension must be even, got {K}")
    if first_token < 0 or first_token + L > grid[0] * grid[1] * grid[2]:
        raise ValueError(f"{op}: grid {tuple(grid)} does not hold {L} tokens from first_token {first_token} on")
    for name, row in (("weight_q", weight_q), ("weight_k", weight_k)):
        if row.shape != (H * K,):
            raise ValueError(f"{op}: {name} must be [H*K={H * K}], got {shape(row)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 2 or table.shape[0] < max(grid) or table.shape[1] != K // 2:
            raise ValueError(f"{op}: {name} must be [P >= {max(grid)}, K/2={K // 2}], got {shape(table)}")
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: sin must have cos's shape {shape(cos)}, got {shape(sin)}")
    if inplace and any(size > 1 and stride == 0 for size, stride in zip(qkv.shape, qkv.stride(), strict=True)):
        raise ValueError(
            f"{op}: inplace cannot write to expanded memory, where several elements are one: copy qkv first"
        )
    if inplace and recording(qkv, weight_q, weight_k):
        raise ValueError(f"{op}: inplace has no derivative: leave it out, or run under torch.no_grad()")
    backend = choose(qkv)
    if backend == "reference":
        return reference.qk_rope(qkv, weight_q, weight_k, cos, sin, grid, eps, inplace, first_token=first_token)
    q, k, v = qkv.unbind(2)
    if inplace:
        _qk_rope_(backend, q, k, weight_q, weight_k, cos, sin, list(grid), first_token, eps)
    else:
        q, k, _, _ = _qk_rope(backend, q, k, weight_q, weight_k, cos, sin, list(grid), first_token, eps)
    return q, k, v


# (q, k, rstd_q, rstd_k) from the q and k views [B, L, H, K] of a packed projection; statistics [B,
# L].
_qk_rope = Op(
    "qk_rope(Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor cos, Tensor sin, SymInt[] grid, "
    "SymInt first_token, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    "qk_rope_forward",
    extra=(False,),
)


@_qk_rope.fake
def _(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, ...]:
    stats = (q.new_empty(q.shape[:2], dtype=accumulator(q)) for _ in range(2))
    return contiguous_like(q), contiguous_like(k), *stats


# The same into q and k.
_qk_rope_ = Op(
    "qk_rope_(Tensor(a!) q, Tensor(b!) k, Tensor weight_q, Tensor weight_k, Tensor cos, Tensor sin, SymInt[] grid, "
    "SymInt first_token, float eps) -> ()",
    "qk_rope_forward",
    extra=(True,),
)

# (dq, dk, dweight_q, dweight_k) by the inputs of `qk_rope`, the last two empty if unwanted.
_qk_rope_backward = Op(
    "qk_rope_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor cos, "
    "Tensor sin, SymInt[] grid, SymInt first_token, Tensor rstd_q, Tensor rstd_k, bool want_weights) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "qk_rope_backward",
)


@_qk_rope_backward.fake
def _(dq: Any, dk: Any, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, *args: Any) -> tuple[Tensor, ...]:
    shapes = (weight_q.shape, weight_k.shape) if args[-1] else ()
    sums = [q.new_empty(size, dtype=accumulator(q)) for size in shapes] or [q.new_empty(0), q.new_empty(0)]
    return contiguous_like(q), contiguous_like(k), *sums


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.grid, ctx.first_token, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, dq: Tensor, dk: Tensor, *_stats: Tensor) -> Grads:
    *tensors, rstd_q, rstd_k = ctx.saved_tensors
    want_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    where = ctx.grid, ctx.first_token
    dq_in, dk_in, *sums = _qk_rope_backward.operator(dq, dk, *tensors, *where, rstd_q, rstd_k, want_weights)
    weights = (s.to(w.dtype) if want_weights else None for s, w in zip(sums, tensors[2:4], strict=True))
    return dq_in, dk_in, *weights, *[None] * 5


_qk_rope.derivative(_setup, _backward)
