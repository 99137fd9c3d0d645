"""The embedded model: what a person gets from it, and the loop that trained it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from pusa_fast import Condition, Pipeline
from pusa_fast.data import sprites
from pusa_fast.sampling.conditioning import to_frames, to_video

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "pusa_fast" / "assets" / "nano"
PICTURE = ROOT / "examples" / "first_frame.png"
PROMPT = "a red circle moves right on a gray background"


@pytest.fixture(scope="module")
def nano() -> Pipeline:
    return Pipeline.from_pretrained("nano", device="cpu")


def test_it_stays_small_and_says_how_it_was_trained() -> None:
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 20_000_000
    training = json.loads((ASSETS / "model.json").read_text())["training"]
    assert list(training["stages"]) == ["vae", "text", "base", "lora"]
    assert all(stage["steps"] > 0 and stage["seconds"] > 0 for stage in training["stages"].values())


def test_the_given_picture_moves_as_the_prompt_says(nano: Pipeline) -> None:
    assert sprites.is_held_out("red", "circle", "right"), "the demo shows a combination that was never trained"
    picture = Image.open(PICTURE)
    frames = nano(PROMPT, conditions=[Condition(picture, 0, 0.0)], seed=0)
    seen = sprites.measure(frames)
    assert frames.shape == (17, 64, 64, 3)
    assert seen.direction == "right"
    assert seen.colors[-1] == "red" and seen.shapes[-1] == "circle"
    # The picture's latent is frozen, so the first frame is what the VAE makes of the picture alone.
    given = torch.from_numpy(np.array(picture))
    alone = nano.vae.decode(nano.vae.encode(to_video(given[None], nano.device)))
    assert (frames[0].int() - to_frames(alone)[0].int()).abs().max() <= 1
    assert (frames[0].float() - given.float()).abs().mean() < 3


def test_the_same_call_gives_the_same_bytes(nano: Pipeline) -> None:
    first, second = (nano("a large blue square moves left", seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, nano("a large blue square moves left", seed=4))


def test_the_lora_is_what_makes_image_to_video_work(nano: Pipeline) -> None:
    """Base without LoRA: clearly further from the true continuation (docs/nano.md has the
    intervals)."""
    generator = torch.Generator().manual_seed(7)
    scenes = [sprites.draw_scene(generator, held_out=True) for _ in range(3)]
    base = Pipeline.from_pretrained("nano", lora={}, device="cpu")

    def error(pipe: Pipeline) -> float:
        total = 0.0
        for scene, truth in zip(scenes, sprites.render(scenes), strict=True):
            seen = sprites.measure(pipe(sprites.caption(scene), conditions=[Condition(truth[0])], seed=1))
            total += float((seen.centers - scene.centers())[1:].norm(dim=1).nan_to_num(32.0).mean()) / len(scenes)
        return total

    assert error(nano) < 0.7 * error(base)


def _stage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nano_stage", ROOT / "examples" / "nano" / "stage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    stage = _stage()

    def run(folder: Path, stop_at: int | None, plan: str = "seed 0") -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)

        def loss(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=stage.step_generator(0, step))
            return (model(x) - x.flip(1)).square().mean()

        stage.SAVE_EVERY = -1.0  # after every step
        stage.train(
            "toy",
            {"model": model},
            [torch.optim.AdamW(model.parameters(), lr=0.01)],
            loss,
            12,
            folder,
            plan=plan,
            log_every=4,
        )
        return model.weight.detach()

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 7)
    assert torch.equal(run(tmp_path / "killed", None), whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "toy.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12]
    with pytest.raises(ValueError, match="seed 0, not seed 1"):
        run(tmp_path / "killed", None, plan="seed 1")


@pytest.mark.slow
def test_all_three_stages_run_and_the_result_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "nano" / "train.py"), "--scale", "0.002", "--threads", "2"]
    command += ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")]
    for _ in range(2):  # the second run finds everything done
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    frames = Pipeline.from_pretrained(tmp_path / "model")(PROMPT, conditions=[Condition(PICTURE)], steps=2)
    assert frames.shape == (17, 64, 64, 3)
