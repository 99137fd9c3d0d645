"""What `pusa-fast generate` was asked for, checked as far as it can be without reading any weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pusa_fast import attention, video
from pusa_fast.commands import record
from pusa_fast.commands.plan import Inputs, MediaPlan, plan_media
from pusa_fast.config import VAEConfig
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.sampling import task
from pusa_fast.weights.pretrained import ModelFiles, find_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("fp8",)
TILINGS: Mapping[str, Tiling | str | None] = {
    "whole": None,
    "auto": "auto",
    "exact": Tiling(mode="exact"),
    "feather": Tiling(),
}


@dataclass(frozen=True)
class Options:
    """The options that give no frames, as typed; None where not given."""

    prompt: str | None = None
    model: str | None = None
    lora: list[str] | None = None
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    seed: list[str] | None = None
    frames: int | None = None
    size: str | None = None
    fps: float | None = None
    negative: str | None = None
    compat: str | None = None
    device: str | None = None
    dtype: str | None = None
    precision: str | None = None
    attention: str | None = None
    fit: str | None = None
    tiling: str | None = None
    out: str | None = None
    overwrite: bool = False
    from_: str | None = None


@dataclass(frozen=True)
class Target:
    """One clip: its seed, and the files it is written to."""

    seed: int
    clip: str
    sheet: str
    record: str


@dataclass(frozen=True)
class Job:
    """Everything about a call that is known before the model is loaded. Fields as in clip.json."""

    prompt: str
    negative_prompt: str
    model: str
    files: ModelFiles
    lora: Mapping[str, float] | None
    settings: task.Settings
    fps: float
    tiling: str
    attention: str
    device: str | None
    dtype: str | None
    precision: str | None
    media: MediaPlan
    resolved: task.Plan
    targets: tuple[Target, ...]
    expected: Mapping[str, str]  # hashes of the model's files and LoRAs in the record of --from


def prepare(options: Options, inputs: Inputs) -> Job:
    """Check the options against each other, the record of --from, the model's defaults and the files. No weights are read."""
    known = {} if options.from_ is None else record.read(options.from_)
    prompt = _first(options.prompt, known.get("prompt"))
    if not isinstance(prompt, str):
        raise ValueError(
            'nothing says what to make: give a prompt, such as pusa-fast generate "a red circle moves right"'
        )
    model = str(_first(options.model, known.get("model"), "nano"))
    files = find_model(model)
    width, height = (None, None) if options.size is None else parse_size(options.size)
    seeds = [known.get("seed", 0)] if options.seed is None else parse_seeds(options.seed)
    given = {
        "num_frames": options.frames, "height": height, "width": width, "steps": options.steps, "guidance_scale": options.guidance,
        "shift": options.shift, "compat": options.compat, "fit": options.fit,
    }  # fmt: skip
    asked = {name: _first(value, known.get(name)) for name, value in given.items()}
    multiple = (
        2 * VAEConfig().spatial_factor
    )  # of the VAE and the transformer's patches; the loaded model is asked again
    with as_typed():
        settings, *_ = (task.settings({**asked, "seed": seed}, files.defaults, (multiple, multiple)) for seed in seeds)
    fps = _first(options.fps, known.get("fps"), files.defaults["fps"])
    with as_typed():
        video.rate_of(fps)
    media = MediaPlan.from_json(known) if not inputs.given() else plan_media(inputs, settings.num_frames)
    with as_typed():
        resolved = media.resolve(settings.num_frames)
    backend = str(_first(options.attention, known.get("attention"), "auto"))
    attention.resolve(backend, _first(options.device, known.get("device")))
    lora = known.get("lora") if options.lora is None else parse_loras(options.lora)
    out = str(_first(options.out, known.get("out"), "clip.mp4"))
    return Job(
        prompt=prompt,
        negative_prompt=str(_first(options.negative, known.get("negative_prompt"), files.defaults["negative_prompt"])),
        model=model if model == "nano" else os.path.abspath(model),
        files=files,
        lora=_existing(lora),
        settings=settings,
        fps=fps,
        tiling=_choice("tiling", _first(options.tiling, known.get("tiling"), "whole"), TILINGS),
        attention=backend,
        device=_first(options.device, known.get("device")),
        dtype=_choice("dtype", _first(options.dtype, known.get("dtype")), DTYPES),
        precision=_choice("precision", _first(options.precision, known.get("precision")), PRECISIONS),
        media=media,
        resolved=resolved,
        targets=tuple(_targets(out, seeds, fps, options.overwrite, media)),
        expected=_expected(known, options),
    )


