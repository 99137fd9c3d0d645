"""Score nano on held-out scenes with the oracle: base against base + LoRA, 95 % intervals.

    python examples/nano/evaluate.py                       # prints the table
    python examples/nano/evaluate.py --clips 1000 --write  # also writes results.json, docs/nano.md
    python examples/nano/evaluate.py --tables              # only docs/nano.md, from results.json

Held-out scenes are combinations of colour, shape and direction that no training stage has seen. A
frame in which the oracle finds no shape counts as 32 pixels of error.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import data
import torch
from rich.progress import Progress
from scoring import Model, Results, held_out_scenes, interval, score, workers

from pusa_fast import Pipeline
from pusa_fast.data import sprites
from pusa_fast.data.durable import write_text

HERE = Path(__file__).parent
RECORD, TABLE = HERE / "results.json", HERE.parents[1] / "docs" / "nano.md"
BASE, TUNED = "base", "base + Pusa LoRA"


def evaluate(folder: str, scenes: Sequence[sprites.Scene]) -> dict[str, Results]:
    """Results of both models, with a progress bar."""
    found: dict[str, Results] = {}
    with Progress() as progress, workers() as pool:
        for label, lora in ((BASE, {}), (TUNED, None)):
            bar = progress.add_task(label, total=len(scenes))
            for done, results in score(pool, Model(folder, lora), scenes):
                progress.update(bar, completed=done)
                found[label] = results
    return found


def vae_psnr(pipe: Pipeline, photo: bool, clips: int, seed: int) -> list[float]:
    """PSNR in dB of held-out clips after encode and decode; `photo`: with an unseen photograph."""
    generator = torch.Generator().manual_seed(seed + photo)
    found = []
    for _ in range(clips):
        sample = data.draw(generator, held_out=True, photo_share=float(photo))
        clip = data.render([sample]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        found.append(float(10 * torch.log10(4 / (pipe.vae.decode(pipe.vae.encode(clip)) - clip).square().mean())))
    return found


def table(results: dict[str, Results]) -> str:
    rows = [f"| task | measure | {BASE} | {TUNED} |", "|---|---|---|---|"]
    for task, metrics in results[TUNED].items():
        for metric in metrics:
            cells = [cell(results[model][task][metric], metric.endswith("%")) for model in (BASE, TUNED)]
            rows.append(f"| {task} | {metric} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def text_of(record: Mapping[str, Any]) -> str:
    """The table and the notes below it."""
    psnr, defaults = record["vae_psnr_db"], record["sampling"]
    notes = (
        f"{record['clips']} held-out scenes (seed {record['seed']}), {defaults['steps']} steps, guidance "
        f"{defaults['guidance_scale']}, float32 on the CPU. VAE on {len(psnr['procedural'])} held-out clips each: "
        f"{cell(psnr['procedural'], False)} dB with procedural backgrounds, {cell(psnr['photographic'], False)} dB "
        f"with a photograph that no stage has seen. Seam jump with the LoRA minus that of the true clip, scene by "
        f"scene: {seam(record['results'])}."
    )
    return f"{table(record['results'])}\n\n{textwrap.fill(notes, 118)}"


def seam(results: Mapping[str, Results]) -> str:
    """How much further the shape jumps at the seam than in the true clip, scene by scene."""
    tasks = [name for name, measures in results[TUNED].items() if "seam jump px" in measures]
    cells = []
    for task in tasks:
        jump, true = (results[TUNED][task][name] for name in ("seam jump px", "that of the true clip px"))
        mean, low, high = interval([a - b for a, b in zip(jump, true, strict=True)], percent=False)
        cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}] px at {task.split(', ')[1]}")
    return " and ".join(cells)


def cell(values: Sequence[float], percent: bool) -> str:
    mean, low, high = interval(values, percent)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano or a model directory")
    parser.add_argument("--clips", type=int, default=60, help="held-out scenes per task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=2024, help="draws the scenes; clip i uses sampling seed i")
    parser.add_argument("--write", action="store_true", help="write results.json and the tables of docs/nano.md")
    parser.add_argument(
        "--tables", action="store_true", help="only write the tables of docs/nano.md, from results.json"
    )
    args = parser.parse_args()
    if args.tables:
        write_page(json.loads(RECORD.read_text()))
        return
    if args.clips < 2:
        parser.error(f"--clips {args.clips}: an interval needs at least 2")
    start = time.monotonic()
    results = evaluate(args.model, held_out_scenes(args.clips, args.seed))
    pipe = Model(args.model).load()
    psnr = {
        name: vae_psnr(pipe, name == "photographic", min(args.clips, 100), args.seed)
        for name in ("procedural", "photographic")
    }
    record = {
        "clips": args.clips, "seed": args.seed, "seconds": round(time.monotonic() - start),
        "training": pipe.spec["training"], "sampling": {k: pipe.defaults[k] for k in ("steps", "guidance_scale")},
        "torch": torch.__version__, "vae_psnr_db": psnr, "results": results,
    }  # fmt: skip
    print(text_of(record))
    if args.write:
        write_text(RECORD, json.dumps(_rounded(record)) + "\n")
        write_page(json.loads(RECORD.read_text()))


def write_page(record: Mapping[str, Any]) -> None:
    page = between(TABLE.read_text(), "<!-- training -->", training_table(record["training"]))
    write_text(TABLE, between(page, "<!-- evaluate.py -->", text_of(record)))


def training_table(training: dict[str, Any]) -> str:
    """Steps, time and last logged figures of each stage, from model.json."""
    rows = ["| stage | steps | time | last figures |", "|---|---|---|---|"]
    for name, stage in training["stages"].items():
        figures = ", ".join(f"{k} {v:.4g}" for k, v in stage.items() if k not in ("steps", "seconds"))
        rows.append(f"| {name} | {stage['steps']} | {stage['seconds'] / 60:.0f} min | {figures} |")
    foot = f"Seed {training['seed']}, float32, {training['threads']} CPU threads, torch {training['torch']}."
    return "\n".join([*rows, "", foot])


def between(page: str, start: str, text: str) -> str:
    """The page with the text between `start` and the next end mark replaced."""
    before, _, rest = page.partition(start)
    return f"{before}{start}\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def _rounded(value: Any) -> Any:
    """The same structure with floats rounded to six digits."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
