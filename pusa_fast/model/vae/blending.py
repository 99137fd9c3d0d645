"""Cutting clips into overlapping tiles, blending what comes of them with feathered masks, and the way to uint8 frames.

Shapes: T frames, H/W height and width, C channels, N tiles of th x tw; "THWC" is contiguous or a view with a unit stride in
C. The masks are the reference's (diffsynth/models/wan_video_vae.py, `build_mask`), but sums are kept in float32, or float64
for float64 tiles. Compiled code (csrc/vae_tiling.hpp) serves where it can, plain torch elsewhere, within one level of 255.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from pusa_fast.model.vae.tiling import Tiling, tile_spans

_NEEDED = ("gather_tiles", "blend_tiles", "finish_frames", "finish_tiles")
_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES)
_KEPT_COVERAGE = 2.5  # times that tiles cover the clip, up to which keeping them takes about the memory of float32 sums
_capsule: Callable[[Tensor], object] = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]


def _load_native() -> Any:
    """The compiled part, or None where it is missing or older than this source."""
    try:
        native = importlib.import_module("pusa_fast._native")
    except ImportError:
        return None
    return native if all(hasattr(native, name) for name in _NEEDED) else None


_native = _load_native()


class Accumulator(Protocol):
    """What a `Blend` keeps between tiles. Starts empty: made from the (T, H, W, C) of the result, its borders, device and dtype."""

    def __init__(
        self, shape: Sequence[int], borders: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None: ...

    def add(self, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
        """Tiles [N, T, th, tw, C]."""

    def finish(self, out: Tensor, clamp: bool, round: bool) -> None:
        """The blended clip, into out [T, H, W, C]."""


@dataclass(frozen=True)
class Backend:
    """`serves` says whether it takes tensors of this device and dtype; the others work on tensors that it takes."""

    serves: Callable[[torch.device, torch.dtype], bool]
    gather: Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], None]
    finish: Callable[[Tensor, Tensor, bool, bool], None]
    accumulator: Callable[[torch.dtype, float], type[Accumulator]]  # of tiles that cover the clip so many times


# Plain torch


def feather_mask(span: tuple[int, int], length: int, border: int, device: torch.device) -> Tensor:
    """Weights of one tile along one axis [span length]: a ramp of `border` entries at each end inside the image.

    Where the two ramps overlap the right one stands, as in the reference; a tile shorter than the border, which the
    reference cannot do, takes the part of the ramp that fits.
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


