"""Which implementation serves an op: Triton on CUDA, native code on the CPU (float32, bf16), plain torch otherwise."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

from pusa_fast.ops import native

_NATIVE_REASON = native.available()


def _probe_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device: set TRITON_INTERPRET=1 before starting to run the kernels in Triton's interpreter"
    return None


@dataclass(frozen=True)
class Backend:
    """`probe` says why this machine cannot use it (None: it can); `module` holds its launchers, None: plain torch."""

    probe: Callable[[], str | None]
    module: str | None


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "triton": Backend(_probe_triton, "pusa_fast.kernels.suite"),
        "native": Backend(lambda: _NATIVE_REASON, "pusa_fast.ops.native"),
        "reference": Backend(lambda: None, None),
    }
)

_forced: str | None = None
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def backends() -> dict[str, str | None]:
    """Every backend by name, with the reason this machine cannot use it, or None where it can."""
    return {name: backend.probe() for name, backend in BACKENDS.items()}


@contextmanager
def use(name: str, probe: bool = True) -> Iterator[None]:
    """Force the backend `name` inside this context, for the whole process: a switch for tests and measurements.

    Raises ValueError for an unknown or unavailable backend. "triton" runs on the CPU under TRITON_INTERPRET=1. `probe` False
    takes one that is not there, for tensors on the meta device, of which operators only ask the shapes.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"ops backend {name!r} does not exist: choose one of {', '.join(BACKENDS)}")
    if probe and (reason := BACKENDS[name].probe()):
        raise ValueError(f"ops backend {name!r} cannot be used: {reason}")
    # A plain global, since torch.compile guards on one and breaks its graph at a ContextVar.
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def chosen(x: Tensor, *others: Tensor | None) -> str:
    """The name of the backend for an op on these tensors. Traceable: torch.compile sees constants."""
    return _automatic(x, *others) if _forced is None else _forced


def _automatic(x: Tensor, *others: Tensor | None) -> str:
    if x.is_cuda:
        return "triton" if _HAS_TRITON else "reference"
    if _NATIVE_REASON is None and native.supports(x, *others):
        return "native"
    return "reference"


@contextmanager
def launchers(x: Tensor, *others: Tensor | None) -> Iterator[ModuleType]:
    """The module of launchers for these tensors, their device made current: Triton launches on that one, whatever it gets."""
    name = chosen(x, *others)
    if (
        name == "reference"
    ):  # forced now, but the forward pass of this backward pass, or a direct caller, chose an operator
        name = _automatic(x, *others)
    module = BACKENDS[name].module
    if module is None:
        raise ValueError(
            f"no kernel of torch.ops.pusa_fast takes {x.dtype} on {x.device} here: call pusa_fast.ops, which falls back "
            "to plain torch"
        )
    if name == "native" and not native.supports(x, *others):
        dtypes = ", ".join(str(t.dtype) for t in (x, *others) if t is not None)
        raise ValueError(f"native ops take float32 and bfloat16 on the CPU, got {dtypes} on {x.device}")
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        yield importlib.import_module(module)
