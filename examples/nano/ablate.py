"""The paper's ablations on nano (spec 5.4): trains, scores with the oracle, writes the tables and plots of docs/training.md.

    python examples/nano/ablate.py --seeds 3             # hours; goes on after a kill, skips rows of examples/nano/ablations.json
    python examples/nano/ablate.py --minutes 60          # stops starting new work after an hour
    python examples/nano/ablate.py --tables              # only writes tables and plots from the rows there are

Every run trains on the embedded base with constant learning rate, as the paper's do, and is scored at several strengths. Total is the mean
of I2V (direction, colour and shape of image-to-video) and Quality (the same of text-to-video), in percent.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dit
import launch
import torch
import train as nano
from evaluate import between
from scoring import Model, held_out_scenes, score, workers

from pusa_fast.training.config import TrainConfig, parse_config
from pusa_fast.training.store import write_text
from pusa_fast.weights.files import file_hash

HERE = Path(__file__).parent
ROWS, PAGE, IMAGES = HERE / "ablations.json", HERE.parents[1] / "docs" / "training.md", HERE.parents[1] / "docs" / "images"
ITERATIONS, STRENGTHS, STEPS = (150, 450, 750, 900, 1200), (1.0, 1.4, 1.7, 2.0), (2, 5, 10, 20)
FULL, HALF = 32, 16  # ranks, for the paper's 512 and 256
BATCH, SCENES, SCENE_SEED = 16, 100, 4096
TASKS = ("text-to-video", "image-to-video, noise 0")
_MEASURES = {
    "i2v": ("image-to-video, noise 0", ("direction right %", "colour kept %", "shape kept to the end %")),
    "quality": ("text-to-video", ("direction right %", "colour right %", "shape right %")),
}


@dataclass(frozen=True)
class Run:
    """One training run: how levels are drawn, and what trains (rank None: all weights)."""

    name: str
    objective: dict[str, Any]
    rank: int | None = FULL
    iterations: tuple[int, ...] = (900,)

    def config(self, seed: int, folder: Path, clips: Path, steps: int) -> TrainConfig:
        values = {
            "model": "nano", "out": folder, "seed": 1000 + seed, "steps": steps, "batch_size": BATCH, "accumulate": 1, "device": "cpu",
            "data": {"path": clips, "caption_dropout": 0.1}, "memory": {"checkpointing": "none"}, "logging": {"every": 150},
            "lora": None if self.rank is None else {"rank": self.rank},
            "objective": {"levels": "continuous", "weighting": "uniform", "shift": dit.TRAINING_SHIFT, **self.objective},
            "optim": {"lr": 1e-4 if self.rank is None else 5e-4, "clip_norm": 1.0}, "checkpoints": {"every": 0, "keep": 1},
        }  # fmt: skip
        return parse_config(values)


_CLEAN = {"p_async": 0.0, "first_frame_clean": True}
RUNS = (
    Run("fully random", {}, iterations=ITERATIONS),
    Run("first frame clean", _CLEAN),
    Run("PTSS 0.2", {"p_async": 0.2}),
    Run("PTSS 0.5", {"p_async": 0.5}),
    Run("PTSS 0.8", {"p_async": 0.8}),
    Run("half the rank", {}, HALF, (750,)),
    Run("all weights, fully random", {}, None, (150, 900)),
    Run("all weights, first frame clean", _CLEAN, None, (150, 900)),
)


@dataclass(frozen=True)
class Key:
    """What a row says: a run's weights after `iterations` at a strength, sampled in `steps`."""

    run: str
    seed: int
    iterations: int
    strength: float
    steps: int = 10
    base: str = field(default_factory=lambda: file_hash(nano.ASSETS / "dit.safetensors")[:12])  # rows of another nano do not count


def wanted(run: Run, seed: int, iterations: int) -> Iterator[Key]:
    """The rows that the tables need of one run's weights."""
    for strength in (1.0,) if run.rank is None else STRENGTHS:
        yield Key(run.name, seed, iterations, strength)
    if run.name == "fully random" and iterations == 900:
        yield from (Key(run.name, seed, iterations, 1.4, steps) for steps in STEPS if steps != 10)


