"""How the VAE works in tiles, and where they are.

The plan is the reference's (diffsynth/models/wan_video_vae.py, `tiled_encode` and `tiled_decode`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MODES = ("feather", "exact", "auto")

Span = tuple[int, int]  # start and stop along one axis
Box = tuple[Span, Span]  # rows, columns


@dataclass(frozen=True)
class Tiling:
    """How the VAE works in tiles, to bound memory; sizes (height, width) are latent pixels.

    "feather": tiles at every `stride` run as pictures of their own and are blended, as in the
    reference: seams and colours may shift a little. "exact": adjacent tiles (`stride` is not used)
    see as much of their surroundings as they depend on, so the result is that of the whole picture.
    "auto": see `Tiling.auto`. Raises ValueError for sizes below one, a stride larger than its tile
    (pixels would be left out) or an unknown mode.
    """

    tile: tuple[int, int] = (30, 52)
    stride: tuple[int, int] = (15, 26)
    mode: str = "feather"
    memory: int | None = None

    @classmethod
    def auto(cls, memory: int | None = None) -> Tiling:
        """Whole where that fits into `memory` bytes, else the largest exact tiles that do.

        None: four fifths of the device's memory, less the weights (in a Pipeline, those of all its
        parts).
        """
        return cls(mode="auto", memory=memory)

    def __post_init__(self) -> None:
        for name in ("tile", "stride"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"Tiling.{name} must be two positive sizes (height, width), got {value}")
        if self.mode == "feather" and (self.stride[0] > self.tile[0] or self.stride[1] > self.tile[1]):
            raise ValueError(
                f"Tiling.stride={self.stride} is larger than tile={self.tile}: pixels between tiles would be lost"
            )
        if self.mode not in MODES:
            raise ValueError(f"Tiling.mode={self.mode!r} is unknown: use {', '.join(map(repr, MODES))}")
        if self.memory is not None and (self.mode != "auto" or self.memory < 1):
            raise ValueError(
                f"Tiling.memory={self.memory} must be a positive number of bytes, and goes with mode 'auto' only"
            )

    def boxes(self, size: tuple[int, int], scale: int) -> list[Box]:
        """Exact tiles of a picture of `size` latent pixels, in units of 1/`scale` latent pixel."""
        rows, columns = (
            [(start * scale, stop * scale) for start, stop in tile_spans(length, tile, tile)]
            for length, tile in zip(size, self.tile, strict=True)
        )
        return [(down, across) for down in rows for across in columns]

    def coverage(self, height: int, width: int) -> float:
        """Pixels of all feathered tiles over those of a picture."""
        rows, columns = (
            sum(stop - start for start, stop in tile_spans(*axis))
            for axis in zip((height, width), self.tile, self.stride, strict=True)
        )
        return rows * columns / (height * width)


def tile_spans(length: int, tile: int, stride: int) -> list[Span]:
    """The tiles along one axis: the last may be shorter; none is wholly inside its predecessor."""
    starts = [p for p in range(0, length, stride) if p < stride or p - stride + tile < length]
    return [(p, min(p + tile, length)) for p in starts]


# The names by which the command line and requests choose a tiling; None: whole frames.
TILINGS: Mapping[str, Tiling | None] = MappingProxyType(
    {"whole": None, "auto": Tiling.auto(), "exact": Tiling(mode="exact"), "feather": Tiling()}
)
