"""The clips that `prepare` has to make: files hashed, windows chosen, no model loaded yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pusa_fast.config import Geometry
from pusa_fast.data.buckets import Bucket, choose, is_picture, window_starts
from pusa_fast.data.catalog import Catalog, digest
from pusa_fast.data.sources import Source
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.weights.pretrained import ModelFiles

# Files of a folder that are part of a model.
_PART_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".model", ".json"})

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What `prepare` was asked for, checked."""

    files: ModelFiles
    geometry: Geometry
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
class Clip:
    """A clip to make: one window of `source`, which is number `number` in the list.

    `bucket` None: the reference's tensors. `key`: hash of everything the clip is made from;
    `details`: kept in the store.
    """

    source: Source
    number: int
    bucket: Bucket | None
    start: int
    key: str
    details: Mapping[str, Any]


@dataclass
class Plan:
    """`model`: what latents and text depend on, by name; `bad`: reasons by number in the list."""

    settings: Settings
    model: Mapping[str, Any]
    clips: list[Clip] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    duplicates: int = 0

    @property
    def keys(self) -> list[str]:
        """Keys of all clips in order, including those that the store holds already."""
        return [clip.key for clip in self.clips]

    def add_bad(self, number: int, source: Source, error: Exception) -> None:
        """Note why a source cannot be used. Raises ValueError in a strict run."""
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = f"cannot be read: {error.strerror.lower()}"
        for path in (source.tensors, source.path):
            reason = reason.removeprefix(f"{path} ")
        reason = " ".join(reason.split())
        if self.settings.strict:
            raise ValueError(f"{source.name}: {reason} (strict: the first bad clip is an error)")
        self.bad.setdefault(number, reason)


def model_hashes(files: ModelFiles, catalog: Catalog) -> dict[str, str]:
    """ "vae" and "text": hashes of the files that latents and text rows depend on."""

    def part(path: Path) -> str:
        if path.is_file():
            return catalog.hash(path)
        inside = sorted(p for p in path.rglob("*") if p.suffix in _PART_SUFFIXES and p.is_file())
        return digest((p.relative_to(path).as_posix(), catalog.hash(p)) for p in inside)

    return {"vae": part(files.vae), "text": digest([part(files.text_encoder), part(files.tokenizer)])}


def make_plan(settings: Settings, model: Mapping[str, Any], sources: Sequence[Source], catalog: Catalog) -> Plan:
    """Hash and measure every file, choose its bucket and windows."""
    plan, seen = Plan(settings, model), set[str]()
    for number, source in enumerate(sources):
        try:
            if source.problem:
                raise ValueError(source.problem)
            clips = _clips(plan, number, source, catalog)
        except (ValueError, OSError) as error:
            plan.add_bad(number, source, error)
        else:
            fresh = [clip for clip in clips if clip.key not in seen]
            plan.duplicates += len(clips) - len(fresh)
            seen.update(clip.key for clip in fresh)
            plan.clips += fresh
        catalog.save(least=max(100, len(sources) // 10))
        settings.progress("reading", number + 1, len(sources))
    return plan


def _clips(plan: Plan, number: int, source: Source, catalog: Catalog) -> list[Clip]:
    """The clips of one file. Raises ValueError or OSError where it has none."""
    settings, (vae, text, dtype) = plan.settings, (plan.model[name] for name in ("vae", "text", "dtype"))
    if source.tensors is not None:  # they bring their own text: the caption in the list does not count
        details: dict[str, Any] = {"tensors": catalog.hash(source.tensors)}
        with suppress(OSError):  # the video may be missing; where it exists, its other clips are known by it
            details["file"] = catalog.hash(source.path)
        return [Clip(source, number, None, 0, digest(["tensors", details["tensors"], vae, text, dtype]), details)]
    own = catalog.hash(source.path)
    width, height, frames = catalog.measure(source.path, settings.fps)
    bucket = choose(settings.buckets, width, height, frames)
    if bucket is None:
        raise ValueError(_too_short(source.path, frames, settings))
    fps = None if settings.fps is None else float(settings.fps)
    # Tiles of other modes give the latents of the whole picture.
    tiling = settings.tiling if settings.tiling is not None and settings.tiling.mode == "feather" else None
    cut = [str(bucket), fps, settings.fit, [tiling.tile, tiling.stride] if tiling else None]
    clips = []
    for start in window_starts(
        frames - bucket.frames, settings.clips_per_video, settings.start, f"{own}:{settings.seed}"
    ):
        key = digest([own, start, vae, text, source.caption, dtype, *cut])
        latents = digest([own, start, vae, dtype, *cut])  # the same under every caption
        details = {
            "file": own, "start": start, "frames": bucket.frames, "fps": fps, "fit": settings.fit, "latents": latents,
        }  # fmt: skip
        clips.append(Clip(source, number, bucket, start, key, details))
    return clips


def _too_short(path: Path, frames: int, settings: Settings) -> str:
    rate = "" if settings.fps is None or path.is_dir() else f" at {settings.fps:g} fps"
    what = "is a picture, 1 frame" if is_picture(path) else f"has {frames} frame{'s' if frames != 1 else ''}{rate}"
    return f"{what}, the shortest bucket needs {min(bucket.frames for bucket in settings.buckets)}"
