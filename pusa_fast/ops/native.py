"""The ops in C++ for the CPU: makes the outputs, hands tensors over as DLPack capsules. See csrc/row_ops.hpp.

The same launchers as `pusa_fast.kernels.suite`, and `gelu_` and `linear_rows`. Streams (x, y and their gradients) are
float32 or bf16, in any mixture of x and y; tables too, and those of other float dtypes are converted to float32.
PUSA_NATIVE_ISA = base, avx2 or avx512 chooses the instruction set, by default the widest; a name that cannot be used here
is a ValueError at the first op. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_IMPORT_ERROR: str | None = None
try:
    import pusa_fast._native as _native
except ImportError as error:
    _IMPORT_ERROR = str(error)

_FUNCTIONS = (
    *("residual_norm_forward", "residual_norm_backward", "gated_residual_forward", "gated_residual_backward"),
    *("rms_norm_forward", "rms_norm_backward", "qk_rope_forward", "qk_rope_backward", "guided_euler_step", "gelu"),
    *("gelu_backward", "linear_rows", "vae_act"),
)
_DTYPES = (torch.float32, torch.bfloat16)
# A tenth of the time of Tensor.__dlpack__, and takes parameters as they are.
_capsule: Callable[[Tensor], object] = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]
_threads: Callable[[], int] = torch.get_num_threads


def available() -> str | None:
    """Why the compiled code cannot be used, or None where it can."""
    if _IMPORT_ERROR is not None:
        return f"{_IMPORT_ERROR}; to build it: pip install -e ."
    missing = [name for name in _FUNCTIONS if not hasattr(_native, name)]
    if missing:
        return (
            f"the compiled part lacks {', '.join(missing)}: it is older than this source, or its compiler was neither GCC "
            "nor Clang; to build it again: pip install -e ."
        )
    return None


def supports(*streams: Tensor | None) -> bool:
    """Whether these tensors of an op (x, y, v, gradients: not its tables) are all float32 or bf16 and on the CPU."""
    return all(x is None or (x.is_cpu and x.dtype in _DTYPES) for x in streams)


def _optional(x: Tensor | None) -> object | None:
    return None if x is None else _capsule(x)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _room(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _unit(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x with a last stride of 1, in `dtype` if given."""
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    if not x.numel():  # whose strides `contiguous` would keep
        return x.new_empty(x.shape)
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(x: Tensor | None) -> object | None:
    """A tensor of any float dtype, as float32 or bf16."""
    if x is None:
        return None
    return _capsule(_unit(x, None if x.dtype in _DTYPES else torch.float32))


def _float32(x: Tensor) -> object:
    return _capsule(x.to(torch.float32).contiguous())


def _frames(table: Tensor | None) -> int:
    return 1 if table is None else table.shape[1]


def residual_norm_forward(
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
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(r, n, mean, rstd): r = x + gate * y, n its LayerNorm, modulated or affine; r None where y is."""
    r = None if y is None else _like(x)
    n, mean = _like(x), _room(x, x.shape[0], x.shape[1])
    rstd = torch.empty_like(mean)
    _native.residual_norm_forward(
        _capsule(_unit(x)),
        None if y is None else _capsule(_unit(y)),
        _table(gate),
        _table(gate_base),
        _table(scale),
        _table(scale_base),
        _table(shift),
        _table(shift_base),
        _table(weight),
        _table(bias),
        _optional(r),
        _capsule(n),
        _capsule(mean),
        _capsule(rstd),
        eps,
        _threads(),
    )
    return r, n, mean, rstd


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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dy, dgate, dscale, dshift, dweight, dbias), None where unwanted; without a gate dy is dx."""
    B, _, D = r.shape
    y = y if want_gate else None
    dx = _like(r)
    dy = None if gate is None and gate_base is None else _like(r, r.dtype if y is None else y.dtype)
    dgate = _room(r, B, _frames(gate), D) if want_gate else None
    dscale, dshift = (_room(r, B, _frames(scale), D) if want_modulation else None for _ in range(2))
    dweight, dbias = (_room(r, D) if want_affine else None for _ in range(2))
    _native.residual_norm_backward(
        None if dr is None else _capsule(_unit(dr, r.dtype)),
        _capsule(_unit(dn, r.dtype)),
        _capsule(_unit(r)),
        None if y is None else _capsule(_unit(y)),
        _table(gate),
        _table(gate_base),
        _table(scale),
        _table(scale_base),
        _table(weight),
        _float32(mean),
        _float32(rstd),
        _capsule(dx),
        _optional(dy),
        _optional(dgate),
        _optional(dscale),
        _optional(dshift),
        _optional(dweight),
        _optional(dbias),
        _threads(),
    )
    return dx, dy, dgate, dscale, dshift, dweight, dbias


def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor | None, gate_base: Tensor | None) -> Tensor:
    """x + gate * y, or x + y."""
    r = _like(x)
    _native.gated_residual_forward(
        _capsule(_unit(x)), _capsule(_unit(y)), _table(gate), _table(gate_base), _capsule(r), _threads()
    )
    return r


