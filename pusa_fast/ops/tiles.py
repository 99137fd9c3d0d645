"""A box of a picture from its tiles: gathered, placed, blended and finished to uint8 by one op.

T frames, H/W height and width, C channels. The masks are the reference's
(diffsynth/models/wan_video_vae.py, `build_mask`); sums are float32, or float64 of float64 tiles.
Compiled code serves the CPU and CUDA where it can, plain torch the rest, within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pusa_fast.native import tiles as native
from pusa_fast.native.tiles import Pair
from pusa_fast.ops.checks import require
from pusa_fast.ops.registry import choose_tiles

_OP = "blend_box_"


class Tile(NamedTuple):
    """Values [T, H, W, C], and the picture's row and column where they start."""

    values: Tensor
    top: int = 0
    left: int = 0

    @property
    def bottom(self) -> int:
        return self.top + self.values.shape[1]

    @property
    def right(self) -> int:
        return self.left + self.values.shape[2]


def blend_box_(
    out: Tensor,
    tiles: Sequence[Tile],
    at: Pair = (0, 0),
    picture: Pair | None = None,
    borders: Pair = (0, 0),
    clamp: bool = False,
    rounded: bool = False,
) -> None:
    """out = sum of mask * tile / sum of masks, over `tiles` in their order.

    out [T, h, w, C], uint8 or a float dtype, contiguous in w and C: the box at (top, left) = `at`
    of a picture of H x W (default: out's own). Tiles are of one float dtype and inside the picture;
    those that miss the box are passed over. A mask is the smaller of a ramp down and a ramp across,
    `borders` long, at those edges of a tile that are inside the picture.

    uint8: (x + 1) * 127.5 in 0 .. 255, NaN as 0, truncated as in the reference, or `rounded`. Float
    dtypes: as it is, or with `clamp` in [-1, 1]. A pixel that no tile covers is NaN, or level 0.
    Meta tensors: checked, nothing else. Inference only. Raises ValueError.
    """
    require(out.ndim == 4, _OP, "out must be [T, H, W, C]", out)
    picture = (out.shape[1], out.shape[2]) if picture is None else picture
    _check(out, tiles, at, picture, borders)
    if out.is_meta or not out.numel():
        return
    if choose_tiles(out, tiles) == "native":
        native.blend_box(out, tiles, at, picture, borders, clamp, rounded)
    else:
        _reference(out, tiles, at, picture, borders, clamp, rounded)


def _check(out: Tensor, tiles: Sequence[Tile], at: Pair, picture: Pair, borders: Pair) -> None:
    if not tiles:
        raise ValueError(f"{_OP}: give at least one tile")
    if min(borders) < 0:
        raise ValueError(f"{_OP}: borders must be 0 or more, got {borders}")
    _check_inside("the box", out, *at, picture)
    first = tiles[0].values
    if not first.is_floating_point():
        raise ValueError(f"{_OP}: tiles must have a float dtype, got {first.dtype}")
    T, C = out.shape[0], out.shape[3]
    for tile, top, left in tiles:
        require(
            tile.ndim == 4 and (tile.shape[0], tile.shape[3]) == (T, C), _OP, f"tiles must be [{T}, h, w, {C}]", tile
        )
        if tile.dtype != first.dtype or tile.device != out.device:
            raise ValueError(f"{_OP}: tiles must be {first.dtype} on {out.device}, got {tile.dtype} on {tile.device}")
        if tile.numel() and not tile.is_meta and tile.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
            raise ValueError(f"{_OP}: out and a tile are views of the same memory: give out memory of its own")
        _check_inside("a tile", tile, top, left, picture)


def _check_inside(what: str, x: Tensor, top: int, left: int, picture: Pair) -> None:
    height, width = x.shape[1:3]
    if not (0 <= top <= picture[0] - height and 0 <= left <= picture[1] - width):
        raise ValueError(
            f"{_OP}: {what} of {height}x{width} at ({top}, {left}) must be inside {picture[0]}x{picture[1]}"
        )


def feather_mask(span: tuple[int, int], length: int, border: int, device: torch.device) -> Tensor:
    """Weights of a tile along one axis [span length].

    They are a ramp of `border` entries at each end that is inside the picture, and 1 between. Where
    the ramps overlap the far one wins, as in the reference. A tile shorter than the border, which
    the reference cannot do, takes the part of the ramp that fits.
    """
    size = span[1] - span[0]
    mask = torch.ones(size, device=device)
    n = min(border, size)
    if n == 0:
        return mask
    ramp = (torch.arange(n, dtype=torch.float32, device=device) + 1) / border
    if span[0] > 0:
        mask[:n] = ramp
    if span[1] < length:
        mask[size - n :] = ramp.flip(0)
    return mask


def _reference(
    out: Tensor, tiles: Sequence[Tile], at: Pair, picture: Pair, borders: Pair, clamp: bool, rounded: bool
) -> None:
    dtype = torch.promote_types(tiles[0].values.dtype, torch.float32)
    sums = torch.full_like(out, -0.0, dtype=dtype)
    weights = sums.new_zeros(out.shape[1:3])
    for tile, *start in tiles:
        inside, part, ramps = [], [], []
        for axis, first, begin, length, border in zip((1, 2), start, at, picture, borders, strict=True):
            stop = first + tile.shape[axis]
            low, high = max(first, begin), min(stop, begin + out.shape[axis])
            inside.append(slice(low - begin, max(low, high) - begin))
            part.append(slice(low - first, max(low, high) - first))
            ramps.append(feather_mask((first, stop), length, border, out.device)[part[-1]])
        mask = torch.minimum(ramps[0][:, None], ramps[1]).to(dtype)
        sums[:, inside[0], inside[1]] += tile[:, part[0], part[1]].to(dtype) * mask[..., None]
        weights[inside[0], inside[1]] += mask
    values = sums / weights[..., None]
    if out.dtype == torch.uint8:
        levels = ((values + 1) * 127.5).nan_to_num_(0, 255, 0).clamp_(0, 255)
        out.copy_(levels.round_() if rounded else levels)
    else:
        out.copy_(values.clamp(-1, 1) if clamp else values)
