"""A nano scene's first and last frame: `picture.py red circle right gray first.png last.png`."""

from __future__ import annotations

import sys

from PIL import Image

from pusa_fast.data import sprites


def main() -> None:
    if len(sys.argv) != 7:
        tables = (sprites.COLORS, sprites.SHAPES, sprites.DIRECTIONS, sprites.BACKGROUNDS)
        sys.exit(
            "usage: picture.py COLOR SHAPE DIRECTION BACKGROUND FIRST LAST, of "
            + "; ".join(" ".join(t) for t in tables)
        )
    color, shape, direction, background, first, last = sys.argv[1:]
    dx, dy = sprites.DIRECTIONS[direction]
    scene = sprites.Scene(shape, color, "large", direction, "slowly", background, 32 - 12 * dx, 32 - 12 * dy)
    clip = sprites.render([scene])[0].numpy()
    Image.fromarray(clip[0]).save(first)
    Image.fromarray(clip[-1]).save(last)


if __name__ == "__main__":
    main()