def gated_residual_backward(
    dr: Tensor, y: Tensor | None, gate: Tensor | None, gate_base: Tensor | None, want_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dy, dgate); both None without a gate: then dy is dr."""
    if gate is None and gate_base is None:
        return None, None
    y = y if want_gate else None
    dy = _like(dr, dr.dtype if y is None else y.dtype)
    dgate = _room(dr, dr.shape[0], _frames(gate), dr.shape[2]) if want_gate else None
    _native.gated_residual_backward(
        _capsule(_unit(dr)),
        None if y is None else _capsule(_unit(y)),
        _table(gate),
        _table(gate_base),
        _capsule(dy),
        _optional(dgate),
        _threads(),
    )
    return dy, dgate


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [B, L, D], a view where strides allow it."""
    return x if x.ndim == 3 else x.reshape(1, x.shape[:-1].numel(), x.shape[-1])


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(n, rstd [...]) of x [..., D]."""
    rows = _rows(x)
    n, rstd = _like(rows), _room(x, rows.shape[0], rows.shape[1])
    _native.rms_norm_forward(_capsule(_unit(rows)), _table(weight), _capsule(n), _capsule(rstd), eps, _threads())
    return (n, rstd) if x.ndim == 3 else (n.view(x.shape), rstd.view(x.shape[:-1]))


def rms_norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight), the latter None where unwanted."""
    rows = _rows(x)
    dx, dweight = _like(rows), _room(x, x.shape[-1]) if want_weight else None
    _native.rms_norm_backward(
        _capsule(_unit(_rows(dn), x.dtype)),
        _capsule(_unit(rows)),
        _table(weight),
        _float32(rstd.reshape(rows.shape[:2])),
        _capsule(dx),
        _optional(dweight),
        _threads(),
    )
    return dx.view(x.shape), dweight


def _heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L, H, K] whose tokens are rows of width H*K, a copy where they are not."""
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
    grid: tuple[int, int, int],
    eps: float,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, rstd_q, rstd_k) from q and k [B, L, H, K]; in place, q and k are the tensors that came."""
    q_rows, k_rows = _heads(q, q.dtype), _heads(k, q.dtype)
    q_out, k_out = (q_rows, k_rows) if inplace else (_like(q), _like(q))
    rstd_q = _room(q, q.shape[0], q.shape[1])
    rstd_k = torch.empty_like(rstd_q)
    _native.qk_rope_forward(
        _capsule(q_rows),
        _capsule(k_rows),
        _table(weight_q),
        _table(weight_k),
        _float32(cos),
        _float32(sin),
        _capsule(q_out),
        _capsule(k_out),
        _capsule(rstd_q),
        _capsule(rstd_k),
        *grid,
        eps,
        _threads(),
    )
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
    grid: tuple[int, int, int],
    rstd_q: Tensor,
    rstd_k: Tensor,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dweight_q, dweight_k) with respect to what `qk_rope_forward` took, the last two None where unwanted."""
    dq_in, dk_in = _like(q), _like(q)
    width = q.shape[2] * q.shape[3]
    dweight_q, dweight_k = (_room(q, width) if want_weights else None for _ in range(2))
    _native.qk_rope_backward(
        _capsule(_heads(dq, q.dtype)),
        _capsule(_heads(dk, q.dtype)),
        _capsule(_heads(q, q.dtype)),
        _capsule(_heads(k, q.dtype)),
        _table(weight_q),
        _table(weight_k),
        _float32(cos),
        _float32(sin),
        _float32(rstd_q),
        _float32(rstd_k),
        _capsule(dq_in),
        _capsule(dk_in),
        _optional(dweight_q),
        _optional(dweight_k),
        *grid,
        _threads(),
    )
    return dq_in, dk_in, dweight_q, dweight_k


def guided_euler_step(x: Tensor, v: Tensor, v_neg: Tensor | None, guidance: float, dsigma: Tensor) -> Tensor:
    """x[f] += (v_neg + guidance * (v - v_neg))[f] * dsigma[f]; frames whose dsigma is 0 keep their bits."""
    out = _like(x)
    if v_neg is not None and v_neg.dtype != v.dtype:
        v, v_neg = v.float(), v_neg.float()
    _native.guided_euler_step(
        _capsule(x.contiguous()),
        _capsule(v.contiguous()),
        None if v_neg is None else _capsule(v_neg.contiguous()),
        _float32(dsigma),
        _capsule(out),
        guidance,
        _threads(),
    )
    return out


def gelu_(x: Tensor) -> Tensor:
    """Tanh GELU in place, of any shape and strides. Returns x."""
    rows = x.contiguous()
    _native.gelu(_capsule(rows), _capsule(rows), _threads())
    if rows is not x:
        x.detach().copy_(rows)
    return x


def gelu_forward(x: Tensor) -> Tensor:
    """Tanh GELU, contiguous."""
    out = _like(x)
    _native.gelu(_capsule(x.contiguous()), _capsule(out), _threads())
    return out


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient by `gelu_forward`'s x, contiguous."""
    dx = _like(x)
    _native.gelu_backward(_capsule(dy.contiguous()), _capsule(x.contiguous()), _capsule(dx), _threads())
    return dx


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, I] W^T + b in float32, each row by itself; weight and bias float32 or bf16, read as they are."""
    out = _room(x, x.shape[0], weight.shape[0])
    _native.linear_rows(_float32(x), _table(weight), _table(bias), _capsule(out), _threads())
    return out


def _flat(x: Tensor | None) -> object | None:
    """A contiguous tensor of any shape and float dtype, as float32 or bf16."""
    if x is None:
        return None
    return _capsule((x if x.dtype in _DTYPES else x.to(torch.float32)).contiguous())


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
    """r = y + bias + x and out = act(norm(r) * gamma), written where they are given; views with a last stride of 1."""
    _native.vae_act(
        _capsule(y),
        _flat(gamma),
        _optional(x),
        _flat(bias),
        _optional(r),
        _optional(out),
        silu,
        upsampled,
        _threads(),
    )
