"""Conditions and settings: what they resolve to, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pusa_fast.sampling.limits import latent_count
from pusa_fast.sampling.task import Condition, Plan, describe, resolve, settings
from pusa_fast.weights.pretrained import WAN_DEFAULTS


class Clip:
    """A medium of `frames` frames; None: a picture."""

    def __init__(self, frames: int | None) -> None:
        self.frames = frames


PICTURE = Clip(None)


def plan(*conditions: Condition, num_frames: int = 81) -> Plan:
    return resolve(conditions, num_frames, lambda media: media.frames, 4)  # type: ignore[attr-defined]


def given_latents(resolved: Plan) -> dict[int, tuple[int, float]]:
    return {p.latent: (p.source, p.noise) for p in resolved.placements}


def test_no_condition() -> None:
    resolved = plan()
    assert resolved.multipliers == (1.0,) * 21 and resolved.placements == () and resolved.task == "text-to-video"


def test_picture_first() -> None:
    resolved = plan(Condition(PICTURE, noise=0.2), num_frames=17)
    assert given_latents(resolved) == {0: (0, 0.2)}
    assert resolved.multipliers == (0.2, 1, 1, 1, 1)
    assert resolved.frames_needed == (1,)


@pytest.mark.parametrize(
    ("latent", "expected"),
    [
        (-1, [20]),
        (slice(0, 4), [0, 1, 2, 3]),
        (slice(-3, None), [18, 19, 20]),
        (slice(None), list(range(21))),
        (slice(0, 21, 10), [0, 10, 20]),
        ([0, -1], [0, 20]),
        (range(2, 4), [2, 3]),
        (np.array([5, 1]), [1, 5]),
        (torch.tensor([3]), [3]),
        (np.int64(7), [7]),
    ],
)
def test_latent_forms(latent: Any, expected: list[int]) -> None:
    assert [p.latent for p in plan(Condition(PICTURE, latent)).placements] == expected


def test_clip_defaults_to_its_own_indices() -> None:
    resolved = plan(Condition(Clip(81), [0, -1], [0.0, 0.3]))
    assert given_latents(resolved) == {0: (0, 0.0), 20: (20, 0.3)}
    assert resolved.frames_needed == (81,)


@pytest.mark.parametrize(
    ("frames", "source", "expected", "needed"),
    [
        (200, None, [18, 19, 20], 81),
        (13, [1, 2, 3], [1, 2, 3], 13),
        (14, slice(1, 4), [1, 2, 3], 13),  # the last, unfinished chunk encodes to nothing
        (13, slice(-3, None), [1, 2, 3], 13),
        (200, range(1, 4), [1, 2, 3], 13),
        (200, np.array([0, 0, 1]), [0, 0, 1], 5),
    ],
)
def test_source(frames: int, source: Any, expected: list[int], needed: int) -> None:
    resolved = plan(Condition(Clip(frames), slice(-3, None), source=source))
    assert [p.source for p in resolved.placements] == expected
    assert resolved.frames_needed == (needed,)


def test_same_medium_in_several_conditions_counts_once() -> None:
    clip, counted = Clip(81), []
    conditions = [
        Condition(clip, 0),
        Condition("a.mp4", 1),
        Condition(clip, 4),
        Condition("a.mp4", 2),
        Condition(Clip(81), 3),
    ]
    resolved = resolve(conditions, 81, lambda media: counted.append(media) or 81, 4)  # type: ignore[func-returns-value]
    assert counted == list(resolved.media) == [clip, "a.mp4", conditions[4].media]
    assert [p.medium for p in resolved.placements] == [0, 1, 1, 2, 0]
    assert resolved.frames_needed == (17, 9, 13)


LONG = Clip(81)


@pytest.mark.parametrize(
    ("conditions", "task"),
    [
        ([], "text-to-video"),
        ([Condition(PICTURE)], "image-to-video"),
        ([Condition(PICTURE), Condition(Clip(None), -1)], "start-end"),
        ([Condition(PICTURE, [0, 20])], "start-end"),
        ([Condition(PICTURE, -1)], "keyframes"),
        ([Condition(PICTURE), Condition(Clip(None), 7), Condition(Clip(None), -1)], "keyframes"),
        ([Condition(LONG, slice(0, 4))], "extension"),
        ([Condition(LONG, [0, -1])], "completion"),
        ([Condition(LONG, slice(0, 3)), Condition(LONG, slice(-3, None))], "completion"),
        ([Condition(LONG, slice(0, 3)), Condition(Clip(13), slice(-3, None), source=slice(1, 4))], "transition"),
        ([Condition(Clip(13), slice(-3, None), source=slice(1, 4)), Condition(LONG, slice(0, 3))], "transition"),
        ([Condition(LONG, slice(1, 3)), Condition(Clip(13), slice(-3, None), source=slice(1, 4))], "completion"),
        ([Condition(LONG, slice(0, 3)), Condition(PICTURE, -1)], "completion"),
    ],
)
def test_task_name(conditions: list[Condition], task: str) -> None:
    assert plan(*conditions).task == task


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([Condition(PICTURE, 21)], r"conditions\[0\] \(Clip\): latent 21 does not exist; the clip has latents 0 to 20"),
        ([Condition(PICTURE, -22)], r"latent -22 does not exist; the clip has latents 0 to 20"),
        ([Condition(PICTURE, slice(0, 22))], "latent=0:22 selects more than there is"),
        ([Condition(PICTURE, slice(5, 5))], "latent=5:5 selects nothing"),
        ([Condition(PICTURE, [])], "latent is empty"),
        ([Condition(PICTURE, 1.0)], "latent must be a whole number, a slice or a sequence of them; got 1.0"),  # type: ignore[arg-type]
        ([Condition(PICTURE, True)], "latent must be a whole number"),
        ([Condition(PICTURE, "0")], "latent must be a whole number"),  # type: ignore[arg-type]
        ([Condition(PICTURE, [0, -21])], "names a latent twice"),
        ([Condition(PICTURE, noise=1.5)], r"conditions\[0\] \(Clip\): noise must be a number from 0 .* got 1.5"),
        ([Condition(PICTURE, noise=math.nan)], "noise must be a number from 0"),
        ([Condition(PICTURE, noise="0.2")], "noise must be a number from 0"),  # type: ignore[arg-type]
        ([Condition(PICTURE, [0, 1], [0.1])], "1 noise values for 2 latents: give one number, or one per latent"),
        ([Condition(PICTURE, noise=[0.1, 0.2])], "2 noise values for 1 latents"),
        ([Condition(PICTURE, [0, 1], np.array([0.1, 0.2, 0.3]))], "3 noise values for 2 latents"),  # type: ignore[arg-type]
        ([Condition(PICTURE, 3, source=3)], "source=3, but a picture encodes to one latent: leave source out"),
        ([Condition(Clip(9), slice(0, 4))], "latent 3 needs 13 frames of the clip, which has 9"),
        ([Condition(Clip(0), 0)], "the clip has no frames"),
        ([Condition(Clip(9), 0, source=3)], "source 3 does not exist; the clip's 9 frames encode to latents 0 to 2"),
        ([Condition(Clip(9), [0, 1], source=[0])], r"source=\[0\] names 1 latents, latent=\[0, 1\] 2"),
        (
            [Condition("first.png"), Condition("clip.mp4", slice(0, 4))],
            r"conditions\[0\] \(first.png\) and conditions\[1\] \(clip.mp4\) both give latent 0: keep one of",
        ),
        (["first.png"], r"conditions\[0\] is a str, not a Condition"),
    ],
)
def test_refused(conditions: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(conditions, 81, lambda media: media.frames if isinstance(media, Clip) else 81, 4)


@given(st.integers(1, 400))
def test_frame_counts(num_frames: int) -> None:
    if num_frames % 4 == 1:
        assert latent_count(num_frames, 4) == (num_frames - 1) / 4 + 1
        return
    with pytest.raises(ValueError, match=rf"num_frames={num_frames} is not 4n\+1.*: use (\d+) or (\d+)") as caught:
        latent_count(num_frames, 4)
    below, above = (int(word) for word in str(caught.value).replace("use ", "").split() if word.isdigit())
    assert below < num_frames < above and latent_count(below, 4) + 1 == latent_count(above, 4)


@pytest.mark.parametrize("num_frames", [0, -3, 17.0, "17", None, True])
def test_frame_count_is_a_number(num_frames: object) -> None:
    with pytest.raises(ValueError, match="num_frames must be a whole number from 1 to"):
        latent_count(num_frames, 4)


def test_settings_take_defaults_for_none() -> None:
    chosen = settings({"steps": 4, "height": None, "seed": 7}, WAN_DEFAULTS, (16, 16), 4)
    assert (chosen.num_frames, chosen.height, chosen.width, chosen.steps, chosen.guidance_scale) == (
        81,
        480,
        832,
        4,
        3.0,
    )
    assert (chosen.seed, chosen.compat, chosen.fit, chosen.output) == (7, "reference", "crop", "frames")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 100}, "height=100 is not a multiple of 16 pixels: use 96 or 112"),
        ({"width": 9}, "width=9 is not a multiple of 32 pixels: use 32"),
        ({"width": 0}, "width=0 is not a multiple"),
        ({"width": -64}, "width=-64 is not a multiple of 32 pixels: use 32"),
        ({"width": 64.0}, r"width=64.0 is not a multiple"),
        ({"num_frames": 80}, "num_frames=80 is not 4n.1 .*: use 77 or 81"),
        ({"steps": 0}, "steps must be"),
        ({"shift": -1}, "shift must be"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a number, at least 0"),
        ({"guidance_scale": math.nan}, "guidance_scale must be"),
        ({"guidance_scale": math.inf}, "guidance_scale must be"),
        ({"guidance_scale": "3"}, "guidance_scale must be"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"compat": "old"}, "unknown compat 'old': choose one of reference, exact"),
        ({"fit": "zoom"}, "unknown fit 'zoom': choose one of crop, pad, stretch"),
        ({"output": "mp4"}, "unknown output 'mp4': choose one of frames, latents"),
    ],
)
def test_settings_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(given, WAN_DEFAULTS, (16, 32), 4)


def test_describe() -> None:
    assert describe("a/b.png") == "a/b.png"
    assert describe(torch.zeros(2, 3)) == "Tensor [2, 3]"
    assert describe([1, 2]) == "list"
