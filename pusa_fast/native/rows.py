"""The row kernels in C++ for the CPU: makes the outputs and calls pusa_fast._native. See
csrc/row_ops.hpp.

The same launchers as `pusa_fast.kernels.suite`, and GELU and `linear_rows`. Streams (x, y and their
gradients) are float32 or bf16, in any mixture of x and y. So are tables; those of other float
dtypes are converted to float32. PUSA_NATIVE_ISA = base, avx2 or avx512 chooses the instruction set,
by default the widest; a name that cannot be used here is a ValueError at the first op. Results do
not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pusa_fast.native import call, missing

_FUNCTIONS = (
    *("residual_norm_forward", "residual_norm_backward", "gated_residual_forward", "gated_residual_backward"),
    *("rms_norm_forward", "rms_norm_backward", "qk_rope_forward", "qk_rope_backward", "guided_euler_step", "gelu"),
    *("gelu_backward", "linear_rows", "vae_act"),
)
_DTYPES = (torch.float32, torch.bfloat16)


def available() -> str | None:
    """Why the row kernels cannot be used, or None if they can."""
    return missing(*_FUNCTIONS)


def supports(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these tensors of an op (x, y, v, gradients: not its tables) are all float32 or bf16
    and on the CPU."""
    taken = x.is_cpu and x.dtype in _DTYPES
    for t in others:
        taken = taken and (t is None or (t.is_cpu and t.dtype in _DTYPES))
    return taken


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _room(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _unit(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """x with a last stride of 1, in `dtype` if given."""
    if x is None:
        return None
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    if x.stride(-1) == 1 and x.numel():
        return x
    return x.contiguous() if x.numel() else x.new_empty(x.shape)  # `contiguous` keeps the strides of nothing


def _table(x: Tensor | None) -> Tensor | None:
    """A tensor of any float dtype, as float32 or bf16 with a last stride of 1."""
    return _unit(x, None if x is None or x.dtype in _DTYPES else torch.float32)


def _float32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def residual_norm_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tokens_per_frame: int,
    first_token: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(r, n, mean, rstd): r = x + gate[f] * y, n its LayerNorm, modulated or affine; r is None if y
    is."""
    r = None if y is None else _like(x)
    n, mean = _like(x), _room(x, x.shape[0], x.shape[1])
    rstd = torch.empty_like(mean)
    tables = (_table(t) for t in (gate, scale, shift, weight, bias))
    results = r, n, mean, rstd
    call("residual_norm_forward", (_unit(x), _unit(y), *tables, *results), eps, tokens_per_frame, first_token)
    return results


def residual_norm_backward(
    dr: Tensor | None,
    dn: Tensor,
    r: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_gate: bool,
    want_modulation: bool,
    want_affine: bool,
    tokens_per_frame: int,
    first_token: int,
) -> tuple[Tensor | None, ...]:
    """(dx, dy, dgate, dscale, dshift, dweight, dbias), None where unwanted; without a gate dy is
    dx."""
    B, _, D = r.shape
    y = y if want_gate else None
    dx = _like(r)
    dy = None if gate is None else _like(r, r.dtype if y is None else y.dtype)
    dgate = _room(r, B, gate.shape[1], D) if want_gate and gate is not None else None
    dscale, dshift = (
        _room(r, B, scale.shape[1], D) if want_modulation and scale is not None else None for _ in range(2)
    )
    dweight, dbias = (_room(r, D) if want_affine else None for _ in range(2))
    results = dx, dy, dgate, dscale, dshift, dweight, dbias
    streams = _unit(dr, r.dtype), _unit(dn, r.dtype), _unit(r), _unit(y)
    rows = _table(gate), _table(scale), _table(weight), _float32(mean), _float32(rstd)
    call("residual_norm_backward", (*streams, *rows, *results), tokens_per_frame, first_token)
    return results


def gated_residual_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, tokens_per_frame: int, first_token: int
) -> Tensor:
    """x + gate[f] * y, or x + y."""
    r = _like(x)
    call("gated_residual_forward", (_unit(x), _unit(y), _table(gate), r), tokens_per_frame, first_token)
    return r


def gated_residual_backward(
    dr: Tensor, y: Tensor | None, gate: Tensor | None, want_gate: bool, tokens_per_frame: int, first_token: int
) -> tuple[Tensor | None, Tensor | None]:
    """(dy, dgate); both None without a gate: then dy is dr."""
    if gate is None:
        return None, None
    y = y if want_gate else None
    dy = _like(dr, dr.dtype if y is None else y.dtype)
    dgate = _room(dr, dr.shape[0], gate.shape[1], dr.shape[2]) if want_gate else None
    call("gated_residual_backward", (_unit(dr), _unit(y), _table(gate), dy, dgate), tokens_per_frame, first_token)
    return dy, dgate


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [B, L, D], a view if strides allow it."""
    return x if x.ndim == 3 else x.reshape(1, x.shape[:-1].numel(), x.shape[-1])


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(n, rstd [...]) of x [..., D]."""
    rows = _rows(x)
    n, rstd = _like(rows), _room(x, rows.shape[0], rows.shape[1])
    call("rms_norm_forward", (_unit(rows), _table(weight), n, rstd), eps)
    return (n, rstd) if x.ndim == 3 else (n.view(x.shape), rstd.view(x.shape[:-1]))


def rms_norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight), the latter None if unwanted."""
    rows = _rows(x)
    dx, dweight = _like(rows), _room(x, x.shape[-1]) if want_weight else None
    factors = _table(weight), _float32(rstd.reshape(rows.shape[:2]))
    call("rms_norm_backward", (_unit(_rows(dn), x.dtype), _unit(rows), *factors, dx, dweight))
    return dx.view(x.shape), dweight


def _heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L, H, K] whose tokens are rows of width H*K, a copy if they are not."""
    if not x.numel():
        return x.new_empty(x.shape, dtype=dtype)
    if x.dtype == dtype and x.stride(3) == 1 and (x.stride(2) == x.shape[3] or x.shape[2] == 1):
        return x
    return x.to(dtype).contiguous()


def qk_rope_forward(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: Sequence[int],
    first_token: int,
    eps: float,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, rstd_q, rstd_k) from q and k [B, L, H, K], tokens first_token .. of a clip's grid (F,
    h, w).

    In place, q and k are the tensors that came.
    """
    q_rows, k_rows = _heads(q, q.dtype), _heads(k, q.dtype)
    q_out, k_out = (q_rows, k_rows) if inplace else (_like(q), _like(q))
    rstd_q = _room(q, q.shape[0], q.shape[1])
    rstd_k = torch.empty_like(rstd_q)
    tables = _table(weight_q), _table(weight_k), _float32(cos), _float32(sin)
    call("qk_rope_forward", (q_rows, k_rows, *tables, q_out, k_out, rstd_q, rstd_k), *grid, first_token, eps)
    if not inplace:
        return q_out, k_out, rstd_q, rstd_k
    for given, result in ((q, q_out), (k, k_out)):
        if result is not given:
            given.detach().copy_(result)
    return q, k, rstd_q, rstd_k


def qk_rope_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: Sequence[int],
    first_token: int,
    rstd_q: Tensor,
    rstd_k: Tensor,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dweight_q, dweight_k) of `qk_rope_forward`'s, the last two None if unwanted."""
    width = q.shape[2] * q.shape[3]
    dweight_q, dweight_k = (_room(q, width) if want_weights else None for _ in range(2))
    results = _like(q), _like(q), dweight_q, dweight_k
    streams = (_heads(t, q.dtype) for t in (dq, dk, q, k))
    tables = _table(weight_q), _table(weight_k), *(_float32(t) for t in (cos, sin, rstd_q, rstd_k))
    call("qk_rope_backward", (*streams, *tables, *results), *grid, first_token)
    return results


