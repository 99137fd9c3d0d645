"""Score nano on held-out scenes with the oracle: base against base + LoRA, 95 % intervals.

    python examples/nano/evaluate.py                       # prints the table
    python examples/nano/evaluate.py --clips 200 --write   # also writes results.json and the table of docs/nano.md

Held-out scenes are combinations of colour, shape and direction that no training stage has seen. A frame in which nothing
stands out counts as LOST pixels of error.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from pusa_fast import Condition, Pipeline
from pusa_fast.training import sprites

HERE = Path(__file__).parent
TABLE = Path(__file__).parents[2] / "docs" / "nano.md"
LOST = 32.0
Scores = dict[str, float]


def text_to_video(pipe: Pipeline, scene: sprites.Scene, truth: Tensor, seed: int) -> Scores:
    seen = sprites.measure(pipe(sprites.caption(scene), seed=seed))
    return {
        "colour right %": 100.0 * (seen.colors[-1] == scene.color),
        "shape right %": 100.0 * (seen.shapes[-1] == scene.shape),
        "direction right %": 100.0 * (seen.direction == scene.direction),
    }


def image_to_video(noise: float) -> Callable[[Pipeline, sprites.Scene, Tensor, int], Scores]:
    def run(pipe: Pipeline, scene: sprites.Scene, truth: Tensor, seed: int) -> Scores:
        clip = pipe(sprites.caption(scene), conditions=[Condition(truth[0], 0, noise)], seed=seed)
        seen, centers = sprites.measure(clip), scene.centers()
        return {
            "centroid error px": float(distance(seen.centers[1:], centers[1:]).mean()),
            "direction right %": 100.0 * (seen.direction == scene.direction),
            "colour kept %": 100.0 * all(c == scene.color for c in seen.colors[1:]),
            "shape kept at the end %": 100.0 * (seen.shapes[-1] == scene.shape),
            "seam jump px": float(distance(seen.centers[:1], seen.centers[1:2])),
            "first frame error /255": float((clip[0].float() - truth[0].float()).abs().mean()),
        }

    return run


def start_end(pipe: Pipeline, scene: sprites.Scene, truth: Tensor, seed: int) -> Scores:
    given = [Condition(truth[0], 0, 0.0), Condition(truth[-1], -1, 0.2)]
    seen = sprites.measure(pipe(sprites.caption(scene), conditions=given, seed=seed))
    error = float(distance(seen.centers[-1:], scene.centers()[-1:]))
    return {"end position error px": error, "end within 2 px %": 100.0 * (error <= 2)}


TASKS = {
    "text-to-video": text_to_video,
    "image-to-video, noise 0": image_to_video(0.0),
    "image-to-video, noise 0.2": image_to_video(0.2),
    "start-end": start_end,
}


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).norm(dim=-1).nan_to_num(LOST)


def interval(values: Sequence[float], percent: bool) -> tuple[float, float, float]:
    """Mean and 95 % interval: Wilson's for shares, normal for measurements."""
    x = torch.tensor(values, dtype=torch.float64)
    n, mean, z = len(x), float(x.mean()), 1.96
    if percent:
        p = mean / 100
        middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        low, high = (100 * (middle + s * half) / (1 + z * z / n) for s in (-1, 1))
        return mean, max(0.0, low), min(100.0, high)
    half = z * float(x.std()) / n**0.5
    return mean, mean - half, mean + half


def evaluate(pipe: Pipeline, scenes: Sequence[sprites.Scene], label: str) -> dict[str, dict[str, list[float]]]:
    """{task: {metric: one value per scene}}."""
    found: dict[str, dict[str, list[float]]] = {}
    truths = sprites.render(scenes)
    for name, run in TASKS.items():
        for seed, (scene, truth) in enumerate(zip(track(scenes, f"{label}: {name}"), truths, strict=True)):
            for metric, value in run(pipe, scene, truth, seed).items():
                found.setdefault(name, {}).setdefault(metric, []).append(value)
    return found


def vae_psnr(pipe: Pipeline, scenes: Sequence[sprites.Scene]) -> list[float]:
    clips = sprites.render(scenes).permute(0, 4, 1, 2, 3).to(pipe.device).float() / 127.5 - 1
    errors = [(pipe.vae.decode(pipe.vae.encode(c[None])) - c[None]).square().mean() for c in clips]
    return [float(10 * torch.log10(4 / e)) for e in errors]


def table(results: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    rows = ["| task | measure | base | base + Pusa LoRA |", "|---|---|---|---|"]
    for task, metrics in results["base + LoRA"].items():
        for metric in metrics:
            cells = []
            for model in ("base", "base + LoRA"):
                mean, low, high = interval(results[model][task][metric], metric.endswith("%"))
                cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
            rows.append(f"| {task} | {metric} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano or a model directory")
    parser.add_argument("--clips", type=int, default=64, help="held-out scenes per task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=2024, help="draws the scenes; clip i uses sampling seed i")
    parser.add_argument("--write", action="store_true", help="write results.json and the table of docs/nano.md")
    args = parser.parse_args()
    if args.clips < 2:
        parser.error(f"--clips {args.clips}: an interval needs at least 2")
    generator = torch.Generator().manual_seed(args.seed)
    scenes = [sprites.draw_scene(generator, held_out=True) for _ in range(args.clips)]
    results, start = {}, time.monotonic()
    for label, lora in (("base", {}), ("base + LoRA", None)):
        pipe = Pipeline.from_pretrained(args.model, lora=lora)
        results[label] = evaluate(pipe, scenes, label)
    psnr, low, high = interval(vae_psnr(pipe, scenes), percent=False)
    true_step = sum(sprites.SPEEDS[s.speed] for s in scenes) / len(scenes)
    notes = (
        f"{args.clips} held-out scenes (seed {args.seed}), {pipe.defaults['steps']} steps, guidance "
        f"{pipe.defaults['guidance_scale']}. True motion between two frames: {true_step:.2f} px on average. "
        f"VAE on these clips: {psnr:.1f} dB [{low:.1f}, {high:.1f}]. Run on {pipe.device.type} in {str(pipe.dit.dtype).removeprefix('torch.')}."
    )
    text = f"{table(results)}\n\n{notes}"
    print(text)
    if args.write:
        record = {"clips": args.clips, "seed": args.seed, "seconds": time.monotonic() - start, "training": pipe.spec["training"],
                  "torch": torch.__version__, "vae_psnr_db": [psnr, low, high], "results": results}  # fmt: skip
        write_atomic(HERE / "results.json", json.dumps(record) + "\n")
        page = between(TABLE.read_text(), "<!-- training -->", training_table(pipe.spec["training"]))
        write_atomic(TABLE, between(page, "<!-- evaluate.py -->", text))


def training_table(training: dict[str, Any]) -> str:
    """Steps, time and last logged figures of each stage, as model.json has them."""
    rows = ["| stage | steps | time | last figures |", "|---|---|---|---|"]
    for name, stage in training["stages"].items():
        figures = ", ".join(f"{k} {v:.4g}" for k, v in stage.items() if k not in ("steps", "seconds"))
        rows.append(f"| {name} | {stage['steps']} | {stage['seconds'] / 60:.0f} min | {figures} |")
    return "\n".join(rows) + f"\n\nSeed {training['seed']}, float32, {training['threads']} CPU threads at the last stage, torch {training['torch']}."


def between(page: str, start: str, text: str) -> str:
    """The page with what stands between `start` and the next end mark replaced."""
    before, _, rest = page.partition(start)
    return f"{before}{start}\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def write_atomic(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    main()
