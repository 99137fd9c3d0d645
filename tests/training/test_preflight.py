"""What cannot work is found before the model is loaded."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from pusa_fast.data.store import LatentStore, StoreWriter
from pusa_fast.testing import make_input
from pusa_fast.training import trainer
from pusa_fast.training.trainer import train
from runs import begin


def test_world_that_does_not_divide_the_batch(tiny: Any) -> None:
    with pytest.raises(ValueError, match="batch of 4 clips cannot be shared by 3 processes in 1 parts"):
        begin(tiny.config(), rank=1, size=3)


def test_mistakes_are_found_before_the_model_is_loaded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_dit", lambda *args, **named: pytest.fail("the model was loaded"))
    (tiny.runs / "file").write_text("")
    for changes, kind, message in (
        ({"dit": "gone.safetensors"}, FileNotFoundError, "dit gone.safetensors does not exist"),
        ({"data": {"path": "gone"}}, FileNotFoundError, "pusa-fast prepare"),
        ({"lora": {"start": "gone.safetensors"}}, FileNotFoundError, "lora.start gone.safetensors does not exist"),
        ({"out": str(tiny.runs / "file")}, NotADirectoryError, "give a folder"),
        (
            {"validation": {"every": 1, "samples": [{"prompt": "a", "image": "gone.png"}]}},
            FileNotFoundError,
            r"gone\.png",
        ),
        ({"device": "tpu"}, ValueError, "unknown device .tpu."),
        ({"device": "cpu:x"}, ValueError, "unknown device"),
        ({"attention": "flash9"}, ValueError, "flash9"),
        ({"batch_size": 6, "accumulate": 6, "data": {"validation_clips": 11}}, ValueError, "leaves none of 11 clips"),
    ):
        with pytest.raises(kind, match=message):
            train(tiny.config(**changes))
    config = tiny.config(lora=None, optim={"name": "muon"}, parallel="fsdp")
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        begin(config, size=2)


def test_clips_of_another_model_are_refused(tiny: Any) -> None:
    about = {**LatentStore(tiny.clips).model, "text_dim": 32}
    with StoreWriter(tiny.runs / "other", about) as writer:
        writer.add("a", make_input(16, 2, 4, 4), make_input(2, 32), source="a", caption="")
    with pytest.raises(ValueError, match="prepared for another model: its text_dim is 32, this one's 64"):
        begin(tiny.config(data={"path": str(tiny.runs / "other")}, batch_size=1))
    with StoreWriter(tiny.runs / "odd", {**about, "text_dim": 64}) as writer:
        writer.add("a", make_input(16, 2, 5, 4), make_input(2, 64), source="odd.mp4", caption="")
    with pytest.raises(ValueError, match=r"odd\.mp4: latents .* not multiples of the patch 2x2"):
        begin(tiny.config(data={"path": str(tiny.runs / "odd")}, batch_size=1))


@pytest.mark.parametrize(("part", "what"), [("vae", "VAE"), ("text", "text encoder or tokenizer")])
def test_clips_of_another_encoder_are_refused(tiny: Any, part: str, what: str) -> None:
    with StoreWriter(tiny.runs / "other", {**LatentStore(tiny.clips).model, part: "another's"}) as writer:
        writer.add("a", make_input(16, 2, 4, 4), make_input(2, 64), source="a", caption="")
    with pytest.raises(
        ValueError,
        match=f"other was prepared with another {what} than that of .*nano: prepare the clips with this model",
    ):
        train(tiny.config(data={"path": str(tiny.runs / "other")}, batch_size=1))
    assert (
        train(tiny.config(steps=1, data={"path": str(tiny.runs / "other"), "same_encoders": False}, batch_size=1)).step
        == 1
    )


def test_caption_dropout_without_an_empty_caption(tiny: Any) -> None:
    shutil.copytree(tiny.clips, tiny.runs / "bare")
    (tiny.runs / "bare" / "empty_text.safetensors").unlink()
    config = tiny.config(data={"path": str(tiny.runs / "bare"), "caption_dropout": 0.1})
    with pytest.raises(ValueError, match="holds no empty caption, so captions cannot be dropped"):
        train(config)
    assert train(tiny.config(steps=1, data={"path": str(tiny.runs / "bare")})).step == 1


def test_a_sample_that_is_no_picture_is_found_before_anything_is_loaded(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_dit", lambda *args, **named: pytest.fail("a model was loaded"))
    text = tiny.runs / "text.png"
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        train(tiny.config(validation={"every": 2, "samples": [{"prompt": "a", "image": str(text)}]}))
    with pytest.raises(ValueError, match=r"validation\.width=100 is not a multiple of 16 pixels: use 96"):
        train(tiny.config(validation={"width": 100}))
    with pytest.raises(ValueError, match=r"validation\.num_frames=80 is not 4n\+1 .*use 77 or 81"):
        train(tiny.config(validation={"num_frames": 80}))