def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """x[f] += (v_neg + guidance * (v - v_neg))[f] * dsigma[f]; frames whose dsigma is 0 keep their
    bits."""
    out = _like(x)
    if v_neg is not None and v_neg.dtype != v.dtype:
        v, v_neg = v.float(), v_neg.float()
    negative = None if v_neg is None else v_neg.contiguous()
    call("guided_euler_step", (x.contiguous(), v.contiguous(), negative, _float32(dsigma), out), guidance)
    return out


def gelu_(x: Tensor) -> Tensor:
    """Tanh GELU in place, of any shape and strides. Returns x."""
    rows = x.contiguous()
    call("gelu", (rows, rows))
    if rows is not x:
        x.detach().copy_(rows)
    return x


def gelu_forward(x: Tensor) -> Tensor:
    """Tanh GELU, contiguous."""
    out = _like(x)
    call("gelu", (x.contiguous(), out))
    return out


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient by `gelu_forward`'s x, contiguous."""
    dx = _like(x)
    call("gelu_backward", (dy.contiguous(), x.contiguous(), dx))
    return dx


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, I] W^T + b in float32, each row by itself; weight and bias float32 or bf16, read as
    they are."""
    out = _room(x, x.shape[0], weight.shape[0])
    call("linear_rows", (_float32(x), _table(weight), _table(bias), out))
    return out


def _flat(x: Tensor | None) -> Tensor | None:
    """A contiguous tensor of any shape and float dtype, as float32 or bf16."""
    return None if x is None else (x if x.dtype in _DTYPES else x.to(torch.float32)).contiguous()


def vae_act_(
    y: Tensor,
    gamma: Tensor | None,
    x: Tensor | None,
    bias: Tensor | None,
    r: Tensor | None,
    out: Tensor | None,
    silu: bool,
    upsampled: bool,
) -> None:
    """r = y + bias + x and out = act(norm(r) * gamma), into those given; views with a last stride
    of 1."""
    call("vae_act", (y, _flat(gamma), x, _flat(bias), r, out), silu, upsampled)
