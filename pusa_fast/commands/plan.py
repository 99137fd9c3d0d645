"""Which frames of which files condition a clip, and which frames are written: decided from the options, before any model.

Latents: 0 stands for frame 0, latent i >= 1 for frames 4i-3 .. 4i. Media are read at the clip's own frames per second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pusa_fast import video
from pusa_fast.sampling import task
from pusa_fast.sampling.task import Condition

EXTENSION_NOISE = (0.0, 0.3, 0.4, 0.5)  # of the overlap's latents, the last repeated (spec 3.9)
CHUNK = 4  # frames per latent of the Wan VAE


@dataclass(frozen=True)
class Inputs:
    """The options that give frames, as typed; None where not given. `keyframe`: PATH@LATENT:NOISE each."""

    image: str | None = None
    image_noise: float | None = None
    end_image: str | None = None
    end_noise: float | None = None
    keyframe: Sequence[str] = ()
    video: str | None = None
    keep: str | None = None
    keep_noise: str | None = None
    extend: str | None = None
    overlap: int | None = None
    transition: tuple[str, str] | None = None
    ends: int | None = None

    def given(self) -> list[str]:
        """Names of the options that were given."""
        return [name for name, value in vars(self).items() if value not in (None, (), [])]


@dataclass(frozen=True)
class Given:
    """Frames of a file and the latents they become. `source` None: a picture; else latents of the clip, encoded from its
    first frame on, or from its last `last_frames` frames alone. Negative latents count from the end."""

    path: str
    latent: tuple[int, ...]
    noise: tuple[float, ...]
    source: tuple[int, ...] | None = None
    last_frames: int | None = None

    def label(self) -> str:
        return self.path if self.last_frames is None else f"the last {self.last_frames} frames of {self.path}"


@dataclass(frozen=True)
class Part:
    """A stretch of the written file: the whole clip at `path`, or generated frames [start:stop], as Python slices them."""

    path: str | None = None
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class MediaPlan:
    conditions: tuple[Given, ...] = ()
    written: tuple[Part, ...] = (Part(),)

    def paths(self) -> set[str]:
        return {given.path for given in self.conditions} | {part.path for part in self.written if part.path is not None}

    def to_json(self) -> dict[str, Any]:
        conditions = [_condition_json(given) for given in self.conditions]
        return {"conditions": conditions, "written": [_part_json(part) for part in self.written]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MediaPlan:
        """Conditions of a clip.json; `written` may be missing. Raises ValueError naming an entry that is no condition."""
        written = tuple(_part(entry) for entry in record.get("written", [{"generated": [0, None]}]))
        return cls(tuple(_condition(entry) for entry in record.get("conditions", ())), written)

    def resolve(self, num_frames: int) -> task.Plan:
        """Checked against a clip of `num_frames`, taking every file to be long enough; its media are the labels.

        Raises ValueError for latents outside the clip or given twice, noise outside [0, 1] and counts that do not match.
        """
        pictures = {given.label() for given in self.conditions if given.source is None}
        named = [Condition(given.label(), given.latent, given.noise, given.source) for given in self.conditions]
        return task.resolve(named, num_frames, lambda label: None if label in pictures else num_frames)

    def read(self, resolved: task.Plan, fps: float) -> list[Condition]:
        """The conditions with their frames, as the pipeline takes them. Only the frames needed stay in memory.

        Raises ValueError or an OSError for a file that is missing, damaged or no picture or video, or holds fewer frames than needed.
        """
        needed = dict(zip(resolved.media, resolved.frames_needed, strict=True))
        media: dict[str, Tensor] = {}
        for given in self.conditions:
            if given.label() not in media:
                media[given.label()] = _read(given, needed[given.label()], fps)
        return [Condition(media[given.label()], given.latent, given.noise, given.source) for given in self.conditions]

    def assemble(self, generated: Tensor, fps: float, fit: str) -> Iterator[Tensor]:
        """Frames of the written file, one by one; those of given clips are their own, brought to the clip's rate and size."""
        size = (generated.shape[2], generated.shape[1])
        for part in self.written:
            if part.path is None:
                yield from generated[part.start : part.stop]
            else:
                for frame in video.iter_video(part.path, fps):
                    yield video.fit(torch.from_numpy(frame), size, fit)


def _read(given: Given, needed: int, fps: float) -> Tensor:
    if given.source is None:
        return video.read_image(given.path)
    video.check_whole(
        given.path
    )  # damage beyond what is needed would be met after generation, when the clip is written
    frames = video.read_video(
        given.path, fps, needed if given.last_frames is None else None, last_frames=given.last_frames
    )
    if len(frames) < needed:
        raise ValueError(
            f"{given.path} has only {len(frames)} frames at {fps:g} per second, {needed} are needed for the latents kept: "
            "give a longer video, keep fewer (--keep, --overlap, --ends), or raise --fps"
        )
    return frames