class Ablation:
    """Rows in `ROWS`, one a line; each is written as soon as it is known."""

    def __init__(self, work: Path, deadline: float, pool: ProcessPoolExecutor) -> None:
        self.work, self.deadline, self.pool = work, deadline, pool
        self.rows: list[dict[str, Any]] = json.loads(ROWS.read_text()) if ROWS.exists() else []
        self.rows = [row for row in self.rows if row["base"] == Key("", 0, 0, 0.0).base]
        self.scenes = held_out_scenes(SCENES, SCENE_SEED)

    def known(self, key: Key) -> bool:
        return any(all(row[k] == v for k, v in asdict(key).items()) for row in self.rows)

    def run(self, seeds: int) -> None:
        """All runs of the first seed, then of the next."""
        clips = nano.Nano(self.work / "nano", nano.ASSETS, 0, 1.0)._clips()
        self.baseline()
        for seed in range(seeds):
            for run in RUNS:
                for iterations in run.iterations:
                    missing = [key for key in wanted(run, seed, iterations) if not self.known(key)]
                    if not missing:
                        continue
                    if time.monotonic() > self.deadline:
                        return
                    weights = self.train(run, seed, iterations, clips)
                    for key in missing:
                        self.score(key, self.model(run, weights, key))

    def baseline(self) -> None:
        key = Key("base", 0, 0, 0.0)
        if not self.known(key):
            self.score(key, Model("nano", {}))

    def train(self, run: Run, seed: int, iterations: int, clips: Path) -> Path:
        """Weights after so many iterations: the run goes on from its last checkpoint, as its learning rate is constant."""
        folder = self.work / f"{run.name.replace(' ', '-').replace(',', '')}-{seed}"
        kept = folder / f"weights-{iterations}.safetensors"
        if not kept.exists():
            done = launch.run(run.config(seed, folder, clips, iterations), dit.processes())
            if done.weights is None:
                raise SystemExit("stopped: start the same command again to go on")
            _copied(done.weights, kept)
        return kept

    def model(self, run: Run, weights: Path, key: Key) -> Model:
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

    def score(self, key: Key, model: Model) -> None:
        *_, (_, results) = score(self.pool, model, self.scenes, TASKS)
        row = asdict(key) | {name: _mean([v for m in measures for v in results[task][m]]) for name, (task, measures) in _MEASURES.items()}
        row["total"] = (row["i2v"] + row["quality"]) / 2
        row["motion px"] = _mean(results[TASKS[1]]["centroid error px"])
        self.rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        write_text(ROWS, "[\n" + ",\n".join(json.dumps(r) for r in self.rows) + "\n]\n")
        print(json.dumps(self.rows[-1]), flush=True)


def _copied(source: Path, target: Path) -> None:
    """A whole copy or none."""
    part = target.with_name(target.name + ".part")
    shutil.copyfile(source, part)
    part.rename(target)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cell(rows: list[dict[str, Any]], measure: str = "total", **where: Any) -> str:
    """Mean over seeds, and a 95 % interval where there are several (Student's t); empty where nothing was scored."""
    values = [row[measure] for row in rows if all(row[k] == v for k, v in where.items())]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.26)
    return f"{_mean(values):.1f} ± {t * float(torch.tensor(values).std()) / len(values) ** 0.5:.1f}"


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


# What the paper has for the same cells (VBench-I2V totals, spec 5.4).
_PAPER_SAMPLING = {
    "fully random": ("81.78", "87.69", "86.93"), "first frame clean": ("73.27", "72.54", "72.42"), "PTSS 0.2": ("77.96", "81.57", "84.74"),
    "PTSS 0.5": ("79.63", "86.38", "87.36"), "PTSS 0.8": ("80.71", "85.98", "86.49"),
}  # fmt: skip
_PAPER_RANK = {HALF: ("79.75", "83.12", "85.86", "84.22"), FULL: ("80.17", "86.46", "87.11", "85.98")}
_PAPER_ITERATIONS = {
    150: ("78.23", "79.33", "82.79", "84.31"), 450: ("79.27", "85.72", "87.37", "85.96"), 750: ("80.17", "86.46", "87.11", "85.98"),
    900: ("81.78", "87.69", "86.93", "85.91"), 1200: ("82.08", "87.32", "86.86", "86.01"),
}  # fmt: skip
_PAPER_STEPS = {2: "79.92", 5: "86.03", 10: "87.69", 20: "87.84"}
_PAPER_FULL = {
    "all weights, fully random": {150: "83.78", 900: "84.06"}, "all weights, first frame clean": {150: "75.01", 900: "73.21"},
    "fully random": {150: "81.62", 900: "87.09"},
}  # fmt: skip


