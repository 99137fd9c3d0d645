"""The ways to run one half of the VAE over a clip: whole, in exact tiles, or in feathered tiles.

`exact`: latent resolution runs whole, the rest box by box. Each stage runs on as many more pixels
as it looks beyond its box, so nothing is blended and the result is that of the whole clip.
`feather`: as in the reference, tiles run as if they were pictures of their own and are blended.

Clips are [B, T, H, W, C]. Results are pieces [B, t, H', W', C'] in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pusa_fast.model.vae.blending import blend
from pusa_fast.model.vae.layers import Head
from pusa_fast.model.vae.stages import Stage, crop, flow, full, overcompute, trace
from pusa_fast.model.vae.stream import Stream
from pusa_fast.model.vae.tiling import Box, Tiling
from pusa_fast.ops.tiles import Tile, blend_box_

Pieces = Iterator[Tensor]

# Tiles smaller than this are run several at a time.
_BATCH_LATENT_PIXELS = 256


@dataclass(frozen=True)
class Clip:
    """Latent frames, and latent rows and columns."""

    latents: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Finish:
    """What the last layer's output becomes: see `ops.tiles.blend_box_`."""

    dtype: torch.dtype
    clamp: bool = False
    rounded: bool = False

    def piece(self, piece: Tensor) -> Tensor:
        """[B, t, H, W, C], finished; itself if there is nothing to do."""
        if piece.dtype == self.dtype and not self.clamp:
            return piece
        return self.place(piece, piece.new_empty(piece.shape, dtype=self.dtype))

    def place(self, piece: Tensor, out: Tensor) -> Tensor:
        """The same, written to `out`, which is returned."""
        for item, result in zip(piece, out, strict=True):
            blend_box_(result, [Tile(item)], clamp=self.clamp, rounded=self.rounded)
        return out


@dataclass(frozen=True)
class Runner:
    """Encoder or decoder: its stages, and how pieces are run.

    `adds`: see `Stream`; `chunk_bytes`: see `WanVAE`.
    """

    stages: Sequence[Stage]
    adds: bool
    item_bytes: int
    chunk_bytes: int

    @property
    def decodes(self) -> bool:
        return self.stages[-1].scale[1] > 1

    @property
    def channels(self) -> int:
        """Of the result."""
        head = self.stages[-1].layers[-1]
        assert isinstance(head, Head)
        return head.convolution.out_channels

    @property
    def inner(self) -> Sequence[Stage]:
        """The stage at latent resolution."""
        return self.stages[:1] if self.decodes else self.stages[-1:]

    @property
    def outer(self) -> Sequence[Stage]:
        return self.stages[1:] if self.decodes else self.stages[:-1]

    def run(self, stages: Sequence[Stage], x: Tensor, clip: Clip, box: Box | None = None) -> Pieces:
        """`box` (default: all) of the result of consecutive stages on x, which stays as it is."""
        scale = stages[-1].scale[1]
        box = box or full(clip.size[0] * scale, clip.size[1] * scale)
        route = trace(stages, box, clip.size)
        source = crop(x, route.sources[0])
        return flow(stages, source, clip.latents, route, Stream(self.adds), self.item_bytes, self.chunk_bytes)

    def overcompute(self, size: tuple[int, int], tiling: Tiling | None) -> float:
        """Multiplications with this tiling over those without; `size`: latent rows and columns."""
        if tiling is None:
            return 1.0
        if tiling.mode == "exact":
            return overcompute(self.outer, tiling.boxes(size, self.outer[-1].scale[1]), size, self.inner)
        return tiling.coverage(*size)

    def frames(self, stages: Sequence[Stage], clip: Clip) -> int:
        """Frames that come out of the last of `stages`."""
        return 1 + stages[-1].rate[1] * (clip.latents - 1)


def join(pieces: Pieces, frames: int) -> Tensor:
    """Pieces [.., t, H, W, C] as one tensor of `frames` frames, each copied as soon as it comes."""
    out: Tensor | None = None
    start = 0
    for piece in pieces:
        if piece.shape[-4] == frames:
            return piece
        out = piece.new_empty(*piece.shape[:-4], frames, *piece.shape[-3:]) if out is None else out
        out[..., start : start + piece.shape[-4], :, :, :] = piece
        start += piece.shape[-4]
    assert out is not None and start == frames
    return out


def _whole(runner: Runner, x: Tensor, clip: Clip, tiling: Tiling | None, finish: Finish) -> Pieces:
    yield from map(finish.piece, runner.run(runner.stages, x, clip))


def _exact(runner: Runner, x: Tensor, clip: Clip, tiling: Tiling | None, finish: Finish) -> Pieces:
    assert tiling is not None
    if runner.decodes:
        features = join(runner.run(runner.inner, x, clip), clip.latents)
        yield _in_boxes(runner, features, clip, tiling, finish)
    else:
        features = _in_boxes(runner, x, clip, tiling, None)
        yield from map(finish.piece, runner.run(runner.inner, features, clip))


def _in_boxes(runner: Runner, x: Tensor, clip: Clip, tiling: Tiling, finish: Finish | None) -> Tensor:
    """The outer stages, box by box, each with its own pieces and its own memory of them."""
    scale = runner.outer[-1].scale[1]
    out: Tensor | None = None
    for box in tiling.boxes(clip.size, scale):
        start = 0
        for piece in runner.run(runner.outer, x, clip, box):
            finish = finish or Finish(piece.dtype)
            if out is None:
                size = (runner.frames(runner.outer, clip), clip.size[0] * scale, clip.size[1] * scale)
                out = piece.new_empty(len(piece), *size, piece.shape[-1], dtype=finish.dtype)
            finish.place(piece, crop(out, box)[:, start : start + piece.shape[1]])
            start += piece.shape[1]
    assert out is not None
    return out


def _feather(runner: Runner, x: Tensor, clip: Clip, tiling: Tiling | None, finish: Finish) -> Pieces:
    assert tiling is not None
    first, last = runner.stages[0].scale[0], runner.stages[-1].scale[1]
    frames = runner.frames(runner.stages, clip)

    def run(tiles: Tensor) -> Tensor:
        size = (tiles.shape[2] // first, tiles.shape[3] // first)
        return join(runner.run(runner.stages, tiles, Clip(clip.latents, size)), frames)

    size = (frames, clip.size[0] * last, clip.size[1] * last, runner.channels)
    batch = max(1, _BATCH_LATENT_PIXELS // (tiling.tile[0] * tiling.tile[1]))
    out = x.new_empty(len(x), *size, dtype=finish.dtype)
    for item, result in zip(x, out, strict=True):
        blend(item, run, result, tiling, first, last, batch, finish.clamp, finish.rounded)
    yield out


MODES: dict[str, Callable[[Runner, Tensor, Clip, Tiling | None, Finish], Pieces]] = {
    "whole": _whole,
    "exact": _exact,
    "feather": _feather,
}
