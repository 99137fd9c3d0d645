"""What nano is trained on and how it is scored: the scripts of examples/nano."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from pusa_fast import Condition, Pipeline
from pusa_fast.data import sprites
from pusa_fast.data.store import LatentStore
from pusa_fast.training.config import load_config
from pusa_fast.training.trainer import Outcome, train

FOLDER = Path(__file__).parents[2] / "examples" / "nano"


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


def test_a_share_of_backgrounds_are_photographs_and_one_of_them_is_held_out(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    moving, still, plain = data.render(
        [data.Sample(scene, photo), data.Sample(scene, photo, still=True), data.Sample(scene)]
    )
    assert torch.equal(still[0], still[16]) and (still[0].float() - photo).abs().max() <= 1
    changed = (moving[0] != moving[16]).any(-1)
    assert 0 < changed.sum() < 64 * 64 / 3 and torch.equal(moving[0, 0], still[0, 0])
    assert sprites.measure(plain).direction == "right"
    assert (
        "on a photo background" in data.caption(data.Sample(scene, photo))
        and data.caption(data.Sample(scene, photo, True)) == "a still photo"
    )
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


@pytest.mark.slow
def test_a_run_by_two_processes(load: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    done = load("launch").run(tiny.config(steps=2), 2)
    assert done.step == 2 and done.weights == tiny.runs / "run" / "lora.safetensors" and done.weights.exists()
    state = json.loads((tiny.runs / "run" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["processes"] == 2


@pytest.mark.parametrize(("code", "steps"), [(0, 2), (0, 3), (1, 2)])
def test_what_a_run_by_two_processes_leaves(
    load: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, code: int, steps: int
) -> None:
    """Beside a stand-in for torchrun, which has taken two of the steps."""
    launch, settings = load("launch"), tiny.config(steps=steps)
    train(settings.model_copy(update={"steps": 2}))
    (tiny.runs / "run" / "lora.safetensors").unlink()
    commands: list[list[str]] = []
    real = launch.subprocess.Popen

    def torchrun(command: list[str], env: dict[str, str]) -> Any:
        commands.append(command)
        assert env["OMP_NUM_THREADS"] == "1"
        return real([sys.executable, "-c", f"raise SystemExit({code})"], env=env)

    monkeypatch.setattr(launch.subprocess, "Popen", torchrun)
    if code:
        with pytest.raises(RuntimeError, match="ended with 1"):
            launch.run(settings, 2)
    else:
        done = launch.run(settings, 2)
        assert (done.step, done.weights is not None) == (2, steps == 2)
    assert "--nproc-per-node=2" in commands[0] and load_config(commands[0][-1]) == settings


def test_intervals(load: Any) -> None:
    interval = load("scoring").interval
    mean, low, high = interval([100.0] * 90 + [0.0] * 10, percent=True)  # Wilson's interval of 90 of 100
    assert (mean, round(low, 1), round(high, 1)) == (90.0, 82.6, 94.5)
    mean, low, high = interval([1.0, 2.0, 3.0], percent=False)
    assert mean == 2.0 and high - mean == pytest.approx(1.96 / 3**0.5)


class Inline(Executor):
    """Does what it is given at once."""

    def submit(self, call: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args, **kwargs))
        return future


def _scores(path_px: tuple[float, float]) -> Any:
    t2v = {f"{name} right %": [50.0, 70.0] for name in ("direction", "colour", "shape")}
    i2v = {
        "direction right %": [50.0, 70.0],
        "colour kept %": [50.0, 70.0],
        "shape kept to the end %": [50.0, 70.0],
        "centroid error px": [*path_px],
    }
    return {"text-to-video": t2v, "image-to-video, noise 0": i2v}


def test_ablation_trains_and_scores_what_is_missing(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ablate, trained, scored = load("ablate"), [], []
    monkeypatch.setattr(ablate, "ROWS", tmp_path / "rows.json")

    def train(config: Any) -> Any:
        trained.append((config.out.name, config.steps, config.batch_size))
        config.out.mkdir(parents=True, exist_ok=True)
        weights = config.out / "lora.safetensors"
        weights.write_bytes(b"weights")
        return Outcome(config.steps, weights)

    def score(pool: Any, model: Any, scenes: Any, tasks: Any) -> Iterator[Any]:
        scored.append(model)
        yield 2, _scores((3.0, 3.1))

    monkeypatch.setattr(ablate, "train", train)
    monkeypatch.setattr(ablate, "score", score)

    def work(seed: int = 0, deadline: float = float("inf")) -> Any:
        rows = ablate.Rows()
        ablate.work_off(Inline(), rows, ablate.tasks(rows, seed, tmp_path, tmp_path / "clips"), 2, deadline)
        return rows

    assert work(deadline=0.0).all == [] and not trained  # nothing starts after the deadline
    rows = work()
    run = f"fully-random-0-{ablate.base()}"  # another base trains anew
    assert [steps for name, steps, _ in trained if name == run] == [150, 450, 750, 900, 1200]
    assert (
        len(rows.all)
        == len(scored)
        == 1 + sum(len(list(ablate.wanted(r, 0, i))) for r in ablate.RUNS for i in r.iterations)
    )
    assert {batch for _, _, batch in trained} == {8}
    weights = str(tmp_path / run / "weights-150.safetensors")
    assert [m.lora for m in scored if m.lora and weights in m.lora] == [{weights: s} for s in ablate.STRENGTHS]
    assert any(m.folder == str(tmp_path / f"all-weights-{run}" / "weights-900") and m.lora == {} for m in scored)
    row = json.loads((tmp_path / "rows.json").read_text())[0]
    # Image-to-video: three measures of 60, and one clip of two near enough to the true path.
    assert (row["quality"], row["i2v path"], row["i2v"], row["total"], row["path px"]) == (
        60.0,
        50.0,
        57.5,
        58.75,
        3.05,
    )

    trained.clear()
    scored.clear()
    assert len(work().all) == len(rows.all) and not trained and not scored  # all is known
    lines = (tmp_path / "rows.json").read_text().splitlines()
    kept = [line for line in lines if not ('"fully random"' in line and '"iterations": 450, "strength": 1.7' in line)]
    (tmp_path / "rows.json").write_text("\n".join(kept))
    assert len(work().all) == len(rows.all)
    assert not trained and len(scored) == 1 and list(scored[0].lora.values()) == [1.7]  # its weights were kept
    monkeypatch.setattr(ablate, "SCENES", 7)
    assert ablate.Rows().all == [], "rows of other scenes count"
    monkeypatch.undo()
    monkeypatch.setattr(ablate, "ROWS", tmp_path / "rows.json")
    again = ablate.Rows()
    assert not again.known(ablate.Key("fully random", 1, 900, 1.0)) and again.known(
        ablate.Key("fully random", 0, 900, 1.4, 5)
    )


def test_a_stopped_ablation_says_how_to_go_on(load: Any, tmp_path: Path) -> None:
    ablate = load("ablate")
    training = ablate.Training(ablate.RUNS[0], 0, (150,), tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="run the same command again"):
        training.done(None, None)


def test_ablation_tables(load: Any, tmp_path: Path) -> None:
    module, ablate = load("ablation_tables"), load("ablate")
    totals = {0: 1.0, 1: 3.0}
    runs = [(r, i) for r in ablate.RUNS for i in r.iterations]
    measures = ("i2v", "quality", "path px")
    rows = [
        {**vars(key), "total": total, **dict.fromkeys(measures, 0.0)}
        for seed, total in totals.items() for r, i in runs for key in ablate.wanted(r, seed, i)
    ]  # fmt: skip
    assert (
        module.cell(rows, run="fully random", iterations=900, strength=1.4) == "2.0 ± 12.7"
    )  # Student's t of two values
    assert module.cell(rows[:1], paper=81.62, run="fully random", iterations=150, strength=1.0) == "1.0 (81.62)"
    text = module.tables(
        [
            *rows,
            {
                "run": "base",
                "steps": 10,
                "strength": 0.0,
                "iterations": 0,
                "seed": 0,
                "total": 7.0,
                **dict.fromkeys(measures, 5.0),
            },
        ],
        100,
    )
    assert "| 900 | 2.0 ± 12.7 (81.78) | 2.0 ± 12.7 (87.69) | 2.0 ± 12.7 (86.93) | 2.0 ± 12.7 (85.91) |" in text
    assert "2 seeds, 100 held-out scenes" in text and "total 7.0, i2v 5.0, quality 5.0" in text
    assert " - (" not in text  # the runs make every cell
    assert "| first frame clean | - (73.27)" in module.tables(
        [row for row in rows if row["run"] == "fully random"], 100
    )
    module.plot(rows, tmp_path / "images" / "plot.png")
    assert Image.open(tmp_path / "images" / "plot.png").width > 1000


def test_the_pages_say_what_was_measured_on_the_shipped_weights(load: Any) -> None:
    evaluate, ablate, module = load("evaluate"), load("ablate"), load("ablation_tables")
    docs = FOLDER.parents[1] / "docs"
    record = json.loads((FOLDER / "results.json").read_text())
    spec = json.loads((FOLDER.parents[1] / "pusa_fast" / "assets" / "nano" / "model.json").read_text())
    assert json.dumps(evaluate._rounded(spec["training"])) == json.dumps(record["training"])
    page = (docs / "nano.md").read_text()
    assert evaluate.text_of(record) in page and evaluate.training_table(record["training"]) in page
    rows = json.loads((FOLDER / "ablations.json").read_text())
    assert {row["base"] for row in rows} == {ablate.Key("", 0, 0, 0.0).base}, "rows of another base"
    assert module.tables(rows, ablate.SCENES) in (docs / "training.md").read_text()
