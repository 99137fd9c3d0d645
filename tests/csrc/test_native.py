"""The native CPU ops: every instruction set, any number of threads, GELU, and no compiled part at
all.

That each op is its formula, for all shapes and forms, is tested with the Triton kernels in
tests/kernels.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast.kernels import reference
from pusa_fast.model.rope import rope_tables
from pusa_fast.native import rows as native
from pusa_fast.testing import assert_within_budget, make_input

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"no native ops: {native.available()}")
_native: Any = None if native.available() else importlib.import_module("pusa_fast._native")
ISAS: list[str] = _native.isas() if _native else []
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
Tensors = dict[str, Tensor]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Each op on inputs of its own: what native code returns, and the same from plain torch in a given
# precision. Gradients are autograd's through the reference op, from the row that the backward pass
# is given.
def residual_norm(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    B, F = 2, 3
    x, y, dr, dn = (make_input(B, F * tokens, width, seed=s, dtype=dtype, padded=True) for s in range(4))
    gate, scale, shift = (make_input(B, F, 6, width, seed=s)[:, :, s] for s in range(3))
    where = tokens, 0
    r, n, _, _ = native.residual_norm_forward(x, y, gate, scale, shift, None, None, EPS, *where)
    r64 = r.double()
    mean, rstd = r64.mean(-1).float(), (r64.var(-1, correction=0) + EPS).rsqrt().float()
    results = native.residual_norm_backward(dr, dn, r, y, gate, scale, None, mean, rstd, True, True, False, *where)
    found = {"r": r, "n": n} | dict(zip(("dx", "dy", "dgate", "dscale", "dshift"), results, strict=False))

    def torch_result(precision: torch.dtype) -> Tensors:
        xp, yp, rp, drp, dnp, g, s, h = (t.to(precision) for t in (x, y, r, dr, dn, gate, scale, shift))
        r_out, n_out = reference.residual_norm(xp, yp, g, scale=s, shift=h, eps=EPS)
        leaves = [t.detach().requires_grad_() for t in (rp, s, h)]
        out = reference.residual_norm(leaves[0], scale=leaves[1], shift=leaves[2], eps=EPS)[1]
        dx, ds, dh = torch.autograd.grad(out, leaves, dnp)
        dx = dx + drp
        by_frame = torch.unflatten(dx * yp, 1, (F, tokens)).sum(2)
        dy = (torch.unflatten(dx, 1, (F, tokens)) * g[:, :, None]).flatten(1, 2)
        return {"r": r_out, "n": n_out, "dx": dx, "dy": dy, "dgate": by_frame, "dscale": ds, "dshift": dh}

    return found, torch_result


def affine_norm(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    x, dn = (make_input(2, 3 * tokens, width, seed=s, dtype=dtype) for s in range(2))
    weight, bias = (make_input(width, seed=s, dtype=dtype) for s in (2, 3))
    _, n, mean, rstd = native.residual_norm_forward(x, *[None] * 4, weight, bias, EPS, 1, 0)
    results = native.residual_norm_backward(None, dn, x, *[None] * 3, weight, mean, rstd, False, False, True, 1, 0)
    found = {"n": n, "dx": results[0], "dweight": results[5], "dbias": results[6]}

    def torch_result(precision: torch.dtype) -> Tensors:
        leaves = [t.to(precision).requires_grad_() for t in (x, weight, bias)]
        out = reference.residual_norm(leaves[0], weight=leaves[1], bias=leaves[2], eps=EPS)[1]
        dx, dweight, dbias = torch.autograd.grad(out, leaves, dn.to(precision))
        return {"n": out.detach(), "dx": dx, "dweight": dweight, "dbias": dbias}

    return found, torch_result


def gated_residual(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    x, y, dr = (make_input(2, 3 * tokens, width, seed=s, dtype=dtype, padded=True) for s in range(3))
    gate = make_input(2, 3, width, seed=3, dtype=torch.bfloat16)
    dy, dgate = native.gated_residual_backward(dr, y, gate, True, tokens, 0)
    found = {"r": native.gated_residual_forward(x, y, gate, tokens, 0), "dy": dy, "dgate": dgate}

    def torch_result(precision: torch.dtype) -> Tensors:
        leaves = [t.to(precision).requires_grad_() for t in (y, gate)]
        out = reference.gated_residual(x.to(precision), *leaves)
        dy, dgate = torch.autograd.grad(out, leaves, dr.to(precision))
        return {"r": out.detach(), "dy": dy, "dgate": dgate}

    return found, torch_result


def rms_norm(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    x, dn = (make_input(2, 3, tokens, 2, width, seed=s, dtype=dtype)[..., 1, :] for s in range(2))
    weight = make_input(width, seed=2, dtype=dtype)
    n, rstd = native.rms_norm_forward(x, weight, EPS)
    dx, dweight = native.rms_norm_backward(dn, x, weight, rstd, True)

    def torch_result(precision: torch.dtype) -> Tensors:
        leaves = [t.to(precision).requires_grad_() for t in (x, weight)]
        out = reference.rms_norm(*leaves, EPS)
        dx, dweight = torch.autograd.grad(out, leaves, dn.to(precision))
        return {"n": out.detach(), "dx": dx, "dweight": dweight}

    return {"n": n, "dx": dx, "dweight": dweight}, torch_result


def qk_rope(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    """Heads of 2, 6, 20, .. columns: the widths around those of vectors."""
    heads, grid = 3, (3, tokens, 2)
    K = max(2, width // heads // 2 * 2)
    qkv = make_input(2, 6 * tokens, 3, heads, K, dtype=dtype)
    dq, dk = (make_input(2, 6 * tokens, heads, K, seed=s, dtype=dtype) for s in (1, 2))
    weights = [make_input(heads * K, seed=s, dtype=dtype) for s in (3, 4)]
    angles = rope_tables(K, max(grid))
    q, k, _ = qkv.unbind(2)
    q_out, k_out, *stats = native.qk_rope_forward(q, k, *weights, *angles, grid, 0, EPS, False)
    results = native.qk_rope_backward(dq, dk, q, k, *weights, *angles, grid, 0, *stats, True)
    found = {"q": q_out, "k": k_out} | dict(zip(("dq", "dk", "dweight_q", "dweight_k"), results, strict=True))

    def torch_result(precision: torch.dtype) -> Tensors:
        leaf, *w = (t.to(precision).requires_grad_() for t in (qkv, *weights))
        out = reference.qk_rope(leaf, *w, *(t.to(precision) for t in angles), grid, EPS)[:2]
        dqkv, dweight_q, dweight_k = torch.autograd.grad(out, (leaf, *w), (dq.to(precision), dk.to(precision)))
        return {
            **{"q": out[0].detach(), "k": out[1].detach(), "dq": dqkv[:, :, 0], "dk": dqkv[:, :, 1]},
            **{"dweight_q": dweight_q, "dweight_k": dweight_k},
        }

    return found, torch_result


def guided_euler_step(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    shape = (2, 3, 4, tokens, width)
    x, v, v_neg = (make_input(*shape, seed=s, dtype=dtype) for s in range(3))
    dsigma = torch.tensor([-0.25, 0.0, -0.5, -0.0])
    found = {
        "guided": native.guided_euler_step(x, v, v_neg, 3.0, dsigma),
        "plain": native.guided_euler_step(x, v, None, 3.0, dsigma),
    }

    def torch_result(precision: torch.dtype) -> Tensors:
        xp, vp, np, dp = (t.to(precision) for t in (x, v, v_neg, dsigma))
        return {
            "guided": reference.guided_euler_step(xp, vp, np, 3.0, dp),
            "plain": reference.guided_euler_step(xp, vp, None, 3.0, dp),
        }

    return found, torch_result


def gelu_(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    x = make_input(2, tokens, width, dtype=dtype, scale=3)
    found = {"contiguous": native.gelu_(x.clone()), "view": native.gelu_(x.clone().transpose(1, 2)).transpose(1, 2)}
    return found, lambda precision: dict.fromkeys(found, nnf.gelu(x.to(precision), approximate="tanh"))


def linear_rows(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    x, weight = make_input(3, width), make_input(tokens * width, width, seed=1, dtype=dtype, padded=True)
    bias = make_input(tokens * width, seed=2, dtype=dtype)
    found = {"out": native.linear_rows(x, weight, bias), "no bias": native.linear_rows(x, weight, None)}
    assert torch.equal(native.linear_rows(x[1:2], weight, bias), found["out"][1:2])  # whatever other rows there are

    def torch_result(precision: torch.dtype) -> Tensors:
        xp, wp, bp = (t.to(precision) for t in (x, weight, bias))
        return {"out": nnf.linear(xp, wp, bp), "no bias": nnf.linear(xp, wp)}

    return found, torch_result


def vae_act(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    """Two rows of `tokens` pixels behind an upsampling, of twice as many else. gamma takes SiLU to
    where its bounds count."""
    x, plain = (make_input(1, 1, 2, 2 * tokens, width, seed=s, dtype=dtype) for s in range(2))
    phases = make_input(1, 1, 2, tokens + 1, 4 * width, seed=2, dtype=dtype)
    gamma, bias = make_input(width, seed=3, dtype=dtype), make_input(width, seed=4)
    forms = {
        "plain": (plain, gamma, x, bias, True, False),
        "alone": (plain, gamma, None, None, True, False),
        "unbounded": (plain, gamma * 200, x, bias, True, False),
        "identity": (plain, gamma, None, bias, False, False),
        "upsampled": (phases, gamma, x, bias, True, True),
    }
    found = {}
    for name, (y, g, residual, b, silu, upsampled) in forms.items():
        r, out = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
        native.vae_act_(y, g, residual, b, r, out, silu, upsampled)
        found |= {f"{name}: r": r, f"{name}: out": out}

    def torch_result(precision: torch.dtype) -> Tensors:
        results = {}
        for name, (y, g, residual, b, silu, upsampled) in forms.items():
            y, g, residual, b = (None if t is None else t.to(precision) for t in (y, g, residual, b))
            r, out = reference.vae_act(y, g, residual, b, silu, upsampled)
            results |= {f"{name}: r": r, f"{name}: out": out}
        return results

    return found, torch_result


def gelu(dtype: torch.dtype, tokens: int, width: int) -> tuple[Tensors, Callable[[torch.dtype], Tensors]]:
    x, dy = make_input(2, tokens, width, dtype=dtype, scale=3), make_input(2, tokens, width, seed=1, dtype=dtype)
    strided = dy.transpose(1, 2).contiguous().transpose(1, 2)
    found = {
        "y": native.gelu_forward(x),
        "dx": native.gelu_backward(dy, x),
        "dx, strided": native.gelu_backward(strided, x),
    }

    def torch_result(precision: torch.dtype) -> Tensors:
        leaf = x.to(precision).requires_grad_()
        y = nnf.gelu(leaf, approximate="tanh")
        (dx,) = torch.autograd.grad(y, leaf, dy.to(precision))
        return {"y": y.detach(), "dx": dx, "dx, strided": dx}

    return found, torch_result


OPS = [
    residual_norm,
    affine_norm,
    gated_residual,
    rms_norm,
    qk_rope,
    guided_euler_step,
    gelu_,
    gelu,
    linear_rows,
    vae_act,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 6, 17, 64, 147])  # 147: every branch of a loop over vectors of 4, 8 or 16
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_every_instruction_set_is_within_budget(isa: str, op: Any, width: int, dtype: torch.dtype) -> None:
    """The budget is for float32 arithmetic, rounded once to the result's dtype."""
    found, torch_result = op(dtype, 5, width)
    low, oracle = torch_result(torch.float32), torch_result(torch.float64)
    assert found.keys() == low.keys()
    for name, result in found.items():
        assert_within_budget(result, low[name].to(result.dtype), oracle[name], f"{isa}: {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_instruction_sets_agree(op: Any, dtype: torch.dtype) -> None:
    """To rounding: at most a unit in the last place of the largest value, in float32 a few of its
    own."""
    before, results = _native.isa(), {}
    for name in ISAS:
        _native.set_isa(name)
        results[name] = op(dtype, 4, 100)[0]
    _native.set_isa(before)
    widest = results[ISAS[-1]]
    for result in results.values():
        for name, value in result.items():
            assert_within_budget(value, widest[name], widest[name].double(), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_the_number_of_threads_changes_no_bit(op: Any, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(op(dtype, 131, 192)[0])
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    expected = {op.__name__: op(torch.float32, 67, 96)[0] for op in OPS}
    with ThreadPoolExecutor(4) as pool:
        for op, (found, _) in zip(OPS * 4, pool.map(lambda op: op(torch.float32, 67, 96), OPS * 4), strict=True):
            assert all(torch.equal(found[name], value) for name, value in expected[op.__name__].items())


def test_bf16_is_rounded_as_torch_does(isa: str) -> None:
    """-0 + y, where x is bf16 and y any float32: ties, overflow, subnormals, any NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000
    special = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 1, 0x8000, 0x18000, 0])
    signs = torch.cat([special, special - (1 << 31)]).to(torch.int32)
    y = torch.cat([bits, ties, signs]).view(torch.float32).view(1, 1, -1)
    x = torch.full(y.shape, -0.0, dtype=torch.bfloat16)
    r = native.gated_residual_forward(x, y, None, 1, 0)
    expected = y.bfloat16()
    nan = expected.isnan()
    assert torch.equal(r.isnan(), nan)
    assert torch.equal(r[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_step_leaves_frozen_frames_bit_for_bit(isa: str) -> None:
    """Signalling NaN, -0, subnormals and the rest of a frozen frame, whatever the velocity."""
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        any_bits = torch.randint(-(1 << 15), 1 << 15, (1, 2, 3, 5, 7), generator=torch.Generator().manual_seed(0))
        x = any_bits.to(torch.int16).view(torch.bfloat16).to(dtype) if dtype == torch.float32 else None
        x = any_bits.to(bits).view(dtype) if x is None else (any_bits * 65537).to(bits).view(dtype)
        v = torch.full(x.shape, math.nan, dtype=torch.bfloat16)
        out = native.guided_euler_step(x, v, v, 2.0, torch.tensor([0.0, -1.0, -0.0]))
        assert torch.equal(out[:, :, ::2].view(bits), x[:, :, ::2].view(bits))
        assert out[:, :, 1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_over_the_whole_range(isa: str, dtype: torch.dtype) -> None:
    """All of bf16; of float32 as many, the same upper halves and random lower ones. Within torch's
    budget in each binade."""
    patterns = torch.arange(-(1 << 15), 1 << 15)
    if dtype == torch.bfloat16:
        x = patterns.to(torch.int16).view(dtype)
    else:
        noise = torch.randint(0, 1 << 16, patterns.shape, generator=torch.Generator().manual_seed(0))
        x = (patterns * 65536 + noise).to(torch.int32).view(dtype)
        x = torch.cat([x, torch.tensor([math.inf, -math.inf, 0.0, -0.0]), torch.linspace(-12, 12, 1 << 16)])
    x = x[x.double().argsort()]  # NaN last
    low, found = nnf.gelu(x, approximate="tanh"), native.gelu_(x.clone())
    x64 = x.double()
    # Not torch's float64 GELU, whose 1 + tanh has no digits left below -8.
    oracle = x64 * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3))
    assert torch.equal(found.isnan(), low.isnan())
    assert torch.equal(found[x == math.inf], x[x == math.inf])
    assert torch.equal(found[x == 0].view(torch.uint8), x[x == 0].view(torch.uint8))  # the sign of zero
    finite = x.isfinite()
    binades = torch.where(x < 0, -1000, 1000) + torch.frexp(x.float()).exponent
    counts = binades[finite].unique_consecutive(return_counts=True)[1].tolist()
    assert len(counts) > 500
    for parts in zip(*(t[finite].split(counts) for t in (found, low, oracle, x)), strict=True):
        assert_within_budget(*parts[:3], f"gelu of {parts[3].min()} to {parts[3].max()}")


def test_rope_in_place_writes_q_and_k_alone(isa: str) -> None:
    for heads, width in ((4, 16), (3, 10)):
        qkv = make_input(2, 12, 3, heads, width)
        weights, angles = [make_input(heads * width, seed=s) for s in (1, 2)], rope_tables(width, 3)
        expected = native.qk_rope_forward(*qkv.unbind(2)[:2], *weights, *angles, (2, 3, 2), 0, EPS, False)
        heads_apart = qkv.transpose(1, 3).contiguous().transpose(1, 3)
        for packed in (qkv.clone(), heads_apart):
            q, k, v = packed.unbind(2)
            results = native.qk_rope_forward(q, k, *weights, *angles, (2, 3, 2), 0, EPS, True)
            assert results[0] is q and results[1] is k
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
            assert torch.equal(v, qkv[:, :, 2])


def test_supports() -> None:
    x = torch.zeros(2)
    assert native.supports(x, None, x.bfloat16())
    assert not any(native.supports(x, y) for y in (x.half(), x.double(), x.long(), torch.zeros(2, device="meta")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_slope_over_the_whole_range(isa: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-14, 14, 1 << 15), torch.tensor([3e38, -3e38, 1e-40, 0.0, 200.0, -200.0])]).to(dtype)
    leaf, leaf64 = x.clone().requires_grad_(), x.double().requires_grad_()
    (low,) = torch.autograd.grad(nnf.gelu(leaf, approximate="tanh").sum(), leaf)
    u = 2 * math.sqrt(2 / math.pi) * (leaf64 + 0.044715 * leaf64**3)
    (oracle,) = torch.autograd.grad((leaf64 * torch.sigmoid(u)).sum(), leaf64)
    found = native.gelu_backward(torch.ones_like(x), x)
    plain = x.abs() < 1e30  # torch's own overflows there
    assert_within_budget(found[plain], low[plain], oracle[plain])
    assert found[-6] == 1 and found[-5].abs() < 1e-30
