"""The contact sheet of a prepared folder: first frames of its clips, for people to look at."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from pusa_fast import video
from pusa_fast.data.buckets import Bucket, read_windows
from pusa_fast.data.planning import Clip, Plan

SHEET_CLIPS, _TILE = 64, 160  # clips on the sheet; the width of one, in pixels


def write_sheet(path: Path, plan: Plan, done: Collection[str]) -> None:
    """First frames of up to SHEET_CLIPS of the clips in `done`, evenly chosen, as they were fitted.

    Removes the sheet where none of their files has frames.
    """
    shown = [clip for clip in plan.clips if clip.key in done and clip.source.path.exists()]
    count = min(SHEET_CLIPS, len(shown))
    chosen = [shown[i * len(shown) // count] for i in range(count)]
    tiles = [tile for clip in chosen if (tile := _tile(clip, plan)) is not None]
    if not tiles:
        path.unlink(missing_ok=True)
        return
    columns = math.ceil(math.sqrt(len(tiles)))
    height = max(tile.height for tile in tiles)
    sheet = Image.new("RGB", (columns * _TILE, -(-len(tiles) // columns) * height))
    for i, tile in enumerate(tiles):
        x, y = i % columns * _TILE + (_TILE - tile.width) // 2, i // columns * height + (height - tile.height) // 2
        sheet.paste(tile, (x, y))
    with video.staged(path) as temporary:
        sheet.save(temporary, format="PNG")


def _tile(clip: Clip, plan: Plan) -> Image.Image | None:
    """A clip's first frame, at most 160x240; None where the video cannot be read."""
    size, fit = clip.bucket or Bucket(_TILE, _TILE, 1), plan.settings.fit if clip.bucket else "pad"
    first = Bucket(size.width, size.height, 1)
    try:
        _, frames = next(read_windows(clip.source.path, [clip.start], first, plan.settings.fps, fit))
    except (ValueError, OSError):
        return None
    scale = min(_TILE / first.width, 1.5 * _TILE / first.height)
    width, height = (max(1, round(side * scale)) for side in (first.width, first.height))
    return Image.fromarray(video.fit(frames[0], (width, height), "stretch").numpy())
