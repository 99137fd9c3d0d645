"""residual_norm and gated_residual, Triton and native, against formulas in float64.

Forward, backward and as e4m3 rows.
"""

from __future__ import annotations

import itertools
import math
import mmap
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast.testing import assert_within_budget, error_budget, make_input

EPS = 1e-6
TABLES = ("gate", "scale", "shift")
NAMES = ("x", "y", *TABLES, "weight", "bias")
GATES = {"no y": (), "ungated": ("y",), "gated": ("y", "gate")}
NORMS = {"bare": (), "modulated": ("scale", "shift"), "affine": ("weight", "bias")}
FULL = ("x", *GATES["gated"], *NORMS["modulated"])
AFFINE = ("x", *GATES["gated"], *NORMS["affine"])
SHAPES = [(1, 1, 1, 2), (2, 3, 1, 17), (1, 2, 5, 65), (2, 1, 3, 160), (1, 3, 5, 17)]  # B, F, tokens per frame, D
# Native code takes float32 and bf16.
TYPED = [("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16)]
TYPED += [("native", torch.float32), ("native", torch.bfloat16)]
typed = pytest.mark.parametrize(("kernels", "dtype"), TYPED, ids=str, indirect=["kernels"])
triton_only = pytest.mark.parametrize("kernels", ["triton"], indirect=True)
Inputs = dict[str, Tensor]


def make_inputs(
    names: tuple[str, ...],
    shape: tuple[int, int, int, int],
    device: str,
    dtype: torch.dtype = torch.float32,
    padded: bool = True,
    **other: torch.dtype,
) -> Inputs:
    """One tensor for each name, of `dtype` but for those in `other`, with NaN between the rows."""
    B, F, tokens, D = shape
    sizes = dict.fromkeys(TABLES, (B, F, D)) | {"x": (B, F * tokens, D), "y": (B, F * tokens, D)}
    return {
        name: make_input(
            *sizes.get(name, (D,)),
            seed=seed,
            dtype=other.get(name, dtype),
            device=device,
            padded=padded and name in sizes,
        )
        for seed, name in enumerate(NAMES)
        if name in names
    }


def arguments(given: Inputs) -> tuple[Tensor | None, ...]:
    return tuple(given.get(name) for name in NAMES)


def place(given: Inputs) -> tuple[int, int]:
    """(tokens_per_frame, first_token) of a whole sequence."""
    frames = next((given[name].shape[1] for name in TABLES if name in given), 1)
    return max(1, given["x"].shape[1] // frames), 0


def forward(kernels: ModuleType, given: Inputs, eps: float = EPS) -> tuple[Any, ...]:
    results: tuple[Any, ...] = kernels.residual_norm_forward(*arguments(given), eps, *place(given))
    return results


def to_tokens(table: Tensor | None, L: int) -> Tensor | None:
    """The row of each token, [B, L, D]."""
    return None if table is None else table[:, [n // (L // table.shape[1]) for n in range(L)]]


def formula(given: Inputs) -> tuple[Tensor, Tensor]:
    """(r, n), token by token, one torch operation per step, each rounded to the inputs' dtype."""
    x, y, *tables, weight, bias = arguments(given)
    assert x is not None
    gate, scale, shift = (to_tokens(table, x.shape[1]) for table in tables)
    r = x
    if y is not None:
        r = x + (y if gate is None else gate * y)
    centred = r - r.mean(-1, keepdim=True)
    n = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPS)
    if scale is not None and shift is not None:
        n = n * (1 + scale) + shift
    if weight is not None and bias is not None:
        n = n * weight + bias
    return r, n


def cast(given: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.to(dtype) for name, t in given.items()}


def check_forward(kernels: ModuleType, given: Inputs) -> None:
    """Against float32 rounded once: the budget of bf16 has no room for a second rounding."""
    x = given["x"]
    r, n, mean, rstd = forward(kernels, given)
    assert (r is None) == ("y" not in given)
    lows, oracles = (formula(cast(given, dtype)) for dtype in (torch.float32, torch.float64))
    for result, low, oracle in zip((r, n), lows, oracles, strict=True):
        if result is not None:
            assert result.is_contiguous()
            assert_within_budget(result, low.to(x.dtype), oracle)
    stats = [(t.mean(-1), torch.rsqrt(t.var(-1, correction=0) + EPS)) for t in (lows[0], oracles[0])]
    for result, low, oracle in zip((mean, rstd), *stats, strict=True):
        assert_within_budget(result, low, oracle)


def gradients(given: Inputs, dr: Tensor | None, dn: Tensor | None) -> Inputs:
    """By autograd through the formula, from those of r and n whose gradient is not None."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    loss = [(t, d.to(t.dtype)) for t, d in zip(formula(leaves), (dr, dn), strict=True) if d is not None]
    torch.autograd.backward(*zip(*loss, strict=True))
    return {name: t.grad for name, t in leaves.items() if t.grad is not None}


def by_name(results: Any, given: Inputs) -> Inputs:
    """What residual_norm_backward returns, as gradients of the inputs."""
    dx, dy, dgate, dscale, dshift, dweight, dbias = results
    gated = "gate" in given
    assert (dy is None) == (not gated) and (dy is None or dy.dtype == given["y"].dtype)
    named = {"x": dx, "y": dy if gated else dx, "gate": dgate, "scale": dscale, "shift": dshift}
    named |= {"weight": dweight, "bias": dbias}
    return {name: named[name].to(t.dtype) for name, t in given.items() if named.get(name) is not None}


def backward(kernels: ModuleType, given: Inputs, dr: Tensor | None, dn: Tensor, *saved: Tensor) -> tuple[Any, ...]:
    """All gradients; `saved`: r, mean and rstd."""
    r, mean, rstd = saved
    tables = [given.get(name) for name in ("gate", "scale", "weight")]
    wanted = (name in given for name in ("gate", "scale", "weight"))
    results: tuple[Any, ...] = kernels.residual_norm_backward(
        dr, dn, r, given.get("y"), *tables, mean, rstd, *wanted, *place(given)
    )
    return results


def check_backward(kernels: ModuleType, given: Inputs, from_r: bool = True) -> None:
    x = given["x"]
    r, _, mean, rstd = forward(kernels, given)
    dr, dn = (make_input(*x.shape, seed=seed, dtype=x.dtype, device=x.device, padded=True) for seed in (20, 21))
    if r is None or not from_r:
        dr = None
    found = by_name(backward(kernels, given, dr, dn, x if r is None else r, mean, rstd), given)
    low, oracle = (gradients(cast(given, dtype), dr, dn) for dtype in (x.dtype, torch.float64))
    assert found.keys() == oracle.keys()
    for name, result in found.items():
        coarser = max(result.dtype, x.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_within_budget(result.to(coarser), low[name].to(coarser), oracle[name], f"d{name}")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", GATES)
def test_every_form_forward_and_backward(kernels: ModuleType, device: str, gate: str, norm: str) -> None:
    given = make_inputs(("x", *GATES[gate], *NORMS[norm]), (2, 3, 2, 17), device)
    check_forward(kernels, given)
    check_backward(kernels, given)


@typed
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(
    kernels: ModuleType, device: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    for names, padded in itertools.product((FULL, AFFINE), (False, True)):
        check_forward(kernels, make_inputs(names, shape, device, dtype, padded))
    check_backward(kernels, make_inputs(FULL, shape, device, dtype), from_r=False)
    check_backward(kernels, make_inputs(AFFINE, shape, device, dtype))


@triton_only
def test_float64_is_computed_in_float64(kernels: ModuleType, device: str) -> None:
    given = make_inputs(FULL, (2, 3, 2, 33), device, torch.float64)
    r, n, mean, rstd = forward(kernels, given)
    assert mean.dtype == rstd.dtype == torch.float64
    for result, expected in zip((r, n), formula(given), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_dtypes(kernels: ModuleType, device: str, x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    """The bf16 transformer has float32 tables; autocast adds bf16 matmuls to a float32 stream."""
    given = make_inputs(FULL, (2, 3, 2, 33), device, x=x_dtype, y=y_dtype)
    check_forward(kernels, given)
    check_backward(kernels, given)


@typed
def test_residual_is_the_exact_sum_rounded_once(kernels: ModuleType, device: str, dtype: torch.dtype) -> None:
    given = make_inputs(("x", "y"), (1, 2, 3, 65), device, dtype)
    r, _, _, _ = forward(kernels, given)
    assert torch.equal(r, (given["x"].double() + given["y"].double()).to(dtype))


def test_norm_reads_the_residual_before_it_is_rounded(kernels: ModuleType, device: str) -> None:
    x = torch.full((1, 4, 64), 256.0, dtype=torch.bfloat16, device=device)  # a spacing of 2
    y = make_input(1, 4, 64, dtype=torch.bfloat16, scale=0.1, device=device)
    r, n, _, _ = forward(kernels, {"x": x, "y": y})
    assert torch.equal(r, x)
    exact = formula({"x": x.double(), "y": y.double()})[1]
    assert_within_budget(n, exact.bfloat16(), exact)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_variance_is_of_centred_values(kernels: ModuleType, device: str, mean: float) -> None:
    """The difference of mean square and squared mean would have lost every digit."""
    x = make_input(1, 4, 160, device=device) * 0.1 + mean
    _, n, _, _ = forward(kernels, {"x": x})
    exact = formula({"x": x.double()})[1]
    assert_within_budget(n, torch.nn.functional.layer_norm(x, (160,), eps=EPS), exact)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps_is_added_to_the_variance(kernels: ModuleType, device: str, eps: float) -> None:
    x = make_input(1, 4, 33, device=device, scale=0.01)
    _, n, _, rstd = forward(kernels, {"x": x}, eps)
    low, exact = (torch.nn.functional.layer_norm(t, (33,), eps=eps) for t in (x, x.double()))
    assert_within_budget(n, low, exact)
    assert_within_budget(rstd, *((t.var(-1, correction=0) + eps).rsqrt() for t in (x, x.double())))


def test_views(kernels: ModuleType, device: str) -> None:
    """Any strides: packed tables, one for all sequences or frames, axes reversed, columns apart."""
    B, F, tokens, D = 2, 3, 2, 17
    plain = make_inputs(FULL, (B, F, tokens, D), device, padded=False)
    packed = torch.full((B, F, 6, D), math.nan, device=device)
    for i, name in enumerate(TABLES):
        packed[:, :, 2 * i] = plain[name]
    tables = {name: packed[:, :, 2 * i] for i, name in enumerate(TABLES)}
    columns_apart = {name: torch.stack((t, t * math.nan), -1)[..., 0] for name, t in plain.items()}
    swapped = {name: plain[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "y", *TABLES)}
    shared = {name: plain[name][:1].expand(B, F, D) for name in TABLES}
    one_row = {name: plain[name][:, :1].expand(B, F, D) for name in TABLES}
    for views in (tables, columns_apart, swapped, shared, one_row, {"y": plain["y"][:, :1].expand(B, F * tokens, D)}):
        check_forward(kernels, plain | views)
        check_backward(kernels, plain | views)


@triton_only
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_any_number_of_rows_a_program(
    kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """One as for wide rows on a GPU; four span two or three frames and pass a sequence's end."""
    monkeypatch.setattr("pusa_fast.kernels._launch._INTERPRETER_TILE", 32 * rows)
    given = make_inputs(FULL, (2, 3, 3, 20), device)
    check_forward(kernels, given)
    check_backward(kernels, given)
    given = make_inputs(AFFINE, (2, 3, 3, 20), device, torch.bfloat16)
    check_forward(kernels, given)
    check_backward(kernels, given)


@triton_only
def test_table_gradients_add_segments_steps_and_column_blocks(
    kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pusa_fast.kernels.table_grad._SEGMENT", 8)
    monkeypatch.setattr("pusa_fast.kernels.table_grad.interpreted", lambda: False)  # blocks as on a GPU: 4 tokens x 512
    for names in (FULL, AFFINE):
        check_backward(kernels, make_inputs(names, (1, 2, 13, 600), device))


def test_frozen_tables_want_nothing_and_y_may_be_dropped(kernels: ModuleType, device: str) -> None:
    given = make_inputs(FULL, (2, 3, 2, 17), device, torch.bfloat16, gate=torch.float32)
    r, _, mean, rstd = forward(kernels, given)
    dr, dn = (make_input(*r.shape, seed=seed, dtype=r.dtype, device=device) for seed in (20, 21))
    frozen = (given["gate"], given["scale"], None, mean, rstd, False, False, False, *place(given))
    dx, dy, *others = kernels.residual_norm_backward(dr, dn, r, None, *frozen)
    assert others == [None] * 5 and dy.dtype == r.dtype
    oracle = gradients(cast(given, torch.float64), dr, dn)
    low = gradients(cast(given, r.dtype), dr, dn)
    for name, result in (("x", dx), ("y", dy)):
        assert_within_budget(result, low[name], oracle[name], name)


@typed
@pytest.mark.parametrize("form", ["ungated", "gated"])
def test_gated_residual(kernels: ModuleType, device: str, dtype: torch.dtype, form: str) -> None:
    given = make_inputs(("x", *GATES[form]), (2, 3, 2, 65), device, dtype)
    x, y, gate = arguments(given)[:3]
    r = kernels.gated_residual_forward(x, y, gate, *place(given))
    assert_within_budget(r, formula(given)[0], formula(cast(given, torch.float64))[0])
    dr = make_input(*r.shape, seed=20, dtype=dtype, device=device, padded=True)
    dy, dgate = kernels.gated_residual_backward(dr, y, gate, form != "ungated", *place(given))
    if form == "ungated":
        assert dy is None and dgate is None
        return
    low, oracle = (gradients(cast(given, precision), dr, None) for precision in (dtype, torch.float64))
    for name, result in (("y", dy), ("gate", dgate)):
        assert_within_budget(result.to(dtype), low[name], oracle[name], name)
    dy, dgate = kernels.gated_residual_backward(dr, None, gate, False, *place(given))
    assert_within_budget(dy, low["y"], oracle["y"])
    assert dgate is None


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 1, 0, 8)], ids=["no sequence", "no token"])
def test_empty(kernels: ModuleType, device: str, shape: tuple[int, int, int, int]) -> None:
    B, F, tokens, D = shape
    for names in (FULL, AFFINE):
        given = make_inputs(names, shape, device)
        x, y, gate = arguments(given)[:3]
        r, n, mean, rstd = forward(kernels, given)
        assert r.shape == n.shape == (B, F * tokens, D) and mean.shape == rstd.shape == (B, F * tokens)
        results = backward(kernels, given, n, n, r, mean, rstd)
        assert results[0].shape == results[1].shape == r.shape
        for rows in results[2:]:
            assert rows is None or torch.equal(rows, torch.zeros_like(rows))
        assert kernels.gated_residual_forward(x, y, gate, *place(given)).shape == r.shape
        dy, dgate = kernels.gated_residual_backward(r, y, gate, True, *place(given))
        assert dy.shape == r.shape and dgate.shape == (B, F, D)


@pytest.fixture(scope="module")
def far_apart() -> Tensor:
    """Room for 7 * 2^30 bf16 numbers, of which the system provides the pages that are touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    try:
        memory = mmap.mmap(-1, 14 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"no 14 GiB of address space: {error}")
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.mark.parametrize("axis", ["token", "sequence"])
def test_offsets_beyond_32_bits(kernels: ModuleType, device: str, far_apart: Tensor, axis: str) -> None:
    """Neighbours 2^30 elements apart: offsets pass 2^31 and 2^32, in 32 bits negative and 0."""
    if device != "cpu":
        pytest.skip("a GPU has no memory that is there only where it is touched")
    shape = (1, 5, 1, 16) if axis == "token" else (5, 1, 1, 16)
    given = make_inputs(FULL, shape, "cpu", torch.bfloat16, padded=False)
    step = 1 << 30
    for i, name in enumerate(("x", "y", *TABLES)):
        strides = (0, step, 1) if axis == "token" else (step, 0, 1)
        view = far_apart.as_strided(given[name].shape, strides, (2 << 30) + 64 * i)
        given[name] = view.copy_(given[name])
    check_forward(kernels, given)
    check_backward(kernels, given)


@triton_only
@pytest.mark.parametrize("names", [FULL, AFFINE, ("x",)], ids=["modulated", "affine", "bare"])
def test_fp8_rows(kernels: ModuleType, device: str, names: tuple[str, ...]) -> None:
    """q is between the casts of n less its error budget and of n plus it."""
    given = make_inputs(names, (2, 3, 5, 65), device, torch.bfloat16)
    r, q, scale = kernels.residual_norm_fp8_forward(*arguments(given), EPS, *place(given))
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert q.shape == given["x"].shape and scale.shape == (2, 15, 1)
    if "y" in names:
        assert torch.equal(r, forward(kernels, given)[0])
    (_, low), (_, exact) = (formula(cast(given, dtype)) for dtype in (torch.float32, torch.float64))
    exact_scale = exact.abs().amax(-1, keepdim=True) / 448
    assert_within_budget(scale, low.abs().amax(-1, keepdim=True) / 448, exact_scale)
    error = error_budget(low, exact)
    lower, upper = (
        ((exact + e) / scale.double()).clamp(-448, 448).float().to(torch.float8_e4m3fn) for e in (-error, error)
    )
    assert (lower.float() <= q.float()).all() and (q.float() <= upper.float()).all()
    assert (lower.float() != upper.float()).float().mean() < 0.01  # so that the bounds say something


@triton_only
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_fp8_of_special_rows(kernels: ModuleType, device: str) -> None:
    x = torch.zeros(1, 2, 16, dtype=torch.bfloat16, device=device)
    x[0, 1, 3] = math.nan
    _, q, scale = kernels.residual_norm_fp8_forward(x, *[None] * 6, EPS, 2, 0)
    assert torch.equal(q[0, 0].float(), x[0, 0].float())
    assert torch.equal(scale[0, 0], torch.full_like(scale[0, 0], 1e-12 / 448))
    assert (q[0, 1].float() * scale[0, 1]).isnan().all()
    empty = kernels.residual_norm_fp8_forward(x[:0], x[:0], *[None] * 5, EPS, 2, 0)
    assert [t.shape for t in empty] == [(0, 2, 16), (0, 2, 16), (0, 2, 1)]