def _torch_gather(source: Tensor, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
    height, width = tiles.shape[2:4]
    for tile, top, left in zip(tiles, tops, lefts, strict=True):
        tile.copy_(source[:, top : top + height, left : left + width])


def _torch_finish(values: Tensor, out: Tensor, clamp: bool, round: bool) -> None:
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if out.dtype == torch.uint8:
        levels = ((values + 1) * 127.5).nan_to_num_(0, 255, 0).clamp_(0, 255)
        out.copy_(levels.round_() if round else levels)
    else:
        out.copy_(values.clamp(-1, 1) if clamp else values)


class _TorchSums:
    def __init__(
        self, shape: Sequence[int], borders: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        self.sums = torch.zeros(*shape, device=device, dtype=dtype)
        self.weight = torch.zeros(*shape[1:3], device=device, dtype=dtype)
        self.borders = borders

    def add(self, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
        H, W = self.weight.shape
        for tile, top, left in zip(tiles, tops, lefts, strict=True):
            bottom, right = top + tile.shape[1], left + tile.shape[2]
            rows = feather_mask((top, bottom), H, self.borders[0], tile.device)
            columns = feather_mask((left, right), W, self.borders[1], tile.device)
            mask = torch.minimum(rows[:, None], columns[None]).to(self.sums.dtype)
            self.sums[:, top:bottom, left:right] += tile.to(self.sums.dtype) * mask[..., None]
            self.weight[top:bottom, left:right] += mask

    def finish(self, out: Tensor, clamp: bool, round: bool) -> None:
        _torch_finish(self.sums / self.weight[..., None], out, clamp, round)


# Compiled code


def _where(x: Tensor) -> tuple[int, int]:
    """(threads, stream) for a call on this tensor's device."""
    return torch.get_num_threads(), torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _native_gather(source: Tensor, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
    _native.gather_tiles(_capsule(source), _capsule(tiles), tops, lefts, *_where(tiles))


def _native_finish(values: Tensor, out: Tensor, clamp: bool, round: bool) -> None:
    _native.finish_frames(_capsule(_unit(values)), None, _capsule(out), clamp, round, *_where(values))


class _NativeSums:
    def __init__(
        self, shape: Sequence[int], borders: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.sums = torch.empty(*shape, device=device)  # not cleared: nothing is read where the weight is 0
        self.weight = torch.zeros(*shape[1:3], device=device)
        self.borders = borders

    def add(self, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
        arrays = (_capsule(x) for x in (tiles.contiguous(), self.sums, self.weight))
        _native.blend_tiles(*arrays, tops, lefts, *self.borders, *_where(tiles))

    def finish(self, out: Tensor, clamp: bool, round: bool) -> None:
        arrays = (_capsule(x) for x in (self.sums, self.weight, out))
        _native.finish_frames(*arrays, clamp, round, *_where(out))


class _KeptTiles:
    """The tiles themselves, blended in one pass at the end: less time, and of 16-bit tiles about the memory of sums."""

    def __init__(
        self, shape: Sequence[int], borders: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.borders = borders
        self.tiles: list[Tensor] = []
        self.places: list[tuple[int, int]] = []

    def add(self, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
        self.tiles += tiles.contiguous().unbind(0)
        self.places += zip(tops, lefts, strict=True)

    def finish(self, out: Tensor, clamp: bool, round: bool) -> None:
        tops, lefts = zip(*self.places, strict=True)
        tiles = [_capsule(tile) for tile in self.tiles]
        _native.finish_tiles(tiles, tops, lefts, *self.borders, _capsule(out), clamp, round, torch.get_num_threads())


class _Sizes:
    """On the meta device: the memory that compiled code takes on the CPU, to predict it."""

    def __init__(
        self, shape: Sequence[int], borders: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.sums = torch.empty(*shape, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def add(self, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
        pass

    def finish(self, out: Tensor, clamp: bool, round: bool) -> None:
        pass


class _KeptSizes(_Sizes):
    def __init__(
        self, shape: Sequence[int], borders: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.tiles: list[Tensor] = []

    def add(self, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
        self.tiles.append(tiles)


@lru_cache
def cuda_reason(index: int) -> str | None:
    """Why the compiled CUDA code cannot run on this device, or None where it can: a driver or a GPU that its build does not know.

    Tried once with a frame of one pixel; warns where it was built and fails.
    """
    if _native is None or not _native.cuda_built():
        return "the compiled part holds no CUDA code: build it where there is nvcc"
    pixel = torch.zeros(1, 1, 1, 1, device=torch.device("cuda", index))
    level = torch.empty(pixel.shape, dtype=torch.uint8, device=pixel.device)
    try:
        _native_finish(pixel, level, True, False)
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


def _serves_cuda(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype not in _FLOATS:
        return False
    return cuda_reason(torch.cuda.current_device() if device.index is None else device.index) is None


def _kept_or_sums(
    kept: type[Accumulator], sums: type[Accumulator]
) -> Callable[[torch.dtype, float], type[Accumulator]]:
    return lambda dtype, coverage: kept if dtype in _HALVES and coverage <= _KEPT_COVERAGE else sums


# The first that serves is taken.
BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "native": Backend(
            lambda device, dtype: _native is not None and device.type == "cpu" and dtype in _FLOATS,
            _native_gather,
            _native_finish,
            _kept_or_sums(_KeptTiles, _NativeSums),
        ),
        "meta": Backend(
            lambda device, dtype: device.type == "meta",
            lambda *_: None,
            lambda *_: None,
            _kept_or_sums(_KeptSizes, _Sizes),
        ),
        "native-cuda": Backend(_serves_cuda, _native_gather, _native_finish, lambda dtype, coverage: _NativeSums),
        "torch": Backend(lambda device, dtype: True, _torch_gather, _torch_finish, lambda dtype, coverage: _TorchSums),
    }
)


def chosen(device: torch.device, dtype: torch.dtype, backend: str | None = None) -> Backend:
    """The backend for tensors of this device and dtype, or the one named. ValueError: that is unknown or does not serve them."""
    for name, candidate in BACKENDS.items():
        if backend in (None, name) and candidate.serves(device, dtype):
            return candidate
    names = ", ".join(name for name, candidate in BACKENDS.items() if candidate.serves(device, dtype))
    raise ValueError(f"tiling backend {backend!r} does not serve {dtype} on {device}: choose one of {names}")


# For both


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def gather_tiles(
    source: Tensor, size: tuple[int, int], tops: Sequence[int], lefts: Sequence[int], backend: str | None = None
) -> Tensor:
    """Areas of size (th, tw) at (tops[n], lefts[n]) of source [T, H, W, C], any float dtype -> [N, T, th, tw, C], contiguous.

    Raises ValueError for a source of another rank and for areas outside it.
    """
    if source.ndim != 4:
        raise ValueError(f"gather_tiles takes a clip [T, H, W, C], got {list(source.shape)}")
    _check_places(tops, lefts, size, source.shape[1:3])
    tiles = source.new_empty(len(tops), source.shape[0], *size, source.shape[3])
    if tiles.numel():
        chosen(source.device, source.dtype, backend).gather(_unit(source), tiles, tops, lefts)
    return tiles


def finish_frames(values: Tensor, round: bool, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """values [T, H, W, C] in [-1, 1], any float dtype -> levels, uint8, truncated as the reference does or `round`ed; NaN is 0.

    `out`: where to write them, a view with a unit stride in C. ValueError: its shape or dtype, or where it overlaps itself or
    values.
    """
    if out is None:
        out = values.new_empty(values.shape, dtype=torch.uint8)
    if values.ndim != 4 or out.shape != values.shape or out.dtype != torch.uint8 or out.device != values.device:
        raise ValueError(
            f"finish_frames makes uint8 [T, H, W, C] of values of that shape on the same device, got values {list(values.shape)} "
            f"on {values.device} and out {list(out.shape)} {out.dtype} on {out.device}"
        )
    if out.numel():
        chosen(values.device, values.dtype, backend).finish(values, out, True, round)
    return out


class Blend:
    """A clip [T, H, W, C] that grows from tiles: each is multiplied by its mask, and the sum divided by that of the masks.

    `borders`: length of the ramps (down, across), tile minus stride in the result's pixels; `dtype`: of the tiles; `coverage`: how
    many times the tiles will cover the clip, which decides what takes less memory, they or their sum.
    ValueError: sizes below one, or borders below nought.
    """

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        channels: int,
        borders: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        backend: str | None = None,
        coverage: float = 1.0,
    ) -> None:
        if min(frames, height, width, channels) < 1 or min(borders) < 0:
            raise ValueError(f"cannot blend tiles with borders {borders} into {frames}x{height}x{width}x{channels}")
        self.shape = (frames, height, width, channels)
        self.device, self.dtype = device, dtype
        self._kept = chosen(device, dtype, backend).accumulator(dtype, coverage)(self.shape, borders, device, dtype)
        self._covered = torch.zeros(height, width, dtype=torch.bool)
        self._places: set[tuple[int, int]] = set()

    def add(self, tiles: Tensor, tops: Sequence[int], lefts: Sequence[int]) -> None:
        """Tiles [N, T, th, tw, C], the n-th at (tops[n], lefts[n]). They may be kept: do not write to them afterwards.

        Raises ValueError for tiles of another shape, dtype or device, outside the clip, or added before.
        """
        frames, height, width, channels = self.shape
        if tiles.ndim != 5 or (tiles.shape[1], tiles.shape[4]) != (frames, channels):
            raise ValueError(f"tiles must be [N, {frames}, th, tw, {channels}], got {list(tiles.shape)}")
        if tiles.dtype != self.dtype or tiles.device.type != self.device.type:
            raise ValueError(f"tiles must be {self.dtype} on {self.device}, got {tiles.dtype} on {tiles.device}")
        size = (tiles.shape[2], tiles.shape[3])
        if len(tops) != tiles.shape[0]:
            raise ValueError(f"{tiles.shape[0]} tiles need as many places, got {len(tops)}")
        _check_places(tops, lefts, size, (height, width))
        new = set(zip(tops, lefts, strict=True))
        if len(new) < len(tops) or new & self._places:
            raise ValueError(f"a tile is added twice: places {sorted(new)} after {sorted(self._places)}")
        if not tiles.shape[0]:
            return
        self._kept.add(tiles, tops, lefts)
        self._places |= new
        for top, left in new:
            self._covered[top : top + size[0], left : left + size[1]] = True

    def frames(self, round: bool) -> Tensor:
        """uint8 [T, H, W, C]; see `finish_frames`. ValueError: tiles do not cover the clip."""
        return self._finish(torch.uint8, True, round)

    def values(self, clamp: bool) -> Tensor:
        """float32 (float64 of float64 tiles) [T, H, W, C], confined to [-1, 1] if `clamp`. ValueError: as above."""
        return self._finish(torch.promote_types(self.dtype, torch.float32), clamp, False)

    def _finish(self, dtype: torch.dtype, clamp: bool, round: bool) -> Tensor:
        if not self._covered.all():
            y, x = (int(i) for i in (~self._covered).nonzero()[0])
            raise ValueError(f"no tile covers pixel ({y}, {x}): {len(self._places)} tiles were added")
        out = torch.empty(*self.shape, dtype=dtype, device=self.device)
        self._kept.finish(out, clamp, round)
        return out


def _check_places(tops: Sequence[int], lefts: Sequence[int], size: tuple[int, int], within: Sequence[int]) -> None:
    if len(tops) != len(lefts):
        raise ValueError(f"each tile has a top and a left, got {len(tops)} and {len(lefts)}")
    for starts, length, limit in zip((tops, lefts), size, within, strict=True):
        bad = [start for start in starts if not 0 <= start <= limit - length]
        if length < 1 or bad:
            raise ValueError(
                f"tiles of {size[0]}x{size[1]} must lie inside {within[0]}x{within[1]}, got starts {list(starts)}"
            )


def _batches(height: int, width: int, tiling: Tiling, most: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """(top, bottom, left, right) of the tiles of the plan, those of one size and row together, at most `most`."""
    for top, bottom in tile_spans(height, tiling.tile[0], tiling.stride[0]):
        spans = tile_spans(width, tiling.tile[1], tiling.stride[1])
        for _, equal in groupby(spans, lambda span: span[1] - span[0]):
            row = [(top, bottom, left, right) for left, right in equal]
            for i in range(0, len(row), most):
                yield row[i : i + most]


def blend(
    source: Tensor,
    run: Callable[[Tensor], Tensor],
    frames: int,
    tiling: Tiling,
    in_scale: int,
    out_scale: int,
    channels: int,
    batch: int = 1,
) -> list[Blend]:
    """Run `run` on the tiles of source [B, T, in_scale*h, in_scale*w, C] and blend: for each item of the batch a `Blend` of
    [frames, out_scale*h, out_scale*w, channels].

    `run` takes tiles [N, T, in_scale*th, in_scale*tw, C], N at most `batch` and of one item, and returns
    [N, frames, out_scale*th, out_scale*tw, channels] of any one float dtype. Raises ValueError for sizes that are no multiples
    of in_scale, a batch below one, and results of another shape.
    """
    if source.ndim != 5 or source.shape[2] % in_scale or source.shape[3] % in_scale or batch < 1:
        raise ValueError(
            f"blend takes [B, T, H, W, C], H and W multiples of {in_scale}, got {list(source.shape)}, batch {batch}"
        )
    h, w = source.shape[2] // in_scale, source.shape[3] // in_scale
    borders = tuple((tile - stride) * out_scale for tile, stride in zip(tiling.tile, tiling.stride, strict=True))
    return [
        _blend_clip(
            _unit(clip), run, (frames, h, w, channels), tiling, in_scale, out_scale, (borders[0], borders[1]), batch
        )
        for clip in source
    ]


def _blend_clip(
    clip: Tensor,
    run: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int, int],
    tiling: Tiling,
    in_scale: int,
    out_scale: int,
    borders: tuple[int, int],
    batch: int,
) -> Blend:
    frames, h, w, channels = shape
    coverage = tiling.coverage(h, w)
    result: Blend | None = None
    for spans in _batches(h, w, tiling, batch):
        top, bottom, left, right = spans[0]
        tops, lefts = [span[0] for span in spans], [span[2] for span in spans]
        size = ((bottom - top) * in_scale, (right - left) * in_scale)
        whole = size == tuple(clip.shape[1:3])
        scaled = [top * in_scale for top in tops], [left * in_scale for left in lefts]
        done = run(clip[None] if whole else gather_tiles(clip, size, *scaled))
        wanted = (len(spans), frames, (bottom - top) * out_scale, (right - left) * out_scale, channels)
        if done.shape != wanted:
            raise ValueError(f"a batch of tiles came back as {list(done.shape)}, not {list(wanted)}")
        if result is None:
            pixels = h * out_scale, w * out_scale
            result = Blend(frames, *pixels, channels, borders, done.device, done.dtype, coverage=coverage)
        result.add(done, [top * out_scale for top in tops], [left * out_scale for left in lefts])
    assert result is not None
    return result
