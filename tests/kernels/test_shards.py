"""Shards: a sequence cut at any token gives the bits of the whole, and its shared gradients add up.

Every row op in every form, forward and backward, on every backend. Where a frame's tokens are not
all in one shard, tokens_per_frame and first_token say which row a token gets; L // F would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.kernels import reference
from pusa_fast.model.rope import rope_tables
from pusa_fast.testing import assert_within_budget, make_input

# The clip's halves of 6 tokens divide by its 3 frames, as an eighth of 32,760 tokens, 4,095, does
# by 21: L // F would give 2 tokens to a frame, not 4.
B, F, TOKENS, D = 2, 3, 4, 20
L, GRID, HEADS = F * TOKENS, (F, 2, 2), 2
Tensors = dict[str, Tensor]
BY_TOKEN = ("x", "y", "qkv")
SIZES = {"x": (B, L, D), "y": (B, L, D), "qkv": (B, L, 3, HEADS, D // HEADS)}
SIZES |= dict.fromkeys(("gate", "scale", "shift"), (B, F, D))


class Case(NamedTuple):
    """`call(module, tensors, first)` of `ops` or the reference returns tensors [B, L, ...]."""

    call: Callable[[Any, Tensors, int], tuple[Tensor, ...]]
    names: tuple[str, ...]


def residual_norm(impl: Any, given: Tensors, first: int) -> tuple[Tensor, ...]:
    r, n = impl.residual_norm(**given, tokens_per_frame=TOKENS, first_token=first)
    return (r, n) if "y" in given else (n,)


def gated_residual(impl: Any, given: Tensors, first: int) -> tuple[Tensor, ...]:
    return (impl.gated_residual(**given, tokens_per_frame=TOKENS, first_token=first),)


def rms_norm(impl: Any, given: Tensors, first: int) -> tuple[Tensor, ...]:
    return (impl.rms_norm(given["x"], given["weight"]),)


def qk_rope(impl: Any, given: Tensors, first: int, **inplace: bool) -> tuple[Tensor, ...]:
    qkv, weight_q, weight_k = given.values()
    angles = (t.to(torch.promote_types(qkv.dtype, torch.float32)) for t in rope_tables(D // HEADS, max(GRID)))
    result: tuple[Tensor, ...] = impl.qk_rope(qkv, weight_q, weight_k, *angles, GRID, first_token=first, **inplace)
    return result


RESIDUALS = {"no y": (), "ungated": ("y",), "gated": ("y", "gate")}
NORMS = {"bare": (), "modulated": ("scale", "shift"), "affine": ("weight", "bias")}
CASES = {
    f"residual_norm, {r}, {n}": Case(residual_norm, ("x", *RESIDUALS[r], *NORMS[n])) for r in RESIDUALS for n in NORMS
}
CASES |= {f"gated_residual, {r}": Case(gated_residual, ("x", *RESIDUALS[r])) for r in ("ungated", "gated")}
CASES |= {"rms_norm": Case(rms_norm, ("x", "weight")), "qk_rope": Case(qk_rope, ("qkv", "weight_q", "weight_k"))}


@pytest.fixture(params=["reference", "triton", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if reason := ops.backends()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    with ops.use(request.param):
        yield request.param


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def inputs(names: tuple[str, ...], dtype: torch.dtype, device: str) -> Tensors:
    """Streams in `dtype`, tables and weights in float32."""
    return {
        name: make_input(
            *SIZES.get(name, (D,)), seed=seed, dtype=dtype if name in BY_TOKEN else torch.float32, device=device
        )
        for seed, name in enumerate(names)
    }


def part(given: Tensors, start: int, end: int) -> Tensors:
    return {name: t[:, start:end] if name in BY_TOKEN else t for name, t in given.items()}


def evaluate(impl: Any, case: Case, given: Tensors, start: int, end: int) -> tuple[tuple[Tensor, ...], Tensors]:
    """Outputs of tokens start .. end - 1, and each input's gradient for fixed output gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in part(given, start, end).items()}
    outputs = case.call(impl, leaves, start)
    wanted = (make_input(B, L, *out.shape[2:], seed=20 + i).to(out)[:, start:end] for i, out in enumerate(outputs))
    return outputs, dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), list(wanted)), strict=True))


def check(case: Case, given: Tensors, cuts: tuple[int, ...]) -> None:
    outputs, gradients = evaluate(ops, case, given, 0, L)
    bounds = zip((0, *cuts), (*cuts, L), strict=True)
    shards = [evaluate(ops, case, given, start, end) for start, end in bounds]
    for i, whole in enumerate(outputs):
        assert torch.equal(torch.cat([shard[0][i] for shard in shards], 1), whole), f"output {i}, cut at {cuts}"
    precise = {name: t.double() for name, t in given.items()}
    low, exact = (evaluate(reference, case, t, 0, L)[1] for t in (given, precise))
    for name, whole in gradients.items():
        pieces = [shard[1][name] for shard in shards]
        if name in BY_TOKEN:
            assert torch.equal(torch.cat(pieces, 1), whole), f"gradient of {name}, cut at {cuts}"
        else:
            # A weight's gradient sums over activations in the streams' dtype.
            coarse = next(t.dtype for t in given.values())
            assert_within_budget(sum(pieces).to(coarse), low[name].to(coarse), exact[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_a_sequence_cut_at_any_token_is_the_whole(backend: str, name: str, dtype: torch.dtype) -> None:
    given = inputs(CASES[name].names, dtype, device_of(backend))
    for cut in range(1, L):
        check(CASES[name], given, (cut,))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_a_cut_sequence_is_the_whole_in_triton(backend: str, name: str) -> None:
    """The interpreter is slow: a cut in a frame, a single token, half of the clip."""
    check(CASES[name], inputs(CASES[name].names, torch.bfloat16, device_of(backend)), (5, 6))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name", ["residual_norm, gated, modulated", "qk_rope"])
def test_single_tokens_are_the_whole_in_triton(backend: str, name: str) -> None:
    """Each token is once the first of a shard, and once the last."""
    check(CASES[name], inputs(CASES[name].names, torch.float32, device_of(backend)), tuple(range(1, L)))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("residual_norm")])
def test_fp8_rows_of_a_cut_sequence(backend: str, name: str) -> None:
    if backend == "native":
        pytest.skip("no native code for fp8")

    def rows(start: int, end: int) -> list[Tensor]:
        shard = part(given, start, end)
        r, (q, scale) = ops.residual_norm_fp8(**shard, tokens_per_frame=TOKENS, first_token=start)
        return [r, q.view(torch.uint8), scale]

    given = inputs(CASES[name].names, torch.bfloat16, device_of(backend))
    whole = rows(0, L)
    for cut in (5, 6):
        for shards, expected in zip(zip(rows(0, cut), rows(cut, L), strict=True), whole, strict=True):
            assert torch.equal(torch.cat(shards, 1), expected)


def test_rotation_in_place_of_a_cut_sequence(backend: str) -> None:
    given = inputs(CASES["qk_rope"].names, torch.bfloat16, device_of(backend))
    expected = torch.stack(qk_rope(ops, given, 0), 2)
    for cut in (5, 6):
        qkv = given["qkv"].clone()
        for start, end in ((0, cut), (cut, L)):
            qk_rope(ops, given | {"qkv": qkv[:, start:end]}, start, inplace=True)
        assert torch.equal(qkv, expected)
