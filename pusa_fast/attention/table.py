"""Which attention backend runs where: the limits of each, the order of `auto`, why one is skipped.

Limits are the libraries' own, from their sources and torch's sdp_utils. A trial on the device,
before a backend is first used, finds whatever they omit.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pusa_fast.attention.flash import PACKAGES, flash_attention, on_device

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Major compute capability -> head dimensions.
Domain = Mapping[int, Collection[int]]


class Refusal(NamedTuple):
    """Why a backend is not used. `broken`: it is installed and should work, so the user is told."""

    reason: str
    broken: bool = False


@dataclass(frozen=True)
class Backend:
    """`forward`, `backward`: where it runs (None: anywhere). `probe`: why it is missing, or None.

    A backend limited to some architectures takes only fp16 and bf16. `deterministic`: it works
    under `torch.use_deterministic_algorithms`. `auto` never chooses one that is not `exact`.
    """

    run: Attend
    forward: Domain | None = None
    backward: Domain | None = None
    probe: Callable[[], Refusal | None] = lambda: None
    deterministic: bool = True
    exact: bool = True


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.numel() == 0 or k.shape[1] < 2:  # the sizes that cuDNN does not take
        return _sdpa(q, k, v)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _probe_cudnn() -> Refusal | None:
    available: Callable[[], bool] = torch.backends.cudnn.is_available
    return None if available() else Refusal("this torch has no cuDNN: install a CUDA build of torch")


@functools.cache
def _installed(name: str) -> Refusal | None:
    package = PACKAGES[name]
    try:
        _apart(package.load)
    except ModuleNotFoundError as error:
        if any(f"{module}.".startswith(f"{error.name}.") for module in package.modules):
            return Refusal(f"{error.name} is not installed: {package.install}")
        return _broken(name, "does not load", error)
    except Exception as error:  # other people's code: whatever it raises is the answer
        return _broken(name, "does not load", error)
    return None


def _broken(name: str, how: str, error: Exception) -> Refusal:
    package = PACKAGES.get(name)
    what = package.modules[-1] if package else name
    mend = f"for torch {torch.__version__}, {package.install}" if package else "update torch and the driver"
    first_line = str(error).strip().partition("\n")[0]
    return Refusal(f"{what} is installed but {how} ({type(error).__name__}: {first_line}): {mend}", broken=True)


def _apart(function: Callable[[], Any]) -> Any:
    """Run in a new thread, without the caller's fake, dispatch, autocast and inference modes."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _packaged(name: str, forward: Domain, backward: Domain, exact: bool = True) -> Backend:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attention(q, k, v, name)[0]
        return out

    return Backend(run, forward, backward, functools.partial(_installed, name), exact=exact)


_TO_128, _TO_256 = range(8, 129, 8), range(8, 257, 8)
_CUDNN: Domain = dict.fromkeys((8, 9, 10, 12), _TO_128)
_FA2: Domain = dict.fromkeys((8, 9, 10, 12), _TO_256)
_FA3: Domain = {8: _TO_256, 9: _TO_256}
_FA4: Domain = {9: _TO_256, 10: (*_TO_128, 256), 11: (*_TO_128, 256), 12: _TO_128}
_SAGE: Domain = dict.fromkeys((8, 9, 10, 12), (64, 96, 128))

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "sdpa": Backend(_sdpa),
        "cudnn": Backend(_cudnn, _CUDNN, _CUDNN, _probe_cudnn, deterministic=False),
        "fa2": _packaged("fa2", _FA2, _FA2),
        "fa3": _packaged("fa3", _FA3, _FA3),
        "fa4": _packaged("fa4", {8: _TO_128, **_FA4}, _FA4),
        "sage": _packaged("sage", _SAGE, {}, exact=False),
    }
)

# Major compute capability -> what `auto` tries, best first. All other devices: sdpa.
ORDER: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {8: ("fa2", "sdpa"), 9: ("fa4", "fa3", "cudnn", "fa2", "sdpa"), 10: ("fa4", "cudnn", "sdpa")}
)


@functools.cache
def architecture(device: torch.device) -> int:
    """Major compute capability; 0 for anything but a present NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip or (device.index or 0) >= torch.cuda.device_count():
        return 0
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def _tried(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, grad: bool) -> Refusal | None:
    """Run a small example: kernels compiled on first call fail here. Leaves random states alone."""

    def trial() -> bool:
        with on_device(device):
            values = torch.linspace(-1, 1, 256 * 3 * head_dim, dtype=dtype, device=device)
            qkv = values.view(1, 256, 3, 1, head_dim).requires_grad_(grad)
            out = BACKENDS[name].run(*qkv.unbind(2))
            if grad:
                (out,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
            return bool(out.isfinite().all())

    try:
        finite = _apart(trial)
    except Exception as error:  # other people's code: whatever it raises is the answer
        return _broken(name, "fails", error)
    return None if finite else _broken(name, "fails", ArithmeticError("the values of a small example are not finite"))


def refusal(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, grad: bool, deterministic: bool
) -> Refusal | None:
    """Why backend `name` cannot take these inputs, or None. On meta all can: nothing runs."""
    backend = BACKENDS[name]
    domain, arch = backend.backward if grad else backend.forward, architecture(device)
    if domain is None or device.type == "meta":
        return None
    if arch == 0:
        return Refusal(f"it runs on CUDA devices, not on {device}: take a machine with an NVIDIA GPU, or use sdpa")
    if arch not in domain:
        return Refusal(f"it has no {'backward' if grad else 'kernel'} for sm_{arch}x, {device}: use auto")
    if dtype not in (torch.float16, torch.bfloat16):
        return Refusal(f"it takes float16 and bfloat16, got {dtype}: use sdpa")
    if head_dim not in domain[arch]:
        return Refusal(f"on sm_{arch}x it takes head dimensions {_listed(domain[arch])}, got {head_dim}: use sdpa")
    if deterministic and not backend.deterministic:
        return Refusal("it is not deterministic, and torch.use_deterministic_algorithms asks for that: use sdpa")
    return backend.probe() or _tried(name, device, dtype, head_dim, grad)


def _listed(dims: Collection[int]) -> str:
    if isinstance(dims, range):
        return f"{dims[0]} to {dims[-1]} in steps of {dims.step}"
    return ", ".join(map(str, dims))


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"attention: auto passes over {name}: {reason}", stacklevel=2)


@functools.cache
def _chosen(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, grad: bool, deterministic: bool
) -> str:
    inputs = (device, dtype, head_dim, grad, deterministic)
    if backend == "auto":
        for name in ORDER.get(architecture(device), ()):
            if (refused := refusal(name, *inputs)) is None:
                return name
            if refused.broken:
                _warn_once(name, refused.reason)
        return "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} does not exist: choose one of auto, {', '.join(BACKENDS)}")
    if refused := refusal(backend, *inputs):
        raise ValueError(f"attention backend {backend!r} cannot be used: {refused.reason}")
    return backend


def chosen(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, grad: bool, deterministic: bool
) -> str:
    """The backend to use; findings on devices and packages are cached. Raises as `resolve`."""
    return _chosen(backend, device, dtype, head_dim, grad, deterministic)


# torch.compile calls a marked function while tracing, instead of tracing its probes and imports.
# torch.compiler.assume_constant_result sets this mark too, but imports torch._dynamo, which doubles
# our own import time.
chosen.__dict__["_dynamo_marked_constant"] = True
