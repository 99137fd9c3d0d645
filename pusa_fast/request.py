"""A request for one clip: what the command line, `Pipeline`, training previews, manifests and
servers all make.

Imports no torch: a request is built and checked where no model is loaded. Shapes: L context rows, D
text width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pusa_fast.config import Geometry
from pusa_fast.options import ClipOptions, declared
from pusa_fast.sampling import task
from pusa_fast.sampling.limits import check_seed
from pusa_fast.sampling.task import Condition, MediaFile, Plan, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from pusa_fast.media import Medium
    from pusa_fast.model.vae.tiling import Tiling


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One clip to make. None: the model's own default.

    Give `prompt`, or `prompt_embeds` [L, D] or [1, L, D], used as they are; likewise the negatives,
    which are ignored when `guidance_scale` is 1. `fit` (crop, pad, stretch): for media of another
    size. `tiling` of the VAE: None or "whole", "auto" (whole where the device's total memory allows
    it), "exact", "feather", or a Tiling. `output`: "frames" or "latents".
    """

    prompt: str | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt: str | None = None
    negative_prompt_embeds: Tensor | None = None
    conditions: Sequence[Condition] = ()
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    seed: int = 0
    compat: str = "reference"
    fit: str = "crop"
    tiling: Tiling | str | None = None
    output: str = "frames"

    def check(self, geometry: Geometry, defaults: Mapping[str, Any]) -> CheckedRequest:
        """Everything that can be known without weights: settings, conditions, the shapes of
        embeddings; media are opened.

        Raises ValueError for anything that cannot work, FileNotFoundError for missing media.
        """
        from pusa_fast.media import open_media

        given = {field.name: getattr(self, field.name) for field in fields(Settings)}
        settings = task.settings(given, defaults, geometry.multiples, geometry.temporal_factor)
        context = _text("prompt", self.prompt, self.prompt_embeds, geometry.text_dim)
        if context is None:
            raise ValueError("nothing says what to make: give prompt (it may be empty) or prompt_embeds")
        negative = None
        if settings.guidance_scale != 1:
            negative = _text("negative_prompt", self.negative_prompt, self.negative_prompt_embeds, geometry.text_dim)
            negative = defaults["negative_prompt"] if negative is None else negative
        opened: list[Medium] = []

        def count_frames(media: object) -> int | None:
            opened.append(open_media(media))
            return opened[-1].frames

        plan = task.resolve(self.conditions, settings.num_frames, count_frames, geometry.temporal_factor)
        return CheckedRequest(self, geometry, settings, plan, tuple(opened), context, negative)

    def to_json(self) -> dict[str, Any]:
        """What was given, under the options' names. Raises ValueError for what only a program can
        give."""
        if unnamed := [name for name in ("prompt_embeds", "negative_prompt_embeds") if getattr(self, name) is not None]:
            raise ValueError(f"{unnamed[0]} cannot be written as JSON: give text")
        if not isinstance(self.tiling, (str, type(None))):
            raise ValueError(f"tiling={self.tiling!r} cannot be written as JSON: give its name")
        found = {name: getattr(self, key) for key, (name, _) in FIELDS.items() if getattr(self, key) is not None}
        return {**found, "conditions": [condition_to_json(condition) for condition in self.conditions]}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Request:
        """The request that `to_json` wrote. Raises ValueError for an unknown key or a value of
        another type."""
        keys = {name: key for key, (name, _) in FIELDS.items()}
        if unknown := sorted(set(given) - {*keys, "conditions"}):
            raise ValueError(f"unknown key {unknown[0]!r}: use {', '.join(keys)} or conditions")
        values = {keys[name]: value for name, value in given.items() if name in keys and value is not None}
        for key, value in values.items():
            check_json(FIELDS[key][0], value, FIELDS[key][1])
        conditions = check_json("conditions", given.get("conditions") or [], (list,))
        return cls(**values, conditions=tuple(map(condition_from_json, conditions)))


