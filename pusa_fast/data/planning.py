"""What a run of `prepare` has to make: every file hashed, measured, and its clips chosen, before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pusa_fast.data.buckets import Bucket, choose, is_picture, window_starts
from pusa_fast.data.catalog import Catalog, digest
from pusa_fast.data.sources import Source
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.weights.pretrained import ModelFiles

_PART_SUFFIXES = frozenset(
    {".safetensors", ".pth", ".pt", ".bin", ".model", ".json"}
)  # files of a folder that are part of a model

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    files: ModelFiles
    buckets: tuple[Bucket, ...]
    fps: float | None
    clips_per_video: int
    start: str
    seed: int
    fit: str
    dtype: str
    tiling: Tiling | None
    strict: bool
    progress: Progress


@dataclass(frozen=True)
class Window:
    """A clip to be. `key`: hash of all that it is made from; `details`: what the store is to keep of it."""

    key: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class File:
    """A file and its clips by their first frames. `bucket` None: the reference's tensors, one clip."""

    source: Source
    bucket: Bucket | None
    windows: Mapping[int, Window]


@dataclass
class Plan:
    files: list[File] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)  # by the entry's place in the list
    duplicates: int = 0

    @property
    def keys(self) -> list[str]:
        """Of all clips, those that the store holds already among them, in their order."""
        return [window.key for file in self.files for window in file.windows.values()]


def model_hashes(files: ModelFiles, catalog: Catalog) -> dict[str, str]:
    """ "vae" and "text": what the latents and text rows depend on. A single file is named by its own sha256."""

    def part(path: Path) -> str:
        if path.is_file():
            return catalog.hash(path)
        inside = sorted(p for p in path.rglob("*") if p.suffix in _PART_SUFFIXES and p.is_file())
        return digest((p.relative_to(path).as_posix(), catalog.hash(p)) for p in inside)

    return {"vae": part(files.vae), "text": digest([part(files.text_encoder), part(files.tokenizer)])}


def make_plan(settings: Settings, entries: Sequence[Source], catalog: Catalog, hashes: Mapping[str, str]) -> Plan:
    """Hash and measure every file, choose its bucket and windows."""
    plan, seen = Plan(), set[str]()
    for i, entry in enumerate(entries):
        try:
            if entry.problem:
                raise ValueError(entry.problem)
            file = _windows(settings, entry, catalog, hashes)
        except (ValueError, OSError) as error:
            add_bad(plan, settings, i, entry, error)
        else:
            fresh = {start: window for start, window in file.windows.items() if window.key not in seen}
            plan.duplicates += len(file.windows) - len(fresh)
            seen.update(window.key for window in fresh.values())
            if fresh:
                plan.files.append(File(entry, file.bucket, fresh))
        catalog.save(least=max(100, len(entries) // 10))
        settings.progress("reading", i + 1, len(entries))
    return plan


def _windows(settings: Settings, entry: Source, catalog: Catalog, hashes: Mapping[str, str]) -> File:
    """The clips of one file. Raises ValueError or OSError where it has none."""
    if entry.tensors is not None:
        return File(entry, None, {0: _reference_clip(settings, entry, catalog, hashes)})
    own = catalog.hash(entry.path)
    width, height, frames = catalog.measure(entry.path, settings.fps)
    bucket = choose(settings.buckets, width, height, frames)
    if bucket is None:
        rate = (
            "" if settings.fps is None or is_picture(entry.path) or entry.path.is_dir() else f" at {settings.fps:g} fps"
        )
        shortest = min(bucket.frames for bucket in settings.buckets)
        what = (
            "is a picture, 1 frame"
            if is_picture(entry.path)
            else f"has {frames} frame{'s' if frames != 1 else ''}{rate}"
        )
        raise ValueError(f"{what}, the shortest bucket needs {shortest}")
    starts = window_starts(frames - bucket.frames, settings.clips_per_video, settings.start, f"{own}:{settings.seed}")
    fps = None if settings.fps is None else float(settings.fps)
    blended = (
        settings.tiling is not None and settings.tiling.mode == "feather"
    )  # other tiles give the whole picture's latents
    cut = [
        str(bucket),
        fps,
        settings.fit,
        [settings.tiling.tile, settings.tiling.stride] if settings.tiling and blended else None,
    ]
    windows = {}
    for start in starts:
        key = digest([own, start, hashes["vae"], hashes["text"], entry.caption, settings.dtype, *cut])
        latents = digest([own, start, hashes["vae"], settings.dtype, *cut])  # whatever the caption
        details = {
            "file": own,
            "start": start,
            "frames": bucket.frames,
            "fps": fps,
            "fit": settings.fit,
            "latents": latents,
        }
        windows[start] = Window(key, details)
    return File(entry, bucket, windows)


def _reference_clip(settings: Settings, entry: Source, catalog: Catalog, hashes: Mapping[str, str]) -> Window:
    """The caption in the list counts for nothing: the tensors bring their own text."""
    assert entry.tensors is not None
    details = {"tensors": catalog.hash(entry.tensors)}
    with suppress(OSError):  # the film itself need not be there; where it is, its other clips are known by it
        details["file"] = catalog.hash(entry.path)
    return Window(digest(["tensors", details["tensors"], hashes["vae"], hashes["text"], settings.dtype]), details)


def add_bad(plan: Plan, settings: Settings, i: int, entry: Source, error: Exception) -> None:
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"cannot be read: {error.strerror.lower()}"
    for path in (entry.tensors, entry.path):
        reason = reason.removeprefix(f"{path} ")
    reason = " ".join(reason.split())
    if settings.strict:
        raise ValueError(f"{entry.name}: {reason} (strict: the first bad clip is an error)")
    plan.bad.setdefault(i, reason)
