"""The gate of correctness: what computes something else is reported and not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pusa_fast
from pusa_fast.commands import bench as command

registry, providers, timing, harness, run_ops = (
    command.load(name) for name in ("registry", "providers", "timing", "harness", "run_ops")
)

CPU = torch.device("cpu")
TINY = registry.SHAPES["tiny"]


# The gate.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", list(registry.OPS.values()), ids=lambda op: op.name)
def test_every_formulation_computes_the_op(op: Any, dtype: torch.dtype) -> None:
    found = providers.candidates(op, CPU, quick=True)
    rows, runs = run_ops.gate(op, found, registry.Drawn(TINY, dtype, CPU))
    assert not [row for row in rows.values() if row["status"] == "failed"], rows
    assert {"pusa", "eager"} <= runs.keys()
    wanted = {name for name, entries in providers.FORMULATIONS.items() if op.name in entries}
    assert wanted <= runs.keys()
    assert all(rows[name]["error"] <= rows[name]["budget"] for name in runs)


def _broken(how: Callable[[Tensor], Tensor]) -> Any:
    """rms_norm by a formulation that is off by `how`."""

    def make(t: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (how(pusa_fast.kernels.reference.rms_norm(t["x"], t["weight"], registry.EPS)),)

    return providers.Candidate(providers.Formulation(make))


def _nan(n: Tensor) -> Tensor:
    n[0, -1, 0] = torch.nan
    return n


def _last_frame(n: Tensor) -> Tensor:
    n[:, -1] *= 1.1
    return n


def _raises(n: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal\nmemory access")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda n: n * 1.01, "output 0, frame 0: largest error"),
        (_last_frame, "output 0, frame 1: largest error"),
        (_nan, "frame 1: largest error nan"),
        (lambda n: n.double(), "output 0 is torch.float64 instead of torch.float32"),
        (lambda n: torch.empty_like(n), "largest error"),
        (_raises, "RuntimeError: CUDA error: an illegal memory access"),
    ],
    ids=["wrong", "last frame", "nan", "dtype", "unwritten", "raises"],
)
def test_a_broken_provider_does_not_pass_the_gate(how: Callable[[Tensor], Tensor], reason: str) -> None:
    rows, runs = run_ops.gate(
        registry.OPS["rms_norm"], {"broken": _broken(how)}, registry.Drawn(TINY, torch.float32, CPU)
    )
    assert rows["broken"]["status"] == "failed" and reason in rows["broken"]["reason"]
    assert not runs


def test_a_broken_provider_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, measure, timed = providers.candidates, timing.measure, []
    monkeypatch.setattr(run_ops, "candidates", lambda *given: {**real(*given), "broken": _broken(_last_frame)})
    monkeypatch.setattr(
        run_ops, "measure", lambda runs, *rest, **named: timed.extend(runs) or measure(runs, *rest, **named)
    )
    result = harness.execute("ops", harness.Options("cpu", True, ops=("rms_norm",), dtypes=("fp32",)))
    rows = {row["provider"]: row for row in result["rows"]}
    assert rows["broken"]["status"] == "failed" and "exceeds the budget" in rows["broken"]["reason"]
    assert "median_us" not in rows["broken"] and "broken" not in timed
    assert rows["pusa"]["status"] == "ok" and rows["pusa"]["median_us"] > 0 and "pusa" in timed


def test_memory_is_poisoned_before_a_provider_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that nobody wrote would often hold what the provider before computed."""
    order: list[str] = []
    monkeypatch.setattr(providers, "_poison", lambda _: order.append("poison"))
    op, t = registry.OPS["gelu"], registry.Drawn(TINY, torch.float32, CPU)
    right = pusa_fast.kernels.reference.gelu(t["hidden"])
    providers.check(op, timing.Run(lambda: order.append("call") or (right,)), t, providers.truths(op, t))
    assert order == ["poison", "call"]


def test_an_op_in_place_is_given_fresh_inputs_every_time() -> None:
    op, t = registry.OPS["qk_rope_inplace"], registry.Drawn(TINY, torch.float32, CPU)
    before = t["qkv"].clone()
    built = providers.build(op, providers.candidates(op, CPU, True)["pusa"], t)
    first = [x.clone() for x in built.call()]
    built.reset()
    assert all(torch.equal(a, b) for a, b in zip(first, built.call(), strict=True))
    assert torch.equal(t["qkv"], before)


def test_torch_compile_is_a_provider() -> None:
    op = registry.OPS["rms_norm"]
    assert providers.candidates(op, CPU, quick=True)["torch.compile"].reason is not None
    assert providers.candidates(op, CPU, quick=False)["torch.compile"].formulation is not None
