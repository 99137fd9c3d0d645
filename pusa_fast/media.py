"""`Condition.media` -> uint8 frames: paths, PIL pictures, arrays, tensors, lists of pictures."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa_fast.sampling.task import MediaFile

# Every other path is opened as a clip.
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Medium:
    """`frames` in it (None: a picture); `read(n)`: the first n, or all, as uint8 [T,H,W,3]."""

    frames: int | None
    read: Callable[[int], Tensor]


def open_media(media: object) -> Medium:
    """Read a picture, or count a clip's frames. FileNotFoundError: the file is missing.

    Raises ValueError for a damaged file, and for a type, dtype or shape that no condition takes.
    """
    if isinstance(media, (str, os.PathLike)):
        return _open_path(Path(media))
    if isinstance(media, MediaFile):
        return _open_file(media)
    if _is_pil(media):
        return _picture(_pil(media))
    if isinstance(media, Sequence):
        return _open_sequence(media)
    if hasattr(media, "shape") and hasattr(media, "dtype"):
        return _open_array(media)
    raise ValueError(
        f"media cannot be a {type(media).__name__}: give a path, a PIL image, a list of them, "
        "or uint8 frames [H,W,3] or [T,H,W,3]"
    )


def _open_path(path: Path) -> Medium:
    from pusa_fast import video

    if path.suffix.lower() in PICTURE_SUFFIXES and not path.is_dir():
        return _picture(video.read_image(path))
    frames = video.probe(path).frames
    if path.suffix.lower() == ".gif" and frames == 1:
        return _picture(video.read_image(path))
    return Medium(frames, lambda count: video.read_video(path, max_frames=count))


def _open_file(file: MediaFile) -> Medium:
    """Decodes a clip to its end: damage must show before a model runs. Read frames are cached."""
    from pusa_fast import video

    if file.picture:
        return _picture(video.read_image(file.path))
    frames, last = video.measure(file.path, file.fps).frames, file.last_frames

    @functools.cache
    def read(count: int) -> Tensor:
        return video.read_video(file.path, file.fps, None if last else count, last_frames=last)[:count]

    return Medium(frames if last is None else min(frames, last), read)


def _open_sequence(pictures: Sequence[Any]) -> Medium:
    for number, picture in enumerate(pictures):
        if not _is_pil(picture):
            raise ValueError(
                f"a list of media holds PIL images, but entry {number} is a {type(picture).__name__}: "
                "use one Condition each"
            )
    if not pictures:
        raise ValueError("the list of pictures is empty: give at least one")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"the pictures of one clip differ in size: {sorted(sizes)}: resize them alike")
    return Medium(len(pictures), lambda count: torch.stack([_pil(picture) for picture in pictures[:count]]))


def _open_array(array: Any) -> Medium:
    kind = str(array.dtype).removeprefix("torch.")
    if kind != "uint8":
        raise ValueError(
            f"frames must be uint8 from 0 to 255, got {kind}: for values in [0, 1] give (x * 255).round() as uint8"
        )
    shape = tuple(array.shape)
    if len(shape) not in (3, 4) or shape[-1] != 3 or 0 in shape:
        raise ValueError(
            f"frames must be [H,W,3] or [T,H,W,3], got {list(shape)}: move the three colours last, drop alpha"
        )
    if len(shape) == 3:
        return _picture(_tensor(array))
    return Medium(shape[0], lambda count: _tensor(array[:count]))


def _picture(frame: Tensor) -> Medium:
    return Medium(None, lambda count: frame[None])


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    import numpy as np

    return torch.from_numpy(np.array(array))  # a copy: views may be read-only or run backwards


def _is_pil(media: object) -> bool:
    return hasattr(media, "convert") and hasattr(media, "getpixel")


def _pil(image: Any) -> Tensor:
    from PIL import ImageOps

    from pusa_fast.video import rgb_array

    return torch.from_numpy(rgb_array(ImageOps.exif_transpose(image)))
