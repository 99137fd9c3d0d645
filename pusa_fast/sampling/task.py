"""Conditions -> which latents are given, from which media, at which noise: it makes all six tasks.

Latent 0 is frame 0 alone, latent i >= 1 the `k` frames ending at `k * i` (k: the VAE's temporal
factor, 4 for Wan).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pusa_fast.sampling.limits import (
    COMPAT,
    check_guidance,
    check_multiplier,
    check_seed,
    check_shift,
    check_size,
    check_steps,
    is_whole,
    latent_count,
)  # fmt: skip


@dataclass(frozen=True)
class MediaFile:
    """A medium by name, as command line and manifests give it; read only when needed.

    `path`: a picture or, by `picture` and not by suffix, a clip, resampled to `fps` (None: every
    frame) and cut to its last `last_frames` frames (None: all).
    """

    path: str
    picture: bool = False
    fps: float | None = None
    last_frames: int | None = None

    def __str__(self) -> str:
        return self.path if self.last_frames is None else f"the last {self.last_frames} frames of {self.path}"


@dataclass(frozen=True, eq=False)
class Condition:
    """Frames that the video has to contain; checked on use, by `resolve`.

    `media`: PIL image, path, `MediaFile`, uint8 array or tensor [H,W,3] (a picture) or [T,H,W,3]
    (a clip), or a sequence of PIL images (a clip).
    `latent`: its latent frames: int (negative counts from the end), slice or sequence of ints.
    `noise`: how freely it is re-synthesised, from 0 (kept) to 1; one number, or one per latent.
    `source`: which latents of the encoded clip (default: the same indices); a picture has only one.
    """

    media: object
    latent: int | slice | Sequence[int] = 0
    noise: float | Sequence[float] = 0.0
    source: int | slice | Sequence[int] | None = None


@dataclass(frozen=True)
class Placement:
    """A given latent frame: latent `latent` is latent `source` of medium `medium`, at `noise`."""

    latent: int
    medium: int
    source: int
    noise: float


@dataclass(frozen=True, eq=False)
class Plan:
    """Checked conditions. `media`: the distinct media.

    `frames_needed[i]`: how many leading frames of medium i to encode; `placements`: sorted by
    latent; `multipliers` [F]: 1 for a generated frame; `task`: names the combination.
    """

    latent_frames: int
    placements: tuple[Placement, ...]
    media: tuple[object, ...]
    frames_needed: tuple[int, ...]
    multipliers: tuple[float, ...]
    task: str


@dataclass(frozen=True)
class Settings:
    """A run's settings other than prompts and conditions; `settings` builds and checks them."""

    num_frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    shift: float
    seed: int = 0
    compat: str = "reference"
    fit: str = "crop"
    output: str = "frames"


CHOICES = {"compat": COMPAT, "fit": ("crop", "pad", "stretch"), "output": ("frames", "latents")}


def settings(
    given: Mapping[str, Any], defaults: Mapping[str, Any], multiples: tuple[int, int], temporal_factor: int
) -> Settings:
    """`given` over `defaults` (None: the default), checked; `multiples` of height, width in pixels.

    Raises ArgumentError with the value and the nearest valid one, ValueError for an unknown choice.
    """
    names = [field.name for field in fields(Settings)]
    values = {name: defaults[name] for name in names if name in defaults}
    values |= {name: value for name, value in given.items() if value is not None}
    for name, multiple in zip(("height", "width"), multiples, strict=True):
        check_size(name, values[name], multiple)
    latent_count(values["num_frames"], temporal_factor)
    check_steps(values["steps"])
    check_shift(values["shift"])
    check_guidance(values["guidance_scale"])
    check_seed(values.get("seed", 0))
    for name, choices in CHOICES.items():
        if values.get(name, choices[0]) not in choices:
            raise ValueError(f"unknown {name} {values[name]!r}: choose one of {', '.join(choices)}")
    return Settings(**values)


def resolve(
    conditions: Sequence[Condition], num_frames: int, count_frames: Callable[[object], int | None], temporal_factor: int
) -> Plan:
    """Check the conditions for a clip of `num_frames`; give each condition latent source and noise.

    `count_frames(medium)`: frames in it, None for a picture; called once per distinct medium (the
    same object or path). Raises ValueError for latents outside the clip or given twice, noise
    outside [0, 1], counts that do not match, and a source outside the encoded clip (too short).
    """
    latent_frames = latent_count(num_frames, temporal_factor)
    media: dict[object, int] = {}
    originals: list[object] = []
    counts: list[int | None] = []
    taken: dict[int, str] = {}
    placements: list[Placement] = []
    for number, condition in enumerate(conditions):
        if not isinstance(condition, Condition):
            kind = type(condition).__name__
            raise ValueError(f"conditions[{number}] is a {kind}, not a Condition: use Condition(media, latent=...)")
        name = describe(condition.media)
        if not isinstance(condition.media, MediaFile):  # that one came from an option, not from a list
            name = f"conditions[{number}] ({name})"
        medium = media.setdefault(_identity(condition.media), len(media))
        if medium == len(originals):
            originals.append(condition.media)
            counts.append(count_frames(condition.media))
        for placement in _place(condition, medium, counts[medium], latent_frames, temporal_factor, name):
            if placement.latent in taken:
                raise ValueError(
                    f"{taken[placement.latent]} and {name} both give latent {placement.latent}: keep one of them there"
                )
            taken[placement.latent] = name
            placements.append(placement)
    placements.sort(key=lambda placement: placement.latent)
    noise = {placement.latent: placement.noise for placement in placements}
    furthest = [max(p.source for p in placements if p.medium == medium) for medium in range(len(originals))]
    return Plan(
        latent_frames=latent_frames,
        placements=tuple(placements),
        media=tuple(originals),
        frames_needed=tuple(temporal_factor * source + 1 for source in furthest),
        multipliers=tuple(noise.get(latent, 1.0) for latent in range(latent_frames)),
        task=task_name(placements, counts, latent_frames),
    )


