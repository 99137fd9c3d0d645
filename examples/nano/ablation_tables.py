"""Tables and plot of `ablate.py`: nano's and the paper's figures (arXiv 2507.16116)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
ITERATIONS, STRENGTHS, STEPS = (150, 450, 750, 900, 1200), (1.0, 1.4, 1.7, 2.0), (2, 5, 10, 20)
FULL, HALF = 32, 16  # ranks, for the paper's 512 and 256

# The paper's VBench-I2V totals (tables 2, 4, 5) for the same cells; the first three by strength.
_SAMPLING = {
    "fully random": (81.78, 87.69, 86.93), "first frame clean": (73.27, 72.54, 72.42),
    "PTSS 0.2": (77.96, 81.57, 84.74), "PTSS 0.5": (79.63, 86.38, 87.36), "PTSS 0.8": (80.71, 85.98, 86.49),
}  # fmt: skip
_RANK = {HALF: (79.75, 83.12, 85.86, 84.22), FULL: (80.17, 86.46, 87.11, 85.98)}
_ITERATIONS = {
    150: (78.23, 79.33, 82.79, 84.31), 450: (79.27, 85.72, 87.37, 85.96), 750: (80.17, 86.46, 87.11, 85.98),
    900: (81.78, 87.69, 86.93, 85.91), 1200: (82.08, 87.32, 86.86, 86.01),
}  # fmt: skip
_STEPS = {2: 79.92, 5: 86.03, 10: 87.69, 20: 87.84}
_TRAINED = {  # the LoRA at 1.4, by iterations
    "fully random": {150: 81.62, 900: 87.09}, "all weights, fully random": {150: 83.78, 900: 84.06},
    "all weights, first frame clean": {150: 75.01, 900: 73.21},
}  # fmt: skip
# Student's t of 95 % by number of values.
_STUDENT = dict(enumerate((12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26), start=2))


def values(rows: Sequence[Row], measure: str = "total", **where: Any) -> list[float]:
    """A measure of the rows with these entries; `steps` defaults to ten."""
    where = {"steps": 10} | where
    return [row[measure] for row in rows if all(row[k] == v for k, v in where.items())]


def cell(rows: Sequence[Row], measure: str = "total", paper: float | None = None, **where: Any) -> str:
    """Mean over seeds ± 95 % interval (Student's t) if several, the paper's figure in brackets."""
    found = values(rows, measure, **where)
    text = f"{mean(found):.1f}" if found else "-"
    if len(found) > 1:
        t = _STUDENT.get(len(found), 2.26)
        text += f" ± {t * float(torch.tensor(found, dtype=torch.float64).std()) / len(found) ** 0.5:.1f}"
    return text if paper is None else f"{text} ({paper:g})"


def mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def _by_strength(rows: Sequence[Row], paper: Sequence[float], **where: Any) -> list[str]:
    return [cell(rows, paper=p, strength=s, **where) for s, p in zip(STRENGTHS, paper, strict=False)]


def tables(rows: Sequence[Row], scenes: int) -> str:
    """Markdown: nano's total, and in brackets the paper's, which is on another scale."""
    seeds = len({row["seed"] for row in rows if row["run"] == "fully random"})
    base = ", ".join(f"{name} {cell(rows, name, run='base')}" for name in ("total", "i2v", "quality"))
    strengths, halves = [f"strength {s:g}" for s in STRENGTHS], ("i2v", "quality")
    at_14 = {"run": "fully random", "iterations": 900, "strength": 1.4}
    sampling = [
        [
            name,
            *_by_strength(rows, paper, run=name, iterations=900),
            *(cell(rows, m, run=name, iterations=900, strength=1.4) for m in (*halves, "path px")),
        ]
        for name, paper in _SAMPLING.items()
    ]
    names = {FULL: "fully random", HALF: "half the rank"}
    ranks = [
        [f"{rank} (paper: {16 * rank})", *_by_strength(rows, paper, run=names[rank], iterations=750)]
        for rank, paper in _RANK.items()
    ]
    iterations = [
        [str(i), *_by_strength(rows, paper, run="fully random", iterations=i)] for i, paper in _ITERATIONS.items()
    ]
    steps = [
        [str(n), cell(rows, paper=p, **at_14, steps=n), *(cell(rows, m, **at_14, steps=n) for m in halves)]
        for n, p in _STEPS.items()
    ]
    trained = [
        [
            name,
            *(
                cell(rows, paper=p, run=name, iterations=i, strength=1.4 if name == "fully random" else 1.0)
                for i, p in paper.items()
            ),
        ]
        for name, paper in _TRAINED.items()
    ]
    title = "Timestep sampling, 900 iterations; the last three columns at strength 1.4"
    return "\n\n".join([
        f"{seeds} seed{'s' if seeds != 1 else ''}, {scenes} held-out scenes a row, mean ± 95 % interval over seeds; "
        f"the base without a LoRA: {base}.",
        _table(title, ("sampling", *strengths[:3], *halves, "path, px"), sampling),
        _table("LoRA rank and strength, 750 iterations", ("rank", *strengths), ranks),
        _table("Iterations and strength", ("iterations", *strengths), iterations),
        _table("Inference steps, 900 iterations at strength 1.4", ("steps", "total", *halves), steps),
        _table("What trains (the LoRA at strength 1.4)", ("training", "150 iterations", "900"), trained),
    ])  # fmt: skip


def plot(rows: Sequence[Row], path: Path) -> None:
    """Total by iterations, strength and inference steps; bars are 95 % intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def line(axis: Any, places: Sequence[float], label: str | None, where: Sequence[Row]) -> None:
        found = [(x, v) for x, w in zip(places, where, strict=True) if (v := values(rows, **w))]
        spread = [
            _STUDENT.get(len(v), 2.26) * float(torch.tensor(v).std()) / len(v) ** 0.5 if len(v) > 1 else 0.0
            for _, v in found
        ]
        axis.errorbar(
            [x for x, _ in found], [mean(v) for _, v in found], spread, marker="o", capsize=2, lw=1.2, label=label
        )

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for s in STRENGTHS:
        line(
            axes[0],
            ITERATIONS,
            f"strength {s:g}",
            [{"run": "fully random", "iterations": i, "strength": s} for i in ITERATIONS],
        )
    for name in _SAMPLING:
        line(axes[1], STRENGTHS, name, [{"run": name, "iterations": 900, "strength": s} for s in STRENGTHS])
    line(axes[2], STEPS, None, [{"run": "fully random", "iterations": 900, "strength": 1.4, "steps": n} for n in STEPS])
    for axis, label in zip(
        axes, ("iterations", "strength, 900 iterations", "inference steps, 900 iterations at 1.4"), strict=True
    ):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("total, %")
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
