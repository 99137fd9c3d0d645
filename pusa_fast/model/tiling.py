"""How the VAE is to work in tiles, and where the tiles lie.

The plan is the reference's (diffsynth/models/wan_video_vae.py, `tiled_encode` and `tiled_decode`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("feather", "exact", "auto")


@dataclass(frozen=True)
class Tiling:
    """How the VAE works in tiles, to bound memory; sizes (height, width) are latent pixels.

    "feather": tiles at every `stride` run as pictures of their own and are blended, as the reference does: seams and colours
    may shift a little. "exact": tiles side by side (`stride` is not used) see as much of their surroundings as they depend
    on: the result is that of the whole picture. "auto": see `Tiling.auto`.
    Raises ValueError for sizes below one, a stride larger than its tile (pixels would be left out) or an unknown mode.
    """

    tile: tuple[int, int] = (30, 52)
    stride: tuple[int, int] = (15, 26)
    mode: str = "feather"
    memory: int | None = None

    @classmethod
    def auto(cls, memory: int | None = None) -> Tiling:
        """Whole where that fits into `memory` bytes, else the largest exact tiles that do.

        None: four fifths of the device's memory, less the weights (in a Pipeline, those of all its parts).
        """
        return cls(mode="auto", memory=memory)

    def __post_init__(self) -> None:
        for name in ("tile", "stride"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"Tiling.{name} must be two positive sizes (height, width), got {value}")
        if self.mode == "feather" and (self.stride[0] > self.tile[0] or self.stride[1] > self.tile[1]):
            raise ValueError(f"Tiling.stride={self.stride} is larger than tile={self.tile}: pixels between tiles would be lost")
        if self.mode not in MODES:
            raise ValueError(f"Tiling.mode={self.mode!r} is unknown: use {', '.join(map(repr, MODES))}")
        if self.memory is not None and (self.mode != "auto" or self.memory < 1):
            raise ValueError(f"Tiling.memory={self.memory} must be a positive number of bytes, and goes with mode 'auto' only")


def tile_spans(length: int, tile: int, stride: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles along one axis; the last one may be shorter, none lies wholly inside its predecessor."""
    starts = [p for p in range(0, length, stride) if p < stride or p - stride + tile < length]
    return [(p, min(p + tile, length)) for p in starts]


def feather_mask(span: tuple[int, int], length: int, border: int, device: torch.device) -> Tensor:
    """Weights of one tile along one axis [span length]: a ramp of `border` entries at each end inside the image.

    Where the two ramps overlap the right one stands, as in the reference; a tile shorter than the border, which the
    reference cannot do, takes the part of the ramp that fits.
    """
    size = span[1] - span[0]
    mask = torch.ones(size, device=device)
    if border == 0:
        return mask
    ramp = (torch.arange(border, dtype=torch.float32, device=device) + 1) / border
    n = min(border, size)
    if span[0] > 0:
        mask[:n] = ramp[:n]
    if span[1] < length:
        mask[size - n :] = ramp[:n].flip(0)
    return mask


def blend_tiles(
    x: Tensor,
    run: Callable[[Tensor], Tensor],
    size: tuple[int, int, int],
    tiling: Tiling,
    *,
    in_scale: int,
    out_scale: int,
    channels: int,
) -> Tensor:
    """Run `run` on each tile of x [B, C, T, in_scale*h, in_scale*w] and blend.

    `size` = (frames, h, w): frames of the result, height and width in latent pixels. Returns
    [B, channels, frames, out_scale*h, out_scale*w] float32 (or x's dtype where that is wider).
    """
    frames, h, w = size
    acc = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape[0], channels, frames, h * out_scale, w * out_scale, dtype=acc)
    weight = x.new_zeros(h * out_scale, w * out_scale, dtype=acc)
    border_h, border_w = ((t - s) * out_scale for t, s in zip(tiling.tile, tiling.stride, strict=True))
    for top, bottom in tile_spans(h, tiling.tile[0], tiling.stride[0]):
        rows = feather_mask((top * out_scale, bottom * out_scale), h * out_scale, border_h, x.device)
        for left, right in tile_spans(w, tiling.tile[1], tiling.stride[1]):
            columns = feather_mask((left * out_scale, right * out_scale), w * out_scale, border_w, x.device)
            mask = torch.minimum(rows[:, None], columns[None, :]).to(acc)
            tile = run(x[..., top * in_scale : bottom * in_scale, left * in_scale : right * in_scale])
            area = (..., slice(top * out_scale, bottom * out_scale), slice(left * out_scale, right * out_scale))
            out[area] += tile.to(acc) * mask
            weight[area] += mask
    return out / weight
