"""The paper's ablations on nano (spec 5.4): trains, scores with the oracle, fills docs/training.md.

    python examples/nano/ablate.py --seeds 3     # hours; resumes after a kill, skips known rows
    python examples/nano/ablate.py --minutes 60  # starts nothing new after an hour
    python examples/nano/ablate.py --tables      # only writes tables and plot from ablations.json

Like the paper's, every run trains on the embedded base with a constant learning rate and batches
of eight clips; it is scored at several strengths. Runs and rows go to as many processes as there
are cores, one thread each. Total is the mean, in percent, of I2V (image-to-video: direction right,
colour and shape kept, centre within 3 pixels of the true continuation's, averaged over all frames)
and Quality (text-to-video: direction, colour and shape right).
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ablation_tables
import dit
import torch
import train as nano
from ablation_tables import FULL, HALF, ITERATIONS, STEPS, STRENGTHS, mean
from evaluate import between
from scoring import Model, Results, held_out_scenes, score, workers

from pusa_fast.data.durable import write_text
from pusa_fast.training.config import TrainConfig, parse_config
from pusa_fast.training.trainer import train
from pusa_fast.weights.files import file_hash

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
ROWS, PAGE, IMAGES = HERE / "ablations.json", DOCS / "training.md", DOCS / "images"
BATCH, SCENES, SCENE_SEED = 8, 60, 4096
T2V, I2V = "text-to-video", "image-to-video, noise 0"
# Pixels: one in eight clips of the base stays this near to the true continuation, nine in ten with
# nano's own LoRA.
NEAR = 3.0


@dataclass(frozen=True)
class Run:
    """One training run: how noise levels are drawn, what trains (rank None: all weights), when and
    at which strengths it is scored."""

    name: str
    objective: dict[str, Any]
    rank: int | None = FULL
    iterations: tuple[int, ...] = (900,)
    strengths: tuple[float, ...] = STRENGTHS

    def config(self, seed: int, folder: Path, clips: Path, steps: int) -> TrainConfig:
        values = {
            "model": "nano", "out": folder, "seed": 1000 + seed, "steps": steps, "batch_size": BATCH, "accumulate": 1,
            "device": "cpu", "data": {"path": clips, "caption_dropout": 0.1}, "memory": {"checkpointing": "none"},
            "lora": None if self.rank is None else {"rank": self.rank}, "logging": {"every": 150},
            "objective": {
                "levels": "continuous", "weighting": "uniform", "shift": dit.TRAINING_SHIFT, **self.objective,
            },
            "optim": {"lr": 1e-4 if self.rank is None else 5e-4, "clip_norm": 1.0},
            "checkpoints": {"every": 150, "keep": 1},
        }  # fmt: skip
        return parse_config(values)


_CLEAN = {"p_async": 0.0, "first_frame_clean": True}
_THREE, _ONE = STRENGTHS[:3], STRENGTHS[:1]
RUNS = (
    Run("fully random", {}, iterations=ITERATIONS),
    Run("first frame clean", _CLEAN, strengths=_THREE),
    Run("PTSS 0.2", {"p_async": 0.2}, strengths=_THREE),
    Run("PTSS 0.5", {"p_async": 0.5}, strengths=_THREE),
    Run("PTSS 0.8", {"p_async": 0.8}, strengths=_THREE),
    Run("half the rank", {}, HALF, (750,)),
    Run("all weights, fully random", {}, None, (150, 900), _ONE),
    Run("all weights, first frame clean", _CLEAN, None, (150, 900), _ONE),
)


@dataclass(frozen=True)
class Key:
    """Identifies a row: a run's weights after `iterations` at a strength, sampled in `steps`. Rows
    of another batch size, number of scenes or base do not count."""

    run: str
    seed: int
    iterations: int
    strength: float
    steps: int = 10
    batch: int = BATCH
    scenes: int = SCENES
    base: str = field(default_factory=lambda: base())


BASE = "base"  # the untrained base


@functools.cache
def base() -> str:
    """A short hash of the weights that all runs start from."""
    return file_hash(nano.ASSETS / "dit.safetensors")[:12]


def wanted(run: Run, seed: int, iterations: int) -> Iterator[Key]:
    """The rows that the tables need from one run's weights."""
    for strength in run.strengths:
        yield Key(run.name, seed, iterations, strength)
    if run.name == "fully random" and iterations == 900:
        yield from (Key(run.name, seed, iterations, 1.4, steps) for steps in STEPS if steps != 10)


class Rows:
    """The file `ROWS`, one row a line, written as soon as each row is known."""

    def __init__(self) -> None:
        found = json.loads(ROWS.read_text()) if ROWS.exists() else []
        same = {"base": base(), "batch": BATCH, "scenes": SCENES}
        self.all: list[dict[str, Any]] = [row for row in found if all(row.get(k) == v for k, v in same.items())]

    def known(self, key: Key) -> bool:
        return any(all(row[k] == v for k, v in asdict(key).items()) for row in self.all)

    def add(self, key: Key, measures: dict[str, float]) -> None:
        row = asdict(key) | {k: round(v, 3) for k, v in measures.items()}
        self.all.append(row)
        write_text(ROWS, "[\n" + ",\n".join(json.dumps(r) for r in self.all) + "\n]\n")
        print(json.dumps(row), flush=True)


