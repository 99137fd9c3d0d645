"""Blending decoded tiles into frames on the CPU: the reference's way in plain torch, and ours.

81 frames of 480x832 from the reference's tiles, (30, 52) at strides of (15, 26) in latent pixels,
in bf16. The reference (docs/reference.md, 6.2; diffsynth `tiled_decode`, then `tensor2video`) adds
tiles and masks in bf16, channels before frames, divides, clamps, and goes through float32 to uint8.
Both start from decoded tiles, in the layout of their own VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.timing import Run, measure, ratio, significant, spread
from pusa_fast import ops
from pusa_fast.model.vae.blending import blend
from pusa_fast.model.vae.tiling import Tiling, tile_spans

CPU = torch.device("cpu")
_SCALE = 8  # pixels of a latent pixel


@dataclass(frozen=True)
class Case:
    """Size of the clip in latent pixels, its frames, and how it is tiled."""

    frames: int
    height: int
    width: int
    tiling: Tiling

    @property
    def borders(self) -> tuple[int, int]:
        (h, w), (down, across) = self.tiling.tile, self.tiling.stride
        return (h - down) * _SCALE, (w - across) * _SCALE

    def places(self) -> list[tuple[int, int, int, int]]:
        """(top, bottom, left, right) in pixels."""
        rows = tile_spans(self.height, self.tiling.tile[0], self.tiling.stride[0])
        columns = tile_spans(self.width, self.tiling.tile[1], self.tiling.stride[1])
        return [(t * _SCALE, b * _SCALE, l * _SCALE, r * _SCALE) for t, b in rows for l, r in columns]


FULL = Case(81, 60, 104, Tiling((30, 52), (15, 26)))
QUICK = Case(9, 15, 26, Tiling((8, 13), (4, 7)))


def _mask_1d(length: int, at_start: bool, at_end: bool, border: int) -> Tensor:
    mask = torch.ones(length)
    if not at_start:
        mask[:border] = (torch.arange(border) + 1) / border
    if not at_end:
        mask[-border:] = torch.flip((torch.arange(border) + 1) / border, dims=(0,))
    return mask


def reference(case: Case, tiles: Sequence[Tensor]) -> Tensor:
    """Tiles [1, 3, T, th, tw] -> uint8 [T, H, W, 3]."""
    height, width = case.height * _SCALE, case.width * _SCALE
    values = torch.zeros(1, 3, case.frames, height, width, dtype=tiles[0].dtype)
    weight = torch.zeros(1, 1, case.frames, height, width, dtype=tiles[0].dtype)
    for tile, (top, bottom, left, right) in zip(tiles, case.places(), strict=True):
        rows = _mask_1d(bottom - top, top == 0, bottom == height, case.borders[0])
        columns = _mask_1d(right - left, left == 0, right == width, case.borders[1])
        both = [rows[:, None].repeat(1, right - left), columns[None].repeat(bottom - top, 1)]
        mask = torch.stack(both).min(dim=0).values[None, None, None].to(tile.dtype)
        values[..., top:bottom, left:right] += tile * mask
        weight[..., top:bottom, left:right] += mask
    values = (values / weight).clamp_(-1, 1)
    return ((values[0].permute(1, 2, 3, 0).float() + 1) * 127.5).clip(0, 255).to(torch.uint8)


def ours(case: Case, tiles: Sequence[Tensor]) -> Tensor:
    """Tiles [1, T, th, tw, 3] -> uint8 [T, H, W, 3]."""
    decoded = iter(tiles)
    out = torch.empty(case.frames, case.height * _SCALE, case.width * _SCALE, 3, dtype=torch.uint8)
    blend(torch.empty(1, case.height, case.width, 1), lambda _: next(decoded), out, case.tiling, 1, _SCALE)
    return out


def run(quick: bool = False) -> dict[str, Any]:
    """{"blend_speedup", "reference_s", "ours_s", "levels_off", "reference_levels_off", ..}.

    Seconds are medians with p20 and p80.
    Before anything is timed our frames are compared with the same formula in float32 torch:
    RuntimeError where a level is more than one off. The reference is off by its rounding to bf16
    between tiles.
    """
    case = QUICK if quick else FULL
    generator = torch.Generator().manual_seed(0)
    shapes = [(case.frames, bottom - top, right - left, 3) for top, bottom, left, right in case.places()]
    tiles = [torch.empty(shape).normal_(0, 0.5, generator=generator).to(torch.bfloat16)[None] for shape in shapes]
    theirs = [tile.permute(0, 4, 1, 2, 3).contiguous() for tile in tiles]
    with ops.use("reference"):
        exact = ours(case, tiles).int()
    levels_off, reference_off = (
        int((frames.int() - exact).abs().max()) for frames in (ours(case, tiles), reference(case, theirs))
    )
    del exact
    if levels_off > 1:
        raise RuntimeError(f"blended frames are {levels_off} levels of 255 off the formula: not timed")
    runs = {"reference": Run(lambda: reference(case, theirs)), "ours": Run(lambda: ours(case, tiles))}
    seconds = measure(runs, CPU, budget=1.0 if quick else 40.0, warmup=1)
    return {
        "shape": [case.frames, case.height * _SCALE, case.width * _SCALE, 3],
        "tiles": len(tiles),
        "dtype": "bf16",
        "threads": torch.get_num_threads(),
        "blend_speedup": significant(ratio(seconds["reference"], seconds["ours"])),
        "reference_s": spread(seconds["reference"], digits=4),
        "ours_s": spread(seconds["ours"], digits=4),
        "levels_off": levels_off,
        "reference_levels_off": reference_off,
    }
