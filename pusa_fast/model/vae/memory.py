"""How much memory a pass through the VAE takes, by running its own code on tensors without storage.

So the prediction follows the code. It leaves out what torch's allocator does not hand out: on the
CPU, oneDNN's copy of the weight of the current convolution (16 MB at most, in float32). It leaves
out cuDNN's workspaces too.
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pusa_fast.config import VAEConfig
from pusa_fast.device import usable_memory, weight_bytes
from pusa_fast.model.vae.stages import area, trace
from pusa_fast.model.vae.tiling import Box, Tiling

if TYPE_CHECKING:
    from pusa_fast.model.vae.model import WanVAE
    from pusa_fast.model.vae.modes import Runner

_SMALLEST_TILE = 4


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages made inside that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def ignore(self, tensors: Any) -> None:
        """These were there before."""
        self._seen.update(t.untyped_storage()._cdata for t in tensors)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _Libraries(Tracker):  # type: ignore[no-untyped-call]
    """Convolutions as in cuDNN and oneDNN: on meta torch may pick another layout."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, *_ = args
            laid_out = torch.empty_like(weight)  # channels last, for the call
            self._add(laid_out.untyped_storage())
            sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
            out = x.new_empty(len(x), *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes), len(weight))
            self._add(out.untyped_storage())
            return out.movedim(-1, 1)
        if func._schema.name == "mkldnn::_convolution_pointwise_":
            return args[0]  # where it adds its result
        return super().__torch_dispatch__(func, types, args, kwargs)


class _FusedAttention(TorchFunctionMode):
    """Attention without a matrix of scores: on meta torch has no fused kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nnf.scaled_dot_product_attention:
            return torch.empty_like(args[0], memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Largest(Tiling):
    """Exact tiles take memory alike: only the one that sees most runs, twice: with a result too."""

    runner: Runner | None = None

    def boxes(self, size: tuple[int, int], scale: int) -> list[Box]:
        assert self.runner is not None
        outer = self.runner.outer
        return 2 * [max(super().boxes(size, scale), key=lambda box: area(trace(outer, box, size).sources[0]))]


def peak_bytes(
    vae: WanVAE, kind: str, shape: tuple[int, ...], tiling: Tiling | None = None, frames: bool = False
) -> int:
    """Most bytes held at once by `vae.encode` ("encode") or `vae.decode` ("decode") of this shape.

    Beyond weights and input, in the VAE's dtype; the result counts. `frames`: of `decode_frames`
    instead, whose pieces leave. Raises ValueError for shapes that the VAE refuses.
    """
    runner = vae.runner(kind)
    return _peak(vae.config, vae.dtype, kind, tuple(shape), tiling, runner.adds, runner.chunk_bytes, frames)


@lru_cache(maxsize=256)
def _peak(
    config: VAEConfig,
    dtype: torch.dtype,
    kind: str,
    shape: tuple[int, ...],
    tiling: Tiling | None,
    adds: bool,
    chunk_bytes: int,
    frames: bool,
) -> int:
    twin = copy.copy(_twin(config, dtype))  # its settings are this call's own
    twin.chunk_bytes, twin.adds = chunk_bytes, adds
    x = torch.empty(shape, dtype=dtype, device="meta")
    call: Callable[[], Any] = {
        "encode": lambda: twin.encode(x, tiling),
        "decode": lambda: [None for _ in twin.decode_frames(x, tiling)] if frames else twin.decode(x, tiling),
    }[kind]
    if tiling is not None and tiling.mode == "exact":
        tiling = _Largest(tiling.tile, tiling.stride, tiling.mode, runner=twin.runner(kind))
    tracker = _Libraries()
    tracker.ignore([x, *twin.parameters()])
    with _FusedAttention(), tracker:
        kept = call()
    del kept
    return tracker.peak


def resolve(
    vae: WanVAE, kind: str, shape: tuple[int, ...], tiling: Tiling | None, frames: bool = False
) -> Tiling | None:
    """What `Tiling.auto()` means: None (whole) if that fits, else the largest exact tiles that do.

    A function of shape, settings and the device's total memory. Other tilings are returned as they
    are. `frames`: see `peak_bytes`. Raises ValueError if not even the smallest tiles fit.
    """
    if tiling is None or tiling.mode != "auto":
        return tiling
    memory = tiling.memory if tiling.memory is not None else usable_memory(vae.device) - weight_bytes(vae.device, vae)
    scale = 1 if kind == "decode" else vae.config.spatial_factor

    def fits(choice: Tiling | None) -> bool:
        return peak_bytes(vae, kind, shape, choice, frames) <= memory

    if fits(None):
        return None
    grids = _grids(shape[-2] // scale, shape[-1] // scale)
    if not grids or not fits(grids[-1]):
        least = peak_bytes(vae, kind, shape, grids[-1] if grids else None, frames)
        raise ValueError(
            f"to {kind} {tuple(shape)} takes {least / 2**30:.2f} GiB in the smallest tiles, and "
            f"{max(memory, 0) / 2**30:.2f} GiB can be used: take a smaller height and width, fewer frames, or a "
            "smaller dtype"
        )
    return grids[bisect_left(range(len(grids)), True, key=lambda i: fits(grids[i]))]


def _grids(height: int, width: int) -> list[Tiling]:
    """Finer and finer grids of equal exact tiles."""
    found: list[Tiling] = []
    rows = columns = 1
    while max(-(-height // rows), -(-width // columns)) > _SMALLEST_TILE:
        if -(-height // rows) > -(-width // columns):
            rows += 1
        else:
            columns += 1
        tile = -(-height // rows), -(-width // columns)
        found.append(Tiling(tile, tile, "exact"))
    return found


@lru_cache(maxsize=8)
def _twin(config: VAEConfig, dtype: torch.dtype) -> WanVAE:
    from pusa_fast.model.vae.model import WanVAE

    with torch.device("meta"):
        return WanVAE(config).to(dtype).requires_grad_(False)
