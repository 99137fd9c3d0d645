"""The one-call API: prompt and conditions in, frames out.

Shapes: T frames, F latent frames, C latent channels, H/W pixels, h/w latent size, L context rows, D
text width.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pusa_fast import stages
from pusa_fast.config import Geometry
from pusa_fast.device import default_dtype, out_of_memory, resolve_device, usable_memory, weight_bytes
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.text import TextEncoder
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.model.vae.tiling import TILINGS, Tiling
from pusa_fast.request import CheckedRequest, Request
from pusa_fast.sampling import sampler
from pusa_fast.sampling.task import Condition
from pusa_fast.weights.pretrained import WAN_DEFAULTS, ModelFiles, find_model, load_text_encoder

if TYPE_CHECKING:
    from pusa_fast.model.experts import ExpertPair

LoRAs = Mapping[Any, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """What a request gave: `frames`, uint8 [T, H, W, 3], or `latents`, float32 [1, C, F, h, w], on
    the CPU; and its record.

    `record`: `task`, the settings, `seconds` per stage, `guidance_mode`, `tokens`, `shape` of the
    latents, `encode_tiling`, the decoder's `tiling` and its `overcompute` (multiplications in tiles
    over those of a whole clip).
    """

    frames: Tensor | None
    latents: Tensor | None
    record: dict[str, Any]


class Pipeline:
    """Text and given frames to video, on one device. Threads may share one: each run has its own
    record.

    Attributes: `dit`, `vae`, `text_encoder`; `geometry`; `defaults`, what None means in a request
    (and the model's fps); `spec`, its model.json; `files`, where it was loaded from (None: built by
    hand); `loras`, handles by path, or by (expert, path); `last_run`, the record of the run that
    began last.
    """

    def __init__(
        self,
        dit: WanDiT | ExpertPair,
        vae: WanVAE,
        text_encoder: TextEncoder | None = None,
        *,
        defaults: Mapping[str, Any] = WAN_DEFAULTS,
    ) -> None:
        """Parts by hand; without a text encoder, calls take `prompt_embeds`. Raises ValueError
        where dit and vae do not fit."""
        self.geometry = Geometry.of(dit.config, vae.config)
        self.dit, self.vae, self.text_encoder = dit, vae, text_encoder
        self.defaults: dict[str, Any] = {**WAN_DEFAULTS, **defaults}
        self.files: ModelFiles | None = None
        self.spec: Mapping[str, Any] = {}
        self.loras: dict[Path | tuple[str, Path], Any] = {}
        self.last_run: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        return torch.device(self.dit.device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        lora: LoRAs | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        attention: str = "auto",
    ) -> Pipeline:
        """Load "nano" or a model directory (layouts: `weights/pretrained.py`).

        `lora`: {path: strength}, or of two experts {"high": {path: strength}, "low": ..., "both":
        ...}; None: the model's own, {}: none. `device` None: a GPU where there is one. `dtype`
        None: bfloat16 on a GPU, float32 on the CPU. `precision`: see `load_dit`; with one, LoRAs
        are merged for good first. The VAE runs in `dtype` on a GPU, in float32 on the CPU. Raises
        ValueError for a path that is not a model and for names that are unknown, before any weights
        are read.
        """
        from pusa_fast.attention import resolve
        from pusa_fast.model.fp8 import check_precision, quantize
        from pusa_fast.weights import apply_lora, load_dit, load_vae
        from pusa_fast.weights.lora import resolve_experts

        files = find_model(model)
        wanted = resolve_experts(files.loras if lora is None else lora, files.networks)
        where = resolve_device(device)
        kind = check_precision(precision, where, dtype) or default_dtype(where)
        resolve(attention, where, kind)

        dit = load_dit(files.dit, device=where, dtype=kind)
        for network in dit.networks.values():
            network.attention_backend = attention
        vae = load_vae(files.vae, device=where, dtype=kind if where.type == "cuda" else torch.float32)
        pipe = cls(dit.eval(), vae.eval(), load_text_encoder(files, where, kind), defaults=files.defaults)
        pipe.files, pipe.spec = files, files.spec
        for experts, path, strength in wanted:
            handle = apply_lora(dit, path, strength=strength, experts=experts, keep_base=precision is None)
            pipe.loras[path if experts is None else (experts, path)] = handle
        if precision is not None:
            quantize(dit)
        return pipe

    def __call__(
        self,
        prompt: str | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt: str | None = None,
        negative_prompt_embeds: Tensor | None = None,
        conditions: Sequence[Condition] = (),
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        seed: int = 0,
        compat: str = "reference",
        fit: str = "crop",
        tiling: Tiling | str | None = None,
        output: str = "frames",
        callback: sampler.Callback | None = None,
    ) -> Tensor:
        """Make one clip: uint8 [T,H,W,3], or with output="latents" float32 [1,C,F,h,w], on the CPU.

        The arguments are those of `Request`; `callback` and what is raised are those of `run`.
        """
        request = Request(
            prompt=prompt, prompt_embeds=prompt_embeds, negative_prompt=negative_prompt,
            negative_prompt_embeds=negative_prompt_embeds, conditions=conditions, num_frames=num_frames, height=height,
            width=width, steps=steps, guidance_scale=guidance_scale, shift=shift, seed=seed, compat=compat, fit=fit,
            tiling=tiling, output=output,
        )  # fmt: skip
        run = self.run(request, callback)
        made = run.latents if run.frames is None else run.frames
        assert made is not None
        return made

    def run(self, request: Request | CheckedRequest, callback: sampler.Callback | None = None) -> Run:
        """Make the clip of a request, which is checked first, or was checked for this model's
        geometry and defaults.

        `callback(done, steps, latents)` runs after each step; what it raises ends the run and
        reaches the caller. Raises ValueError for anything that cannot work, before the first model
        runs; FileNotFoundError for missing media; OutOfMemory (a torch.OutOfMemoryError) naming the
        option that helps.
        """
        checked = request.check(self.geometry, self.defaults) if isinstance(request, Request) else request
        self._check_texts(checked)
        encode_tiling, decode_tiling = self._tilings(checked)
        overcompute = self.vae.runner("decode").overcompute(checked.latent_shape[-2:], decode_tiling)
        tokens = math.prod(checked.latent_shape[-3:]) // math.prod(self.geometry.patch)
        record: dict[str, Any] = {
            "task": checked.plan.task, **asdict(checked.settings), "encode_tiling": encode_tiling,
            "tiling": decode_tiling, "overcompute": round(overcompute, 3), "tokens": tokens,
            "shape": list(checked.latent_shape), "seconds": {},
        }  # fmt: skip
        self.last_run = record
        with self._stage("text", record):
            context = stages.encode_text(self.text_encoder, checked.context, self.device)
            negative = checked.negative
            if negative is not None:
                negative = stages.encode_text(self.text_encoder, negative, self.device)
        with self._stage("encode", record):
            clean = stages.encode_media(self.vae, checked, encode_tiling)
        with self._stage("denoise", record):
            mode = sampler.guidance_mode(checked.settings.guidance_scale, tokens, context, negative)
            record["guidance_mode"] = mode
            latents = stages.denoise(self.dit, checked, clean, context, negative, mode, callback)
        if checked.settings.output == "latents":
            return Run(None, latents.cpu(), record)
        with self._stage("decode", record):
            return Run(stages.decode(self.vae, checked, latents, decode_tiling), None, record)

    def _check_texts(self, checked: CheckedRequest) -> None:
        """Raises ValueError where there is text and nothing to encode it, or a request checked for
        another model."""
        if replace(checked.geometry, text_len=0) != replace(self.geometry, text_len=0):
            raise ValueError(
                f"this request was checked for {checked.geometry}, the model has {self.geometry}: check it again"
            )
        if self.text_encoder is not None:
            return
        if isinstance(checked.context, str):
            raise ValueError("this pipeline has no text encoder for prompt: give prompt_embeds")
        if isinstance(checked.negative, str):
            if checked.request.negative_prompt is not None:
                raise ValueError("this pipeline has no text encoder for negative_prompt: give negative_prompt_embeds")
            raise ValueError(
                "guidance needs negative_prompt_embeds, as there is no text encoder: give them, or guidance_scale=1"
            )

    def _tilings(self, checked: CheckedRequest) -> tuple[Tiling | None, Tiling | None]:
        """The encoder's and the decoder's tiles, None: whole, or not run. "auto" counts the weights
        of all parts."""
        tiling = checked.request.tiling
        if isinstance(tiling, str) and tiling in TILINGS:
            tiling = TILINGS[tiling]
        if tiling is not None and not isinstance(tiling, Tiling):
            raise ValueError(
                f"tiling={tiling!r} is not available: use None (whole), {', '.join(map(repr, TILINGS))}, or Tiling(...)"
            )
        if tiling is not None and tiling.mode == "auto" and tiling.memory is None:
            weights = weight_bytes(self.vae.device, self.dit, self.vae, getattr(self.text_encoder, "model", None))
            tiling = Tiling.auto(max(1, usable_memory(self.vae.device) - weights))
        encode_tiling = decode_tiling = None
        if checked.plan.frames_needed:
            longest = max(checked.plan.frames_needed)
            video = (1, 3, longest, checked.settings.height, checked.settings.width)
            encode_tiling = self.vae.resolve("encode", video, tiling)
        if checked.settings.output != "latents":
            decode_tiling = self.vae.resolve("decode", checked.latent_shape, tiling, frames=True)
        return encode_tiling, decode_tiling

    @contextmanager
    def _stage(self, name: str, record: dict[str, Any]) -> Iterator[None]:
        """Record how long a stage takes; out of memory names the option that helps."""
        start = time.perf_counter()
        with out_of_memory(name, self.device):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        record["seconds"][name] = time.perf_counter() - start