# Option -> the options of which it needs one.
_NEEDS = {
    "image_noise": ("image",),
    "end_noise": ("end_image",),
    "keep": ("video",),
    "keep_noise": ("video", "extend", "transition"),
    "overlap": ("extend",),
    "ends": ("transition",),
}


def plan_media(inputs: Inputs, num_frames: int) -> MediaPlan:
    """Turn the options into conditions and the make-up of the written file, for a clip of `num_frames` = 4k+1.

    Raises ValueError for options that do not go together or cannot be read. Ranges are left to `MediaPlan.resolve`.
    """
    given = inputs.given()
    for name, needs in _NEEDS.items():
        if name in given and not set(needs) & set(given):
            raise ValueError(
                f"{_option(name)} needs {' or '.join(map(_option, needs))}: give that too, or leave it out"
            )
    clips = [name for name in ("video", "extend", "transition") if name in given]
    if len(clips) > 1:
        raise ValueError(f"{' and '.join(map(_option, clips))} do not go together: give one of them")
    latent_frames = task.latent_count(num_frames, CHUNK)
    conditions = list(_pictures(inputs))
    written: tuple[Part, ...] = (Part(),)
    if inputs.video is not None:
        conditions.append(_kept(inputs, inputs.video, latent_frames))
    if inputs.extend is not None:
        overlap, condition = _overlap(inputs, inputs.extend, num_frames)
        conditions.append(condition)
        written = (Part(condition.path), Part(start=overlap))
    if inputs.transition is not None:
        ends, pair = _ends(inputs, inputs.transition, latent_frames)
        conditions += pair
        # The second clip's frame 0 stands where the generated clip has the frame before its last 4*ends: that instant is
        # written once too, as the second clip shows it, else the motion would halt for a frame at the seam.
        between = Part(start=CHUNK * (ends - 1) + 1, stop=-(CHUNK * ends + 1))
        written = (Part(pair[0].path), between, Part(pair[1].path))
    return MediaPlan(tuple(conditions), written)


def _pictures(inputs: Inputs) -> Iterator[Given]:
    if inputs.image is not None:
        yield Given(os.path.abspath(inputs.image), (0,), (inputs.image_noise or 0.0,))
    if inputs.end_image is not None:
        yield Given(os.path.abspath(inputs.end_image), (-1,), (inputs.end_noise or 0.0,))
    for text in inputs.keyframe:
        path, latent, noise = parse_keyframe(text)
        yield Given(os.path.abspath(path), (latent,), (noise,))


def _kept(inputs: Inputs, path: str, latent_frames: int) -> Given:
    if inputs.keep is None:
        raise ValueError("--video needs --keep: say which latents of it to keep, such as --keep 0-3")
    keep = parse_latents("--keep", inputs.keep)
    # Resolved here, since a clip's latents are taken from where they go.
    latents = tuple(latent + latent_frames if -latent_frames <= latent < 0 else latent for latent in keep)
    if outside := [latent for latent in latents if not 0 <= latent < latent_frames]:
        raise ValueError(
            f"--keep {inputs.keep}: latent {outside[0]} does not exist, the clip has latents 0 to {latent_frames - 1}"
        )
    noise = (0.0,) if inputs.keep_noise is None else parse_noises("--keep-noise", inputs.keep_noise)
    return Given(os.path.abspath(path), latents, _one_or_each(noise, len(latents), inputs.keep_noise), source=latents)


