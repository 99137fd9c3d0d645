"""Score nano on held-out scenes with the oracle: base against base + LoRA, 95 % intervals.

    python examples/nano/evaluate.py                        # prints the table
    python examples/nano/evaluate.py --clips 1000 --write   # also writes results.json and the tables of docs/nano.md

Held-out scenes are combinations of colour, shape and direction that no training stage has seen. A frame in which nothing
stands out counts as 32 pixels of error.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import torch
from rich.progress import Progress
from scoring import Model, Results, held_out_scenes, interval, score, workers

from pusa_fast import Pipeline
from pusa_fast.training import sprites
from pusa_fast.training.store import write_text

HERE = Path(__file__).parent
TABLE = Path(__file__).parents[2] / "docs" / "nano.md"
BASE, TUNED = "base", "base + Pusa LoRA"


def evaluate(folder: str, scenes: Sequence[sprites.Scene]) -> dict[str, Results]:
    """Results of both models; a bar on the terminal."""
    found: dict[str, Results] = {}
    with Progress() as progress, workers() as pool:
        for label, lora in ((BASE, {}), (TUNED, None)):
            bar = progress.add_task(label, total=len(scenes))
            for done, results in score(pool, Model(folder, lora), scenes):
                progress.update(bar, completed=done)
                found[label] = results
    return found


def vae_psnr(pipe: Pipeline, photo: bool, clips: int, seed: int) -> list[float]:
    """PSNR in dB of held-out clips after encode and decode; `photo`: before a photograph that no stage has seen."""
    generator = torch.Generator().manual_seed(seed + photo)
    found = []
    for _ in range(clips):
        clip = data.render([data.draw(generator, held_out=True, photo_share=float(photo))]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        found.append(float(10 * torch.log10(4 / (pipe.vae.decode(pipe.vae.encode(clip)) - clip).square().mean())))
    return found


def table(results: dict[str, Results]) -> str:
    rows = [f"| task | measure | {BASE} | {TUNED} |", "|---|---|---|---|"]
    for task, metrics in results[TUNED].items():
        for metric in metrics:
            cells = [cell(results[model][task][metric], metric.endswith("%")) for model in (BASE, TUNED)]
            rows.append(f"| {task} | {metric} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def cell(values: Sequence[float], percent: bool) -> str:
    mean, low, high = interval(values, percent)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano or a model directory")
    parser.add_argument("--clips", type=int, default=60, help="held-out scenes per task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=2024, help="draws the scenes; clip i uses sampling seed i")
    parser.add_argument("--write", action="store_true", help="write results.json and the tables of docs/nano.md")
    args = parser.parse_args()
    if args.clips < 2:
        parser.error(f"--clips {args.clips}: an interval needs at least 2")
    start = time.monotonic()
    results = evaluate(args.model, held_out_scenes(args.clips, args.seed))
    pipe = Model(args.model).load()
    psnr = {name: vae_psnr(pipe, name == "photographic", min(args.clips, 100), args.seed) for name in ("procedural", "photographic")}
    notes = (
        f"{args.clips} held-out scenes (seed {args.seed}), {pipe.defaults['steps']} steps, guidance {pipe.defaults['guidance_scale']}, "
        f"float32 on the CPU. VAE on {len(psnr['procedural'])} held-out clips each: {cell(psnr['procedural'], False)} dB before procedural "
        f"backgrounds, {cell(psnr['photographic'], False)} dB before a photograph that no stage has seen."
    )
    text = f"{table(results)}\n\n{notes}"
    print(text)
    if args.write:
        record = {"clips": args.clips, "seed": args.seed, "seconds": round(time.monotonic() - start), "training": pipe.spec["training"],
                  "torch": torch.__version__, "vae_psnr_db": psnr, "results": results}  # fmt: skip
        write_text(HERE / "results.json", json.dumps(_rounded(record)) + "\n")
        page = between(TABLE.read_text(), "<!-- training -->", training_table(pipe.spec["training"]))
        write_text(TABLE, between(page, "<!-- evaluate.py -->", text))


def training_table(training: dict[str, Any]) -> str:
    """Steps, time and last logged figures of each stage, as model.json has them."""
    rows = ["| stage | steps | time | last figures |", "|---|---|---|---|"]
    for name, stage in training["stages"].items():
        figures = ", ".join(f"{k} {v:.4g}" for k, v in stage.items() if k not in ("steps", "seconds"))
        rows.append(f"| {name} | {stage['steps']} | {stage['seconds'] / 60:.0f} min | {figures} |")
    return "\n".join(rows) + f"\n\nSeed {training['seed']}, float32, {training['threads']} CPU threads, torch {training['torch']}."


def between(page: str, start: str, text: str) -> str:
    """The page with what stands between `start` and the next end mark replaced."""
    before, _, rest = page.partition(start)
    return f"{before}{start}\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def _rounded(value: Any) -> Any:
    """Thousands of values at six digits."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
