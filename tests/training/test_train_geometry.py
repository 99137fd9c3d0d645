"""Training takes sizes and lengths from the model, before any of its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import pytest

from models import unusual_model
from pusa_fast.data.store import StoreWriter
from pusa_fast.testing import make_input
from pusa_fast.training import trainer
from pusa_fast.training.config import parse_config
from pusa_fast.training.data import auto_parts
from pusa_fast.training.preflight import check
from pusa_fast.training.trainer import train
from runs import made_up_captions


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A run of one step on a clip of 20 x 32 pixels, 7 frames, for a model of unusual geometry."""
    model = unusual_model(tmp_path / "model")
    about = {"vae": "", "text": "", "channels": 16, "text_dim": 64, "text_len": 6}
    with StoreWriter(tmp_path / "clips", about) as writer:
        for number in range(2):
            clip = make_input(16, 4, 5, 8, seed=number), make_input(2, 64, seed=number)
            writer.add(str(number), *clip, source=f"{number}.mp4", caption="")
    return {
        "data": {"path": str(tmp_path / "clips"), "same_encoders": False}, "out": str(tmp_path / "run"),
        "model": str(model), "device": "cpu", "steps": 1, "batch_size": 1, "lora": {"rank": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrong", "right", "said"),
    [
        ("width", 24, 16, r"width=24 is not a multiple of 16 pixels: use 16 or 32"),
        ("height", 18, 20, r"height=18 is not a multiple of 4 pixels: use 16 or 20"),
        ("num_frames", 6, 7, r"num_frames=6 is not 2n\+1 .*: use 5 or 7"),
    ],
)
def test_samples_of_the_model_s_sizes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, wrong: int, right: int, said: str
) -> None:
    monkeypatch.setattr(trainer, "load_dit", lambda *args, **named: pytest.fail("the model was loaded"))
    check(parse_config({**settings, "validation": {name: right}}))
    with pytest.raises(ValueError, match=rf"validation\.{said}"):
        train(parse_config({**settings, "validation": {name: wrong}}))


def test_samples_are_as_large_as_the_largest_clip(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made_up_captions(monkeypatch)
    train(parse_config({**settings, "validation": {"samples": [{"prompt": "a"}], "steps": 1}}))
    with av.open(str(tmp_path / "run" / "samples" / "step-000001" / "00.mp4")) as file:
        assert [(f.width, f.height) for f in file.decode(video=0)] == [(32, 20)] * 7


def test_clips_that_the_patch_does_not_divide(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Five latents high passes with a patch one high; six wide does not with one four wide."""
    monkeypatch.setattr(trainer, "load_dit", lambda *args, **named: pytest.fail("the model was loaded"))
    about = {"vae": "", "text": "", "channels": 16, "text_dim": 64, "text_len": 6}
    with StoreWriter(tmp_path / "odd", about) as writer:
        writer.add("a", make_input(16, 4, 5, 6), make_input(2, 64), source="odd.mp4", caption="")
    with pytest.raises(ValueError, match=r"odd\.mp4: latents .* are not multiples of the patch 1x4"):
        train(parse_config({**settings, "data": {"path": str(tmp_path / "odd"), "same_encoders": False}}))


@pytest.mark.parametrize(("patch", "parts"), [((1, 2, 2), 8), ((1, 4, 4), 2), ((1, 1, 1), 8)])
def test_tokens_of_a_part_follow_the_patch(patch: tuple[int, int, int], parts: int) -> None:
    assert auto_parts(8, 1, (16, 21, 60, 104), patch) == parts