def _place(
    condition: Condition, medium: int, frames: int | None, latent_frames: int, temporal_factor: int, name: str
) -> list[Placement]:
    latents = _indices(
        condition.latent, latent_frames, f"{name}: latent", f"the clip has latents 0 to {latent_frames - 1}"
    )
    if len(set(latents)) != len(latents):
        raise ValueError(f"{name}: latent={condition.latent!r} names a latent twice")
    noises = _listed(condition.noise)
    if isinstance(noises, list) and len(noises) != len(latents):
        raise ValueError(
            f"{name}: {len(noises)} noise values for {len(latents)} latents: give one number, or one per latent"
        )
    if frames is None:
        if condition.source not in (None, 0):
            raise ValueError(
                f"{name}: source={condition.source!r}, but a picture encodes to one latent: leave source out"
            )
        sources = [0] * len(latents)
    else:
        sources = _sources(condition, latents, frames, temporal_factor, name)
    try:
        levels = [
            check_multiplier(noise) for noise in (noises if isinstance(noises, list) else [noises] * len(latents))
        ]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return [
        Placement(latent, medium, source, noise) for latent, source, noise in zip(latents, sources, levels, strict=True)
    ]


def _sources(condition: Condition, latents: list[int], frames: int, temporal_factor: int, name: str) -> list[int]:
    if frames < 1:
        raise ValueError(f"{name}: the clip has no frames")
    encoded = (frames - 1) // temporal_factor + 1
    if condition.source is None:
        if max(latents) >= encoded:
            need = max(latents) * temporal_factor + 1
            raise ValueError(
                f"{name}: latent {max(latents)} needs {need} frames of the clip, which has {frames}: "
                "give a longer clip, or `source`"
            )
        return latents
    hint = f"the clip's {frames} frames encode to latents 0 to {encoded - 1}"
    listed = _listed(condition.source)
    whole = [index for index in (listed if isinstance(listed, list) else [listed]) if is_whole(index)]
    if whole and max(whole) >= encoded:
        hint += f"; latent {max(whole)} needs {max(whole) * temporal_factor + 1} frames"
    sources = _indices(condition.source, encoded, f"{name}: source", hint)
    if len(sources) != len(latents):
        raise ValueError(
            f"{name}: source={condition.source!r} names {len(sources)} latents, "
            f"latent={condition.latent!r} {len(latents)}"
        )
    return sources


def _indices(given: int | slice | Sequence[int], count: int, name: str, hint: str) -> list[int]:
    """Non-negative indices below `count`. Unlike in Python, a slice bound outside is an error."""
    if isinstance(given, slice):
        edges = [edge for edge in (given.start, given.stop) if edge is not None]
        found = list(range(*given.indices(count)))
        if any(not -count <= edge <= count for edge in edges) or not found:
            what = "nothing" if not found else "more than there is"
            raise ValueError(f"{name}={given.start}:{given.stop} selects {what}; {hint}")
        return found
    listed = _listed(given)
    wanted = listed if isinstance(listed, list) else [listed]
    if not wanted:
        raise ValueError(f"{name} is empty; {hint}")
    for index in wanted:
        if not is_whole(index):
            raise ValueError(f"{name} must be a whole number, a slice or a sequence of them; got {index!r}")
        if not -count <= index < count:
            raise ValueError(f"{name} {index} does not exist; {hint}")
    return [int(index) % count for index in wanted]


def _listed(value: Any) -> Any:
    """A sequence, array or tensor as a list; anything else unchanged."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _identity(media: object) -> object:
    """Equal for the same medium: files by name, others by identity."""
    if isinstance(media, MediaFile):
        return media
    return os.fspath(media) if isinstance(media, (str, os.PathLike)) else id(media)


def describe(media: object) -> str:
    """A few words for messages: the path, or the type and its shape."""
    if isinstance(media, (str, os.PathLike)):
        return os.fspath(media)
    if isinstance(media, MediaFile):
        return str(media)
    shape = getattr(media, "shape", None) or getattr(media, "size", None)
    return type(media).__name__ if shape is None or callable(shape) else f"{type(media).__name__} {list(shape)}"


def _is_prefix(latents: Sequence[int]) -> bool:
    return list(latents) == list(range(len(latents)))


def _is_suffix(latents: Sequence[int], latent_frames: int) -> bool:
    return list(latents) == list(range(latent_frames - len(latents), latent_frames))


def task_name(placements: Sequence[Placement], counts: Sequence[int | None], latent_frames: int) -> str:
    """A label for people; nothing depends on it. `counts[medium]` is None for a picture."""
    latents = sorted(placement.latent for placement in placements)
    groups = {p.medium: sorted(q.latent for q in placements if q.medium == p.medium) for p in placements}
    if not placements:
        return "text-to-video"
    if all(counts[medium] is None for medium in groups):
        return {(0,): "image-to-video", (0, latent_frames - 1): "start-end"}.get(tuple(latents), "keyframes")
    first, *others = sorted(groups.values())
    if not others:
        return "extension" if _is_prefix(first) else "completion"
    is_transition = len(others) == 1 and _is_prefix(first) and _is_suffix(others[0], latent_frames)
    return "transition" if is_transition and None not in counts else "completion"
