"""Model directories: where the parts are, and the defaults of each model. Reads no weights.

Three layouts: nano's own (`model.json`), diffusers (`model_index.json`) and official Wan
(`Wan2.1_VAE.pth`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pusa_fast.config import Geometry

if TYPE_CHECKING:
    import torch

    from pusa_fast.model.text import TextEncoder

# Defaults of published Wan models: sizes of the 480p models, the rest those of the reference's
# command line (spec 2.4, 3.1).
WAN_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_frames": 81,
        "height": 480,
        "width": 832,
        "fps": 16,
        "steps": 30,
        "guidance_scale": 3.0,
        "shift": 5.0,
        "negative_prompt": "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, "
        "images, static, overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra "
        "fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still "
        "picture, messy background, three legs, many people in the background, walking backwards",
    }
)


@dataclass(frozen=True)
class ModelFiles:
    """The parts of a model. `text_encoder`: a transformers directory, or one file of weights.

    `loras`: path to strength. `defaults` has every key of WAN_DEFAULTS. `spec`: the whole
    model.json, empty for other layouts.
    """

    name: str
    dit: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    text_len: int = 512
    loras: Mapping[Path, float] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=lambda: WAN_DEFAULTS)
    spec: Mapping[str, Any] = field(default_factory=dict)
    networks: tuple[str, ...] = ("dit",)  # of the denoiser; two experts have two


def find_model(model: str | os.PathLike[str]) -> ModelFiles:
    """Files and defaults of "nano" (shipped with the package) or of a directory.

    Raises ValueError for a directory that is not a model, saying what was looked for, and for a
    part that is missing.
    """
    embedded = model == "nano"
    folder = Path(str(resources.files("pusa_fast") / "assets" / "nano")) if embedded else Path(model)
    for marker, read in _LAYOUTS.items():
        if (folder / marker).is_file():
            return _complete(read(folder), folder)
    what = "a directory" if folder.is_dir() else "a file" if folder.exists() else "missing"
    hint = "; each expert of Wan2.2 is a transformer: load both and use ExpertPair"
    hint = hint if (folder / "high_noise_model").is_dir() else ""
    raise ValueError(f'{folder} ({what}) is not a model: looked in it for {", ".join(_LAYOUTS)}; or give "nano"{hint}')


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): restore the file") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}: restore the file")
    return value


def _nano(folder: Path) -> ModelFiles:
    path = folder / "model.json"
    spec = _read_json(path)
    try:
        text, given = spec["text"], spec["defaults"]
        unknown = sorted(set(given) - set(WAN_DEFAULTS))
        if unknown:
            raise ValueError(f"{path}: unknown defaults {', '.join(unknown)}: use {', '.join(WAN_DEFAULTS)}")
        return ModelFiles(
            name=spec["name"],
            dit=folder / spec["dit"],
            vae=folder / spec["vae"],
            text_encoder=folder / text["encoder"],
            tokenizer=folder / text["tokenizer"],
            text_len=text["text_len"],
            loras={folder / name: float(strength) for name, strength in spec.get("lora", {}).items()},
            defaults=MappingProxyType({**WAN_DEFAULTS, **given}),
            spec=spec,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks or misshapes an entry ({error}): restore the file") from None


def _diffusers(folder: Path) -> ModelFiles:
    index = _read_json(folder / "model_index.json")
    if not str(index.get("_class_name", "")).startswith("Wan"):
        raise ValueError(f"{folder / 'model_index.json'} is of a {index.get('_class_name')}, not of a Wan pipeline")
    second = index.get("transformer_2")
    if second and second[0]:
        mend = "load_dit its transformer and transformer_2, and build Pipeline(dit=ExpertPair(high, low), ...)"
        raise ValueError(f"{folder} holds two experts: {mend}")
    dit, vae, text_encoder, tokenizer = (folder / n for n in ("transformer", "vae", "text_encoder", "tokenizer"))
    return ModelFiles(folder.resolve().name, dit, vae, text_encoder, tokenizer)


def _official(folder: Path) -> ModelFiles:
    def first(*names: str) -> Path:
        """The first of these that exists, or the last."""
        return next((folder / name for name in names if (folder / name).exists()), folder / names[-1])

    encoder = first("models_t5_umt5-xxl-enc-bf16.safetensors", "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = first("google/umt5-xxl", "umt5-xxl", "google/umt5-xxl")
    return ModelFiles(folder.resolve().name, folder, first(*_OFFICIAL_VAES), encoder, tokenizer)


_OFFICIAL_VAES = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")
_LAYOUTS: Mapping[str, Callable[[Path], ModelFiles]] = MappingProxyType(
    {"model.json": _nano, "model_index.json": _diffusers, **dict.fromkeys(_OFFICIAL_VAES, _official)}
)


def _complete(files: ModelFiles, folder: Path) -> ModelFiles:
    for part in (files.dit, files.vae, files.text_encoder, files.tokenizer, *files.loras):
        if not part.exists():
            lacking = f"{part.relative_to(folder)} is missing"
            raise ValueError(f"{folder} is incomplete: {lacking}; download it, or build Pipeline from parts")
    return files


def model_geometry(files: ModelFiles) -> Geometry:
    """Factors, patch and channels of a model, from its files' headers. No weights are read.

    Raises what `load_dit` and `load_vae` raise for a file that they cannot load or whose
    configuration is unknown, and ValueError for a transformer and a VAE that do not fit.
    """
    from pusa_fast.weights import checkpoint

    dit, vae = checkpoint.read_config(checkpoint.DIT, files.dit), checkpoint.read_config(checkpoint.VAE, files.vae)
    return Geometry.of(dit, vae, files.text_len)


def load_text_encoder(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text encoder, from a transformers directory or a file. Raises as `TextEncoder`."""
    from pusa_fast.model.text import TextEncoder
    from pusa_fast.weights import load_text_encoder_state

    if files.text_encoder.is_dir():
        return TextEncoder.from_directory(files.text_encoder, files.tokenizer, device, dtype, files.text_len)
    state = load_text_encoder_state(files.text_encoder)
    return TextEncoder.from_state(state, files.tokenizer, device, dtype, files.text_len)
