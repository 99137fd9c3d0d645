"""What nano is trained on and how it is scored: the scripts of examples/nano."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pusa_fast import Condition, Pipeline
from pusa_fast.training import sprites
from pusa_fast.training.store import LatentStore

FOLDER = Path(__file__).parents[1] / "examples" / "nano"


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Imports a script by name; the folder and its modules are forgotten afterwards."""
    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)

    def find(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield find
    sys.path.remove(str(FOLDER))
    own = {path.stem for path in FOLDER.glob("*.py")}
    for name in (set(sys.modules) - before) & own:
        del sys.modules[name]


def test_a_share_of_backgrounds_are_photographs_and_one_of_them_is_held_out(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    data, photos = load("data"), load("photos")
    opened: list[str] = []
    real = photos._open
    monkeypatch.setattr(photos, "_open", lambda name: opened.append(name) or real(name))
    draw = torch.Generator().manual_seed(0)
    training = [data.draw(draw) for _ in range(200)]
    assert set(opened) <= set(photos.TRAINING) and len(set(opened)) > 6
    share = sum(s.photo is not None for s in training) / 200
    assert 0.15 < share < 0.35 and any(s.still for s in training if s.photo is not None)
    opened.clear()
    held_out = [data.draw(draw, held_out=True, photo_share=1.0) for _ in range(20)]
    assert set(opened) == set(photos.HELD_OUT)
    assert all(sprites.is_held_out(s.scene.color, s.scene.shape, s.scene.direction) for s in held_out)


def test_a_shape_moves_before_a_photograph_that_stays(load: Any) -> None:
    pytest.importorskip("skimage")
    data = load("data")
    scene = sprites.Scene("circle", "red", "small", "right", "slowly", "gray", 20.0, 32.0)
    photo = load("photos").crop(64, torch.Generator().manual_seed(1))
    assert photo.shape == (64, 64, 3) and photo.min() >= 0 and photo.max() <= 255
    moving, still, plain = data.render([data.Sample(scene, photo), data.Sample(scene, photo, still=True), data.Sample(scene)])
    assert torch.equal(still[0], still[16]) and (still[0].float() - photo).abs().max() <= 1
    changed = (moving[0] != moving[16]).any(-1)
    assert 0 < changed.sum() < 64 * 64 / 3 and torch.equal(moving[0, 0], still[0, 0])
    assert sprites.measure(plain).direction == "right"
    assert "on a photo background" in data.caption(data.Sample(scene, photo)) and data.caption(data.Sample(scene, photo, True)) == "a still photo"
    assert "on a gray background" in data.caption(data.Sample(scene))


def test_the_tokenizer_knows_every_word(load: Any) -> None:
    tokenizer = load("text").build_tokenizer()
    draw = torch.Generator().manual_seed(0)
    scenes = [sprites.draw_scene(draw, None) for _ in range(100)]
    captions = ["a still photo", *(sprites.caption(s, draw, b) for s in scenes for b in (None, "photo"))]
    assert not any(tokenizer.unk_token_id in tokenizer(caption)["input_ids"] for caption in captions)


def test_training_clips_are_a_store_that_goes_on(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    latents = load("latents")
    assets = Path(sys.modules["pusa_fast"].__file__ or "").parent / "assets" / "nano"
    first = latents.prepare(tmp_path, assets, 0, 3)
    store = LatentStore(latents.prepare(tmp_path, assets, 0, 5))
    assert store.folder == first and len(store) == 5
    assert store.clips[0].shape == (16, 5, 8, 8) and store.clips[0].caption == latents.sample(0, 0)[1]


def test_a_batch_of_scored_clips_is_what_the_pipeline_makes(load: Any) -> None:
    scoring = load("scoring")
    pipe = Pipeline.from_pretrained("nano", device="cpu")
    scenes = scoring.held_out_scenes(2, 1)
    truths, captions = sprites.render(scenes), [sprites.caption(s) for s in scenes]
    for given in ((), ((0, 0, 0.0), (-1, -1, 0.2))):
        clips = scoring.make(pipe, captions, truths, given, (4, 5), steps=3)
        for i in range(2):
            conditions = [Condition(truths[i][frame], latent, noise) for frame, latent, noise in given]
            alone = pipe(captions[i], conditions=conditions, seed=4 + i, steps=3)
            assert (clips[i].int() - alone.int()).abs().max() <= 1


def test_a_run_by_two_processes(load: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    launch = load("launch")
    done = launch.run(tiny.config(steps=2), 2)
    assert done.step == 2 and done.weights == tiny.runs / "run" / "lora.safetensors" and done.weights.exists()
    state = json.loads((tiny.runs / "run" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["processes"] == 2
    with pytest.raises(RuntimeError, match="ended with 1"):
        launch.run(tiny.config("uneven", batch_size=3), 2)


def test_intervals(load: Any) -> None:
    interval = load("scoring").interval
    mean, low, high = interval([100.0] * 90 + [0.0] * 10, percent=True)  # Wilson's interval of 90 of 100
    assert (mean, round(low, 1), round(high, 1)) == (90.0, 82.6, 94.5)
    mean, low, high = interval([1.0, 2.0, 3.0], percent=False)
    assert mean == 2.0 and high - mean == pytest.approx(1.96 / 3**0.5)


def test_ablation_rows_are_scored_once_and_make_tables(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ablate = load("ablate")
    monkeypatch.setattr(ablate, "ROWS", tmp_path / "rows.json")
    scored: list[Any] = []

    def score(pool: Any, model: Any, scenes: Any, tasks: Any) -> Iterator[Any]:
        scored.append(model)
        results = {task: {key_0: [50.0, 70.0] for key_0 in (*measures, "centroid error px")} for task, measures in ablate._MEASURES.values()}
        yield 2, results

    monkeypatch.setattr(ablate, "score", score)
    ablation = ablate.Ablation(tmp_path, float("inf"), None)
    run = ablate.RUNS[0]
    keys = list(ablate.wanted(run, 0, 900))
    assert len(keys) == len(ablate.STRENGTHS) + len(ablate.STEPS) - 1 and len(set(keys)) == len(keys)
    for key in keys:
        ablation.score(key, ablation.model(run, tmp_path / "w.safetensors", key))
    assert [m.lora for m in scored[:2]] == [{str(tmp_path / "w.safetensors"): s} for s in ablate.STRENGTHS[:2]]
    again = ablate.Ablation(tmp_path, float("inf"), None)
    assert all(again.known(key) for key in keys) and not again.known(ablate.Key(run.name, 1, 900, 1.0))
    assert json.loads((tmp_path / "rows.json").read_text())[0]["total"] == 60.0
    text = ablate.tables(again.rows)
    assert "| 900 | 60.0 (81.78) | 60.0 (87.69) | 60.0 (86.93) | 60.0 (85.91) |" in text and "| first frame clean | - (73.27)" in text
    assert ablate.cell([{"total": 1.0, "a": 1}, {"total": 3.0, "a": 1}], a=1) == "2.0 ± 12.7"
