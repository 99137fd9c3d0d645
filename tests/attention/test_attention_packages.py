"""The custom op around the attention packages, on stand-ins that compute in float32 on the CPU.

The stand-ins have the packages' signatures. They check our side: order of arguments, softmax scale,
log-sum-exp, gradients, strides, and what the op needs for torch.compile, meta tensors and
checkpoints. What the real packages compute is tested on a GPU (test_attention.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pusa_fast.attention.flash import PACKAGES, flash_attention
from pusa_fast.testing import assert_within_budget, make_input

STAND_INS = ["fa2", "fa3", "fa3 of 2026", "fa4"]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("blhk,bmhk->bhlm", q.float(), k.float()) * scale
    lse = scores.logsumexp(-1)
    return torch.einsum("bhlm,bmhk->blhk", (scores - lse[..., None]).exp(), v.float()).to(q.dtype), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
) -> None:
    """From out and lse, as the packages do it: either of them wrong shows in the gradients."""
    p = (torch.einsum("blhk,bmhk->bhlm", q.float(), k.float()) * scale - lse[..., None]).exp()
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
    ds = p * (torch.einsum("blhk,bmhk->bhlm", dout.float(), v.float()) - delta) * scale
    dq.copy_(torch.einsum("bhlm,bmhk->blhk", ds, k.float()))
    dk.copy_(torch.einsum("bhlm,blhk->bmhk", ds, q.float()))
    dv.copy_(torch.einsum("bhlm,blhk->bmhk", p, dout.float()))


class StandIn:
    """The modules of one package, with its own names and orders of arguments.

    `calls`: what was called, with what.
    """

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = name.partition(" ")[0]
        self.calls: list[tuple[str, dict[str, Any]]] = []
        module = ModuleType(name)
        for attribute, function in self.functions(name).items():
            monkeypatch.setattr(module, attribute, function, raising=False)
        for path in PACKAGES[self.backend].modules:
            monkeypatch.setitem(sys.modules, path, module)

    def called(self, function: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name == function]

    def functions(self, name: str) -> dict[str, Callable[..., Any]]:
        def run_forward(
            q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, **others: Any
        ) -> tuple[Tensor, Tensor]:
            assert not causal and isinstance(scale, float)
            self.calls.append(("forward", {"q": q, "k": k, "v": v, "scale": scale, **others}))
            return forward(q, k, v, scale)

        def run_backward(*saved: Tensor, scale: float, causal: bool, deterministic: bool) -> None:
            assert not causal
            self.calls.append(("backward", {"dout": saved[0], "deterministic": deterministic}))
            backward(*saved, scale)

        # fmt: off
        def fa2_forward(
            q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
            return_softmax
        ):
            assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax) == (
                0, -1, -1, 0, None, False
            )
            return *run_forward(q, k, v, softmax_scale, causal), torch.empty(0), torch.empty(2)

        def fa2_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
            window_size_right, softcap, alibi_slopes, deterministic, rng_state=None
        ):
            assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, rng_state) == (
                0, -1, -1, 0, None, None
            )
            run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, scale=softmax_scale,
                         causal=causal, deterministic=deterministic)
            return torch.empty(0)

        def fa3_forward(
            q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
            max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
            q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0,
            softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0
        ):
            unused = {k_new, v_new, qv, out, cu_seqlens_q, seqused_k, page_table, seqlens_rotary, q_descale, v_descale}
            assert unused == {None}
            return *run_forward(q, k, v, softmax_scale, causal), None, None

        def fa3_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
            max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False,
            sm_margin=0
        ):
            assert {cu_seqlens_q, sequed_q, max_seqlen_k} == {None} and (window_size, softcap) == ((-1, -1), 0)
            run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, scale=softmax_scale,
                         causal=causal, deterministic=deterministic)
            return dq, dk, dv, torch.empty(0)

        def fa3_forward_2026(
            q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
            cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
            page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None,
            q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1,
            window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
            num_splits=1, pack_gqa=None, sm_margin=0
        ):
            assert (v_descale, window_size_left, window_size_right, softcap, num_splits) == (None, -1, -1, 0, 1)
            return *run_forward(q, k, v, softmax_scale, causal), torch.empty(0), torch.empty(0)

        def fa3_backward_2026(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
            max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
            window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0
        ):
            assert (max_seqlen_k, window_size_left, window_size_right, softcap) == (None, -1, -1, 0)
            run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, scale=softmax_scale,
                         causal=is_causal, deterministic=deterministic)
            return torch.empty(0)

        def fa4_forward(q, k, v, qv=None, *, softmax_scale=None, causal=False, return_lse=False):
            assert qv is None
            out, lse = run_forward(q, k, v, softmax_scale, causal)
            return out, lse if return_lse else None, None, None, None

        def fa4_backward(
            q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, *, deterministic=False, dq=None,
            dk=None, dv=None
        ):
            run_backward(dout, q, k, v, out, lse, dq, dk, dv, scale=softmax_scale,
                         causal=causal, deterministic=deterministic)
            return dq, dk, dv

        def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True):
            assert tensor_layout == "NHD"
            return run_forward(q, k, v, sm_scale, is_causal, smooth_k=smooth_k)[0]
        # fmt: on

        return {
            "fa2": {"_flash_attn_forward": fa2_forward, "_flash_attn_backward": fa2_backward},
            "fa3": {"_flash_attn_forward": fa3_forward, "_flash_attn_backward": fa3_backward},
            "fa3 of 2026": {"_flash_attn_forward": fa3_forward_2026, "_flash_attn_backward": fa3_backward_2026},
            "fa4": {"_flash_attn_fwd": fa4_forward, "_flash_attn_bwd": fa4_backward},
            "sage": {"sageattn": sageattn},
        }[name]


@pytest.fixture(params=STAND_INS)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(request.param, monkeypatch)


@pytest.fixture
def fa4(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn("fa4", monkeypatch)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhk,bmhk->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhk->blhk", scores.softmax(-1), v)


@pytest.mark.parametrize(("Lq", "Lk"), [(6, 6), (5, 9)])
def test_result_and_gradients_are_those_of_softmax_attention(package: StandIn, Lq: int, Lk: int) -> None:
    kv = make_input(2, Lk, 2, 3, 8, seed=1)
    dout = make_input(2, Lq, 3, 8, seed=2)

    def results(dtype: torch.dtype, function: Callable[..., Tensor]) -> list[Tensor]:
        q, both = (x.to(dtype).requires_grad_() for x in (make_input(2, Lq, 3, 8), kv))
        out = function(q, *both.unbind(2))
        return [out, *torch.autograd.grad(out, (q, both), dout.to(dtype))]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, package.backend)[0]

    low, exact = results(torch.float32, softmax_attention), results(torch.float64, softmax_attention)
    for name, candidate, plain, oracle in zip(
        ("out", "dq", "dk and dv"), results(torch.float32, ours), low, exact, strict=True
    ):
        assert_within_budget(candidate, plain, oracle, name)


def test_lse_is_the_log_of_the_denominators_and_has_no_gradient(package: StandIn) -> None:
    q, k, v = (make_input(1, 5, 2, 8, seed=s).requires_grad_() for s in range(3))
    out, lse = flash_attention(q, k, v, package.backend)
    scores = torch.einsum("blhk,bmhk->bhlm", q.double(), k.double()) / 8**0.5
    assert lse.dtype == torch.float32 and lse.shape == (1, 2, 5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert out.requires_grad and not lse.requires_grad


def test_strided_views_reach_the_package_as_they_are(package: StandIn) -> None:
    qkv = make_input(2, 5, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    flash_attention(q, k, v, package.backend)
    (seen,) = package.called("forward")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        assert (seen[name].data_ptr(), seen[name].stride()) == (tensor.data_ptr(), tensor.stride())
    flash_attention(q.transpose(1, 3).contiguous().transpose(1, 3), k, v, package.backend)
    assert package.called("forward")[1]["q"].stride(-1) == 1  # the one thing that all of them ask for


def test_gradients_that_are_expanded_arrive_dense(package: StandIn) -> None:
    q = make_input(1, 4, 2, 8).requires_grad_()
    flash_attention(q, q, q, package.backend)[0].sum().backward()
    (seen,) = package.called("backward")
    assert seen["dout"].is_contiguous() and not seen["deterministic"]


def test_deterministic_algorithms_are_passed_on(package: StandIn) -> None:
    q = make_input(1, 4, 2, 8).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        flash_attention(q, q, q, package.backend)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert package.called("backward")[0]["deterministic"]


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(package: StandIn, grad: bool) -> None:
    qkv = make_input(2, 5, 3, 2, 8).requires_grad_(grad)
    op = torch.ops.pusa_fast.flash_attention.default
    torch.library.opcheck(op, (*qkv.unbind(2), package.backend))
    q, k, v = qkv.detach().unbind(2)
    out, lse = flash_attention(q, k, v, package.backend)
    op = torch.ops.pusa_fast.flash_attention_backward.default
    torch.library.opcheck(op, (torch.ones_like(out), q, k, v, out, lse, package.backend))


def test_compiles_into_one_graph(fa4: StandIn) -> None:
    def block(qkv: Tensor) -> Tensor:
        return flash_attention(*qkv.sin().unbind(2), "fa4")[0].flatten(2)

    qkv = make_input(2, 5, 3, 2, 8).requires_grad_()
    out, expected = torch.compile(block, fullgraph=True, backend="aot_eager")(qkv), block(qkv)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), qkv) for y in (out, expected)))


def test_meta_tensors_need_no_package() -> None:
    qkv = torch.empty(2, 5, 3, 2, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out, lse = flash_attention(*qkv.unbind(2), "fa4")
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 5, 2, 8), torch.bfloat16, (2, 2, 5), torch.float32)
    out.sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(("saved", "runs"), [(True, 1), (False, 2)])
def test_a_checkpoint_that_saves_the_op_never_runs_it_again(fa4: StandIn, saved: bool, runs: int) -> None:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = saved and op is torch.ops.pusa_fast.flash_attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def block(qkv: Tensor) -> Tensor:
        return flash_attention(*qkv.sin().unbind(2), "fa4")[0].cos()

    qkv = make_input(2, 5, 3, 2, 8).requires_grad_()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(block, qkv, use_reentrant=False, context_fn=contexts)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    assert len(fa4.called("forward")) == runs
    torch.testing.assert_close(grad, torch.autograd.grad(block(qkv).square().sum(), qkv)[0])


@pytest.mark.parametrize(("B", "Lq", "Lk"), [(0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_empty_inputs_do_not_reach_the_package(B: int, Lq: int, Lk: int) -> None:
    q, k = (torch.zeros(B, L, 2, 8, requires_grad=True) for L in (Lq, Lk))
    out, lse = flash_attention(q, k, k, "fa4")  # which is not installed
    assert out.shape == q.shape and not out.any() and bool((lse == -torch.inf).all())
    out.sum().backward()
    assert q.grad is not None and k.grad is not None and not q.grad.any() and not k.grad.any()


def test_sage_gets_keys_of_mean_zero_and_the_callers_keys_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    sage = StandIn("sage", monkeypatch)
    q, k, v = (make_input(2, 6, 2, 64, seed=s) for s in range(3))
    k += 3
    before = k.clone()
    out, lse = flash_attention(q, k, v, "sage")
    assert torch.equal(k, before) and bool(lse.isnan().all()) and lse.shape == (2, 2, 6)
    (seen,) = sage.called("forward")
    assert float(seen["k"].mean(1).abs().max()) < 1e-6 and seen["smooth_k"] is False
    torch.testing.assert_close(out, softmax_attention(q, k, v))
    with pytest.raises(RuntimeError, match="'sage' has no backward"):
        flash_attention(q.requires_grad_(), k, v, "sage")[0].sum().backward()
