"""Attention against a float64 softmax, and the table of backends. GPU backends are exercised only where there is a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pusa_fast import attention as module
from pusa_fast.attention import attention, backends
from pusa_fast.testing import assert_within_budget, make_input


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In the dtype of the inputs, every intermediate rounded."""
    scores = torch.einsum("blhk,bmhk->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhk->blhk", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (17, 5), (6, 33)])
def test_sdpa_is_softmax_attention(Lq: int, Lk: int, dtype: torch.dtype) -> None:
    q = make_input(2, Lq, 3, 10, dtype=dtype)
    k, v = (make_input(2, Lk, 3, 10, seed=s, dtype=dtype) for s in (1, 2))
    oracle = softmax_attention(q.double(), k.double(), v.double())
    out = attention(q, k, v)
    assert out.shape == (2, Lq, 3, 10)
    assert_within_budget(out, softmax_attention(q, k, v), oracle)


def test_strided_views_and_gradients() -> None:
    qkv = make_input(2, 7, 3, 2, 8).requires_grad_()
    out = attention(*qkv.unbind(2), backend="sdpa")
    torch.testing.assert_close(out, attention(*(t.contiguous() for t in qkv.unbind(2))))
    out.square().sum().backward()
    exact = qkv.detach().double().requires_grad_()
    softmax_attention(*exact.unbind(2)).square().sum().backward()
    torch.testing.assert_close(qkv.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert attention(*torch.empty(0, 7, 3, 2, 8).unbind(2)).shape == (0, 7, 2, 8)


def test_backends_reports_each_with_a_reason() -> None:
    report = backends()
    assert list(report) == ["sdpa", "cudnn", "fa2", "fa3", "fa4"] and report["sdpa"] is None
    if not torch.cuda.is_available():
        assert all("CUDA" in str(reason) for name, reason in report.items() if name != "sdpa")


def test_unknown_and_unusable_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q = make_input(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"'flash' does not exist: choose one of auto, sdpa"):
        attention(q, q, q, backend="flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'fa3' cannot be used: no CUDA device"):
        attention(q, q, q, backend="fa3")


def test_a_package_that_is_absent_broken_or_of_the_wrong_shape_gives_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "is not installed: pip install absent" in str(module._flash("flash_absent", "pip install absent").probe())
    monkeypatch.setitem(sys.modules, "flash_broken", ModuleType("flash_broken"))
    assert "does not load" in str(module._flash("flash_broken", "reinstall it").probe())

    working = ModuleType("flash_working")
    monkeypatch.setattr(working, "flash_attn_func", lambda q, k, v: (softmax_attention(q, k, v), None), raising=False)
    monkeypatch.setitem(sys.modules, "flash_working", working)
    backend = module._flash("flash_working", "")
    q = make_input(1, 3, 2, 4)
    assert backend.probe() is None and torch.equal(backend.run(q, q, q), softmax_attention(q, q, q))
    monkeypatch.setattr(module, "BACKENDS", {"mine": backend})
    with pytest.raises(ValueError, match=r"takes fp16 and bf16 on CUDA, got torch\.float32 on cpu"):
        attention(q, q, q, backend="mine")


@pytest.mark.parametrize("k_shape", [(1, 5, 2, 4), (2, 5, 3, 4), (2, 5, 2, 6), (2, 5, 8)])
def test_shapes_that_do_not_agree_are_refused(k_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="attention needs q"):
        attention(torch.zeros(2, 3, 2, 4), torch.zeros(k_shape), torch.zeros(k_shape))


def test_dtypes_that_do_not_agree_are_refused() -> None:
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"one dtype on one device, got torch.float32 on cpu, torch.bfloat16"):
        attention(q, q.bfloat16(), q)


@pytest.mark.gpu
def test_usable_gpu_backends_are_softmax_attention() -> None:
    q, k, v = (make_input(2, 300, 3, 128, seed=s, dtype=torch.bfloat16, device="cuda") for s in range(3))
    oracle = softmax_attention(q.double(), k.double(), v.double())
    for name, reason in backends().items():
        if reason is None:
            assert_within_budget(attention(q, k, v, name), softmax_attention(q, k, v), oracle, name)