# What the library says -> what was typed.
_TYPED = {
    r"conditions\[\d+\] \((.+?)\)(?=: | and conditions\[| both )": r"\1",
    r"\bnum_frames\b": "--frames",
    r"\bguidance_scale\b": "--guidance",
    r"^(steps|shift|seed|fps)\b": r"--\1",
    r"^(width|height)\b": r"--size: \1",
}


@contextmanager
def as_typed() -> Iterator[None]:
    """Errors of the library in the words of the command line."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for pattern, typed in _TYPED.items():
            message = re.sub(pattern, typed, message)
        raise ValueError(message) from None


def _expected(known: Mapping[str, Any], options: Options) -> dict[str, str]:
    """Hashes that the record of --from gives for files that this call reads again."""
    hashes = known.get("hashes", {})
    model = hashes.get("model", {}) if options.model is None else {}
    return {**model, **(hashes.get("lora", {}) if options.lora is None else {})}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _choice(name: str, value: Any, table: Collection[str]) -> Any:
    if value is not None and value not in table:
        raise ValueError(f"--{name} {value} is unknown: choose one of {', '.join(table)}")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """ "832x480" -> (832, 480): width, then height."""
    found = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if found is None:
        raise ValueError(f"--size {text} is no size: write WIDTHxHEIGHT, such as 832x480")
    return int(found[1]), int(found[2])


def parse_seeds(texts: list[str]) -> list[int]:
    """Seeds from options that may each hold several, separated by commas. Raises ValueError for one that is repeated or no number."""
    items = [item.strip() for text in texts for item in text.split(",")]
    if wrong := [item for item in items if not re.fullmatch(r"\d{1,19}", item)]:
        raise ValueError(f"--seed {wrong[0]} is no seed: give whole numbers from 0, such as --seed 1,2,3")
    seeds = [int(item) for item in items]
    if repeated := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"--seed {repeated[0]} is given twice: it would make the same clip")
    return seeds


def parse_loras(texts: list[str]) -> dict[str, float]:
    """PATH or PATH:STRENGTH each, "none" for no LoRA at all; only a number after the last colon is a strength."""
    if "none" in texts:
        if len(texts) > 1:
            raise ValueError(f"--lora none goes with no other --lora: got {', '.join(texts)}")
        return {}
    found: dict[str, float] = {}
    for text in texts:
        path, _, strength = text.rpartition(":")
        if not path or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|[+-]?inf", strength):
            path, strength = text, "1"
        if not math.isfinite(float(strength)):
            raise ValueError(f"--lora {text}: strength {strength} is not finite: write such as {path}:1.4")
        if os.path.abspath(path) in found:
            raise ValueError(f"--lora {path} is given twice: give it once, with the strength it is to have")
        found[os.path.abspath(path)] = float(strength)
    return found


def _existing(lora: Any) -> Mapping[str, float] | None:
    if lora is not None and not (isinstance(lora, dict) and all(isinstance(s, (int, float)) for s in lora.values())):
        raise ValueError(f"lora {lora!r} is not understood: it must map paths to strengths")
    for path in lora or ():
        if not os.path.isfile(path):
            raise FileNotFoundError(f"LoRA {path} does not exist: give a .safetensors or .pt file, or --lora none")
    return lora


def _targets(out: str, seeds: list[int], fps: float, overwrite: bool, media: MediaPlan) -> Iterator[Target]:
    """Files for each seed. Raises ValueError or an OSError where one cannot be written, or must not be."""
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
