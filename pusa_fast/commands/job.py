"""What `pusa-fast generate` was asked for, checked as far as possible without any weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from pusa_fast import attention, video
from pusa_fast.commands import record
from pusa_fast.device import DTYPES
from pusa_fast.media_plan import MediaPlan, given_inputs, plan_media
from pusa_fast.model.vae.tiling import TILINGS
from pusa_fast.options import GenerateOptions, declared
from pusa_fast.request import CheckedRequest, Request
from pusa_fast.sampling import task
from pusa_fast.weights.lora import resolve_experts
from pusa_fast.weights.pretrained import ModelFiles, find_model, model_geometry

# Where a dictionary says the choices of an option of a record; the command line knows them from the
# options' types.
_CHOICES: Mapping[str, Collection[str]] = {
    "tiling": TILINGS, "dtype": DTYPES, "precision": get_args(declared(GenerateOptions)["precision"].kind),
}  # fmt: skip


# Options that a request passes on as they are.
_SETTINGS = {field.name for field in fields(task.Settings)} - {"seed"}


@dataclass(frozen=True)
class Target:
    """One clip: its seed, and the files it is written to."""

    seed: int
    clip: str
    sheet: str
    record: str


@dataclass(frozen=True)
class Job:
    """Everything about a call that is known before the model is loaded. `request` has the first
    seed. Fields as in clip.json."""

    request: CheckedRequest
    model: str
    files: ModelFiles
    lora: Mapping[str, Any] | None
    fps: float
    tiling: str
    attention: str
    device: str | None
    dtype: str | None
    precision: str | None
    media: MediaPlan
    targets: tuple[Target, ...]
    expected: Mapping[str, str]  # hashes of the model's files and LoRAs in the record of --from


def prepare(options: GenerateOptions) -> Job:
    """Check the options against each other, the record of --from, the model's defaults and the
    files. No weights are read."""
    known = {} if options.from_ is None else record.read(options.from_)

    def chosen(name: str, default: Any = None) -> Any:
        """The option as given, else as recorded, else the default."""
        values = getattr(options, name), known.get(declared(GenerateOptions)[name].key), default
        value = next((value for value in values if value is not None), None)
        if value is not None and name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"--{name} {value} is unknown: choose one of {', '.join(_CHOICES[name])}")
        return value

    if not isinstance(chosen("prompt"), str):
        raise ValueError(
            'nothing says what to make: give a prompt, such as pusa-fast generate "a red circle moves right"'
        )
    model = str(chosen("model", "nano"))
    files = find_model(model)
    width, height = (known.get("width"), known.get("height")) if options.size is None else parse_size(options.size)
    seeds = [known.get("seed", 0)] if options.seed is None else parse_seeds(options.seed)
    wanted = {
        option.key: chosen(option.name) for option in declared(GenerateOptions).values() if option.key in _SETTINGS
    }
    wanted |= {"height": height, "width": width}
    settings = {key: value for key, value in wanted.items() if value is not None}
    geometry = model_geometry(files)
    for seed in seeds:
        resolved = task.settings(
            {**settings, "seed": seed}, files.defaults, geometry.multiples, geometry.temporal_factor
        )
    fps = chosen("fps", files.defaults["fps"])
    video.rate_of(fps)
    if given_inputs(options):
        media = plan_media(options, resolved.num_frames, fps, geometry.temporal_factor)
    else:
        media = MediaPlan.from_json(known, fps)
    backend = str(chosen("attention", "auto"))
    attention.resolve(backend, chosen("device"))
    lora = _checked(known.get("lora") if options.lora is None else parse_loras(options.lora), files)
    targets = tuple(_targets(str(chosen("out", "clip.mp4")), seeds, fps, options.overwrite, media))
    request = Request(
        prompt=chosen("prompt"), negative_prompt=chosen("negative", files.defaults["negative_prompt"]),
        conditions=media.conditions, tiling=chosen("tiling", "whole"), seed=seeds[0], **settings,
    )  # fmt: skip
    return Job(
        request=request.check(geometry, files.defaults),
        model=model if model == "nano" else os.path.abspath(model),
        files=files,
        lora=lora,
        fps=fps,
        tiling=chosen("tiling", "whole"),
        attention=backend,
        device=chosen("device"),
        dtype=chosen("dtype"),
        precision=chosen("precision"),
        media=media,
        targets=targets,
        expected=_expected(known, options),
    )


def _expected(known: Mapping[str, Any], options: GenerateOptions) -> dict[str, str]:
    """Hashes that the record of --from gives for files that this call reads again."""
    hashes = known.get("hashes", {})
    model = hashes.get("model", {}) if options.model is None else {}
    return {**model, **(hashes.get("lora", {}) if options.lora is None else {})}


def parse_size(text: str) -> tuple[int, int]:
    """ "832x480" -> (832, 480): width, then height."""
    found = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if found is None:
        raise ValueError(f"--size {text} is not a size: write WIDTHxHEIGHT, such as 832x480")
    return int(found[1]), int(found[2])


def parse_seeds(texts: list[str]) -> list[int]:
    """Seeds from options that may each hold several, separated by commas. Raises ValueError for one
    that is repeated or not a number."""
    items = [item.strip() for text in texts for item in text.split(",")]
    if wrong := [item for item in items if not re.fullmatch(r"\d{1,19}", item)]:
        raise ValueError(f"--seed {wrong[0]} is not a seed: give whole numbers from 0, such as --seed 1,2,3")
    seeds = [int(item) for item in items]
    if repeated := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"--seed {repeated[0]} is given twice: it would make the same clip")
    return seeds


def parse_loras(texts: list[str]) -> dict[str, Any]:
    """{path: strength} of PATH or PATH:STRENGTH each; {"high": {path: strength}, ...} of those
    behind high=, low= or both=.

    "none" is no LoRA at all. Only a number after the last colon is a strength.
    """
    if "none" in texts:
        if len(texts) > 1:
            raise ValueError(f"--lora none goes with no other --lora: got {', '.join(texts)}")
        return {}
    found: dict[str, dict[str, float]] = {}
    for typed in texts:
        expert, text = re.fullmatch(r"(?:(high|low|both)=)?(.*)", typed, re.DOTALL).groups()  # type: ignore[union-attr]
        path, _, strength = text.rpartition(":")
        if not path or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|[+-]?inf", strength):
            path, strength = text, "1"
        if not math.isfinite(float(strength)):
            raise ValueError(f"--lora {typed}: strength {strength} is not finite: write such as {path}:1.4")
        group = found.setdefault(expert or "", {})
        if os.path.abspath(path) in group:
            raise ValueError(f"--lora {path} is given twice: give it once, with the strength it is to have")
        group[os.path.abspath(path)] = float(strength)
    if "" in found and len(found) > 1:
        raise ValueError(f"--lora {', '.join(texts)}: put high=, low= or both= before each path, or before none")
    return found.get("") or found


def _checked(lora: Any, files: ModelFiles) -> Mapping[str, Any] | None:
    """`lora` as `parse_loras` gives it, or as recorded, checked against the model's networks; its
    files must exist."""
    if lora is None:
        return None
    groups = [files for files in lora.values() if isinstance(files, dict)] if isinstance(lora, dict) else [lora]
    for group in groups or [lora]:
        if not isinstance(group, dict) or not all(isinstance(strength, (int, float)) for strength in group.values()):
            raise ValueError(f"lora {lora!r} is not understood: it must map paths to strengths")
    resolve_experts(lora, files.networks)
    checked: Mapping[str, Any] = lora
    return checked


def lora_files(lora: Mapping[str, Any] | None) -> list[str]:
    """The paths in such a mapping, each once."""
    found = (v if isinstance(v, dict) else [k] for k, v in (lora or {}).items())
    return list(dict.fromkeys(path for group in found for path in group))


def _targets(out: str, seeds: list[int], fps: float, overwrite: bool, media: MediaPlan) -> Iterator[Target]:
    """Files for each seed. Raises ValueError or an OSError where one cannot be written, or must not
    be."""
    folder = "/" if out.endswith("/") or os.path.isdir(out) else ""
    stem, suffix = (out.rstrip("/"), folder) if folder else os.path.splitext(out)
    if not os.path.basename(stem):
        raise ValueError(f"--out {out!r} names no file: write such as clip.mp4")
    inputs = {os.path.realpath(path) for path in media.paths()}
    for seed in seeds:
        name = os.path.abspath(stem) + (f"-{seed}" if len(seeds) > 1 else "")
        target = Target(seed, name + suffix, name + ".png", name + ".json")
        video.check_target(target.clip, fps)
        parent = os.path.dirname(name)
        if not os.path.isdir(parent):
            raise FileNotFoundError(f"--out {out}: the folder {parent} does not exist: create it first")
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"--out {out}: the folder {parent} cannot be written to: choose another")
        for path in (target.clip, target.sheet, target.record):
            real, is_folder = os.path.realpath(path), path.endswith("/")
            if used := [given for given in inputs if given == real or (is_folder and given.startswith(real + os.sep))]:
                raise ValueError(
                    f"--out {out} would replace {used[0]}, which the clip is made from: choose another name"
                )
            if os.path.isdir(path) and not is_folder:
                raise IsADirectoryError(f"{path} is a folder where a file is to be written: choose another --out")
            empty = is_folder and os.path.isdir(path) and not os.listdir(path)
            if not overwrite and os.path.lexists(path) and not empty:
                raise FileExistsError(f"{path} exists: give --overwrite to replace it, or another --out")
        yield target