@dataclass(frozen=True, eq=False)
class CheckedRequest:
    """A request that has passed every check that needs no model, resolved for one geometry.

    `context`, `negative`: text, or embeddings [1, L, D]; `negative` None: no guidance. `media`: one
    for each of `plan.media`.
    """

    request: Request
    geometry: Geometry
    settings: Settings
    plan: Plan
    media: tuple[Medium, ...]
    context: str | Tensor
    negative: str | Tensor | None

    def with_seed(self, seed: int) -> CheckedRequest:
        """The same with another seed. Raises ValueError for a seed out of range."""
        settings = replace(self.settings, seed=check_seed(seed))
        return replace(self, request=replace(self.request, seed=seed), settings=settings)

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        scale = self.geometry.spatial_factor
        size = self.settings.height // scale, self.settings.width // scale
        return (1, self.geometry.channels, self.plan.latent_frames, *size)


def _text(name: str, text: str | None, embeds: Tensor | None, width: int) -> str | Tensor | None:
    if embeds is None:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {type(text).__name__}: one call makes one clip")
        return text
    if text is not None:
        raise ValueError(f"{name} and {name}_embeds were both given: give one")
    rows = embeds[None] if embeds.ndim == 2 else embeds
    if rows.ndim != 3 or rows.shape[0] != 1 or rows.shape[1] < 1 or rows.shape[2] != width:
        raise ValueError(f"{name}_embeds must be [L, {width}] or [1, L, {width}], got {list(embeds.shape)}")
    return rows


def _fields() -> dict[str, tuple[str, tuple[type, ...]]]:
    own = {field.name for field in fields(Request)} - {"conditions"}
    found = {o.key: (o.name, o.json_types) for o in declared(ClipOptions).values() if o.key in own}
    return {**found, "height": ("height", (int,)), "width": ("width", (int,)), "seed": ("seed", (int,))}


# Field of a request -> its key in JSON, which is the option's name, and the types of its value
# there.
FIELDS: Mapping[str, tuple[str, tuple[type, ...]]] = MappingProxyType(_fields())


def check_json(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """`value`, which must be of one of the JSON types `kinds`. Raises ValueError."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{name}={value!r} is not a {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def condition_to_json(condition: Condition) -> dict[str, Any]:
    """A condition on a file, as in clip.json: one latent as plain numbers, several as lists; what
    is None is left out.

    An entry without `source` is a picture. Raises ValueError for media that are not files, and for
    a slice.
    """
    media, latent, source = condition.media, condition.latent, condition.source
    if isinstance(media, (str, os.PathLike)):
        media = MediaFile(os.fspath(media), picture=source is None)
    if not isinstance(media, MediaFile) or isinstance(latent, slice) or isinstance(source, slice):
        raise ValueError("only conditions on files, at numbered latents, can be written as JSON: give paths and lists")
    entry = {"path": media.path, "latent": _plain(latent), "noise": _plain(condition.noise)}
    if not media.picture:
        entry["source"] = _plain(latent if source is None else source)
    return entry if media.last_frames is None else {**entry, "last_frames": media.last_frames}


def condition_from_json(entry: Any, fps: float | None = None) -> Condition:
    """The condition of a clip.json's entry; clips are resampled to `fps`. Raises ValueError naming
    what is wrong with it."""
    known = {"path", "latent", "noise", "source", "last_frames"}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - known:
        optional = ", ".join(sorted(known - {"path"}))
        raise ValueError(f"condition {entry!r} is not understood: it needs a path, and may have {optional}")

    def numbers(name: str, default: Any, kind: type) -> tuple[Any, ...]:
        values = entry.get(name, default)
        listed = values if isinstance(values, list) else [values]
        if not listed or any(isinstance(value, bool) or not isinstance(value, (int, kind)) for value in listed):
            raise ValueError(f"condition {entry['path']}: {name}={values!r} must be a number or a list of them")
        return tuple(listed)

    latent, noise = numbers("latent", 0, int), numbers("noise", 0.0, float)
    source = numbers("source", None, int) if entry.get("source") is not None else None
    last = numbers("last_frames", None, int)[0] if entry.get("last_frames") is not None else None
    if last is not None and (last < 1 or source is None):
        raise ValueError(f"condition {entry['path']}: last_frames={last} must be at least 1, and needs source")
    path = os.path.abspath(entry["path"])
    media = MediaFile(path, picture=True) if source is None else MediaFile(path, fps=fps, last_frames=last)
    return Condition(media, latent, noise * len(latent) if len(noise) == 1 else noise, source)


def _plain(values: Any) -> Any:
    listed = list(values) if isinstance(values, Sequence) else [values]
    return listed[0] if len(listed) == 1 else listed