def _overlap(inputs: Inputs, path: str, num_frames: int) -> tuple[int, Given]:
    most = num_frames - CHUNK
    if most < 1:
        raise ValueError(
            f"--frames {num_frames} leaves no room for an overlap and a continuation: give --extend at least {CHUNK + 1}"
        )
    overlap = min(13, most) if inputs.overlap is None else inputs.overlap
    if overlap < 1 or (overlap - 1) % CHUNK:
        below = max(1, (overlap - 1) // CHUNK * CHUNK + 1)
        raise ValueError(f"--overlap {overlap} is not {CHUNK}k+1 frames: use {below} or {below + CHUNK}")
    if overlap > most:
        raise ValueError(
            f"--overlap {overlap} leaves nothing of {num_frames} frames to generate: use at most {most}, or more --frames"
        )
    latents = tuple(range((overlap - 1) // CHUNK + 1))
    noise = (
        EXTENSION_NOISE[: len(latents)]
        if inputs.keep_noise is None
        else parse_noises("--keep-noise", inputs.keep_noise)
    )
    if len(noise) > len(latents):
        raise ValueError(
            f"--keep-noise {inputs.keep_noise} has {len(noise)} values, --overlap {overlap} has {len(latents)} latents: give fewer"
        )
    noise += noise[-1:] * (len(latents) - len(noise))
    return overlap, Given(os.path.abspath(path), latents, noise, source=latents, last_frames=overlap)


def _ends(inputs: Inputs, paths: tuple[str, str], latent_frames: int) -> tuple[int, tuple[Given, Given]]:
    most = (latent_frames - 1) // 2
    ends = min(3, most) if inputs.ends is None else inputs.ends
    if not 1 <= ends <= most:
        raise ValueError(
            f"--ends {ends} does not fit: both ends of {latent_frames} latents and one between them allow 1 to {most}; "
            f"a clip of {CHUNK * 2 * max(ends, 1) + 1} frames is the least"
        )
    noise = (0.0,) if inputs.keep_noise is None else parse_noises("--keep-noise", inputs.keep_noise)
    noise = _one_or_each(noise, 2 * ends, inputs.keep_noise)
    first, second = map(os.path.abspath, paths)
    head, tail = tuple(range(ends)), tuple(range(-ends, 0))
    return ends, (
        Given(first, head, noise[:ends], source=head, last_frames=CHUNK * (ends - 1) + 1),
        # Its own latent 0 stands for one frame, the others for four: it is encoded, but never placed.
        Given(second, tail, noise[ends:], source=tuple(range(1, ends + 1))),
    )


def _one_or_each(noise: tuple[float, ...], count: int, text: str | None) -> tuple[float, ...]:
    if len(noise) not in (1, count):
        raise ValueError(f"--keep-noise {text} has {len(noise)} values for {count} latents: give one, or {count}")
    return noise * count if len(noise) == 1 else noise


def parse_keyframe(text: str) -> tuple[str, int, float]:
    """PATH@LATENT or PATH@LATENT:NOISE; only what follows the last @ (and : after it) is read, so paths may hold both."""
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
            raise ValueError(f"{name} {text}: {item!r} is no latent or range, write such as 0-3 or 0,4 or 0-2,-1")
        found += range(int(span[2]), int(span[3]) + 1) if span[2] is not None else [int(span[1])]
    return tuple(found)


def parse_noises(name: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers in [0, 1]."""
    try:
        levels = tuple(float(item) for item in text.split(","))
    except ValueError:
        raise ValueError(f"{name} {text!r} is no list of numbers: write such as 0,0.3,0.4") from None
    if outside := [level for level in levels if not 0 <= level <= 1]:  # NaN is in no interval
        raise ValueError(f"{name} {outside[0]:g} is outside [0, 1]: 0 keeps a frame, 1 makes it anew")
    return levels


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _condition_json(given: Given) -> dict[str, Any]:
    """One latent as plain numbers, several as lists; what is None is left out."""

    def plain(values: tuple[Any, ...]) -> Any:
        return values[0] if len(values) == 1 else list(values)

    record = {"path": given.path, "latent": plain(given.latent), "noise": plain(given.noise)}
    if given.source is not None:
        record["source"] = plain(given.source)
    return record if given.last_frames is None else {**record, "last_frames": given.last_frames}


def _condition(entry: Any) -> Given:
    known = {"path", "latent", "noise", "source", "last_frames"}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - known:
        raise ValueError(
            f"condition {entry!r} is not understood: it needs a path, and may have {', '.join(sorted(known - {'path'}))}"
        )

    def numbers(name: str, default: Any, kind: type) -> tuple[Any, ...]:
        values = entry.get(name, default)
        listed = values if isinstance(values, list) else [values]
        if not listed or any(isinstance(value, bool) or not isinstance(value, (int, kind)) for value in listed):
            raise ValueError(f"condition {entry['path']}: {name}={values!r} must be a number or a list of them")
        return tuple(listed)

    latent = numbers("latent", 0, int)
    noise = numbers("noise", 0.0, float)
    source = numbers("source", None, int) if entry.get("source") is not None else None
    last = numbers("last_frames", None, int)[0] if entry.get("last_frames") is not None else None
    if last is not None and (last < 1 or source is None):
        raise ValueError(f"condition {entry['path']}: last_frames={last} must be at least 1, and needs source")
    return Given(
        os.path.abspath(entry["path"]), latent, noise * len(latent) if len(noise) == 1 else noise, source, last
    )


def _part_json(part: Part) -> dict[str, Any]:
    return {"generated": [part.start, part.stop]} if part.path is None else {"path": part.path}


def _part(entry: Any) -> Part:
    match entry:
        case {"path": str(path)}:
            return Part(path)
        case {"generated": [int(start), (int() | None) as stop]}:
            return Part(start=start, stop=stop)
    raise ValueError(
        f'written part {entry!r} is not understood: write {{"path": ...}} or {{"generated": [start, stop]}}'
    )
