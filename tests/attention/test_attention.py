"""Attention against a float64 softmax: every usable backend, its gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pusa_fast.attention import BACKENDS, attention, backends
from pusa_fast.testing import assert_within_budget, make_input, relative_error

EXACT = [name for name, backend in BACKENDS.items() if backend.exact]
QKV = tuple[Tensor, Tensor, Tensor]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In the dtype of the inputs, every intermediate rounded."""
    scores = torch.einsum("blhk,bmhk->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhk->blhk", scores.softmax(-1), v)


def packed(B: int, L: int, H: int, K: int, dtype: torch.dtype, device: str = "cpu") -> QKV:
    """q, k and v as the packed projection gives them: views of one [B, L, 3, H, K]."""
    q, k, v = make_input(B, L, 3, H, K, dtype=dtype, device=device).unbind(2)
    return q, k, v


def cross(B: int, Lq: int, Lk: int, H: int, K: int, dtype: torch.dtype, device: str = "cpu") -> QKV:
    """q by itself; k and v views of one [B, Lk, 2, H, K]."""
    k, v = make_input(B, Lk, 2, H, K, seed=1, dtype=dtype, device=device).unbind(2)
    return make_input(B, Lq, H, K, dtype=dtype, device=device), k, v


def assert_attention(qkv: QKV, backend: str, grad: bool = True) -> None:
    """The result and, with `grad`, the three gradients are within budget of float64."""
    names = ["out", "dq", "dk", "dv"] if grad else ["out"]
    dout = make_input(*qkv[0].shape, seed=7, dtype=qkv[0].dtype, device=qkv[0].device)

    def results(dtype: torch.dtype, function) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_(grad) for x in qkv]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, dout.to(dtype))] if grad else [out]

    exact, low = results(torch.float64, softmax_attention), results(qkv[0].dtype, softmax_attention)
    inputs = [x.detach().requires_grad_(grad) for x in qkv]  # detach keeps the strides
    out = attention(*inputs, backend=backend)
    assert out.shape == qkv[0].shape and out.dtype == qkv[0].dtype
    assert out.flatten(2).data_ptr() == out.data_ptr()  # the projection after it needs no copy
    found = [out, *torch.autograd.grad(out, inputs, dout)] if grad else [out]
    for name, candidate, plain, oracle in zip(names, found, low, exact, strict=True):
        assert_within_budget(candidate, plain, oracle, f"{backend} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (17, 5), (6, 33)])
def test_sdpa_is_softmax_attention(Lq: int, Lk: int, dtype: torch.dtype) -> None:
    grad = min(Lq, Lk) > 1  # one key alone: the gradients of q and k are zero, and so would be the budget
    assert_attention(cross(2, Lq, Lk, 3, 10, dtype), "sdpa", grad)
    assert_attention(packed(2, Lq, 3, 10, dtype), "auto", grad)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", EXACT)
def test_each_backend_at_hand_is_softmax_attention(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    if reason := backends()[backend]:
        pytest.skip(reason)
    for qkv in (
        packed(2, 333, 3, head_dim, dtype, "cuda"),
        cross(2, 259, 512, 3, head_dim, dtype, "cuda"),
        cross(1, 129, 77, 3, head_dim, dtype, "cuda"),
    ):
        assert_attention(qkv, backend)
        assert_attention(qkv, backend, grad=False)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", EXACT)
def test_each_backend_at_hand_compiles_without_a_graph_break(backend: str) -> None:
    if reason := backends()[backend]:
        pytest.skip(reason)
    qkv = [x.detach().requires_grad_() for x in packed(1, 333, 3, 128, torch.bfloat16, "cuda")]
    out = torch.compile(attention, fullgraph=True)(*qkv, backend)
    expected = attention(*qkv, backend)
    dout = make_input(*out.shape, seed=7, dtype=out.dtype, device="cuda")
    pairs = zip(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(expected, qkv, dout), strict=True)
    for found, wanted in ((out, expected), *pairs):  # not bit for bit: some backwards add up in any order
        assert relative_error(found, wanted) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_sage_is_near() -> None:
    if reason := backends()["sage"]:
        pytest.skip(reason)
    qkv = packed(2, 333, 3, 128, torch.bfloat16, "cuda")
    before = [x.clone() for x in qkv]
    with torch.no_grad():
        out = attention(*qkv, backend="sage")
    assert (
        relative_error(out, softmax_attention(*(x.double() for x in qkv))) < 0.05
    )  # eight bits; no budget of rounding
    assert all(torch.equal(*pair) for pair in zip(qkv, before, strict=True))


def test_one_gradient_reaches_the_packed_projection() -> None:
    qkv = make_input(2, 7, 3, 2, 8).requires_grad_()
    attention(*qkv.unbind(2)).square().sum().backward()
    exact = qkv.detach().double().requires_grad_()
    softmax_attention(*exact.unbind(2)).square().sum().backward()
    low = qkv.detach().requires_grad_()
    softmax_attention(*low.unbind(2)).square().sum().backward()
    assert_within_budget(qkv.grad, low.grad, exact.grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_auto_compiles_without_a_graph_break(dynamic: bool) -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 5, 3, 2, 8), (1, 6, 3, 2, 8), (1, 6, 3, 2, 16)):
        qkv = make_input(*shape).requires_grad_()
        out, expected = compiled(*qkv.unbind(2)), attention(*qkv.unbind(2))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), qkv) for y in (out, expected)))


def test_empty_batches_and_meta_tensors_keep_their_shapes() -> None:
    assert attention(*torch.empty(0, 7, 3, 2, 8).unbind(2)).shape == (0, 7, 2, 8)
    for name in ("auto", *BACKENDS):  # nothing runs on meta tensors: a name needs no package
        out = attention(*torch.empty(1, 7, 3, 2, 8, dtype=torch.bfloat16, device="meta").unbind(2), backend=name)
        assert out.shape == (1, 7, 2, 8) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("k_shape", [(1, 5, 2, 4), (2, 5, 3, 4), (2, 5, 2, 6), (2, 5, 8)])
def test_shapes_that_do_not_agree_are_refused(k_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="attention needs q"):
        attention(torch.zeros(2, 3, 2, 4), torch.zeros(k_shape), torch.zeros(k_shape))
    with pytest.raises(ValueError, match="attention needs q"):
        attention(torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4), torch.zeros(k_shape))


def test_dtypes_that_do_not_agree_are_refused() -> None:
    q = torch.zeros(1, 2, 1, 4)
    for k, v in ((q.bfloat16(), q), (q, q.bfloat16())):
        with pytest.raises(ValueError, match=r"one dtype on one device, got torch.float32 on cpu, torch\."):
            attention(q, k, v)
    with pytest.raises(ValueError, match="one dtype on one device"):
        attention(q, q.to("meta"), q)
