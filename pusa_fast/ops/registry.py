"""The only place that chooses what serves an op, and how an op becomes `torch.ops.pusa_fast.*`.

Triton serves CUDA tensors, native code float32 and bf16 on the CPU, plain torch everything else.
A public function chooses once. It then calls its `Op`, which runs the chosen launcher directly, or
as an operator of torch where something observes the call: autograd, tracing, a mode, functorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from pusa_fast.native import rows as native
from pusa_fast.native import tiles

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_NATIVE_REASON = native.available()


def _probe_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device: set TRITON_INTERPRET=1 before starting to run the kernels in Triton's interpreter"
    return None


@dataclass(frozen=True)
class Backend:
    """`probe` says why this machine cannot use it (None: it can); `module` has its launchers, None:
    plain torch."""

    probe: Callable[[], str | None]
    module: str | None


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "triton": Backend(_probe_triton, "pusa_fast.kernels.suite"),
        "native": Backend(lambda: _NATIVE_REASON, "pusa_fast.native.rows"),
        "reference": Backend(lambda: None, None),
    }
)

_forced: str | None = None


def backends() -> dict[str, str | None]:
    """Every backend by name, with the reason this machine cannot use it, or None if it can."""
    return {name: backend.probe() for name, backend in BACKENDS.items()}


@contextmanager
def use(name: str, probe: bool = True) -> Iterator[None]:
    """Force the backend `name` inside this context, for the whole process: a switch for tests and
    measurements.

    Raises ValueError for an unknown or unavailable backend. "triton" runs on the CPU under
    TRITON_INTERPRET=1. `probe` False accepts an unavailable one: for tensors on the meta device, of
    which operators only ask the shapes.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"ops backend {name!r} does not exist: choose one of {', '.join(BACKENDS)}")
    if probe and (reason := BACKENDS[name].probe()):
        raise ValueError(f"ops backend {name!r} cannot be used: {reason}")
    # A plain global: torch.compile guards on one, and breaks its graph at a ContextVar.
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(x: Tensor, *others: Tensor | None, only: str | None = None) -> str:
    """The backend of an op whose streams these tensors are. Traceable: torch.compile sees
    constants.

    `only`: the one backend that has kernels for the op. Raises ValueError if "native" is forced,
    has kernels for the op, and does not take these tensors.
    """
    name = _forced
    if name is None:
        name = ("triton" if _HAS_TRITON else "reference") if x.is_cuda else "native"
        if name == "native" and (_NATIVE_REASON is not None or not native.supports(x, *others)):
            name = "reference"
    elif name == "native" and only != "triton" and not native.supports(x, *others):
        if only == "native":
            return "reference"
        if not x.is_meta:
            dtypes = ", ".join(str(t.dtype) for t in (x, *others) if t is not None)
            raise ValueError(f"native ops take float32 and bfloat16 on the CPU, got {dtypes} on {x.device}")
    return name if only in (None, name) else "reference"


def choose_tiles(out: Tensor, placed: tiles.Places) -> str:
    """The backend of `blend_box_`: "native", which serves CUDA too, or "reference"."""
    return "native" if _forced != "reference" and tiles.supports(out, placed) else "reference"


def _onednn_bf16() -> bool:
    """Whether oneDNN multiplies bf16 here, and this torch lets us call its linear layer."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


ONEDNN_BF16 = _onednn_bf16()


def recording(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def choose_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """What multiplies x [..., I] by weight [O, I]: "cublaslt", "onednn", both with an epilogue, or
    "torch".

    Inductor picks matmuls itself, and knows oneDNN's with constant weights only.
    """
    kind = x.device.type
    if recording(x, weight, bias) or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return "torch"
    if _forced == "triton" or (_forced is None and x.is_cuda and _HAS_TRITON):
        return "torch" if x.is_cpu else "cublaslt"
    if not ONEDNN_BF16 or _forced == "reference" or _NATIVE_REASON is not None or torch.compiler.is_compiling():
        return "torch"
    bf16 = x.dtype == weight.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)
    fits = bf16 and x.is_cpu and x.numel() > 0 and x.shape[-1] == weight.shape[-1]
    return "onednn" if fits and torch._C._get_mkldnn_enabled() else "torch"


def onednn_convolves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves tensors of this kind and can add to its result."""
    supported = dtype == torch.float32 or (dtype == torch.bfloat16 and ONEDNN_BF16)
    entries = hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
    return device.type == "cpu" and entries and supported and bool(torch._C._get_mkldnn_enabled())


