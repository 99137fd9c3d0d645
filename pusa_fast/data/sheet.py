"""The picture of a prepared folder: first frames of its clips, for people to look at."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image

from pusa_fast import video
from pusa_fast.data.buckets import Bucket, read_windows
from pusa_fast.data.planning import File, Plan, Settings

SHEET_CLIPS, _TILE = 64, 160  # clips on the sheet; the width of one, in pixels


def write_sheet(path: Path, plan: Plan, done: set[str], settings: Settings) -> None:
    """First frames of up to SHEET_CLIPS clips, evenly chosen, in their order, as they were fitted; none where no file has frames."""
    shown = [
        (file, start)
        for file in plan.files
        for start, window in file.windows.items()
        if window.key in done and file.source.path.exists()
    ]
    count = min(SHEET_CLIPS, len(shown))
    chosen = [shown[i * len(shown) // count] for i in range(count)]
    tiles = [tile for file, start in chosen if (tile := _tile(file, start, settings)) is not None]
    if not tiles:
        path.unlink(missing_ok=True)
        return
    columns = math.ceil(math.sqrt(len(tiles)))
    height = max(tile.height for tile in tiles)
    sheet = Image.new("RGB", (columns * _TILE, -(-len(tiles) // columns) * height))
    for i, tile in enumerate(tiles):
        sheet.paste(
            tile, (i % columns * _TILE + (_TILE - tile.width) // 2, i // columns * height + (height - tile.height) // 2)
        )
    with video.staged(path) as temporary:
        sheet.save(temporary, format="PNG")


def _tile(file: File, start: int, settings: Settings) -> Image.Image | None:
    """A clip's first frame, at most 160x240; None where the file beside the reference's tensors cannot be read."""
    first = Bucket(_TILE, _TILE, 1) if file.bucket is None else Bucket(file.bucket.width, file.bucket.height, 1)
    try:
        _, frames = next(
            read_windows(file.source.path, [start], first, settings.fps, "pad" if file.bucket is None else settings.fit)
        )
    except (ValueError, OSError):
        return None
    scale = min(_TILE / first.width, 1.5 * _TILE / first.height)
    size = (max(1, round(first.width * scale)), max(1, round(first.height * scale)))
    return Image.fromarray(video.fit(frames[0], size, "stretch").numpy())
