"""Scores a model on nano's tasks: several processes make clips, the oracle measures them.

A batch of twenty clips goes through the same functions as in `Pipeline`: rounding differs, results
do not. Means have 95 % intervals.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa_fast import Condition, Pipeline, WanVAE
from pusa_fast.data import sprites
from pusa_fast.sampling import conditioning, sampler, task
from pusa_fast.sampling.schedule import lift, sigma_grid
from pusa_fast.weights import load_vae
from pusa_fast.weights.files import file_hash
from pusa_fast.weights.pretrained import find_model

LOST = 32.0  # pixels of error of a frame in which the oracle finds no shape
BATCH = 20
Scores = dict[str, float]
Results = dict[str, dict[str, list[float]]]  # task -> measure -> one value a scene


@dataclass(frozen=True)
class Model:
    """A model folder or "nano", LoRAs ({path: strength}; None: its own), steps (None: its own)."""

    folder: str
    lora: Mapping[str, float] | None = None
    steps: int | None = None

    def load(self) -> Pipeline:
        lora = None if self.lora is None else {Path(path): strength for path, strength in self.lora.items()}
        return Pipeline.from_pretrained(self.folder, lora=lora, device="cpu")


def text_to_video(scene: sprites.Scene, truth: Tensor, rebuilt: Tensor, clip: Tensor) -> Scores:
    seen = sprites.measure(clip)
    return {
        "colour right %": 100.0 * (seen.colors[-1] == scene.color),
        "shape right %": 100.0 * (seen.shapes[-1] == scene.shape),
        "direction right %": 100.0 * (seen.direction == scene.direction),
    }


def image_to_video(scene: sprites.Scene, truth: Tensor, rebuilt: Tensor, clip: Tensor) -> Scores:
    seen, centers, start = sprites.measure(clip), scene.centers(), sprites.measure(rebuilt[:2]).centers
    return {
        "centroid error px": float(distance(seen.centers[1:], centers[1:]).mean()),
        "direction right %": 100.0 * (seen.direction == scene.direction),
        "colour kept %": 100.0 * all(c == scene.color for c in seen.colors[1:]),
        "shape kept to the end %": 100.0 * (seen.shapes[-1] == scene.shape),
        "seam jump px": float(distance(seen.centers[:1], seen.centers[1:2])),
        "that of the true clip px": float(distance(start[:1], start[1:])),
        "first frame error /255": float((clip[0].float() - truth[0].float()).abs().mean()),
    }


def start_end(scene: sprites.Scene, truth: Tensor, rebuilt: Tensor, clip: Tensor) -> Scores:
    error = float(distance(sprites.measure(clip).centers[-1:], scene.centers()[-1:]))
    return {"end position error px": error, "end within 2 px %": 100.0 * (error <= 2)}


@dataclass(frozen=True)
class Task:
    """`given`: (frame of the true clip, latent frame it conditions, noise).

    `score` gets the scene, the true clip, that clip encoded and decoded, and the result.
    """

    given: tuple[tuple[int, int, float], ...]
    score: Callable[[sprites.Scene, Tensor, Tensor, Tensor], Scores]


TASKS: Mapping[str, Task] = {
    "text-to-video": Task((), text_to_video),
    "image-to-video, noise 0": Task(((0, 0, 0.0),), image_to_video),
    "image-to-video, noise 0.2": Task(((0, 0, 0.2),), image_to_video),
    "start-end": Task(((0, 0, 0.0), (-1, -1, 0.2)), start_end),
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


def held_out_scenes(count: int, seed: int) -> list[sprites.Scene]:
    """Combinations of colour, shape and direction that no stage was trained on."""
    generator = torch.Generator().manual_seed(seed)
    return [sprites.draw_scene(generator, held_out=True) for _ in range(count)]


@torch.no_grad()
def make(
    pipe: Pipeline,
    captions: Sequence[str],
    truths: Tensor,
    given: Sequence[tuple[int, int, float]],
    seeds: Sequence[int],
    steps: int | None = None,
) -> Tensor:
    """One clip per caption, as `pipe(...)` makes it. truths and result: uint8 [N, T, H, W, 3]."""
    defaults, config = pipe.defaults, pipe.vae.config
    assert pipe.text_encoder is not None
    starts = []
    for truth, seed in zip(truths, seeds, strict=True):
        plan = task.resolve(
            [Condition(truth[frame], latent, noise) for frame, latent, noise in given],
            defaults["num_frames"],
            lambda _: None,
            config.temporal_factor,
        )
        clean = conditioning.encode_conditions(
            plan, pipe.vae, lambda i, plan=plan: conditioning.to_video(plan.media[i][None], pipe.device)
        )
        size = (defaults["height"] // config.spatial_factor, defaults["width"] // config.spatial_factor)
        noise = conditioning.initial_noise(seed, (1, config.z_dim, plan.latent_frames, *size))
        schedule = lift(sigma_grid(steps or defaults["steps"], defaults["shift"]), plan.multipliers, "reference")
        starts.append(conditioning.initial_latents(noise.to(pipe.device), schedule, plan.placements, clean))
    context, empty = pipe.text_encoder.encode(captions), pipe.text_encoder.encode([defaults["negative_prompt"]])
    negative = empty.expand_as(context).contiguous()
    latents = sampler.sample(
        pipe.dit, torch.cat(starts), schedule, context, negative, defaults["guidance_scale"], mode="batch"
    )
    return torch.cat(list(pipe.vae.decode_frames(latents)), dim=1)


@torch.no_grad()
def through_vae(vae: WanVAE, clips: Tensor) -> Tensor:
    """Clips uint8 [N, T, H, W, 3], encoded and decoded."""
    latents = vae.encode(clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    return torch.cat(list(vae.decode_frames(latents)), dim=1)


@functools.lru_cache(maxsize=8)
def _rebuilt(vae: Path, sha256: str, scenes: tuple[sprites.Scene, ...]) -> Tensor:
    """The true clips through a VAE: the same for every model with this VAE."""
    return through_vae(load_vae(vae, dtype=torch.float32), sprites.render(scenes))


def workers(count: int | None = None) -> ProcessPoolExecutor:
    """Single-threaded processes (None: one per core), reusable; they end with this process."""
    return ProcessPoolExecutor(count or len(os.sched_getaffinity(0)), get_context("spawn"), _start)


def score(
    pool: ProcessPoolExecutor | None, model: Model, scenes: Sequence[sprites.Scene], tasks: Sequence[str] = tuple(TASKS)
) -> Iterator[tuple[int, Results]]:
    """(scenes done, results so far) after each batch; clip i has seed i. `pool` None: inline."""
    starts = range(0, len(scenes), BATCH)
    jobs = [(model, list(scenes[at : at + BATCH]), at, tuple(tasks)) for at in starts]
    found: Results = {}
    for at, results in zip(starts, (map if pool is None else pool.map)(_batch, jobs), strict=True):
        for name, measures in results.items():
            for measure, values in measures.items():
                found.setdefault(name, {}).setdefault(measure, []).extend(values)
        yield min(at + BATCH, len(scenes)), found


def _start() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_pipes: dict[Any, Pipeline] = {}


def _batch(job: tuple[Model, list[sprites.Scene], int, tuple[str, ...]]) -> Results:
    model, scenes, first, tasks = job
    key = (model.folder, tuple((model.lora or {"own": 0.0}).items()), model.lora is None)
    if key not in _pipes:
        _pipes.clear()
        _pipes[key] = model.load()
    truths, captions = sprites.render(scenes), [sprites.caption(scene) for scene in scenes]
    vae = find_model(model.folder).vae
    rebuilt = _rebuilt(vae, file_hash(vae), tuple(scenes))
    found: Results = {}
    for name in tasks:
        clips = make(_pipes[key], captions, truths, TASKS[name].given, range(first, first + len(scenes)), model.steps)
        for scene, *shown in zip(scenes, truths, rebuilt, clips, strict=True):
            for measure, value in TASKS[name].score(scene, *shown).items():
                found.setdefault(name, {}).setdefault(measure, []).append(value)
    return found
