"""nano's training clips: scenes of the sprites' grammar, some with a photograph as background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import photos
import torch
from torch import Tensor

from pusa_fast.data import sprites

PHOTO_SHARE = 0.25
STILL_SHARE = 0.25  # of the photographs: nothing moves in front of them
# How often each shape is drawn, relative to the most frequent: crosses and squares are learnt last.
SHAPE_RATES = {"circle": 0.35, "square": 0.7, "triangle": 0.5, "cross": 1.0}


@dataclass(frozen=True, eq=False)
class Sample:
    """`photo`: float [SIZE, SIZE, 3] in place of the background; `still`: without the shape."""

    scene: sprites.Scene
    photo: Tensor | None = None
    still: bool = False


def draw(
    generator: torch.Generator, held_out: bool = False, photo_share: float = PHOTO_SHARE, frames: int = sprites.FRAMES
) -> Sample:
    """A random sample; `held_out`: of combinations and photographs that no stage is trained on."""
    scene = sprites.draw_scene(generator, held_out, frames)
    while not held_out and torch.rand((), generator=generator) >= SHAPE_RATES[scene.shape]:
        scene = sprites.draw_scene(generator, held_out, frames)
    kind, still = torch.rand(2, generator=generator).tolist()
    if kind >= photo_share:
        return Sample(scene)
    names = photos.HELD_OUT if held_out else photos.TRAINING
    return Sample(scene, photos.crop(sprites.SIZE, generator, names), still < STILL_SHARE)


def render(samples: Sequence[Sample], frames: int = sprites.FRAMES) -> Tensor:
    """uint8 [N, frames, SIZE, SIZE, 3]."""
    pictures = {i: s.photo for i, s in enumerate(samples) if s.photo is not None}
    clips = sprites.render([s.scene for s in samples], frames, backdrops=pictures)
    for i, sample in enumerate(samples):
        if sample.still and sample.photo is not None:
            clips[i] = sample.photo.round().to(torch.uint8)
    return clips


def caption(sample: Sample, generator: torch.Generator | None = None) -> str:
    """As `sprites.caption`, with "photo" for the background's name."""
    if sample.still:
        return "a still photo"
    background = sample.scene.background if sample.photo is None else "photo"
    return sprites.caption(sample.scene, generator, background)
