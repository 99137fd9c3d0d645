"""The procedural clips, and the oracle that scores everything else."""

from __future__ import annotations

import pytest
import torch

from pusa_fast.data import sprites

SCENES = [sprites.draw_scene(torch.Generator().manual_seed(i), held_out=None) for i in range(60)]
CLIPS = sprites.render(SCENES)


def test_the_oracle_reads_what_was_rendered() -> None:
    for scene, clip in zip(SCENES, CLIPS, strict=True):
        seen = sprites.measure(clip)
        assert set(seen.colors) == {scene.color}
        assert set(seen.shapes) == {scene.shape}
        assert seen.direction == scene.direction
        assert (seen.centers - scene.centers()).norm(dim=1).max() < 0.3


def test_the_oracle_sees_a_wrong_clip() -> None:
    scene, clip = SCENES[0], CLIPS[0]
    assert sprites.measure(clip.flip(0)).direction != scene.direction
    assert scene.color not in sprites.measure(clip.flip(-1)).colors[:1] or scene.color in ("green", "purple")
    nothing = sprites.measure(torch.full_like(clip, 100))
    assert nothing.direction is None and set(nothing.colors) == {None} and bool(nothing.centers.isnan().all())
    still = sprites.measure(clip[:1].expand(17, -1, -1, -1))
    assert still.direction is None and set(still.shapes) == {scene.shape}


def test_the_shape_never_leaves_the_picture() -> None:
    for scene, clip in zip(SCENES, CLIPS, strict=True):
        areas = sprites.measure(clip).areas
        assert areas.float().std() < 0.06 * areas.float().mean(), scene


def test_scenes_are_seeded_and_splits_do_not_meet() -> None:
    a, b = (sprites.draw_scene(torch.Generator().manual_seed(5)) for _ in range(2))
    assert a == b
    generator = torch.Generator().manual_seed(0)
    for held_out in (True, False):
        for _ in range(40):
            s = sprites.draw_scene(generator, held_out)
            assert sprites.is_held_out(s.color, s.shape, s.direction) == held_out


def test_every_word_of_the_grammar_is_trained_and_thirteen_combinations_are_held_out() -> None:
    table = [(c, s, d) for c in sprites.COLORS for s in sprites.SHAPES for d in sprites.DIRECTIONS]
    held = [t for t in table if sprites.is_held_out(*t)]
    assert (len(held), len(table)) == (13, 96)
    for column, words in enumerate((sprites.COLORS, sprites.SHAPES, sprites.DIRECTIONS)):
        assert {t[column] for t in table if t not in held} == set(words)


def test_captions_name_the_scene() -> None:
    scene = SCENES[0]
    full = sprites.caption(scene)
    for word in (scene.size, scene.color, scene.shape, scene.direction, scene.speed, scene.background):
        assert word in full
    generator = torch.Generator().manual_seed(0)
    varied = {sprites.caption(scene, generator) for _ in range(50)}
    assert len(varied) > 10
    assert all(w in text for text in varied for w in (scene.color, scene.shape, scene.direction))


@pytest.mark.parametrize("frames,size", [(1, 64), (9, 64), (17, 32)])
def test_render_shapes(frames: int, size: int) -> None:
    clips = sprites.render(SCENES[:2], frames, size)
    assert clips.shape == (2, frames, size, size, 3) and clips.dtype == torch.uint8


@pytest.mark.parametrize(
    ("direction", "axis", "sign"), [("right", 1, 1), ("left", 1, -1), ("down", 0, 1), ("up", 0, -1)]
)
def test_words_mean_what_a_person_reads(direction: str, axis: int, sign: int) -> None:
    """Rows count downwards, columns to the right; the brightest pixels are the shape's on black."""
    scene = sprites.Scene("square", "yellow", "small", direction, "slowly", "black", 32.0, 32.0)
    first, last = (
        frame.float().sum(-1).gt(300).nonzero().float().mean(0) for frame in sprites.render([scene])[0, [0, -1]]
    )
    assert float((last - first)[axis]) == pytest.approx(16 * sign, abs=0.3)
    assert float((last - first)[1 - axis]) == pytest.approx(0, abs=0.3)
