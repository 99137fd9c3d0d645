"""Who computes an op, and whether the result is right: candidates by name, and the correctness gate
before any timing.

The gate runs a candidate on the whole shape and compares the first and the last latent frame (the
last one's offsets are the largest) with `kernels/reference.py` in float64, within the error budget
of `pusa_fast.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor

from bench.formulations import FORMULATIONS, Call, Formulation
from bench.public_kernels import LIBRARIES
from bench.registry import Drawn, Inputs, Op, Outputs, along, frame_of
from bench.timing import Run
from pusa_fast import ops
from pusa_fast.kernels import reference
from pusa_fast.testing import error_budget, max_error

Scope = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Candidate:
    """`formulation` None: cannot run here, for this `reason`. `scope` surrounds every call."""

    formulation: Formulation | None
    reason: str | None = None
    scope: Scope = nullcontext


def known_providers() -> list[str]:
    """Every provider's name, in the order of the tables."""
    backends = [f"pusa[{name}]" for name in ops.BACKENDS if name != "reference"]
    return ["pusa", *backends, "eager", "torch.compile", *reversed(FORMULATIONS), *LIBRARIES]


def candidates(op: Op, device: torch.device, quick: bool) -> dict[str, Candidate]:
    """Everyone who can be asked for `op`, usable here or not."""
    found = {"pusa": Candidate(_ours(op))}
    for name, reason in ops.backends().items():
        if name != "reference":  # plain torch through our own checks: eager shows it
            reason = reason or _misplaced(name, op, device)
            found[f"pusa[{name}]"] = Candidate(None if reason else _ours(op), reason, lambda name=name: ops.use(name))
    found["eager"] = Candidate(Formulation(lambda t: lambda: op.body(reference, t)))
    left_out = "left out by --quick, it compiles for seconds" if quick else None
    found["torch.compile"] = Candidate(None if quick else Formulation(lambda t: _compiled(op, t)), left_out)
    for name, entries in reversed(FORMULATIONS.items()):
        if op.name in entries:
            found[name] = Candidate(entries[op.name])
    for name, library in LIBRARIES.items():
        if op.name in library.entries:
            reason = library.reason()
            found[name] = Candidate(None if reason else library.entries[op.name], reason)
    return found


def _ours(op: Op) -> Formulation:
    return Formulation(lambda t: lambda: op.body(ops, t))


def _misplaced(backend: str, op: Op, device: torch.device) -> str | None:
    """A backend may be usable in this process without being meant for this device."""
    if backend == "triton" and device.type == "cpu":
        return "the interpreter on the CPU says nothing about speed"
    if backend == "native" and (device.type != "cpu" or op.fp8 or not op.native):
        return "CPU only" if device.type != "cpu" else f"no native code for {'fp8' if op.fp8 else op.name}"
    return None


def _compiled(op: Op, t: Inputs) -> Call:
    torch._dynamo.reset()
    if not torch.cuda.is_available():
        torch._inductor.config.compile_threads = 1  # idle compiler processes would share the cores with what is timed
    # A derivative taken again and again from one graph may not have its buffers reused.
    torch._functorch.config.donated_buffer = False
    compiled = torch.compile(lambda plain: op.body(reference, plain), dynamic=False)
    inputs = {name: t[name] for name in (*op.reads, "grid")}
    return lambda: compiled(inputs)


def build(op: Op, candidate: Candidate, t: Drawn) -> Run:
    """A candidate on these inputs, ready to be called again and again."""
    assert candidate.formulation is not None
    formulation, scope = candidate.formulation, candidate.scope
    if op.leaves:
        return Run(_derivative(op, formulation, scope, t))
    own = t.replaced(**{name: t[name].clone() for name in op.mutates})
    call = formulation.make(own)

    def run() -> Outputs:
        with scope(), torch.no_grad():
            return call()

    def reset() -> None:
        for name in op.mutates:
            own[name].copy_(t[name])

    return Run(run, reset if op.mutates else None)


