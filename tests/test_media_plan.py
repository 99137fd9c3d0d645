"""Options that give frames -> conditions and the parts of the written file."""

from __future__ import annotations

import json
import os
from typing import Any

from pusa_fast.media_plan import MediaPlan, Part, parse_keyframe, parse_latents, plan_media
from pusa_fast.options import ClipOptions
from pusa_fast.sampling.task import Condition, MediaFile

FPS = 8.0


def plan(num_frames: int, chunk: int = 4, **given: Any) -> MediaPlan:
    return plan_media(ClipOptions(**given), num_frames, FPS, chunk)


def fields(condition: Condition) -> tuple[Any, ...]:
    return condition.media, condition.latent, condition.noise, condition.source


def file(name: str, **more: Any) -> MediaFile:
    return MediaFile(os.path.abspath(name), **more)


def test_extension_repeats_the_last_noise() -> None:
    (condition,) = plan(81, extend="x.mp4", overlap=25).conditions
    assert condition.noise == (0.0, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5)
    (condition,) = plan(81, extend="x.mp4", overlap=13, keep_noise="0.1,0.2").conditions
    assert condition.noise == (0.1, 0.2, 0.2, 0.2)


def test_a_plan_survives_its_record() -> None:
    for given in (
        {},
        {"image": "a.png", "image_noise": 0.2, "end_image": "b.png", "keyframe": ["c.png@2"]},
        {"video": "v.mp4", "keep": "0-2,-1"},
        {"extend": "v.mp4", "end_image": "b.png"},
        {"transition": ("v.mp4", "w.mp4"), "ends": 1},
    ):
        made = plan(17, **given)
        read = MediaPlan.from_json(json.loads(json.dumps(made.to_json())), FPS)
        assert list(map(fields, read.conditions)) == list(map(fields, made.conditions))
        assert read.written == made.written and read.paths() == made.paths()


def test_what_is_written_counts_each_instant_once() -> None:
    made = plan(81, transition=("v.mp4", "w.mp4"))  # ends: 3
    assert made.written == (Part(os.path.abspath("v.mp4")), Part(start=9, stop=-13), Part(os.path.abspath("w.mp4")))
    first, second = map(fields, made.conditions)
    assert first == (file("v.mp4", fps=FPS, last_frames=9), (0, 1, 2), (0.0,) * 3, (0, 1, 2))
    assert second == (file("w.mp4", fps=FPS), (-3, -2, -1), (0.0,) * 3, (1, 2, 3))


def test_the_chunk_is_the_models_own() -> None:
    """A VAE that halves time once: latent i is the two frames up to 2i."""
    (condition,) = plan(17, chunk=2, extend="v.mp4", overlap=5).conditions
    assert condition.latent == (0, 1, 2) and condition.media == file("v.mp4", fps=FPS, last_frames=5)
    made = plan(17, chunk=2, transition=("v.mp4", "w.mp4"), ends=2)
    assert made.written[1] == Part(start=3, stop=-5)


def test_latents_as_typed() -> None:
    assert parse_latents("--keep", "0-3") == (0, 1, 2, 3)
    assert parse_latents("--keep", "0, 4-4,-1") == (0, 4, -1)


def test_a_keyframe_reads_only_what_follows_the_last_mark() -> None:
    assert parse_keyframe("a@1:0.5@3:0.25") == ("a@1:0.5", 3, 0.25)
