"""The reference ops against formulas written token by token, in float64 and within budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.kernels import reference
from pusa_fast.model.rope import rope_tables
from pusa_fast.testing import assert_within_budget, make_input, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 17), (1, 7, 1, 33), (2, 2, 3, 96)]  # B, F, tokens per frame, D
FORMS: dict[str, tuple[str, ...]] = {
    "modulated": ("y", "gate", "scale", "shift"),
    "affine": ("y", "gate", "weight", "bias"),
    "ungated": ("y", "scale", "shift"),
    "first block": ("scale", "shift"),
    "bare": (),
}


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with ops.use("reference"):
        yield


def naive_residual_norm(x: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    """Tables expanded to tokens, one torch operation per step, each rounded to x's dtype."""
    rows = [n // (x.shape[1] // given["scale"].shape[1]) for n in range(x.shape[1])] if "scale" in given else []
    if "gate" in given:
        rows = [n // (x.shape[1] // given["gate"].shape[1]) for n in range(x.shape[1])]
    r = x
    if "y" in given:
        r = x + (given["gate"][:, rows] * given["y"] if "gate" in given else given["y"])
    centred = r - r.mean(-1, keepdim=True)
    n = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)
    if "scale" in given:
        n = n * (1 + given["scale"][:, rows]) + given["shift"][:, rows]
    if "weight" in given:
        n = n * given["weight"] + given["bias"]
    return r, n


def norm_inputs(form: str, shape: tuple[int, int, int, int], dtype: torch.dtype, padded: bool) -> dict[str, Tensor]:
    B, F, tokens, D = shape
    sizes = {"x": (B, F * tokens, D), "y": (B, F * tokens, D), "weight": (D,), "bias": (D,)}
    names = ("x", *FORMS[form])
    return {
        name: make_input(*sizes.get(name, (B, F, D)), seed=seed, dtype=dtype, padded=padded)
        for seed, name in enumerate(names)
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_residual_norm_is_the_formula(form: str, shape: tuple[int, int, int, int]) -> None:
    given = norm_inputs(form, shape, torch.float64, padded=True)
    for result, expected in zip(ops.residual_norm(**given), naive_residual_norm(**given), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_residual_norm_is_within_budget(form: str, padded: bool, dtype: torch.dtype) -> None:
    given = norm_inputs(form, (2, 3, 5, 65), dtype, padded)
    oracle = naive_residual_norm(**{name: t.double() for name, t in given.items()})
    for result, low, exact in zip(ops.residual_norm(**given), naive_residual_norm(**given), oracle, strict=True):
        assert result.dtype == dtype
        assert_within_budget(result, low, exact, form)


def test_residual_norm_takes_float32_tables_and_another_dtype_for_y() -> None:
    """What the transformer passes: a bf16 stream; with autocast an fp32 stream and bf16 matmuls."""
    for stream, product in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        x, y = make_input(2, 6, 8, dtype=stream), make_input(2, 6, 8, seed=1, dtype=product)
        gate, scale, shift = (make_input(2, 3, 8, seed=seed) for seed in (2, 3, 4))
        r, n = ops.residual_norm(x, y, gate, scale=scale, shift=shift)
        exact = naive_residual_norm(
            **{k: t.double() for k, t in {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift}.items()}
        )
        assert r.dtype == n.dtype == stream
        assert relative_error(n, exact[1]) < 2 * torch.finfo(stream).eps


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = make_input(2, 5, 33, dtype=dtype, padded=True), make_input(33, seed=1, dtype=dtype)

    def naive(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    assert_within_budget(ops.rms_norm(x, weight), naive(x, weight), naive(x.double(), weight.double()))


def naive_qk_rope(qkv: Tensor, weights: tuple[Tensor, Tensor], grid: tuple[int, int, int]) -> list[Tensor]:
    """Each pair of columns as a complex number, turned by the angle of its axis: float64."""
    _, L, _, H, K = qkv.shape
    F, h, w = grid
    out = []
    for x, weight in zip(qkv.double().unbind(2), weights, strict=False):
        flat = x.reshape(x.shape[0], L, H * K)
        flat = flat / torch.sqrt((flat * flat).mean(-1, keepdim=True) + 1e-6) * weight.double()
        pairs = torch.view_as_complex(flat.reshape(x.shape[0], L, H, K // 2, 2).contiguous())
        third = 2 * (K // 6)
        turned = torch.empty_like(pairs)
        for n in range(L):
            positions = (n // (h * w), n // w % h, n % w)
            angles = [
                p * 10000.0 ** (-2 * j / d)
                for p, d in zip(positions, (K - 2 * third, third, third), strict=True)
                for j in range(d // 2)
            ]
            turned[:, n] = pairs[:, n] * torch.polar(
                torch.ones(K // 2, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64)
            )
        out.append(torch.view_as_real(turned).flatten(-2))
    assert F * h * w == L
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 6), (2, 16), (2, 20), (1, 64)])
def test_qk_rope_is_the_formula(heads: int, width: int, padded: bool) -> None:
    grid = (3, 2, 5)
    qkv = make_input(2, 30, 3, heads, width, dtype=torch.float64, padded=padded)
    weights = (
        make_input(heads * width, seed=1, dtype=torch.float64),
        make_input(heads * width, seed=2, dtype=torch.float64),
    )
    results = ops.qk_rope(qkv, *weights, *rope_tables(width, 7), grid)
    assert results[2].data_ptr() == qkv[:, :, 2].data_ptr()
    for result, expected in zip(results[:2], naive_qk_rope(qkv, weights, grid), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)  # the tables are float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_rope_is_within_budget(dtype: torch.dtype) -> None:
    grid, heads, width = (2, 3, 2), 3, 20
    qkv = make_input(2, 12, 3, heads, width, dtype=dtype)
    weights = tuple(make_input(heads * width, seed=s, dtype=dtype) for s in (1, 2))
    tables = tuple(table.to(dtype) for table in rope_tables(width, 3))

    def step_by_step(qkv: Tensor, weights: Any, tables: Any) -> list[Tensor]:
        """Every intermediate rounded to the dtype of the inputs."""
        half = [d // 2 for d in reference.rope_split(width)]
        cos, sin = (
            torch.stack(
                [
                    torch.cat([t[p, a:b] for p, a, b in zip((n // 6, n // 2 % 3, n % 2), starts, ends, strict=True)])
                    for n in range(12)
                ]
            )
            for t in tables
            for starts, ends in [((0, half[0], half[0] + half[1]), (half[0], half[0] + half[1], width // 2))]
        )
        out = []
        for x, weight in zip(qkv.unbind(2), weights, strict=False):
            flat = x.flatten(2)
            n = (flat * torch.rsqrt((flat * flat).mean(-1, keepdim=True) + 1e-6) * weight).view_as(x)
            re, im = n[..., 0::2], n[..., 1::2]
            c, s = cos[:, None], sin[:, None]
            out.append(torch.stack((re * c - im * s, re * s + im * c), -1).flatten(-2))
        return out

    lows = step_by_step(qkv, weights, tables)
    oracles = step_by_step(qkv.double(), [w.double() for w in weights], [t.double() for t in tables])
    for result, low, oracle in zip(ops.qk_rope(qkv, *weights, *tables, grid)[:2], lows, oracles, strict=True):
        assert_within_budget(result, low, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_leaves_frozen_frames_bit_for_bit(dtype: torch.dtype) -> None:
    x, v, v_neg = (
        make_input(2, 3, 4, 2, 5, seed=s, dtype=d) for s, d in ((0, dtype), (1, torch.bfloat16), (2, torch.bfloat16))
    )
    dsigma = torch.tensor([0.0, -0.25, -0.0, -0.5])
    x[:, :, 0] = -0.0
    x[:, 0, 2] = math.nan
    v[:, :, 0], v[:, :, 2], v_neg[:, :, 2] = math.nan, math.inf, math.inf
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for negative in (None, v_neg):
        out = ops.guided_euler_step(x, v, negative, 3.0, dsigma)
        assert torch.equal(out[:, :, [0, 2]].view(bits), x[:, :, [0, 2]].view(bits))
        velocity = v.double() if negative is None else negative.double() + 3.0 * (v.double() - negative.double())
        exact = x.double() + velocity * dsigma.double()[:, None, None]
        assert relative_error(out[:, :, [1, 3]], exact[:, :, [1, 3]]) < 2 * torch.finfo(dtype).eps


def test_step_guidance_one_takes_the_positive_velocity() -> None:
    x, v, v_neg = (make_input(1, 2, 3, 2, 2, seed=s, dtype=torch.float64) for s in range(3))
    dsigma = torch.tensor([-0.1, -0.2, -0.3], dtype=torch.float64)
    torch.testing.assert_close(
        ops.guided_euler_step(x, v, v_neg, 1.0, dsigma), ops.guided_euler_step(x, v, None, 7.0, dsigma)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    given = norm_inputs("modulated", (2, 3, 5, 65), dtype, padded=False)
    qkv = make_input(2, 12, 3, 2, 8, dtype=dtype)
    rope = (make_input(16, seed=1), make_input(16, seed=2), *rope_tables(8, 3), (2, 3, 2))
    x, v, v_neg = (make_input(1, 2, 3, 4, 4, seed=seed, dtype=dtype) for seed in range(3))
    dsigma = torch.tensor([-0.1, -0.2, -0.3])
    pairs = [
        (ops.residual_norm(**given), ops.residual_norm(**{name: t.float() for name, t in given.items()})),
        (ops.qk_rope(qkv, *rope), ops.qk_rope(qkv.float(), *rope)),
        ([ops.rms_norm(qkv, torch.ones(8))], [ops.rms_norm(qkv.float(), torch.ones(8))]),
        (
            [ops.guided_euler_step(x, v, v_neg, 3.0, dsigma)],
            [ops.guided_euler_step(x.float(), v.float(), v_neg.float(), 3.0, dsigma)],
        ),
    ]
    for low, exact in pairs:
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(low, exact, strict=True))


def test_empty_batch() -> None:
    x, table = torch.empty(0, 6, 8), torch.empty(0, 3, 8)
    assert [t.shape for t in ops.residual_norm(x, x, table, scale=table, shift=table)] == [x.shape, x.shape]
    assert ops.rms_norm(x, torch.ones(8)).shape == x.shape
    q, k, _ = ops.qk_rope(torch.empty(0, 6, 3, 2, 4), torch.ones(8), torch.ones(8), *rope_tables(4, 3), (3, 1, 2))
    assert q.shape == k.shape == (0, 6, 2, 4)
    latents = torch.empty(0, 2, 3, 4, 4)
    assert ops.guided_euler_step(latents, latents, latents, 2.0, torch.zeros(3)).shape == latents.shape


X, ROWS, D = torch.zeros(2, 6, 4), torch.zeros(2, 3, 4), torch.ones(4)
QKV, TABLE, V = torch.zeros(1, 6, 3, 2, 4), torch.zeros(3, 2), torch.zeros(1, 2, 3, 4, 4)
BAD: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], str]] = {
    "rank": (ops.residual_norm, (X[0],), {}, r"x must be \[B, L, D\]"),
    "ints": (ops.residual_norm, (X.long(),), {}, "x must be a float tensor"),
    "y": (ops.residual_norm, (X, X[:, :3]), {}, "y must have x's shape"),
    "gate alone": (ops.residual_norm, (X, None, ROWS), {}, "without y"),
    "scale alone": (ops.residual_norm, (X,), {"scale": ROWS}, "give both"),
    "weight alone": (ops.residual_norm, (X,), {"weight": D}, "give both"),
    "both pairs": (ops.residual_norm, (X,), {"scale": ROWS, "shift": ROWS, "weight": D, "bias": D}, "not both pairs"),
    "frames": (ops.residual_norm, (X[:, :5],), {"scale": ROWS, "shift": ROWS}, "5 tokens do not divide into 3 frames"),
    "past the frames": (
        ops.gated_residual,
        (X, X, ROWS),
        {"tokens_per_frame": 2, "first_token": 1},
        "no row for some of the 6 tokens from first_token 1",
    ),
    "a shard of what": (ops.gated_residual, (X, X, ROWS), {"first_token": 3}, "first_token 3 needs tokens_per_frame"),
    "two Fs": (ops.residual_norm, (X, X, ROWS[:, :1]), {"scale": ROWS, "shift": ROWS}, "one F for all tables"),
    "per token": (ops.residual_norm, (X,), {"scale": ROWS[0], "shift": ROWS[0]}, "scale must be"),
    "weight": (ops.residual_norm, (X,), {"weight": D[:3], "bias": D}, r"weight must be \[D=4\]"),
    "rms": (ops.rms_norm, (X, D[:3]), {}, "must match x's last dimension"),
    "unpacked": (ops.qk_rope, (QKV[:, :, 0], D, D, TABLE, TABLE, (1, 2, 3)), {}, "qkv must be"),
    "grid": (ops.qk_rope, (QKV, torch.ones(8), torch.ones(8), TABLE, TABLE, (1, 2, 2)), {}, "does not hold 6 tokens"),
    "past the grid": (
        ops.qk_rope,
        (QKV, torch.ones(8), torch.ones(8), TABLE, TABLE, (2, 2, 2)),
        {"first_token": 3},
        "does not hold 6 tokens from first_token 3",
    ),
    "qk weight": (ops.qk_rope, (QKV, D, torch.ones(8), TABLE, TABLE, (1, 2, 3)), {}, r"weight_q must be \[H\*K=8\]"),
    "table": (ops.qk_rope, (QKV, torch.ones(8), torch.ones(8), TABLE, TABLE[:2], (1, 2, 3)), {}, "sin must be"),
    "odd": (ops.qk_rope, (QKV[..., :3], torch.ones(6), torch.ones(6), TABLE, TABLE, (1, 2, 3)), {}, "must be even"),
    "latents": (ops.guided_euler_step, (V[0], V[0], None, 1.0, D), {}, r"x must be \[B, C, F, h, w\]"),
    "device": (
        ops.residual_norm,
        (X,),
        {"weight": D.to("meta"), "bias": D},
        "weight is on meta, but the op runs on cpu",
    ),
    "rms device": (ops.rms_norm, (X, D.to("meta")), {}, "weight is on meta"),
    "tables": (
        ops.qk_rope,
        (QKV, torch.ones(8), torch.ones(8), TABLE, torch.zeros(4, 2), (1, 2, 3)),
        {},
        "sin must have cos's shape",
    ),
    "velocity": (ops.guided_euler_step, (V, V, V[:, :1], 1.0, D[:3]), {}, "v_neg must be"),
    "dsigma": (ops.guided_euler_step, (V, V, None, 1.0, D), {}, r"dsigma must be \[F=3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    op, args, kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        op(*args, **kwargs)


def test_use_forces_a_backend_and_refuses_an_unknown_one() -> None:
    with ops.use("reference"):
        assert torch.equal(ops.rms_norm(X + 1, D), reference.rms_norm(X + 1, D))
    with (
        pytest.raises(ValueError, match=r"'cuda' does not exist: choose one of triton, native, reference"),
        ops.use("cuda"),
    ):
        pass


def test_in_place_rotation_is_for_inference() -> None:
    qkv = make_input(1, 6, 3, 2, 4)
    rope = (torch.ones(8), torch.ones(8), *rope_tables(4, 3), (3, 1, 2))
    with pytest.raises(ValueError, match="inplace has no derivative"):
        ops.qk_rope(qkv.requires_grad_(), *rope, inplace=True)
    with torch.no_grad():
        expected = ops.qk_rope(qkv, *rope)
        for result, wanted in zip(ops.qk_rope(qkv, *rope, inplace=True), expected, strict=True):
            assert (
                torch.equal(result, wanted) and result.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
            )
    with pytest.raises(ValueError, match="expanded memory"):
        ops.qk_rope(qkv.detach().expand(3, -1, -1, -1, -1), *rope, inplace=True)