def fp8_reason(device: torch.device) -> str | None:
    """Why this device cannot multiply e4m3 rows, or None if it can."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return f"fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return None
    name = torch.cuda.get_device_name(device)
    has = f"{name} has {capability[0]}.{capability[1]}"
    return f"fp8 needs compute capability 8.9 or later (Ada, Hopper, Blackwell); {has}"


Grads = tuple[Tensor | None, ...]


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


# Library.impl costs a third of `custom_op`'s wrappers per call, and a schema is one line instead of
# a typed signature.
_LIBRARY: Any = torch.library.Library("pusa_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
_TENSORS = {Tensor, torch.nn.Parameter}
_PLAIN = {type(None), bool, int, float, list, tuple, torch.Size, torch.dtype}


def _observed(args: Sequence[Any]) -> bool:
    """Whether anything but this process's memory must see a call: autograd, tracing, modes,
    functorch, subclasses."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    grad = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            if arg.is_meta or (grad and arg.requires_grad):
                return True
        elif kind not in _PLAIN:
            return True
    return False


class Op:
    """An op as `torch.ops.pusa_fast.<name>`, whose launcher has its arguments, and then `extra`.

    A tensor that the launcher leaves out (None) comes back empty from the operator, whose schema
    has no optional result. `check` refuses arguments of which it must know the addresses.
    """

    def __init__(
        self, schema: str, launcher: str, extra: tuple[Any, ...] = (), check: Callable[..., None] | None = None
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.launcher, self.extra, self.check = launcher, extra, check
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.operator: Any = getattr(torch.ops.pusa_fast, self.name).default
        written = self.operator._schema.arguments
        self.written = [i for i, arg in enumerate(written) if arg.alias_info is not None and arg.alias_info.is_write]
        self._setup: Callable[..., Any] = lambda ctx, inputs, output: None
        self._backward: Callable[..., Any] = self._no_derivative
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, self._kernel, key)
        if self.written:
            self.fake(lambda *args: None)
        else:
            torch.library.register_autograd(
                f"pusa_fast::{self.name}",
                lambda ctx, *grads: self._backward(ctx, *grads),
                setup_context=lambda ctx, inputs, output: self._setup(ctx, inputs, output),
                lib=_LIBRARY,
            )

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator of what makes results without their values, from arguments without theirs."""
        torch.library.register_fake(f"pusa_fast::{self.name}", function, lib=_LIBRARY)
        return function

    def _no_derivative(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"no autograd formula was registered for torch.ops.pusa_fast.{self.name}: detach its inputs")

    def derivative(self, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
        """As torch.library.register_autograd takes them."""
        self._setup, self._backward = setup, backward

    def __call__(self, backend: str, *args: Any) -> Any:
        """Run it on the backend that was chosen: triton or native."""
        return self.operator(*args) if _observed(args) else self._launch(backend, args)

    def _kernel(self, *args: Any) -> Any:
        """What the operator runs. The dispatcher has chosen by device; `pusa_fast.ops` has checked
        the arguments."""
        x = next(arg for arg in args if isinstance(arg, Tensor))
        backend = "triton" if x.is_cuda or _forced == "triton" else "native"
        if not _HAS_TRITON if backend == "triton" else _NATIVE_REASON is not None or not native.supports(x):
            raise ValueError(
                f"no kernel of torch.ops.pusa_fast takes {x.dtype} on {x.device} here: call pusa_fast.ops, which "
                "falls back to plain torch"
            )
        results = self._launch(backend, args)
        if self.written:
            return None
        return tuple(x.new_empty(0) if t is None else t for t in results) if isinstance(results, tuple) else results

    def _launch(self, backend: str, args: Sequence[Any]) -> Any:
        if self.check is not None:
            self.check(*args)
        launcher = getattr(_launchers(backend), self.launcher)
        if backend == "triton":  # which launches on the current device, whatever it gets
            x = next(arg for arg in args if isinstance(arg, Tensor))
            with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
                results = launcher(*args, *self.extra)
        else:
            results = launcher(*args, *self.extra)
        if self.written:
            torch.autograd.graph.increment_version([args[i] for i in self.written if args[i] is not None])
        return results


@cache
def _launchers(backend: str) -> ModuleType:
    module = BACKENDS[backend].module
    assert module is not None, backend
    return importlib.import_module(module)
