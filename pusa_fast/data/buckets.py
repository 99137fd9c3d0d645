"""Sizes to prepare clips in, the windows of a file that become clips, and reading them.

Shapes: frames are uint8 [T,H,W,3], with T the bucket's number of frames.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pusa_fast import video
from pusa_fast.config import Geometry
from pusa_fast.errors import ArgumentError
from pusa_fast.media import PICTURE_SUFFIXES

STARTS = ("first", "middle", "random")


@dataclass(frozen=True)
class Bucket:
    """A size to prepare clips in: pixels and frames. Written 832x480x81."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def parse_bucket(text: str, geometry: Geometry) -> Bucket:
    """WIDTHxHEIGHTxFRAMES, for a model of this geometry.

    Raises ValueError with the nearest size that works where the model cannot take this one.
    """
    found = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})[xX](\d{1,6})", text.strip())
    if found is None:
        raise ArgumentError("bucket", f" {text} is not a size: write WIDTHxHEIGHTxFRAMES, such as 832x480x81")
    bucket = Bucket(*map(int, found.groups()))
    height, width = geometry.multiples
    for name, side, multiple in (("width", bucket.width, width), ("height", bucket.height, height)):
        if side < 1 or side % multiple:
            below = side // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below else str(multiple)
            raise ArgumentError(
                "bucket", f" {text}: {name} {side} is not a multiple of {multiple} pixels: use {nearest}"
            )
    step = geometry.temporal_factor
    if bucket.frames < 1 or (bucket.frames - 1) % step:
        below = max(0, bucket.frames - 1) // step * step + 1
        nearest = f"{below} or {below + step}" if bucket.frames else "1"
        raise ArgumentError("bucket", f" {text}: {bucket.frames} frames is not {step}k+1: use {nearest}")
    return bucket


def choose(buckets: Iterable[Bucket], width: int, height: int, frames: int) -> Bucket | None:
    """The nearest in aspect of at most `frames` frames; ties: the most frames, then the largest."""

    def rank(bucket: Bucket) -> tuple[Fraction, int, int, int]:
        ratio = Fraction(bucket.width * height, bucket.height * width)
        return max(ratio, 1 / ratio), -bucket.frames, -bucket.width * bucket.height, bucket.width

    return min((bucket for bucket in buckets if bucket.frames <= frames), key=rank, default=None)


def window_starts(spare: int, count: int, start: str, salt: str) -> list[int]:
    """First frames of `count` windows, ascending, in a file `spare` frames longer than one.

    Equal ones count once. `start`: "first" spaces them evenly from the first possible frame to the
    last; "middle" takes the middle of `count` equal parts; "random" a place in each part from a
    hash of `salt`.
    """

    def share(i: int) -> Fraction:
        if start == "first":
            return Fraction(i, max(1, count - 1))
        if start == "middle":
            return Fraction(2 * i + 1, 2 * count)
        drawn = int.from_bytes(hashlib.sha256(f"{salt}:{i}".encode()).digest()[:8])
        return (i + Fraction(drawn, 1 << 64)) / count

    scale = spare + 1 if start == "random" else spare
    return sorted({int(share(i) * scale) for i in range(count)})


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.is_dir()


def measure(path: Path, fps: float | None) -> tuple[int, int, int]:
    """(width, height, frames at `fps`) of a picture or a whole video. Raises as `iter_video`."""
    if is_picture(path):
        height, width, _ = video.read_image(path).shape
        return width, height, 1
    info = video.measure(path, fps)
    return info.width, info.height, info.frames


def read_windows(
    path: str | os.PathLike[str], starts: Sequence[int], bucket: Bucket, fps: float | None, fit: str
) -> Iterator[tuple[int, Tensor]]:
    """(start, frames [T,H,W,3] in the bucket's size) of each window, ascending, in one pass.

    Holds the fitted frames of one window in memory. Raises ValueError for a damaged file, frames of
    several sizes, or too few frames.
    """
    path, waiting = Path(path), deque(sorted(starts))
    kept: deque[Tensor] = deque()
    shape: tuple[int, ...] | None = None
    for number, convert in enumerate(_frames(path, fps)):
        if number < waiting[0]:
            continue
        frame = convert()
        if shape is not None and frame.shape != shape:
            sizes = f"{shape[1]}x{shape[0]} and {frame.shape[1]}x{frame.shape[0]}"
            raise ValueError(f"{path} holds frames of several sizes ({sizes}): convert it to one size")
        shape = tuple(frame.shape)
        kept.append(video.fit(frame, (bucket.width, bucket.height), fit))
        if len(kept) < bucket.frames:
            continue
        yield waiting.popleft(), torch.stack(list(kept))
        if not waiting:
            return
        for _ in range(min(len(kept), waiting[0] - (number + 1 - len(kept)))):
            kept.popleft()
    raise ValueError(f"{path} ends before frame {waiting[0] + bucket.frames}: it changed while it was read")


def _frames(path: Path, fps: float | None) -> Iterator[Callable[[], Tensor]]:
    if is_picture(path):
        return iter([lambda: video.read_image(path)])
    return (partial(_tensor, convert) for convert in video.lazy_frames(path, fps))


def _tensor(convert: Callable[[], video.Array]) -> Tensor:
    return torch.from_numpy(convert())
