"""The VAE as stages of one resolution each, through which a clip or a box of it flows in pieces.

A stage is everything between two changes of resolution. It cuts what it is given into pieces of its
own size, so that wide low-resolution stages run long pieces and none holds more than it must.
Lengths are counted in latent frames: the first is one frame, each later one for `rate`
frames. Spans are (start, stop) pixels along one axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pusa_fast.model.vae.layers import (
    CausalConv3d,
    Decoder,
    Downsample,
    Encoder,
    Head,
    ResidualBlock,
    Upsample,
)
from pusa_fast.model.vae.stream import Stream, Sum, run
from pusa_fast.model.vae.tiling import Box, Span


@dataclass(frozen=True)
class Stage:
    """Layers of one resolution, and the resampling before (decoder) or after them (encoder).

    `rate`: frames per latent frame, of its input and of its output; `scale`: pixels per latent
    pixel, likewise, along each axis; the stage works at the larger of each. `channels`: the widest
    that it works with there.
    """

    layers: tuple[nn.Module, ...]
    rate: tuple[int, int]
    scale: tuple[int, int]
    channels: int

    @property
    def halo(self) -> int:
        """How many working pixels its 3x3 convolutions reach, those of the resampling aside."""
        return sum(_REACH.get(type(layer), 0) for layer in self.layers)

    def source(self, need: Span, size: int) -> Span:
        """The span of the input that the output's span `need` depends on; `size`: all input."""
        start, stop = need
        if self.scale[0] < self.scale[1]:  # output row p reads input rows (p - 1) // 2 .. (p + 1) // 2
            start, stop = max(0, start - self.halo), min(2 * size, stop + self.halo)
            return max(0, (start - 1) // 2), min(size, stop // 2 + 1)
        if self.scale[0] > self.scale[1]:  # row p reads rows 2p .. 2p + 2; an even start keeps the pairs as they are
            start, stop = 2 * start - self.halo, 2 * stop + 1 + self.halo
            return max(0, start - start % 2), min(size, stop)
        return max(0, start - self.halo), min(size, stop + self.halo)

    def result(self, source: Span) -> Span:
        """The output's span made of one of the input. Its edges are right only at the picture's."""
        before, after = self.scale
        return source[0] * after // before, source[1] * after // before

    def working_area(self, source: Box) -> int:
        """Pixels at the working resolution, for a box of the input."""
        before, after = self.scale
        return area(source) * max(1, after // before) ** 2

    def latents_per_piece(self, source: Box, item_bytes: int, chunk_bytes: int) -> int:
        """How many latent frames run together: at least one, activations within `chunk_bytes`."""
        frame = self.working_area(source) * self.channels * item_bytes
        return max(1, chunk_bytes // (frame * max(self.rate)))

    @property
    def cost(self) -> int:
        """Multiplications per working pixel and latent frame."""
        weights = sum(p.numel() for layer in self.layers for p in layer.parameters() if p.ndim > 3)
        return weights * max(self.rate)


# 3x3 convolutions of a layer, at the resolution of its stage.
_REACH: dict[type[nn.Module], int] = {CausalConv3d: 1, ResidualBlock: 2, Head: 1}


def encoder_stages(encoder: Encoder) -> list[Stage]:
    """Each with the downsampling behind it; the last one works on latent pixels."""
    layers = (encoder.conv1, *encoder.downsamples, *encoder.middle, encoder.head)
    halvings = [layer.time_conv is not None for layer in layers if isinstance(layer, Downsample)]
    return _stages(_cut(layers, after=Downsample), 2 ** sum(halvings), 2 ** len(halvings))


def decoder_stages(decoder: Decoder) -> list[Stage]:
    """Each with the upsampling before it; the first one works on latent pixels."""
    layers = (decoder.conv1, *decoder.middle, *decoder.upsamples, decoder.head)
    return _stages(_cut(layers, before=Upsample), 1, 1)


def _cut(
    layers: Iterable[nn.Module], before: type[nn.Module] | None = None, after: type[nn.Module] | None = None
) -> list[list[nn.Module]]:
    groups: list[list[nn.Module]] = [[]]
    for layer in layers:
        if before is not None and isinstance(layer, before):
            groups.append([])
        groups[-1].append(layer)
        if after is not None and isinstance(layer, after):
            groups.append([])
    return groups


def _stages(groups: list[list[nn.Module]], rate: int, scale: int) -> list[Stage]:
    stages = []
    for layers in groups:
        rates, scales = [rate], [scale]
        for layer in layers:
            if isinstance(layer, Upsample):
                rate, scale = rate * (1 if layer.time_conv is None else 2), scale * 2
            elif isinstance(layer, Downsample):
                rate, scale = rate // (1 if layer.time_conv is None else 2), scale // 2
        rates.append(rate)
        scales.append(scale)
        convs = [
            m for layer in layers for m in layer.modules() if isinstance(m, CausalConv3d) and m.kernel_size[-1] == 3
        ]
        widest = max(max(c.in_channels, c.out_channels) for c in convs)
        stages.append(Stage(tuple(layers), (rates[0], rates[1]), (scales[0], scales[1]), widest))
    return stages


def full(height: int, width: int) -> Box:
    return (0, height), (0, width)


def area(box: Box) -> int:
    (top, bottom), (left, right) = box
    return (bottom - top) * (right - left)


@dataclass(frozen=True)
class Route:
    """A box traced back through stages: the box of each one's input, and the crop of its output."""

    sources: tuple[Box, ...]
    crops: tuple[Box, ...]


def trace(stages: Sequence[Stage], box: Box, size: tuple[int, int]) -> Route:
    """What the stages must see to make `box` of the result. `size`: latent rows and columns."""
    sources: list[Box] = []
    crops: list[Box] = []
    need = box
    for stage in reversed(stages):
        rows, columns = (stage.source(span, stage.scale[0] * n) for span, n in zip(need, size, strict=True))
        made = stage.result(rows), stage.result(columns)
        crop = tuple((a - m, b - m) for (a, b), (m, _) in zip(need, made, strict=True))
        crops.insert(0, (crop[0], crop[1]))
        need = rows, columns
        sources.insert(0, need)
    return Route(tuple(sources), tuple(crops))


def crop(x: Tensor, box: Box) -> Tensor:
    """A box of each frame of x [B, T, H, W, C], as a view."""
    (top, bottom), (left, right) = box
    return x[:, :, top:bottom, left:right]


def flow(
    stages: Sequence[Stage], x: Tensor, latents: int, route: Route, stream: Stream, item_bytes: int, chunk_bytes: int
) -> Iterator[Tensor]:
    """Pieces [B, t, H', W', C'] made by the stages of x [B, T, H, W, C], `route`'s first source.

    `latents`: of the whole clip. A piece is valid until the next one is asked for.
    """
    pieces: Iterator[Tensor] = iter([x])
    for stage, source, box in zip(stages, route.sources, route.crops, strict=True):
        limit = stage.latents_per_piece(source, x.shape[0] * item_bytes, chunk_bytes)
        pieces = _through(stage, pieces, latents, limit, box, stream)
    return pieces


def _through(
    stage: Stage, pieces: Iterator[Tensor], latents: int, limit: int, box: Box, stream: Stream
) -> Iterator[Tensor]:
    done = 0
    for piece in pieces:
        counts = list(_share(piece.shape[1], stage.rate[0], done == 0, limit))
        frames = [count * stage.rate[0] for count in counts]
        frames[0] -= stage.rate[0] - 1 if done == 0 else 0
        parts = list(torch.split(piece, frames, dim=1))
        del piece  # nothing but its parts, and none of those that are done, is held while layers run
        for count in counts:
            value = Sum(parts.pop(0))
            done += count
            stream.last = done == latents
            for layer in stage.layers:
                value = run(layer, value, stream)
            yield crop(value.value(), box)


def _share(frames: int, rate: int, first: bool, limit: int) -> Iterator[int]:
    """Latent frames of each part of a piece: as equal as they go, at most `limit`."""
    latents = (frames + rate - 1) // rate if first else frames // rate
    parts = -(-latents // limit)
    for i in range(parts):
        yield latents // parts + (1 if i < latents % parts else 0)


def overcompute(stages: Sequence[Stage], boxes: Iterable[Box], size: tuple[int, int], whole: Sequence[Stage]) -> float:
    """Multiplications with `stages` run box by box and `whole` once, over those without boxes."""
    rows, columns = size
    at_once = [
        stage.cost * stage.working_area(full(rows * stage.scale[0], columns * stage.scale[0])) for stage in stages
    ]
    rest = sum(
        stage.cost * stage.working_area(full(rows * stage.scale[0], columns * stage.scale[0])) for stage in whole
    )
    tiled = 0
    for box in boxes:
        route = trace(stages, box, size)
        tiled += sum(
            stage.cost * stage.working_area(source) for stage, source in zip(stages, route.sources, strict=True)
        )
    return (tiled + rest) / (sum(at_once) + rest)
