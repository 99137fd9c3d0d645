"""RMSNorm of q and k with rotary embedding: Triton and native code against torch in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.kernels import reference
from pusa_fast.model.rope import rope_tables
from pusa_fast.testing import assert_within_budget, make_input

pytest.importorskip("triton")

EPS = 1e-6
TYPED = [("triton", t) for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
TYPED += [("native", t) for t in (torch.float32, torch.bfloat16)]
each_dtype = pytest.mark.parametrize(("kernels", "dtype"), TYPED, ids=str, indirect=["kernels"])
triton_only = pytest.mark.parametrize("kernels", ["triton"], indirect=True)
# (F, h, w), heads, width of a head
SHAPES = [
    ((1, 1, 1), 1, 2),
    ((3, 2, 5), 3, 6),
    ((2, 1, 7), 5, 10),
    ((3, 2, 5), 12, 16),
    ((2, 3, 2), 3, 64),
    ((1, 2, 3), 6, 128),
    ((2, 1, 2), 1, 256),
]


class Inputs(NamedTuple):
    """`q` and `k` are views of `qkv`; tables are float32, or float64 with float64."""

    qkv: Tensor
    weight_q: Tensor
    weight_k: Tensor
    cos: Tensor
    sin: Tensor
    grid: tuple[int, int, int]

    @property
    def q(self) -> Tensor:
        return self.qkv[:, :, 0]

    @property
    def k(self) -> Tensor:
        return self.qkv[:, :, 1]

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(t.to(dtype) for t in self[:5]), self.grid)

    def arguments(self) -> tuple[Any, ...]:
        return (self.q, self.k, *self[1:])


def check(result: Tensor, low: Tensor, exact: Tensor, what: str = "result") -> None:
    if result.dtype == torch.float64:  # where the oracle is no better than the kernel
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_within_budget(result, low, exact, what)


def make(
    grid: tuple[int, int, int],
    heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: int = 2,
) -> Inputs:
    tokens = grid[0] * grid[1] * grid[2]
    tables = torch.promote_types(dtype, torch.float32)
    qkv = make_input(batch, tokens, 3, heads, width, dtype=dtype, device=device, scale=2.0)
    weights = (make_input(heads * width, seed=seed, dtype=tables, device=device) for seed in (1, 2))
    # More positions than the grid has.
    angles = (t.to(device=device, dtype=tables) for t in rope_tables(width, max(grid) + 3))
    return Inputs(qkv, *weights, *angles, grid)


def forward(kernels: ModuleType, given: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.qk_rope_forward(*given.arguments(), 0, EPS, False)
    return results


def oracle(given: Inputs) -> tuple[Tensor, ...]:
    exact = given.to(torch.float64)
    return reference.qk_rope(*exact, EPS)[:2]


def plain(given: Inputs) -> list[Tensor]:
    """Plain torch, each operation rounded to the dtype of its arguments."""
    results = []
    F, h, w = given.grid
    half = [d // 2 for d in reference.rope_split(given.qkv.shape[-1])]
    for x, weight in ((given.q, given.weight_q), (given.k, given.weight_k)):
        flat = x.flatten(2)
        n = (flat * torch.rsqrt((flat * flat).mean(-1, keepdim=True) + EPS) * weight).unflatten(2, x.shape[2:])
        position = torch.cartesian_prod(torch.arange(F), torch.arange(h), torch.arange(w)).to(x.device)
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(half)).to(x.device)
        rows, columns = position.view(-1, 3)[:, axis], torch.arange(sum(half), device=x.device)
        cos, sin = (table[rows, columns][:, None] for table in (given.cos, given.sin))
        re, im = n[..., 0::2], n[..., 1::2]
        results.append(torch.stack((re * cos - im * sin, re * sin + im * cos), -1).flatten(-2).to(x.dtype))
    return results


@each_dtype
@pytest.mark.parametrize(("grid", "heads", "width"), SHAPES, ids=str)
def test_forward(
    kernels: ModuleType, device: str, grid: tuple[int, int, int], heads: int, width: int, dtype: torch.dtype
) -> None:
    given = make(grid, heads, width, dtype, device)
    *outs, rstd_q, rstd_k = forward(kernels, given)
    for out, low, exact in zip(outs, plain(given), oracle(given), strict=True):
        assert out.dtype == dtype and out.is_contiguous()
        check(out, low, exact)
    for rstd, x in ((rstd_q, given.q), (rstd_k, given.k)):
        squares = [x.flatten(2).to(t).square().mean(-1) for t in (rstd.dtype, torch.float64)]
        assert rstd.dtype == torch.promote_types(dtype, torch.float32)
        check(rstd, *(torch.rsqrt(s + EPS) for s in squares))


def test_another_dtype_of_weights_and_tables(kernels: ModuleType, device: str) -> None:
    given = make((2, 1, 3), 2, 10, torch.bfloat16, device)
    mixed = given._replace(weight_q=given.weight_q.bfloat16(), weight_k=given.weight_k.bfloat16())
    for out, low, exact in zip(forward(kernels, mixed)[:2], plain(mixed), oracle(mixed), strict=True):
        check(out, low, exact)


def gap_after_token(x: Tensor) -> Tensor:
    room = x.new_full((*x.shape[:2], x[0, 0].numel() + 5), math.nan)
    return room[..., :-5].unflatten(2, x.shape[2:]).copy_(x)


def gap_after_head(x: Tensor) -> Tensor:
    return x.new_full((*x.shape[:3], x.shape[3] + 1), math.nan)[..., :-1].copy_(x)


def heads_outermost(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other_column(x: Tensor) -> Tensor:
    return x.new_full((*x.shape[:3], 2 * x.shape[3]), math.nan)[..., ::2].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gap after each token": gap_after_token,
    "gap after each head": gap_after_head,
    "heads outermost": heads_outermost,
    "every other column": every_other_column,
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(kernels: ModuleType, device: str, layout: str, inplace: bool) -> None:
    """NaN between the elements; the values are those of the packed projection, bit for bit."""
    given = make((2, 1, 3), 3, 10, device=device)
    q, k = LAYOUTS[layout](given.q), LAYOUTS[layout](given.k.clone())
    results = kernels.qk_rope_forward(q, k, *given[1:], 0, EPS, inplace)
    for result, expected in zip(results, forward(kernels, given), strict=True):
        assert torch.equal(result, expected)
    if inplace:
        assert results[0] is q and results[1] is k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_is_the_functional_op_and_leaves_v_alone(kernels: ModuleType, device: str, dtype: torch.dtype) -> None:
    given = make((3, 2, 5), 5, 16, dtype, device)
    given.qkv[:, :, 2] = math.nan
    expected = forward(kernels, given)
    before = given.qkv.clone()
    results = kernels.qk_rope_forward(*(arguments := given.arguments()), 0, EPS, True)
    assert results[0] is arguments[0] and results[1] is arguments[1]
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(given.qkv[:, :, 2].view(bits), before[:, :, 2].view(bits))


def gradients(
    given: Inputs, outs: Callable[[Inputs], tuple[Tensor, ...]], dq: Tensor, dk: Tensor
) -> tuple[Tensor, ...]:
    """(dq_in, dk_in, dweight_q, dweight_k) by autograd."""
    leaves = given._replace(**{name: getattr(given, name).detach().requires_grad_() for name in Inputs._fields[:3]})
    with torch.enable_grad():
        q, k = outs(leaves)
    packed, weight_q, weight_k = torch.autograd.grad((q, k), leaves[:3], (dq.to(q.dtype), dk.to(k.dtype)))
    return packed[:, :, 0], packed[:, :, 1], weight_q, weight_k


def backward(kernels: ModuleType, given: Inputs, dq: Tensor, dk: Tensor, want_weights: bool) -> tuple[Any, ...]:
    rstd = forward(kernels, given)[2:]
    results: tuple[Any, ...] = kernels.qk_rope_backward(dq, dk, *given.arguments(), 0, *rstd, want_weights)
    return results


def output_gradients(given: Inputs) -> tuple[Tensor, Tensor]:
    dtype, device = given.qkv.dtype, given.qkv.device
    first, second = (make_input(*given.q.shape, seed=seed, dtype=dtype, device=device) for seed in (3, 4))
    return first, second


def check_gradients(given: Inputs, results: tuple[Any, ...], dq: Tensor, dk: Tensor) -> None:
    exact = gradients(given.to(torch.float64), lambda leaves: reference.qk_rope(*leaves, EPS)[:2], dq, dk)
    low = gradients(given, lambda leaves: tuple(plain(leaves)), dq, dk)
    for name, result, rounded, value in zip(("dq", "dk", "weight_q", "weight_k"), results, low, exact, strict=True):
        expected = torch.promote_types(given.qkv.dtype, torch.float32) if "weight" in name else given.qkv.dtype
        assert result.dtype == expected
        check(result, rounded.to(expected), value, name)


@each_dtype
@pytest.mark.parametrize(("grid", "heads", "width"), SHAPES, ids=str)
def test_backward(
    kernels: ModuleType, device: str, grid: tuple[int, int, int], heads: int, width: int, dtype: torch.dtype
) -> None:
    given = make(grid, heads, width, dtype, device)
    dq, dk = output_gradients(given)
    check_gradients(given, results := backward(kernels, given, dq, dk, True), dq, dk)
    frozen = backward(kernels, given, dq, dk, False)
    assert frozen[2:] == (None, None)
    assert torch.equal(frozen[0], results[0]) and torch.equal(frozen[1], results[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_takes_any_strides(kernels: ModuleType, device: str, layout: str) -> None:
    given = make((2, 1, 3), 3, 10, device=device)
    dq, dk = output_gradients(given)
    expected = backward(kernels, given, dq, dk, True)
    place, rstd = LAYOUTS[layout], forward(kernels, given)[2:]
    views = (place(t) for t in (dq, dk, given.q, given.k))
    for result, value in zip(kernels.qk_rope_backward(*views, *given[1:], 0, *rstd, True), expected, strict=True):
        assert torch.equal(result, value)


@triton_only
def test_many_programs(kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut finer than on a GPU, where the interpreter would take these shapes as one tile."""
    module = importlib.import_module("pusa_fast.kernels.qk_rope")
    launches: list[int] = []

    def few_tokens(rows: int, width: int, per_thread: int) -> Any:
        launches.append(programs := -(-rows // 4))
        return importlib.import_module("pusa_fast.kernels._launch").RowLaunch(4, 0, 1, programs)

    monkeypatch.setattr(module, "row_launch", few_tokens)
    monkeypatch.setattr(module, "_PARTIAL_SUMS", 3)  # 3 tiles a program, and a last one with fewer
    given = make((3, 2, 5), 3, 6, device=device)
    dq, dk = output_gradients(given)
    for out, low, exact in zip(forward(kernels, given)[:2], plain(given), oracle(given), strict=True):
        check(out, low, exact)
    check_gradients(given, backward(kernels, given, dq, dk, True), dq, dk)
    assert set(launches) == {8}


def test_empty(kernels: ModuleType, device: str) -> None:
    for batch, grid in ((0, (1, 2, 3)), (2, (0, 2, 3))):
        given = make(grid, 2, 4, device=device, batch=batch)
        results = forward(kernels, given)
        assert [t.shape for t in results] == [given.q.shape] * 2 + [given.q.shape[:2]] * 2
        dq, dk, *weights = backward(kernels, given, given.q, given.k, True)
        assert dq.shape == dk.shape == given.q.shape
        assert all(torch.equal(w, torch.zeros_like(given.weight_q)) for w in weights)


def test_offsets_beyond_31_bits(kernels: ModuleType, device: str) -> None:
    """Three tokens 2^30 elements apart: 4 GiB of addresses, of which a few pages are touched."""
    given = make((1, 1, 3), 2, 6, torch.bfloat16, device, batch=1)
    far = torch.empty_strided((2 * 2**30 + 64,), (1,), dtype=torch.bfloat16, device=device)
    q, k = (far.as_strided(given.q.shape, (0, 2**30, 6, 1), start) for start in (0, 32))
    q.copy_(given.q), k.copy_(given.k)
    expected = forward(kernels, given)
    for result, value in zip(kernels.qk_rope_forward(q, k, *given[1:], 0, EPS, False), expected, strict=True):
        assert torch.equal(result, value)
    rstd, gradient = expected[2:], output_gradients(given)
    expected = backward(kernels, given, *gradient, True)
    for result, value in zip(
        kernels.qk_rope_backward(*gradient, q, k, *given[1:], 0, *rstd, True), expected, strict=True
    ):
        assert torch.equal(result, value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the arithmetic of Triton's interpreter")
@triton_only
def test_nothing_past_the_tables_is_read(kernels: ModuleType) -> None:
    """A program's last tokens may be past the end, at positions past the tables: infinity here."""
    given = make((5, 1, 1), 2, 8, batch=1)
    tables = (torch.full((64, 4), math.inf) for _ in range(2))
    cos, sin = (room[:5].copy_(table[:5]) for room, table in zip(tables, (given.cos, given.sin), strict=True))
    given = given._replace(cos=cos, sin=sin)
    with numpy.errstate(invalid="raise"):  # of infinity times zero
        forward(kernels, given)
        backward(kernels, given, *output_gradients(given), True)


@triton_only
def test_rows_that_are_too_wide(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="at most 16384 elements, got 16640"):
        forward(kernels, make((1, 1, 1), 65, 256, batch=1))


def public(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return ops.qk_rope(*given, EPS)


def leaves(dtype: torch.dtype) -> Inputs:
    given = make((2, 1, 2), 2, 6, dtype, "cuda" if torch.cuda.is_available() else "cpu", batch=1)
    return given._replace(**{name: getattr(given, name).requires_grad_() for name in Inputs._fields[:3]})


def test_gradcheck() -> None:
    given = leaves(torch.float64)

    def outs(*tensors: Tensor) -> tuple[Tensor, ...]:
        return public(Inputs(*tensors, *given[3:]))

    with ops.use("triton"):
        assert torch.autograd.gradcheck(outs, given[:3], fast_mode=True)


def test_opcheck() -> None:
    given = leaves(torch.float32)
    arguments = (given.qkv.detach()[:, :, 0], given.qkv.detach()[:, :, 1], *given[1:5], list(given.grid), 0, EPS)
    with ops.use("triton"):
        torch.library.opcheck(torch.ops.pusa_fast.qk_rope.default, arguments)
        frozen = tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in arguments)
        torch.library.opcheck(torch.ops.pusa_fast.qk_rope_.default, frozen)


def test_compile() -> None:
    given = leaves(torch.float32)
    with ops.use("triton"):
        expected = public(given)
        results = torch.compile(public, fullgraph=True, backend="aot_eager")(given)
        for result, value in zip(results, expected, strict=True):
            assert torch.equal(result, value)
        pairs = [torch.autograd.grad([t.square().sum() for t in outs], given[:3]) for outs in (results, expected)]
        for result, value in zip(*pairs, strict=True):
            assert torch.equal(result, value)
        with torch.no_grad():
            twin = given._replace(qkv=given.qkv.detach().clone())
            compiled = torch.compile(lambda g: ops.qk_rope(*g, EPS, inplace=True), fullgraph=True, backend="aot_eager")
            for result, value in zip(compiled(twin), expected, strict=True):
                assert torch.equal(result, value)
            assert torch.equal(twin.q, expected[0]) and torch.equal(twin.k, expected[1])
