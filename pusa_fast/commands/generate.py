"""`pusa-fast generate`: load the model, make the clips, write them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import Tensor

from pusa_fast import video
from pusa_fast.commands import record
from pusa_fast.commands.job import Job, Target, lora_files, prepare
from pusa_fast.commands.progress import bars
from pusa_fast.device import DTYPES
from pusa_fast.options import GenerateOptions

if TYPE_CHECKING:
    from pusa_fast.pipeline import Pipeline

SHEET_FRAMES = 64  # kept of a written file for its contact sheet


def run(options: GenerateOptions) -> None:
    """Make the clips. Raises ValueError, OSError or torch.OutOfMemoryError; what was finished by
    then stays."""
    job = prepare(options)
    typer.echo(_summary(job))
    for medium, needed in zip(job.request.media, job.request.plan.frames_needed, strict=True):
        medium.read(needed)  # and kept: what is wrong with a file is known before the model is loaded
    start = time.perf_counter()
    pipe = _load(job)
    hashes = record.Hashes([*record.model_files(job.files), *map(Path, lora_files(job.lora))])
    seconds = {"load": time.perf_counter() - start}
    for target in job.targets:
        _make(job, pipe, target, hashes, seconds)
        seconds = {}


def _summary(job: Job) -> str:
    chosen, seeds = job.request.settings, ", ".join(str(target.seed) for target in job.targets)
    return (
        f"{job.request.plan.task}: {chosen.num_frames} frames of {chosen.width}x{chosen.height} at {job.fps:g} per "
        f"second, {job.files.name}, {chosen.steps} steps, guidance {chosen.guidance_scale:g}, seed {seeds}"
    )


def _load(job: Job) -> Pipeline:
    from pusa_fast.pipeline import Pipeline  # here, not above: bad input is answered without it

    dtype = None if job.dtype is None else DTYPES[job.dtype]
    return Pipeline.from_pretrained(
        job.model, lora=job.lora, device=job.device, dtype=dtype, precision=job.precision, attention=job.attention
    )


def _make(job: Job, pipe: Pipeline, target: Target, hashes: record.Hashes, seconds: dict[str, float]) -> None:
    request = job.request.with_seed(target.seed)
    label = f"seed {target.seed}"
    with bars() as update:
        update(label, 0, request.settings.steps)
        done = pipe.run(request, lambda step, steps, _: update(label, step, steps))
    assert done.frames is not None
    seconds = {**seconds, **done.record["seconds"]}
    found = hashes.result()
    start = time.perf_counter()
    thinned = Thinned(job.media.assemble(done.frames, job.fps, request.settings.fit))
    # All three are complete before the first is renamed, and the record, which speaks of the
    # others, comes last.
    with video.staged(target.record) as note, video.staged(target.sheet) as sheet, video.staged(target.clip) as clip:
        video.encode_video(clip, target.clip, thinned, job.fps)
        video.contact_sheet(thinned.kept()).save(sheet, format="PNG")
        seconds["write"] = time.perf_counter() - start
        made = _record(job, pipe, done.record, target, found, thinned.hash(), seconds)
        note.write_text(record.text(made), encoding="utf-8")
    typer.echo(f"wrote {', '.join(map(os.path.relpath, (target.clip, target.sheet, target.record)))}")
    used = {**made["hashes"]["model"], **made["hashes"]["lora"]}
    if changed := [name for name, value in used.items() if job.expected.get(name, value) != value]:
        typer.echo(f"warning: {changed[0]} is not the file that the record names: the clip may differ", err=True)
    typer.echo("time: " + ", ".join(f"{stage} {spent:.2f} s" for stage, spent in seconds.items()))


class Thinned:
    """Passes frames on, hashes them, and keeps evenly spaced ones for a contact sheet: a long file
    need not stay in memory."""

    def __init__(self, frames: Iterator[Tensor], limit: int = SHEET_FRAMES) -> None:
        self._frames, self._limit, self._stride = frames, limit, 1
        self._kept: list[Tensor] = []
        self._last: Tensor | None = None
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[Tensor]:
        for number, frame in enumerate(self._frames):
            frame = frame.cpu().contiguous()
            self._last = frame
            self._hash.update(frame.numpy().data)
            if number % self._stride == 0:
                self._kept.append(frame)
            if len(self._kept) > self._limit:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            yield frame

    def hash(self) -> str:
        """SHA-256 of the bytes of all frames, before any encoder."""
        return self._hash.hexdigest()

    def kept(self) -> Tensor:
        """[T,H,W,3], the first and the last frame among them."""
        assert self._last is not None
        ends_on_last = self._kept[-1] is self._last
        return torch.stack(self._kept if ends_on_last else [*self._kept, self._last])


def _record(
    job: Job,
    pipe: Pipeline,
    run: dict[str, Any],
    target: Target,
    hashes: dict[str, str],
    frames: str,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Every setting under the key by which `prepare` reads it again, then what else is known of the
    run."""
    settings = asdict(job.request.settings)
    del settings["output"]
    return {
        "task": run["task"],
        "prompt": job.request.request.prompt,
        "negative_prompt": job.request.request.negative_prompt,
        **settings,
        "seed": target.seed,
        "fps": job.fps,
        "tiling": job.tiling,
        "tiles": None if run["tiling"] is None else list(run["tiling"].tile),  # null: the decoder ran whole
        "encode_tiles": None if run["encode_tiling"] is None else list(run["encode_tiling"].tile),
        "overcompute": run["overcompute"],
        "model": job.model,
        "lora": job.lora,  # null: the model's own
        "attention": job.attention,
        "device": str(pipe.device),
        "dtype": str(pipe.dit.dtype).removeprefix("torch."),
        "precision": job.precision,  # null: as its dtype says
        **job.media.to_json(),
        "out": target.clip,
        "guidance_mode": run["guidance_mode"],
        "tokens": run["tokens"],
        "seconds": {stage: round(spent, 4) for stage, spent in seconds.items()},
        "versions": record.versions(),
        "commit": record.commit(),
        "hashes": {
            "model": record.named_hashes(job.files, hashes),
            "lora": {path: hashes[path] for path in lora_files(job.lora)},
            "frames": frames,
        },
    }
