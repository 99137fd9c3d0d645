"""How much memory a pass through the VAE takes, found by running its own code on tensors without storage.

So the prediction follows the code. What torch's allocator does not hand out is not in it: on the CPU, oneDNN's copy of the
weight of the convolution under way (16 MB at most, in float32). cuDNN's workspaces are not in it either.
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pusa_fast.config import VAEConfig
from pusa_fast.device import usable_memory, weight_bytes
from pusa_fast.model.vae.tiling import Tiling

if TYPE_CHECKING:
    from pusa_fast.model.vae.model import WanVAE

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


def peak_bytes(
    vae: WanVAE, kind: str, shape: tuple[int, ...], tiling: Tiling | None = None, frames: bool = False
) -> int:
    """Most bytes that `vae.encode` ("encode") or `vae.decode` ("decode") of a tensor of this shape holds at once.

    Beyond weights and input, in the VAE's dtype; the result counts. `frames`: of `decode_frames` instead, its pieces gathered on the
    CPU. Raises ValueError for shapes that the VAE refuses.
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
    tracker = Tracker()
    tracker.ignore([x, *twin.parameters()])
    with tracker:
        kept = call()
    del kept
    return tracker.peak


def resolve(
    vae: WanVAE, kind: str, shape: tuple[int, ...], tiling: Tiling | None, frames: bool = False
) -> Tiling | None:
    """What `Tiling.auto()` stands for here: None (whole) where that fits, else the largest exact tiles that do.

    A function of shape, settings and the device's total memory. Others are returned as they are. `frames`: see `peak_bytes`.
    Raises ValueError where not even the smallest tiles fit.
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
            f"to {kind} {tuple(shape)} takes {least / 2**30:.2f} GiB in the smallest tiles, and {max(memory, 0) / 2**30:.2f} GiB can be "
            "used: take a smaller height and width, fewer frames, or a smaller dtype"
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
