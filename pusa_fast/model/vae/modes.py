"""The ways to run one half of the VAE over a clip: whole, in exact tiles, or in feathered tiles.

`exact`: latent resolution runs whole, and the rest box by box, each stage on as many pixels more as it looks beyond its
box; nothing is blended, the result is that of the whole clip. `feather`: as the reference, tiles run as if they were
pictures of their own and are blended.

Clips are [B, T, H, W, C]. What comes out are pieces [B, t, H', W', C'] in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pusa_fast.model.vae.blending import Blend, blend
from pusa_fast.model.vae.layers import Head
from pusa_fast.model.vae.stages import Box, Stage, crop, flow, full, overcompute, trace
from pusa_fast.model.vae.stream import Stream
from pusa_fast.model.vae.tiling import Tiling, tile_spans

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
    """What becomes of the last layer's output: a piece [B, t, H, W, C], or a clip blended of tiles, to [T, H, W, C']."""

    piece: Callable[[Tensor], Tensor]
    blend: Callable[[Blend], Tensor]


@dataclass(frozen=True)
class Runner:
    """Encoder or decoder: its stages, and how pieces are run. `adds`: see `Stream`; `chunk_bytes`: see `WanVAE`."""

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
        """`box` of the result of consecutive stages, all of it by default; x is all of their input."""
        scale = stages[-1].scale[1]
        box = box or full(clip.size[0] * scale, clip.size[1] * scale)
        route = trace(stages, box, clip.size)
        source = crop(x, route.sources[0])
        return flow(stages, source, clip.latents, route, Stream(self.adds), self.item_bytes, self.chunk_bytes)

    def overcompute(self, size: tuple[int, int], tiling: Tiling | None) -> float:
        """Multiplications with this tiling over those of the whole clip; `size`: latent rows and columns."""
        if tiling is None:
            return 1.0
        if tiling.mode == "exact":
            boxes = exact_boxes(size, tiling, self.outer[-1].scale[1])
            return overcompute(self.outer, boxes, size, self.inner)
        return tiling.coverage(*size)

    def frames(self, stages: Sequence[Stage], clip: Clip) -> int:
        """Frames that come out of the last of `stages`."""
        return 1 + stages[-1].rate[1] * (clip.latents - 1)


def join(pieces: Pieces, frames: int) -> Tensor:
    """Pieces [.., t, H, W, C] as one tensor of `frames` frames, written where they belong as they come."""
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
    for piece in runner.run(runner.stages, x, clip):
        yield finish.piece(piece)


def _exact(runner: Runner, x: Tensor, clip: Clip, tiling: Tiling | None, finish: Finish) -> Pieces:
    assert tiling is not None
    if not runner.decodes:
        features = _in_boxes(runner, x, clip, tiling, lambda piece: piece)
        yield from map(finish.piece, runner.run(runner.inner, features, clip))
        return
    features = join(runner.run(runner.inner, x, clip), clip.latents)
    yield _in_boxes(runner, features, clip, tiling, finish.piece)


def _in_boxes(runner: Runner, x: Tensor, clip: Clip, tiling: Tiling, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """The outer stages, box by box: each with pieces and a memory of its own."""
    scale = runner.outer[-1].scale[1]
    out: Tensor | None = None
    boxes: Iterable[Box] = exact_boxes(clip.size, tiling, scale)
    if x.is_meta:  # all take alike: the largest stands for them, a second time beside the result
        boxes = 2 * [max(boxes, key=lambda box: _area(trace(runner.outer, box, clip.size).sources[0]))]
    for box in boxes:
        start = 0
        for piece in runner.run(runner.outer, x, clip, box):
            part = finish(piece)
            if out is None:
                size = (runner.frames(runner.outer, clip), clip.size[0] * scale, clip.size[1] * scale)
                out = part.new_empty(part.shape[0], *size, part.shape[-1])
            crop(out, box)[:, start : start + part.shape[1]] = part
            start += part.shape[1]
    assert out is not None
    return out


def _area(box: Box) -> int:
    (top, bottom), (left, right) = box
    return (bottom - top) * (right - left)


def exact_boxes(size: tuple[int, int], tiling: Tiling, scale: int) -> Iterator[Box]:
    """Boxes side by side that cover a picture of `size` latent pixels, in units of 1/`scale` latent pixel."""
    for top, bottom in tile_spans(size[0], tiling.tile[0], tiling.tile[0]):
        for left, right in tile_spans(size[1], tiling.tile[1], tiling.tile[1]):
            yield (top * scale, bottom * scale), (left * scale, right * scale)


def _feather(runner: Runner, x: Tensor, clip: Clip, tiling: Tiling | None, finish: Finish) -> Pieces:
    assert tiling is not None
    first, last = runner.stages[0].scale[0], runner.stages[-1].scale[1]
    frames = runner.frames(runner.stages, clip)

    def run(tiles: Tensor) -> Tensor:
        size = (tiles.shape[2] // first, tiles.shape[3] // first)
        return join(runner.run(runner.stages, tiles, Clip(clip.latents, size)), frames)

    pixels = tiling.tile[0] * tiling.tile[1]
    batch = max(1, _BATCH_LATENT_PIXELS // pixels)

    def blended(clip: Tensor) -> Tensor:
        (result,) = blend(
            clip, run, frames, tiling, in_scale=first, out_scale=last, channels=runner.channels, batch=batch
        )
        return finish.blend(result)[None]

    yield torch.cat([blended(clip) for clip in torch.split(x, 1)]) if len(x) > 1 else blended(x)


MODES: dict[str, Callable[[Runner, Tensor, Clip, Tiling | None, Finish], Pieces]] = {
    "whole": _whole,
    "exact": _exact,
    "feather": _feather,
}