def _derivative(op: Op, formulation: Formulation, scope: Scope, t: Inputs) -> Call:
    """Gradients by the leaves, from a forward pass that ran once."""
    assert isinstance(t, Drawn)
    names = formulation.leaves or op.leaves
    leaves = {name: t[name].detach().requires_grad_() for name in names}
    with scope(), torch.enable_grad():
        outputs = formulation.make(t.replaced(**leaves))()
    grads = [t[name] for name in op.grads[: len(outputs)]]

    def call() -> Outputs:
        with scope():
            found = torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True)
        return found[0].unbind(2)[:2] if names == ("qkv",) else found

    return call


@dataclass(frozen=True)
class Truth:
    """Of one frame: the result in float64, and plain torch's in the run's dtype."""

    frame: int
    oracle: Outputs
    low: Outputs


def truths(op: Op, t: Drawn) -> list[Truth]:
    return [_truth(op, t, frame) for frame in sorted({0, t.shape.grid[0] - 1})]


def _truth(op: Op, t: Drawn, frame: int) -> Truth:
    grid = t["grid"]
    part = {name: frame_of(name, t[name], frame, grid) for name in op.reads}
    both: list[Outputs] = []
    for dtype in (torch.float64, None):
        cast = {name: value if dtype is None else value.to(dtype) for name, value in part.items()}
        inputs = Drawn(t.shape, t.dtype, t.device, {**cast, "grid": (1, *grid[1:])})
        exact = op.oracle if dtype is not None else None
        body: Callable[[Inputs], Outputs] = exact or (lambda inputs: op.body(reference, inputs))
        candidate = Candidate(Formulation(lambda inputs, body=body: lambda: body(inputs)))
        outputs = build(op, candidate, inputs).call()
        both.append(tuple(outputs) if exact else tuple(op.view(outputs)))
    return Truth(frame, both[0], both[1])


def check(op: Op, run: Run, t: Drawn, expected: list[Truth]) -> dict[str, float]:
    """{"error", "budget"} of the output closest to its budget. Raises AssertionError where one
    exceeds it, or is no number."""
    if run.reset is not None:
        run.reset()
    _poison(t)
    outputs = tuple(op.view(run.call()))
    if len(outputs) < len(op.outputs):
        raise AssertionError(f"{len(outputs)} outputs instead of {len(op.outputs)}")
    closest = {"error": 0.0, "budget": 1.0}
    for truth, at, error, budget in _errors(op, outputs, t, expected):
        if not error <= budget:
            raise AssertionError(
                f"output {at}, frame {truth.frame}: largest error {error:.3e} exceeds the budget {budget:.3e}"
            )
        if error * closest["budget"] >= closest["error"] * budget:
            closest = {"error": error, "budget": budget}
    return closest


def _errors(op: Op, outputs: Outputs, t: Drawn, expected: list[Truth]) -> Iterator[tuple[Truth, int, float, float]]:
    for truth in expected:
        for at, (axis, oracle, low) in enumerate(zip(op.outputs, truth.oracle, truth.low, strict=True)):
            value = along(axis, outputs[at], truth.frame, t["grid"])
            if value.dtype != low.dtype:
                raise AssertionError(f"output {at} is {value.dtype} instead of {low.dtype}")
            # A float32 gradient of tables sums over activations that the forward pass saved in the
            # run's dtype.
            yield truth, at, max_error(value, oracle), error_budget(low.to(t.dtype) if op.leaves else low, oracle)


def _poison(t: Drawn) -> None:
    """Leave NaN in the memory that outputs are likely to get, so that what a kernel does not write
    shows."""
    held: list[Tensor] = [
        torch.full((t.shape.tokens, t.shape.dim), torch.nan, dtype=t.dtype, device=t.device) for _ in range(3)
    ]
    held.clear()


def failure(error: Exception) -> str:
    """One line for the result file."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def usable(found: Mapping[str, Candidate], wanted: tuple[str, ...]) -> dict[str, Candidate]:
    """The candidates that were asked for; all of them where none was named."""
    return {name: candidate for name, candidate in found.items() if not wanted or name in wanted}
