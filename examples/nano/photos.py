"""Backgrounds: crops of photographs from scikit-image's wheel (all CC0 or public domain).

astronaut, hubble: NASA. rocket: SpaceX. coffee: Rachel Michetti. camera: Lav Varshney. brick,
grass, gravel: CC0Textures. retina: Wikimedia, CC0. chelsea, a cat by Stefan van der Walt, is held
out of all training.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

TRAINING = (
    "astronaut.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "camera.png", "brick.png",
    "grass.png", "gravel.png",
)  # fmt: skip
HELD_OUT = ("chelsea.png",)


@functools.cache
def _open(name: str) -> Tensor:
    """uint8 [3, H, W]."""
    import numpy as np
    from PIL import Image

    with resources.as_file(resources.files("skimage") / "data" / name) as path, Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def crop(size: int, generator: torch.Generator, names: Sequence[str] = TRAINING) -> Tensor:
    """A random square of a random picture, half of them mirrored: [size, size, 3] in 0..255."""
    picture = _open(names[int(torch.randint(len(names), (), generator=generator))])
    H, W = picture.shape[1:]
    share = float(torch.rand((), generator=generator))
    side = round(size * (min(H, W) / size) ** share)  # log-uniform: from a small detail to the whole
    y, x = (int(torch.randint(n - side + 1, (), generator=generator)) for n in (H, W))
    square = picture[None, :, y : y + side, x : x + side].float()
    small = F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    mirrored = small.flip(2) if float(torch.rand((), generator=generator)) < 0.5 else small
    return mirrored.permute(1, 2, 0)
