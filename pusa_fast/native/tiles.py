"""The VAE's tiles in C++ and CUDA. See csrc/vae_tiling.hpp."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pusa_fast.native import capsule, compiled, missing

_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.uint8}
_MOST_TILES = 64  # kMostTiles of csrc/vae_tiling.hpp

Places = Sequence[tuple[Tensor, int, int]]  # tiles [T, H, W, C], the picture's row and column where each starts
Pair = tuple[int, int]


def supports(out: Tensor, tiles: Places) -> bool:
    """Whether compiled code makes `out` of these tiles, whose dtype and device are one."""
    if missing("blend_box") or len(tiles) > _MOST_TILES or not {out.dtype, tiles[0][0].dtype} <= _DTYPES:
        return False
    return out.is_cpu or (out.is_cuda and cuda_reason(out.get_device()) is None)


def blend_box(out: Tensor, tiles: Places, at: Pair, picture: Pair, borders: Pair, clamp: bool, rounded: bool) -> None:
    """See `ops.tiles.blend_box_`. A tile whose rows are not contiguous is copied first."""
    places = [(capsule(_contiguous_rows(tile)), top, left) for tile, top, left in tiles]
    stream = torch.cuda.current_stream(out.device).cuda_stream if out.is_cuda else 0
    where = capsule(out), places, at, picture, borders
    compiled.blend_box(*where, clamp, rounded, torch.get_num_threads(), stream)


def _contiguous_rows(x: Tensor) -> Tensor:
    width, channels = x.shape[2:]
    contiguous = (x.stride(3) == 1 or channels == 1) and (x.stride(2) == channels or width == 1)
    return x if contiguous else x.contiguous()


@lru_cache
def cuda_reason(index: int) -> str | None:
    """Why the compiled CUDA code cannot run on this device, or None if it can.

    It fails with a driver or a GPU that its build does not know. So it is tried, once, with one
    pixel; a failure is warned about.
    """
    if compiled is None or not compiled.cuda_built():
        return "the compiled part holds no CUDA code: build it where there is nvcc"
    pixel = torch.zeros(1, 1, 1, 1, device=torch.device("cuda", index))
    level = torch.empty_like(pixel, dtype=torch.uint8)
    try:
        blend_box(level, [(pixel, 0, 0)], (0, 0), (1, 1), (0, 0), True, False)
        found = int(level)
    except RuntimeError as error:
        reason = str(error)
    else:
        if found == 127:
            return None
        reason = f"0.0 became level {found}, not 127"
    warnings.warn(
        f"the compiled CUDA tiling does not work on cuda:{index} ({reason}): plain torch does its work", stacklevel=2
    )
    return reason
