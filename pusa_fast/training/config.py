"""The settings of a training run: YAML or keyword arguments in, checked values out.

They are saved with the run. Defaults are Pusa's published recipe (spec section 5.3): rank 512 on q,
k, v, o and the feed-forward, AdamW at 1e-5, a level for every frame, 900 steps of 8 clips.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pusa_fast.device import default_dtype
from pusa_fast.model.linear import LORA_INITS, LORA_TARGETS
from pusa_fast.training.fafm import WEIGHTINGS
from pusa_fast.training.ptss import LEVELS, TimestepSampling
from pusa_fast.weights.pretrained import ModelFiles, find_model

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
AboveZero = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Data(_Part):
    """`path`: a folder of `pusa-fast prepare`. Its last `validation_clips` are never trained on.

    `same_encoders` False: do not require that the clips were made by exactly the model's VAE and
    text encoder files (for the same weights in another layout).
    """

    path: Path
    caption_dropout: Share = 0.0
    validation_clips: Count = 0
    same_encoders: bool = True


class LoRA(_Part):
    """`alpha` None: the rank (scale 1). `start`: a LoRA of this rank and targets to start from."""

    rank: Positive = 512
    alpha: AboveZero | None = None
    targets: tuple[str, ...] = LORA_TARGETS
    init: Literal[tuple(LORA_INITS)] = "kaiming"  # type: ignore[valid-type]
    start: Path | None = None


class Objective(_Part):
    """Noise levels (paper section 3.2, `training.ptss`) and the loss's weighting (see `fafm`)."""

    p_async: Probability = 1.0
    first_frame_clean: bool = False
    levels: Literal[LEVELS] = "reference"  # type: ignore[valid-type]
    shift: AboveZero | None = None  # None: the model's own
    weighting: Literal[tuple(WEIGHTINGS)] = "reference"  # type: ignore[valid-type]


class Optim(_Part):
    """The rate rises to `lr` in `warmup_steps`, then stays, or falls to `final_lr` x lr (cosine).

    `muon`: see `training.optim`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: AboveZero = 1e-5
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: AboveZero = 1e-8
    weight_decay: NotNegative = 0.01
    muon_lr: AboveZero | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Count = 0
    final_lr: Probability = 0.0
    clip_norm: AboveZero | None = None
    ema_decay: Share | None = None


class Memory(_Part):
    """What a block keeps for its backward pass.

    "attention": its input and the results of attention; "block": its input only, so that attention
    runs twice; "none": everything. `offload`: inputs wait in host memory.
    """

    checkpointing: Literal["none", "block", "attention"] = "attention"
    offload: bool = False


class Checkpoints(_Part):
    """Every `every` steps (0: at the end only). The last `keep` and the best by validation stay."""

    every: Count = 100
    keep: Positive = 3


class Sample(_Part):
    """A clip to make at validation: a prompt, and a picture to start from."""

    prompt: str
    image: Path | None = None
    seed: Count = 0


class Validation(_Part):
    """Loss on held-out clips at fixed levels and noise, and `samples` as clips and a contact sheet.

    Every `every` steps (0: never; None: with the checkpoints, at least the last one, if there is
    anything to do). Sizes None: those of the largest training clip.
    """

    every: Count | None = None
    samples: tuple[Sample, ...] = ()
    width: Positive | None = None
    height: Positive | None = None
    num_frames: Positive | None = None
    steps: Positive | None = None
    guidance_scale: NotNegative | None = None


class Logging(_Part):
    """metrics.jsonl has every step, the terminal one in `every`. `wandb`: a project's name."""

    every: Positive = 10
    tensorboard: bool = False
    wandb: str | None = None


