"""The paper's ablations on nano (spec 5.4): trains, scores with the oracle, writes the tables and the plot of docs/training.md.

    python examples/nano/ablate.py --seeds 3             # hours; goes on after a kill, skips rows of examples/nano/ablations.json
    python examples/nano/ablate.py --minutes 60          # starts nothing new after an hour
    python examples/nano/ablate.py --tables              # only writes tables and plot from the rows there are

Every run trains on the embedded base with constant learning rate and batches of eight clips, as the paper's do, and is scored at several
strengths. Runs and rows are shared out to as many processes as there are cores, one thread each. Total is the mean of I2V
(image-to-video: direction right, colour and shape kept, centre within 3 pixels of the true continuation's on the mean of all frames)
and Quality (text-to-video: direction, colour and shape right), in percent.
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
ROWS, PAGE, IMAGES = (
    HERE / "ablations.json",
    HERE.parents[1] / "docs" / "training.md",
    HERE.parents[1] / "docs" / "images",
)
BATCH, SCENES, SCENE_SEED = 8, 60, 4096
T2V, I2V = "text-to-video", "image-to-video, noise 0"
NEAR = 3.0  # pixels; of the base's clips one in eight stays so near to the true continuation, of nano's own LoRA's nine in ten


@dataclass(frozen=True)
class Run:
    """One training run: how levels are drawn, what trains (rank None: all weights), and where and how strong it is scored."""

    name: str
    objective: dict[str, Any]
    rank: int | None = FULL
    iterations: tuple[int, ...] = (900,)
    strengths: tuple[float, ...] = STRENGTHS

    def config(self, seed: int, folder: Path, clips: Path, steps: int) -> TrainConfig:
        values = {
            "model": "nano", "out": folder, "seed": 1000 + seed, "steps": steps, "batch_size": BATCH, "accumulate": 1, "device": "cpu",
            "data": {"path": clips, "caption_dropout": 0.1}, "memory": {"checkpointing": "none"}, "logging": {"every": 150},
            "lora": None if self.rank is None else {"rank": self.rank},
            "objective": {"levels": "continuous", "weighting": "uniform", "shift": dit.TRAINING_SHIFT, **self.objective},
            "optim": {"lr": 1e-4 if self.rank is None else 5e-4, "clip_norm": 1.0}, "checkpoints": {"every": 150, "keep": 1},
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
    """What a row says: a run's weights after `iterations` at a strength, sampled in `steps`; and of what, as rows of other settings do
    not count."""

    run: str
    seed: int
    iterations: int
    strength: float
    steps: int = 10
    batch: int = BATCH
    scenes: int = SCENES
    base: str = field(default_factory=lambda: base())


BASE = "base"  # the run of no training


@functools.cache
def base() -> str:
    """Names the weights that all runs begin from."""
    return file_hash(nano.ASSETS / "dit.safetensors")[:12]


def wanted(run: Run, seed: int, iterations: int) -> Iterator[Key]:
    """The rows that the tables need of one run's weights."""
    for strength in run.strengths:
        yield Key(run.name, seed, iterations, strength)
    if run.name == "fully random" and iterations == 900:
        yield from (Key(run.name, seed, iterations, 1.4, steps) for steps in STEPS if steps != 10)


class Rows:
    """The file `ROWS`, one row a line; each is written as soon as it is known."""

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
    """A run's way to its next number of iterations, and on to those after it. `call` works in a process of its own."""

    run: Run
    seed: int
    iterations: tuple[int, ...]
    work: Path
    clips: Path

    def call(self) -> Path | None:
        """Weights after so many iterations; None where a signal stopped it. It goes on from the last checkpoint: the rate is constant."""
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
            raise SystemExit("stopped: start the same command again to go on")
        keys = [key for key in wanted(self.run, self.seed, self.iterations[0]) if not rows.known(key)]
        scored: list[Task] = [Scoring(key, _model(self.run, weights, key)) for key in keys]
        later = self.iterations[1:]
        return scored + ([Training(self.run, self.seed, later, self.work, self.clips)] if later else [])


@dataclass(frozen=True)
class Scoring:
    """One row."""

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
    """What is missing of a seed, to begin with: rows of a run's weights wait for its training."""
    found: list[Task] = []
    if not rows.known(key := Key(BASE, 0, 0, 0.0)):
        found.append(Scoring(key, Model("nano", {})))
    for run in RUNS:
        missing = [i for i in run.iterations if not all(rows.known(key) for key in wanted(run, seed, i))]
        if missing:  # every number up to the last: a run passes through them all
            found.append(Training(run, seed, tuple(i for i in run.iterations if i <= missing[-1]), work, clips))
    return found


def work_off(pool: ProcessPoolExecutor, rows: Rows, first: Sequence[Task], together: int, deadline: float) -> None:
    """Do tasks and what comes of them, so many at a time; start none after the deadline. Rows go before further training."""
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
    """What a row keeps of its clips: total, its two halves, and the means that they are made of."""
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
        help="training runs; nano's clips in its folder nano (default %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new run or row after so long")
    parser.add_argument("--processes", type=int, default=dit.threads(), help="of one thread each (default: one a core)")
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