@dataclass(frozen=True)
class Training:
    """Trains a run to its next iteration count, then to the later ones. `call` runs in a worker."""

    run: Run
    seed: int
    iterations: tuple[int, ...]
    work: Path
    clips: Path

    def call(self) -> Path | None:
        """Weights at that count, resumed from the last checkpoint; None if a signal stopped it."""
        folder = self.work / f"{self.run.name.replace(' ', '-').replace(',', '')}-{self.seed}-{base()}"
        kept = folder / f"weights-{self.iterations[0]}.safetensors"
        if not kept.exists():
            done = train(self.run.config(self.seed, folder, self.clips, self.iterations[0]))
            if done.weights is None:
                return None
            _copied(done.weights, kept)
        return kept

    def done(self, rows: Rows, weights: Path | None) -> list[Task]:
        if weights is None:
            raise SystemExit("stopped: run the same command again to continue")
        keys = [key for key in wanted(self.run, self.seed, self.iterations[0]) if not rows.known(key)]
        scored: list[Task] = [Scoring(key, _model(self.run, weights, key)) for key in keys]
        later = self.iterations[1:]
        return scored + ([Training(self.run, self.seed, later, self.work, self.clips)] if later else [])


@dataclass(frozen=True)
class Scoring:
    """Computes one row."""

    key: Key
    model: Model

    def call(self) -> dict[str, float]:
        *_, (_, results) = score(None, self.model, held_out_scenes(SCENES, SCENE_SEED), (T2V, I2V))
        return summary(results)

    def done(self, rows: Rows, measures: dict[str, float]) -> list[Task]:
        rows.add(self.key, measures)
        return []


Task = Training | Scoring


def tasks(rows: Rows, seed: int, work: Path, clips: Path) -> list[Task]:
    """The first tasks of what a seed lacks; rows of a run's weights follow its training."""
    found: list[Task] = []
    if not rows.known(key := Key(BASE, 0, 0, 0.0)):
        found.append(Scoring(key, Model("nano", {})))
    for run in RUNS:
        missing = [i for i in run.iterations if not all(rows.known(key) for key in wanted(run, seed, i))]
        if missing:  # every count up to the last: a run passes through all of them
            found.append(Training(run, seed, tuple(i for i in run.iterations if i <= missing[-1]), work, clips))
    return found


def work_off(pool: ProcessPoolExecutor, rows: Rows, first: Sequence[Task], together: int, deadline: float) -> None:
    """Do tasks and their follow-ups, rows first, `together` at a time, until the deadline."""
    waiting, running = deque(first), dict[Future[Any], Task]()
    while waiting or running:
        while waiting and len(running) < together and time.monotonic() < deadline:
            task = waiting.popleft()
            running[pool.submit(task.call)] = task
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            waiting.extendleft(reversed(running.pop(future).done(rows, future.result())))


def _model(run: Run, weights: Path, key: Key) -> Model:
    if run.rank is not None:
        return Model("nano", {str(weights): key.strength}, key.steps)
    folder = weights.with_suffix("")
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(nano.ASSETS, part)
        shutil.copyfile(weights, part / "dit.safetensors")
        part.rename(folder)
    return Model(str(folder), {}, key.steps)


def _copied(source: Path, target: Path) -> None:
    """A whole copy or none."""
    part = target.with_name(target.name + ".part")
    shutil.copyfile(source, part)
    part.rename(target)


def summary(results: Results) -> dict[str, float]:
    """The measures of a row: total, its two halves, and the means they consist of."""
    t2v, i2v = results[T2V], results[I2V]
    quality = {f"t2v {name}": mean(t2v[f"{name} right %"]) for name in ("direction", "colour", "shape")}
    long = {"direction": "direction right %", "colour": "colour kept %", "shape": "shape kept to the end %"}
    kept = {f"i2v {name}": mean(i2v[measure]) for name, measure in long.items()}
    kept["i2v path"] = mean([100.0 * (error <= NEAR) for error in i2v["centroid error px"]])
    halves = {"i2v": mean(list(kept.values())), "quality": mean(list(quality.values()))}
    return {
        "total": mean(list(halves.values())),
        **halves,
        **kept,
        **quality,
        "path px": mean(i2v["centroid error px"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs"),
        help="training runs; nano's clips go to its folder nano (default %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new run or row after this time")
    parser.add_argument(
        "--processes", type=int, default=dit.threads(), help="of one thread each (default: one per core)"
    )
    parser.add_argument("--tables", action="store_true", help="only write the tables and the plot")
    args = parser.parse_args()
    for name in ("seeds", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    rows, deadline = Rows(), time.monotonic() + 60 * args.minutes
    if not args.tables:
        torch.set_num_threads(args.processes)
        clips = nano.Nano(args.work / "nano", nano.ASSETS, 0, 1.0)._clips()
        with workers(args.processes) as pool:
            for seed in range(args.seeds):
                work_off(pool, rows, tasks(rows, seed, args.work, clips), args.processes, deadline)
    text = ablation_tables.tables(rows.all, SCENES)
    write_text(PAGE, between(PAGE.read_text(), "<!-- ablate.py -->", text))
    ablation_tables.plot(rows.all, IMAGES / "ablations.png")


if __name__ == "__main__":
    main()