class TrainConfig(_Part):
    """One run. `out`: its folder; `steps`: optimiser steps; `batch_size`: clips per step in total.

    `accumulate`: how many parts of a batch go through the model one after the other; None: as few
    as keep a part to 40,000 tokens, so one clip at 480p. `model`: "nano" or a model's folder;
    `dit`: a transformer in place of that folder's, such as one of Wan2.2's experts. `lora` None:
    full fine-tuning, with float32 masters. `dtype`: of the frozen base, or of the matmuls in full
    fine-tuning (None: bfloat16 on a GPU, float32 on the CPU).
    """

    data: Data
    out: Path
    model: str = "nano"
    dit: Path | None = None
    steps: Positive = 900
    batch_size: Positive = 8
    accumulate: Positive | None = None
    seed: Count = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    attention: str = "auto"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    lora: LoRA | None = LoRA()
    objective: Objective = Objective()
    optim: Optim = Optim()
    memory: Memory = Memory()
    checkpoints: Checkpoints = Checkpoints()
    validation: Validation = Validation()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.accumulate is not None and self.batch_size % self.accumulate:
            sizes = f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            raise ValueError(f"{sizes}: change one of them")
        if self.optim.schedule == "cosine" and self.optim.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.optim.warmup_steps} leaves nothing of {self.steps} steps: lower it")
        if self.optim.name == "muon" and self.lora is not None:
            raise ValueError("optim.name muon is for full fine-tuning: use adamw with a LoRA, or lora: null")
        if self.memory.offload and self.memory.checkpointing == "none":
            raise ValueError("memory.offload moves what checkpoints keep: set checkpointing to attention or block")
        return self

    def files(self) -> ModelFiles:
        """The model's files, with `dit` in place of its transformer. Raises as `find_model`."""
        files = find_model(self.model)
        return files if self.dit is None else replace(files, dit=self.dit)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """`dtype`, or the default of the device."""
        found: torch.dtype = default_dtype(device) if self.dtype is None else getattr(torch, self.dtype)
        return found

    @property
    def validate_every(self) -> int:
        """Steps from one validation to the next; 0: none."""
        if self.validation.every is not None:
            return self.validation.every
        return (self.checkpoints.every or self.steps) if self.validation.samples or self.data.validation_clips else 0

    def sampling(self, shift: float) -> TimestepSampling:
        """How levels are drawn; `shift` is used where the objective has none."""
        chosen = self.objective
        return TimestepSampling(chosen.p_async, chosen.first_frame_clean, chosen.levels, chosen.shift or shift)

    def identity(self) -> dict[str, Any]:
        """Settings that must be the same for all steps of a run: what a checkpoint depends on.

        Paths are left out: the trainer adds hashes of the files, and the dtype that was used.
        """
        free: dict[str, Any] = {**dict.fromkeys(_FREE, True), "data": {"path", "same_encoders"}}
        if self.lora is not None:
            free["lora"] = {"start"}
        if self.optim.schedule == "constant":
            free["steps"] = True
        return self.model_dump(mode="json", exclude=free)


_FREE = (
    "out", "model", "dit", "device", "dtype", "attention", "parallel", "memory", "checkpoints", "validation", "logging",
    "accumulate",
)  # fmt: skip


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A YAML file, then `a.b=value` overrides (values in YAML); the last one wins.

    Paths are relative to the current folder. Raises FileNotFoundError, or ValueError that names
    every wrong setting.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _mapping(Path(path).read_bytes(), str(path))
    for override in overrides:
        _set(values, override)
    return parse_config(values, "the settings" if path is None else str(path))


def parse_config(values: Mapping[str, Any], label: str = "the settings") -> TrainConfig:
    """`TrainConfig` from plain values. Raises ValueError that names every wrong setting."""
    try:
        return TrainConfig.model_validate({str(name): value for name, value in values.items()})
    except ValidationError as error:
        wrong = [
            f"{'.'.join(str(part) for part in e['loc']) or 'settings'}: {e['msg'].removeprefix('Value error, ')}"
            + (f" (got {e['input']!r})" if e["type"] != "missing" and e["loc"] else "")
            for e in error.errors()
        ]
        raise ValueError(f"{label}: {'; '.join(wrong)}") from None


def dump_config(config: TrainConfig) -> str:
    """YAML that `load_config` reads back."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


class _AsTyped(yaml.SafeLoader):  # type: ignore[misc]
    """YAML whose plain words stay text, except null: 007 and 2026-11-27 are names of folders too.

    pydantic knows which are numbers.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, Any]]]] = {
        first: [(tag, pattern) for tag, pattern in entries if tag.endswith((":null", ":merge"))]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(text: bytes, label: str) -> dict[str, Any]:
    try:
        found = yaml.load(text, Loader=_AsTyped) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{label} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{label} holds a {type(found).__name__}: it must map settings to values")
    return found


def _set(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"--set {override} is not a setting: write it as optim.lr=1e-5")
    *parents, last = name.split(".")
    for parent in parents:
        inner = values.get(parent)
        values[parent] = dict(inner) if isinstance(inner, dict) else {}
        values = values[parent]
    try:
        values[last] = yaml.load(text, Loader=_AsTyped)
    except yaml.YAMLError:
        values[last] = text
