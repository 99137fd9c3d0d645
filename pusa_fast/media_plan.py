"""Which frames of which files condition a clip, and which frames are written: decided from the
options, before any model.

Latents: 0 is frame 0, latent i >= 1 the k frames ending at k * i (k: the VAE's temporal factor).
Clips are read at the written clip's own frames per second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pusa_fast.options import GIVEN, ClipOptions, declared
from pusa_fast.request import condition_from_json, condition_to_json
from pusa_fast.sampling.limits import latent_count
from pusa_fast.sampling.task import Condition, MediaFile

if TYPE_CHECKING:
    from torch import Tensor

EXTENSION_NOISE = (0.0, 0.3, 0.4, 0.5)  # of the overlap's latents, the last repeated (spec 3.9)
# The options that give frames.
INPUTS = tuple(name for name, o in declared(ClipOptions).items() if o.option.panel == GIVEN and name != "fit")


@dataclass(frozen=True)
class Part:
    """A stretch of the written file: the whole clip at `path`, or generated frames [start:stop], as
    Python slices them."""

    path: str | None = None
    start: int = 0
    stop: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"generated": [self.start, self.stop]} if self.path is None else {"path": self.path}

    @classmethod
    def from_json(cls, entry: Any) -> Part:
        match entry:
            case {"path": str(path)}:
                return cls(path)
            case {"generated": [int(start), (int() | None) as stop]}:
                return cls(start=start, stop=stop)
        raise ValueError(
            f'written part {entry!r} is not understood: write {{"path": ...}} or {{"generated": [start, stop]}}'
        )


@dataclass(frozen=True, eq=False)
class MediaPlan:
    """`conditions`, all on a `MediaFile`, and the parts of the written file in order."""

    conditions: tuple[Condition, ...] = ()
    written: tuple[Part, ...] = (Part(),)

    def paths(self) -> set[str]:
        conditioned = {c.media.path for c in self.conditions if isinstance(c.media, MediaFile)}
        return conditioned | {part.path for part in self.written if part.path is not None}

    def to_json(self) -> dict[str, Any]:
        conditions = [condition_to_json(condition) for condition in self.conditions]
        return {"conditions": conditions, "written": [part.to_json() for part in self.written]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], fps: float) -> MediaPlan:
        """Conditions of a clip.json; `written` may be missing. Raises ValueError naming an entry
        that is not understood."""
        written = tuple(map(Part.from_json, record.get("written", [{"generated": [0, None]}])))
        return cls(tuple(condition_from_json(entry, fps) for entry in record.get("conditions", ())), written)

    def assemble(self, generated: Tensor, fps: float, fit: str) -> Iterator[Tensor]:
        """Frames of the written file, one by one. Given clips keep their own frames, at the clip's
        rate and size."""
        import torch

        from pusa_fast import video

        size = (generated.shape[2], generated.shape[1])
        for part in self.written:
            if part.path is None:
                yield from generated[part.start : part.stop]
            else:
                for frame in video.iter_video(part.path, fps):
                    yield video.fit(torch.from_numpy(frame), size, fit)


# Option -> the options of which it needs one.
_NEEDS = {
    "image_noise": ("image",),
    "end_noise": ("end_image",),
    "keep": ("video",),
    "keep_noise": ("video", "extend", "transition"),
    "overlap": ("extend",),
    "ends": ("transition",),
}


def given_inputs(options: ClipOptions) -> list[str]:
    """Names of the options that give frames and were given."""
    return [name for name in INPUTS if getattr(options, name) not in (None, (), [])]


def plan_media(options: ClipOptions, num_frames: int, fps: float, chunk: int) -> MediaPlan:
    """Turn the options into conditions and the parts of the written file, for a clip of
    `num_frames` = k*n + 1 at `fps`.

    `chunk`: the VAE's temporal factor k. Raises ValueError for options that do not go together or
    cannot be read. Ranges are left to `Request.check`.
    """
    given = given_inputs(options)
    for name, needs in _NEEDS.items():
        if name in given and not set(needs) & set(given):
            raise ValueError(f"{_flags([name])} needs {_flags(needs, ' or ')}: give that too, or leave it out")
    clips = [name for name in ("video", "extend", "transition") if name in given]
    if len(clips) > 1:
        raise ValueError(f"{_flags(clips)} do not go together: give one of them")
    latent_frames = latent_count(num_frames, chunk)
    conditions = list(_pictures(options))
    written: tuple[Part, ...] = (Part(),)
    if options.video is not None:
        conditions.append(_kept(options, options.video, latent_frames, fps))
    if options.extend is not None:
        overlap, condition = _overlap(options, options.extend, num_frames, fps, chunk)
        conditions.append(condition)
        written = (Part(os.path.abspath(options.extend)), Part(start=overlap))
    if options.transition is not None:
        ends, pair = _ends(options, options.transition, latent_frames, fps, chunk)
        conditions += pair
        # The second clip's frame 0 falls on the generated frame before the last chunk * ends. That
        # instant is written once too, as the second clip shows it: else the motion would halt for a
        # frame at the seam.
        between = Part(start=chunk * (ends - 1) + 1, stop=-(chunk * ends + 1))
        first, second = map(os.path.abspath, options.transition)
        written = (Part(first), between, Part(second))
    return MediaPlan(tuple(conditions), written)


def _flags(names: Sequence[str], separator: str = " and ") -> str:
    return separator.join(declared(ClipOptions)[name].flag for name in names)


def _picture(path: str, latent: int, noise: float | None) -> Condition:
    return Condition(MediaFile(os.path.abspath(path), picture=True), (latent,), (noise or 0.0,))


def _pictures(options: ClipOptions) -> Iterator[Condition]:
    if options.image is not None:
        yield _picture(options.image, 0, options.image_noise)
    if options.end_image is not None:
        yield _picture(options.end_image, -1, options.end_noise)
    for text in options.keyframe or ():
        yield _picture(*parse_keyframe(text))


def _kept(options: ClipOptions, path: str, latent_frames: int, fps: float) -> Condition:
    if options.keep is None:
        raise ValueError("--video needs --keep: say which latents of it to keep, such as --keep 0-3")
    keep = parse_latents("--keep", options.keep)
    # Resolved here, since a clip's latents are taken from where they go.
    latents = tuple(latent + latent_frames if -latent_frames <= latent < 0 else latent for latent in keep)
    if outside := [latent for latent in latents if not 0 <= latent < latent_frames]:
        raise ValueError(
            f"--keep {options.keep}: latent {outside[0]} does not exist, the clip has latents 0 to {latent_frames - 1}"
        )
    noise = _one_or_each(options.keep_noise, len(latents))
    return Condition(MediaFile(os.path.abspath(path), fps=fps), latents, noise, latents)


def _overlap(options: ClipOptions, path: str, num_frames: int, fps: float, chunk: int) -> tuple[int, Condition]:
    most = num_frames - chunk
    if most < 1:
        raise ValueError(
            f"--frames {num_frames} leaves no room for an overlap and a continuation: "
            f"give --extend at least {chunk + 1}"
        )
    overlap = min(13, (most - 1) // chunk * chunk + 1) if options.overlap is None else options.overlap
    if overlap < 1 or (overlap - 1) % chunk:
        below = max(1, (overlap - 1) // chunk * chunk + 1)
        raise ValueError(f"--overlap {overlap} is not {chunk}k+1 frames: use {below} or {below + chunk}")
    if overlap > most:
        raise ValueError(
            f"--overlap {overlap} leaves nothing of {num_frames} frames to generate: "
            f"use at most {most}, or more --frames"
        )
    latents = tuple(range((overlap - 1) // chunk + 1))
    typed = options.keep_noise
    noise = EXTENSION_NOISE[: len(latents)] if typed is None else parse_noises("--keep-noise", typed)
    if len(noise) > len(latents):
        raise ValueError(
            f"--keep-noise {typed} has {len(noise)} values, --overlap {overlap} has {len(latents)} latents: give fewer"
        )
    noise += noise[-1:] * (len(latents) - len(noise))
    return overlap, Condition(MediaFile(os.path.abspath(path), fps=fps, last_frames=overlap), latents, noise, latents)


def _ends(
    options: ClipOptions, paths: tuple[str, str], latent_frames: int, fps: float, chunk: int
) -> tuple[int, tuple[Condition, Condition]]:
    most = (latent_frames - 1) // 2
    ends = min(3, most) if options.ends is None else options.ends
    if not 1 <= ends <= most:
        raise ValueError(
            f"--ends {ends} does not fit: both ends of {latent_frames} latents and one between them allow 1 to {most}; "
            f"a clip needs at least {chunk * 2 * max(ends, 1) + 1} frames"
        )
    noise = _one_or_each(options.keep_noise, 2 * ends)
    first, second = map(os.path.abspath, paths)
    head, tail = tuple(range(ends)), tuple(range(-ends, 0))
    return ends, (
        Condition(MediaFile(first, fps=fps, last_frames=chunk * (ends - 1) + 1), head, noise[:ends], head),
        # Its own latent 0 holds one frame, the others a chunk: it is encoded, but never placed.
        Condition(MediaFile(second, fps=fps), tail, noise[ends:], tuple(range(1, ends + 1))),
    )


def _one_or_each(text: str | None, count: int) -> tuple[float, ...]:
    noise = (0.0,) if text is None else parse_noises("--keep-noise", text)
    if len(noise) not in (1, count):
        raise ValueError(f"--keep-noise {text} has {len(noise)} values for {count} latents: give one, or {count}")
    return noise * count if len(noise) == 1 else noise


def parse_keyframe(text: str) -> tuple[str, int, float]:
    """PATH@LATENT or PATH@LATENT:NOISE; only what follows the last @ (and : after it) is read, so
    paths may hold both."""
    path, at, suffix = text.rpartition("@")
    latent, _, noise = suffix.partition(":")
    if not at or not path or not re.fullmatch(r"-?\d+", latent):
        raise ValueError(f"--keyframe {text}: write PATH@LATENT:NOISE, such as end.png@4:0.4")
    return path, int(latent), parse_noises(f"--keyframe {text}: noise", noise)[0] if noise else 0.0


def parse_latents(name: str, text: str) -> tuple[int, ...]:
    """Latents such as "0-3" or "0,4" or "0-2,-1"; a range has non-negative ends."""
    found: list[int] = []
    for item in text.split(","):
        span = re.fullmatch(r"\s*(-?\d+|(\d+)-(\d+))\s*", item)
        if span is None or (span[2] is not None and not int(span[2]) <= int(span[3]) < 100_000):
            raise ValueError(f"{name} {text}: {item!r} is not a latent or a range: write such as 0-3 or 0,4 or 0-2,-1")
        found += range(int(span[2]), int(span[3]) + 1) if span[2] is not None else [int(span[1])]
    return tuple(found)


def parse_noises(name: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers in [0, 1]."""
    try:
        levels = tuple(float(item) for item in text.split(","))
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a list of numbers: write such as 0,0.3,0.4") from None
    if outside := [level for level in levels if not 0 <= level <= 1]:  # NaN is in no interval
        raise ValueError(f"{name} {outside[0]:g} is outside [0, 1]: 0 keeps a frame, 1 makes it new")
    return levels
