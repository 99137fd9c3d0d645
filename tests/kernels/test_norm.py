"""RMSNorm, forward and backward, against the formula in float64: Triton and native code."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pusa_fast.testing import assert_within_budget, make_input

EPS = 1e-6
SHAPES = [(1,), (17,), (5, 2), (1, 3, 65), (2, 5, 160), (2, 3, 2, 33)]
TYPED = [("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16)]
TYPED += [("native", torch.float32), ("native", torch.bfloat16)]
typed = pytest.mark.parametrize(("kernels", "dtype"), TYPED, ids=str, indirect=["kernels"])
triton_only = pytest.mark.parametrize("kernels", ["triton"], indirect=True)


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def check(kernels: ModuleType, x: Tensor, weight: Tensor, dn: Tensor) -> None:
    n, rstd = kernels.rms_norm_forward(x, weight, EPS)
    assert n.is_contiguous() and n.dtype == x.dtype and rstd.shape == x.shape[:-1]
    low32, exact = (torch.rsqrt((t * t).mean(-1) + EPS) for t in (x.float(), x.double()))
    assert_within_budget(rstd, low32, exact, "rstd")
    dx, dweight = kernels.rms_norm_backward(dn, x, weight, rstd, True)
    assert dx.is_contiguous() and dweight.dtype == rstd.dtype
    results = []
    for dtype in (x.dtype, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        out = formula(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, dn.to(dtype))))
    names = ("n", "dx", "dweight")
    for name, result, low, oracle in zip(names, (n, dx, dweight), *results, strict=True):
        assert_within_budget(result.to(x.dtype), low, oracle, name)
    frozen = kernels.rms_norm_backward(dn, x, weight, rstd, False)
    assert torch.equal(frozen[0], dx) and frozen[1] is None


@typed
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(kernels: ModuleType, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = make_input(shape[-1], seed=1, dtype=dtype, device=device)
    for padded in (False, True):
        x, dn = (make_input(*shape, seed=s, dtype=dtype, device=device, padded=padded) for s in (0, 2))
        check(kernels, x, weight, dn)


def test_float32_weight_on_a_bf16_stream(kernels: ModuleType, device: str) -> None:
    x, dn = (make_input(2, 3, 65, seed=seed, dtype=torch.bfloat16, device=device) for seed in (0, 2))
    check(kernels, x, make_input(65, seed=1, device=device), dn)


@triton_only
def test_float64_is_computed_in_float64(kernels: ModuleType, device: str) -> None:
    x, weight = (make_input(*shape, dtype=torch.float64, device=device) for shape in ((2, 3, 33), (33,)))
    n, rstd = kernels.rms_norm_forward(x, weight, EPS)
    assert rstd.dtype == torch.float64
    torch.testing.assert_close(n, formula(x, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps_is_added_to_the_mean_square(kernels: ModuleType, device: str, eps: float) -> None:
    x, weight = make_input(4, 33, device=device, scale=0.01), torch.ones(33, device=device)
    n, _ = kernels.rms_norm_forward(x, weight, eps)
    low, exact = (torch.nn.functional.rms_norm(t, (33,), eps=eps) for t in (x, x.double()))
    assert_within_budget(n, low, exact)


def views(device: str) -> dict[str, Tensor]:
    packed = make_input(2, 3, 2, 20, device=device)
    packed[:, :, 1] = math.nan
    cropped = make_input(2, 5, 20, device=device)
    cropped[:, 3:] = math.nan
    return {
        "half of a packed projection": packed[:, :, 0],
        "some tokens": cropped[:, :3],
        "other order": make_input(3, 2, 20, device=device).transpose(0, 1),
        "one row for all": make_input(1, 1, 20, device=device).expand(2, 3, 20),
        "columns apart": make_input(2, 20, 3, device=device).transpose(1, 2),
        "two strides for four axes": make_input(2, 4, 3, 2, 40, device=device)[:, 1:3, :, 0, :20],
        "three strides": make_input(2, 4, 3, 2, 40, device=device)[:, 1:3, :2, 0, :20],
    }


@pytest.mark.parametrize("name", views("cpu"))
def test_views(kernels: ModuleType, device: str, name: str) -> None:
    x = views(device)[name]
    dn = make_input(*x.shape, seed=2, device=device)
    check(kernels, x, make_input(20, seed=1, device=device), dn)
    check(kernels, dn, make_input(20, seed=1, device=device), x)  # and as the gradient


def test_strided_views_are_not_copied() -> None:
    pytest.importorskip("triton")
    from pusa_fast.kernels._tokens import as_sequences

    copied = ("columns apart", "three strides")
    for name, x in views("cpu").items():
        sequences = as_sequences(x)
        assert torch.equal(sequences.reshape(x.shape).nan_to_num(9), x.nan_to_num(9))
        assert (sequences.data_ptr() == x.data_ptr()) == (name not in copied), name
    assert as_sequences(views("cpu")["half of a packed projection"]).shape == (1, 6, 20)


@triton_only
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_any_number_of_rows_a_program(
    kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("pusa_fast.kernels._launch._INTERPRETER_TILE", 32 * rows)
    x, dn = (make_input(2, 7, 20, seed=seed, device=device, padded=True)[:, :5] for seed in (0, 2))
    check(kernels, x, make_input(20, seed=1, device=device), dn)


@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8)], ids=str)
def test_empty(kernels: ModuleType, device: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape, device=device), torch.ones(8, device=device)
    n, rstd = kernels.rms_norm_forward(x, weight, EPS)
    assert n.shape == x.shape and rstd.shape == shape[:-1]
    dx, dweight = kernels.rms_norm_backward(n, x, weight, rstd, True)
    assert dx.shape == x.shape and torch.equal(dweight, torch.zeros_like(weight))


@triton_only
def test_rows_wider_than_a_program_are_refused(kernels: ModuleType, device: str) -> None:
    x = torch.zeros(1, (1 << 14) + 1, device=device)
    with pytest.raises(ValueError, match="at most 16384 elements, got 16385"):
        kernels.rms_norm_forward(x, x[0], EPS)