def _both(ours: str, paper: str) -> str:
    return f"{ours or '-'} ({paper})" if paper else ours or "-"


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: nano's total, and in brackets the paper's on VBench-I2V, which is another scale."""
    seeds = len({row["seed"] for row in rows if row["run"] == "fully random"})
    base = [f"{name} {cell(rows, name, run='base')}" for name in ("total", "i2v", "quality")]
    sampling = [
        [name, *(_both(cell(rows, run=name, iterations=900, strength=s, steps=10), p) for s, p in zip(STRENGTHS, paper, strict=False)),
         *(cell(rows, m, run=name, iterations=900, strength=1.0, steps=10) for m in ("i2v", "quality"))]
        for name, paper in _PAPER_SAMPLING.items()
    ]  # fmt: skip
    names = {FULL: "fully random", HALF: "half the rank"}
    rank = [[f"{r} (paper: {16 * r})", *(_both(cell(rows, run=names[r], iterations=750, strength=s, steps=10), p) for s, p in zip(STRENGTHS, paper, strict=True))] for r, paper in _PAPER_RANK.items()]
    iterations = [[str(i), *(_both(cell(rows, run="fully random", iterations=i, strength=s, steps=10), p) for s, p in zip(STRENGTHS, paper, strict=True))] for i, paper in _PAPER_ITERATIONS.items()]
    steps = [[str(n), _both(cell(rows, run="fully random", iterations=900, strength=1.4, steps=n), p), *(cell(rows, m, run="fully random", iterations=900, strength=1.4, steps=n) for m in ("i2v", "quality"))] for n, p in _PAPER_STEPS.items()]
    full = [[name, *(_both(cell(rows, run=name, iterations=i, strength=1.0, steps=10), paper.get(i, "")) for i in (150, 900))] for name, paper in _PAPER_FULL.items()]
    strengths = [f"strength {s:g}" for s in STRENGTHS]
    return "\n\n".join([
        f"{seeds} seed{'s' if seeds != 1 else ''}, {SCENES} held-out scenes a row; the base without a LoRA: {', '.join(base)}.",
        "Timestep sampling, 900 iterations", table(("sampling", *strengths[:3], "i2v at 1", "quality at 1"), sampling),
        "LoRA rank and strength, 750 iterations", table(("rank", *strengths), rank),
        "Iterations and strength", table(("iterations", *strengths), iterations),
        "Inference steps, 900 iterations at strength 1.4", table(("steps", "total", "i2v", "quality"), steps),
        "What trains, at strength 1 (the paper's LoRA at 1.4)", table(("training", "150 iterations", "900"), full),
    ])  # fmt: skip


def plot(rows: list[dict[str, Any]]) -> None:
    """docs/images/ablations.png: total by iterations and by strength, and by inference steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def mean(**where: Any) -> float | None:
        values = [row["total"] for row in rows if all(row[k] == v for k, v in where.items())]
        return _mean(values) if values else None

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for s in STRENGTHS:
        axes[0].plot(ITERATIONS, [mean(run="fully random", iterations=i, strength=s, steps=10) for i in ITERATIONS], "o-", label=f"strength {s:g}")
    for name in _PAPER_SAMPLING:
        axes[1].plot(STRENGTHS, [mean(run=name, iterations=900, strength=s, steps=10) for s in STRENGTHS], "o-", label=name)
    axes[2].plot(STEPS, [mean(run="fully random", iterations=900, strength=1.4, steps=n) for n in STEPS], "o-")
    for axis, label in zip(axes, ("iterations", "strength, 900 iterations", "inference steps"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("total, %")
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "ablations.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs"), help="training runs; nano's clips in its folder nano (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new run or row after so long")
    parser.add_argument("--threads", type=int, default=dit.threads())
    parser.add_argument("--tables", action="store_true", help="only write the tables and plots")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with workers() as pool:
        ablation = Ablation(args.work, time.monotonic() + 60 * args.minutes, pool)
        if not args.tables:
            ablation.run(args.seeds)
    write_text(PAGE, between(PAGE.read_text(), "<!-- ablate.py -->", tables(ablation.rows)))
    plot(ablation.rows)


if __name__ == "__main__":
    main()
