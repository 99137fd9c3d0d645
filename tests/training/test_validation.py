"""The validation loss and the previews of a run."""

from __future__ import annotations

import json
from typing import Any

import av
import pytest
import torch
from PIL import Image

from pusa_fast.data.store import LatentStore
from pusa_fast.pipeline import Run
from pusa_fast.training import validation
from pusa_fast.training.data import validation_batches
from pusa_fast.training.trainer import train
from runs import begin, made_up_captions, rows, saved, weights


def test_validation_loss_is_that_of_the_averaged_weights(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        validation, "load_text_encoder", lambda *args: pytest.fail("the text encoder was loaded without samples")
    )
    config = tiny.config(
        steps=4,
        data={"validation_clips": 5},
        validation={"every": 2},
        optim={"ema_decay": 0.5},
        checkpoints={"every": 2},
    )
    train(config)
    told = [row for row in rows(config) if "validation_loss" in row]
    assert [row["step"] for row in told] == [2, 4] and not (config.out / "samples").exists()
    made = begin(config)
    assert made.average is not None
    plain = made._validation_loss()
    made.average.swap()
    held = list(validation_batches(LatentStore(tiny.clips), 5, 1, made.sampling, config.seed))
    total = sum(float(made.loss(batch)[0].detach()) for batch in held)
    assert (
        len(held) == 5
        and told[-1]["validation_loss"] == pytest.approx(total / 5, rel=1e-5)
        and told[-1]["validation_loss"] != plain
    )
    assert json.loads((config.out / "checkpoints" / "best.json").read_text())["loss"] == min(
        row["validation_loss"] for row in told
    )


def test_previews_are_files_one_can_look_at(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_captions(monkeypatch)
    picture = tiny.runs / "first.png"
    Image.new("RGB", (32, 32), (200, 30, 40)).save(picture)
    samples = [{"prompt": "a cat"}, {"prompt": "a red square", "image": str(picture), "seed": 5}]
    config = tiny.config(steps=2, validation={"every": 2, "samples": samples, "steps": 2})
    train(config)
    folder = config.out / "samples" / "step-000002"
    assert sorted(p.name for p in folder.iterdir()) == ["00.mp4", "01.mp4", "sheet.png"]
    with av.open(str(folder / "00.mp4")) as file:
        assert [(f.width, f.height) for f in file.decode(video=0)] == [(32, 32)] * 9, "not as large as the largest clip"
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width >= 32 and sheet.height >= 64


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_fails_in_previews_costs_no_step(tiny: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    made_up_captions(monkeypatch)
    config = tiny.config(
        steps=4,
        validation={"every": 2, "samples": [{"prompt": "a"}], "steps": 1, "num_frames": 5},
        checkpoints={"every": 3},
    )
    with monkeypatch.context() as patch:
        patch.setattr(validation.Pipeline, "run", lambda *args, **named: (_ for _ in ()).throw(error))
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"in validation at step 2: make validation\.num_frames, .* the steps so far are saved",
        ):
            train(config)
    assert saved(config) == ["step-000002"]
    assert train(config).step == 4 and saved(config) == ["step-000002", "step-000003", "step-000004"]
    with av.open(str(config.out / "samples" / "step-000004" / "00.mp4")) as file:
        assert len(list(file.decode(video=0))) == 5


def test_samples_take_the_memory_that_training_leaves(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_captions(monkeypatch)
    seen: list[Any] = []
    monkeypatch.setattr(validation, "usable_memory", lambda device: 10**9)
    monkeypatch.setattr(
        validation.Pipeline,
        "run",
        lambda self, request: (
            seen.append(request.tiling) or Run(torch.zeros(9, 32, 32, 3, dtype=torch.uint8), None, {})
        ),
    )
    config = tiny.config(steps=2, validation={"every": 2, "samples": [{"prompt": "a"}]}, optim={"ema_decay": 0.5})
    train(config)
    adapters_bytes = sum(t.nbytes for t in weights(config).values())
    made = begin(config)
    vae = made.previews._decoder()
    rest = 10**9 - sum(p.nbytes for model in (made.dit, vae) for p in model.parameters())
    steps = 4 * len(made.parameters)  # AdamW counts, in a float each
    assert seen[0].mode == "auto" and seen[0].memory == rest - 3 * adapters_bytes - steps  # two moments and an average

    def unknown(device: torch.device) -> int:
        raise ValueError("this system does not say how much memory it has")

    monkeypatch.setattr(validation, "usable_memory", unknown)
    made.preview()
    assert seen[1] is None
