"""How far apart two clips are, and whether tile borders can be seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pusa_fast.model.vae.tiling import tile_spans


def psnr(value: Tensor, reference: Tensor) -> float | None:
    """In dB, of pixels in [-1, 1] (peak to peak 2); None where both are equal."""
    error = float((value.float() - reference.float()).square_().mean(dtype=torch.float64))
    return 10 * math.log10(4 / error) if error else None


def tile_lines(length: int, tile: int, stride: int, scale: int) -> list[int]:
    """Where tiles begin or end inside an axis of `length` latent pixels, in units of 1/scale.

    Line x is between entries x-1 and x.
    """
    edges = {edge for span in tile_spans(length, tile, stride) for edge in span} - {0, length}
    return sorted(scale * edge for edge in edges)


def seam(error: Tensor, rows: Iterable[int], columns: Iterable[int]) -> float | None:
    """How much more the error jumps across tile borders than elsewhere; 1: no seam.

    `error` [..., H, W] is tiled minus whole, `rows` and `columns` the borders as `tile_lines` gives
    them. The mean of |error[y] - error[y-1]| over all y in `rows`, and |error[x] - error[x-1]| over
    all x in `columns`, divided by the mean of the same differences at all other places. None where
    there is no border, or no error elsewhere to compare with.
    """
    at, apart = [0.0, 0], [0.0, 0]
    for axis, lines in ((-2, rows), (-1, columns)):
        jumps = error.float().diff(dim=axis).abs_().movedim(axis, 0).flatten(1)
        means = jumps.mean(1, dtype=torch.float64).cpu()
        border = torch.zeros(len(means), dtype=torch.bool)
        border[[line - 1 for line in lines]] = True
        for total, chosen in ((at, border), (apart, ~border)):
            total[0] += float(means[chosen].sum()) * jumps.shape[1]
            total[1] += int(chosen.sum()) * jumps.shape[1]
    if not at[1] or not apart[0]:
        return None
    return (at[0] / at[1]) / (apart[0] / apart[1])
