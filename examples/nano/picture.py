"""Draw a first frame for nano: `python examples/nano/picture.py red circle right gray first.png`."""

from __future__ import annotations

import sys

from PIL import Image

from pusa_fast.training import sprites


def main() -> None:
    if len(sys.argv) != 6:
        tables = (sprites.COLORS, sprites.SHAPES, sprites.DIRECTIONS, sprites.BACKGROUNDS)
        sys.exit("usage: picture.py COLOR SHAPE DIRECTION BACKGROUND OUT, of " + "; ".join(" ".join(t) for t in tables))
    color, shape, direction, background, out = sys.argv[1:]
    dx, dy = sprites.DIRECTIONS[direction]
    scene = sprites.Scene(shape, color, "large", direction, "slowly", background, 32 - 12 * dx, 32 - 12 * dy)
    Image.fromarray(sprites.render([scene])[0, 0].numpy()).save(out)


if __name__ == "__main__":
    main()
