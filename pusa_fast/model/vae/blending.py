"""Feathered tiles: runs a clip tile by tile and finishes each part of the result as soon as it can.

T frames, H/W height and width, C channels. Tiles run row by row, so a tile is the last to cover the
pixels from its start to the next tile's: its cell. They are blended then, and tiles that no later
cell needs are dropped, so about one row of tiles is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from torch import Tensor

from pusa_fast.model.vae.tiling import Tiling, tile_spans
from pusa_fast.ops.tiles import Tile, blend_box_

Cell = tuple[int, int, int]  # where a tile starts and stops along one axis, and where the next one starts


def blend(
    source: Tensor,
    run: Callable[[Tensor], Tensor],
    out: Tensor,
    tiling: Tiling,
    in_scale: int,
    out_scale: int,
    batch: int = 1,
    clamp: bool = False,
    rounded: bool = False,
) -> None:
    """Fill out [T', out_scale*h, out_scale*w, C'] from source [T, in_scale*h, in_scale*w, C].

    `run` takes up to `batch` tiles [N, T, in_scale*th, in_scale*tw, C], views that it must not
    write to, and returns [N, T', out_scale*th, out_scale*tw, C'] of one float dtype. `clamp`,
    `rounded`: see `ops.tiles.blend_box_`. Raises ValueError for results of another shape.
    """
    S = out_scale
    picture = (out.shape[1], out.shape[2])
    borders = ((tiling.tile[0] - tiling.stride[0]) * S, (tiling.tile[1] - tiling.stride[1]) * S)
    rows, columns = (_cells(n // S, *sizes) for n, *sizes in zip(picture, tiling.tile, tiling.stride, strict=True))
    kept: list[Tile] = []
    for top, bottom, below in rows:
        for group in _groups(columns, batch):
            made = run(_views(source[:, top * in_scale : bottom * in_scale], group, in_scale))
            for values, (left, right, beyond) in zip(made, group, strict=True):
                if values.shape[1:3] != ((bottom - top) * S, (right - left) * S):
                    raise ValueError(f"a tile of {bottom - top}x{right - left} came back as {list(values.shape)}")
                kept.append(Tile(values, top * S, left * S))
                cell = out[:, top * S : below * S, left * S : beyond * S]
                near = [t for t in kept if t.left < beyond * S and t.right > left * S]
                blend_box_(cell, near, (top * S, left * S), picture, borders, clamp, rounded)
                kept = [t for t in kept if t.bottom > below * S or t.right > beyond * S]
            del made, values, near  # what is not kept is free while the next tiles run


def _cells(length: int, tile: int, stride: int) -> list[Cell]:
    spans = tile_spans(length, tile, stride)
    ends = [start for start, _ in spans[1:]] + [length]
    return [(start, stop, end) for (start, stop), end in zip(spans, ends, strict=True)]


def _groups(columns: list[Cell], most: int) -> Iterator[list[Cell]]:
    """Neighbours of one width, at most `most`."""
    for _, equal in groupby(columns, lambda cell: cell[1] - cell[0]):
        cells = list(equal)
        for i in range(0, len(cells), most):
            yield cells[i : i + most]


def _views(strip: Tensor, group: list[Cell], scale: int) -> Tensor:
    """Tiles [N, T, H, w, C] of a strip [T, H, W, C]: views, as the first layer copies its input."""
    start, stop, until = group[0]
    strip = strip[:, :, start * scale : group[-1][1] * scale]
    return strip.unfold(2, (stop - start) * scale, (until - start) * scale).permute(2, 0, 1, 4, 3)
