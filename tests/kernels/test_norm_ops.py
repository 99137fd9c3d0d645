"""residual_norm, gated_residual and rms_norm as operators: derivatives, fakes, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.testing import make_input

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDER = ("x", "y", "gate", "scale", "shift", "weight", "bias")
B, F, TOKENS, D = 2, 2, 2, 5
SHAPES = dict.fromkeys(("gate", "scale", "shift"), (B, F, D)) | dict.fromkeys(("x", "y"), (B, F * TOKENS, D))
FORMS: dict[str, tuple[str, ...]] = {
    "modulated": ORDER[:5],
    "affine": ("x", "y", "gate", "weight", "bias"),
    "ungated": ("x", "y", "weight", "bias"),
    "no y": ("x", "scale", "shift"),
    "bare": ("x",),
}


@pytest.fixture(autouse=True, params=["triton", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if reason := ops.backends()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    with ops.use(request.param):
        yield request.param


def inputs(names: tuple[str, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    return {
        name: make_input(*SHAPES.get(name, (D,)), seed=seed, dtype=dtype, device=device).requires_grad_()
        for seed, name in enumerate(ORDER)
        if name in names
    }


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def residual_norm(*tensors: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    given = dict(zip(names, tensors, strict=True))
    r, n = ops.residual_norm(given.pop("x"), **given)
    return (r, n) if "y" in names else (n,)


def gated_residual(*tensors: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    return (ops.gated_residual(**dict(zip(names, tensors, strict=True))),)


def rms_norm(*tensors: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    return (ops.rms_norm(*tensors),)


Case = tuple[Callable[..., tuple[Tensor, ...]], tuple[str, ...]]
CASES: dict[str, Case] = {f"residual_norm, {form}": (residual_norm, names) for form, names in FORMS.items()}
CASES |= {f"gated_residual, {form}": (gated_residual, ORDER[:n]) for form, n in (("gated", 3), ("ungated", 2))}
CASES |= {"rms_norm": (rms_norm, ("x", "weight"))}


@pytest.mark.parametrize("backend", ["triton"], indirect=True)  # native ops have no float64
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(backend: str, case: str) -> None:
    op, names = CASES[case]
    given = inputs(names, torch.float64, DEVICE)
    assert torch.autograd.gradcheck(lambda *t: op(*t, names=names), tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("case", ["residual_norm, modulated", "residual_norm, affine"])
def test_gradients_of_some_inputs(backend: str, case: str) -> None:
    """Each input's gradient is the same whether the others want theirs or are frozen."""
    op, names = CASES[case]
    given = inputs(names, torch.float32, device_of(backend))

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in given.items()}
        loss = sum(result.square().sum() for result in op(*leaves.values(), names=names))
        return dict(zip(wanted, torch.autograd.grad(loss, [leaves[name] for name in wanted]), strict=True))

    together = gradients(names)
    for name in names:
        torch.testing.assert_close(gradients((name,))[name], together[name], rtol=0, atol=0)


def test_opcheck(backend: str) -> None:
    namespace = torch.ops.pusa_fast
    for names in (FORMS["modulated"], FORMS["affine"], FORMS["no y"]):
        given = inputs(names, torch.float32, device_of(backend))
        torch.library.opcheck(namespace.residual_norm, (*(given.get(name) for name in ORDER), 1e-6, TOKENS, 0))
    given = inputs(ORDER, torch.float32, device_of(backend))
    for gate in (given["gate"], None):
        torch.library.opcheck(namespace.gated_residual, (given["x"], given["y"], gate, TOKENS, 0))
    torch.library.opcheck(namespace.rms_norm, (given["x"], given["weight"], 1e-6))


@pytest.mark.parametrize(
    "case", ["residual_norm, modulated", "residual_norm, no y", "gated_residual, gated", "rms_norm"]
)
def test_compiled_is_eager(backend: str, case: str) -> None:
    op, names = CASES[case]
    tensors = tuple(inputs(names, torch.float32, device_of(backend)).values())

    def run(function: Callable[..., Any]) -> tuple[Any, ...]:
        results = function(*tensors, names=names)
        return *results, *torch.autograd.grad(sum(result.square().sum() for result in results), tensors)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(op), rtol=0, atol=0)
