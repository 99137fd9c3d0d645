"""The one-call API: prompt and conditions in, frames out.

Shapes: T frames, F latent frames, C latent channels, H/W pixels, h/w latent size, L context rows, D text width.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa_fast.device import default_dtype, out_of_memory, resolve_device, usable_memory, weight_bytes
from pusa_fast.media import Medium, open_media
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.text import TextEncoder
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.model.vae.modes import join
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.sampling import conditioning, sampler, task
from pusa_fast.sampling.schedule import lift, sigma_grid
from pusa_fast.sampling.task import Condition, Plan, Settings
from pusa_fast.weights.pretrained import WAN_DEFAULTS, ModelFiles, find_model, load_text_encoder

LoRAs = Mapping[str | os.PathLike[str], float]


@dataclass(frozen=True, eq=False)
class _Request:
    """A call that has passed every check that needs no model to run."""

    settings: Settings
    plan: Plan
    media: tuple[Medium, ...]
    encode_tiling: Tiling | None
    decode_tiling: Tiling | None
    context: str | Tensor
    negative: str | Tensor | None  # None: no guidance


class Pipeline:
    """Text and given frames to video, on one device.

    Attributes: `dit`, `vae`, `text_encoder`; `defaults`, what None stands for in a call (and the model's fps); `spec`, its model.json;
    `files`, where it was loaded from (None: built by hand); `loras`, handles by path; `last_run`, what the last call did:
    `seconds` per stage, `task`, `guidance_mode`, `tokens`, the settings, `encode_tiling`, the decoder's `tiling` and its `overcompute`
    (multiplications in tiles over those of a whole clip).
    """

    def __init__(
        self,
        dit: WanDiT | sampler.ExpertPair,
        vae: WanVAE,
        text_encoder: TextEncoder | None = None,
        *,
        defaults: Mapping[str, Any] = WAN_DEFAULTS,
    ) -> None:
        """Parts by hand; without a text encoder, calls take `prompt_embeds`. Raises ValueError where dit and vae do not fit."""
        channels = (dit.config.in_channels, dit.config.out_channels, vae.config.z_dim)
        if len(set(channels)) > 1:
            raise ValueError(
                f"the transformer maps {channels[0]} to {channels[1]} channels, the VAE's latents have {channels[2]}: all three must agree"
            )
        self.dit, self.vae, self.text_encoder = dit, vae, text_encoder
        self.defaults: dict[str, Any] = {**WAN_DEFAULTS, **defaults}
        self.files: ModelFiles | None = None
        self.spec: Mapping[str, Any] = {}
        self.loras: dict[Path, Any] = {}
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

        `lora`: {path: strength}; None: the model's own, {}: none. `device` None: a GPU where there is one. `dtype` None: bfloat16
        on a GPU, float32 on the CPU. `precision`: see `load_dit`; with one, LoRAs are merged for good first. The VAE runs in `dtype` on a GPU, in float32 on the CPU.
        Raises ValueError for a path that is no model and for names that are unknown, before any weights are read.
        """
        from pusa_fast.attention import resolve
        from pusa_fast.model.fp8 import check_precision, quantize
        from pusa_fast.weights import apply_lora, load_dit, load_vae

        files = find_model(model)
        wanted = files.loras if lora is None else {Path(path): strength for path, strength in lora.items()}
        for path, strength in wanted.items():
            if not path.exists():
                raise ValueError(f"LoRA {path} does not exist: give the path of a .safetensors or .pt file")
            if not math.isfinite(strength):
                raise ValueError(f"LoRA {path}: strength must be a number, got {strength!r}")
        where = resolve_device(device)
        kind = check_precision(precision, where, dtype) or default_dtype(where)
        resolve(attention, where, kind)

        dit = load_dit(files.dit, device=where, dtype=kind)
        dit.attention_backend = attention
        vae = load_vae(files.vae, device=where, dtype=kind if where.type == "cuda" else torch.float32)
        pipe = cls(dit.eval(), vae.eval(), load_text_encoder(files, where, kind), defaults=files.defaults)
        pipe.files, pipe.spec = files, files.spec
        pipe.loras = {
            path: apply_lora(dit, path, strength=strength, keep_base=precision is None)
            for path, strength in wanted.items()
        }
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

        Give `prompt`, or `prompt_embeds` [L,D] or [1,L,D], used as they are. None: the model's default. Negatives are ignored when
        `guidance_scale` is 1. `fit` (crop, pad, stretch): for media of another size. `tiling` of the VAE: None (whole),
        a Tiling, or "auto", whole where the device's total memory allows it.
        `callback(done, steps, latents)` runs after each step; what it raises ends the run and reaches the caller.
        Raises ValueError for anything that cannot work, before the first model runs; FileNotFoundError for missing media;
        torch.OutOfMemoryError naming the option that helps.
        """
        given = {
            "num_frames": num_frames, "height": height, "width": width, "steps": steps, "guidance_scale": guidance_scale,
            "shift": shift, "seed": seed, "compat": compat, "fit": fit, "output": output,
        }  # fmt: skip
        request = self._check(
            given, conditions, tiling, (prompt, prompt_embeds), (negative_prompt, negative_prompt_embeds)
        )
        chosen = request.settings
        size = (chosen.height // self.vae.config.spatial_factor, chosen.width // self.vae.config.spatial_factor)
        tiles = {"encode_tiling": request.encode_tiling, "tiling": request.decode_tiling}
        overcompute = round(self.vae.runner("decode").overcompute(size, request.decode_tiling), 3)
        self.last_run = {
            "task": request.plan.task,
            **asdict(chosen),
            **tiles,
            "overcompute": overcompute,
            "seconds": {},
        }
        with self._stage("text"):
            context = self._context(request.context)
            negative = None if request.negative is None else self._context(request.negative)
        with self._stage("encode"):
            latents, schedule = self._start(request)
        with self._stage("denoise"):
            tokens = latents[0, 0].numel() // math.prod(self.dit.config.patch_size)
            mode = sampler.guidance_mode(chosen.guidance_scale, tokens, context, negative)
            self.last_run |= {"guidance_mode": mode, "tokens": tokens, "shape": list(latents.shape)}
            latents = sampler.sample(
                self.dit, latents, schedule, context, negative, chosen.guidance_scale, mode=mode, callback=callback
            )
        if chosen.output == "latents":
            return latents.cpu()
        with self._stage("decode"):
            pieces = self.vae.decode_frames(latents, request.decode_tiling, rounded=chosen.compat == "exact")
            return join((piece[0].cpu() for piece in pieces), chosen.num_frames)

    def _check(
        self,
        given: Mapping[str, Any],
        conditions: Sequence[Condition],
        tiling: Tiling | str | None,
        positive: tuple[str | None, Tensor | None],
        negative: tuple[str | None, Tensor | None],
    ) -> _Request:
        factor, scale, (_, ph, pw) = (
            self.vae.config.temporal_factor,
            self.vae.config.spatial_factor,
            self.dit.config.patch_size,
        )
        settings = task.settings(given, self.defaults, (scale * ph, scale * pw), factor)
        tiles = self._tiling(tiling)
        context = self._check_text("prompt", *positive)
        if context is None:
            raise ValueError("nothing says what to make: give prompt (it may be empty) or prompt_embeds")
        opposite = None
        if settings.guidance_scale != 1:
            opposite = self._check_text("negative_prompt", *negative)
            if opposite is None and self.text_encoder is None:
                raise ValueError(
                    "guidance needs negative_prompt_embeds, as there is no text encoder: give them, or guidance_scale=1"
                )
            opposite = self.defaults["negative_prompt"] if opposite is None else opposite
        opened: list[Medium] = []

        def count_frames(media: object) -> int | None:
            opened.append(open_media(media))
            return opened[-1].frames

        plan = task.resolve(conditions, settings.num_frames, count_frames, factor)
        height, width = settings.height, settings.width
        encode_tiles = decode_tiles = None
        if plan.frames_needed:
            encode_tiles = self.vae.resolve("encode", (1, 3, max(plan.frames_needed), height, width), tiles)
        if settings.output != "latents":
            latents = (1, self.vae.config.z_dim, plan.latent_frames, height // scale, width // scale)
            decode_tiles = self.vae.resolve("decode", latents, tiles, frames=True)
        return _Request(settings, plan, tuple(opened), encode_tiles, decode_tiles, context, opposite)

    def _tiling(self, tiling: Tiling | str | None) -> Tiling | None:
        """ "auto" with the memory that the weights of all parts on the VAE's device leave."""
        if isinstance(tiling, str) and tiling == "auto":
            tiling = Tiling.auto()
        if tiling is not None and not isinstance(tiling, Tiling):
            raise ValueError(f"tiling={tiling!r} is not available: use None (whole), 'auto', or Tiling(...)")
        if tiling is None or tiling.mode != "auto" or tiling.memory is not None:
            return tiling
        dits = (self.dit.high, self.dit.low) if isinstance(self.dit, sampler.ExpertPair) else (self.dit,)
        parts = [
            m for m in (*dits, self.vae, getattr(self.text_encoder, "model", None)) if isinstance(m, torch.nn.Module)
        ]
        return Tiling.auto(max(1, usable_memory(self.vae.device) - weight_bytes(self.vae.device, *parts)))

    def _check_text(self, name: str, text: str | None, embeds: Tensor | None) -> str | Tensor | None:
        if embeds is None:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{name} must be a string, got {type(text).__name__}: one call makes one clip")
            if text is not None and self.text_encoder is None:
                raise ValueError(f"this pipeline has no text encoder for {name}: give {name}_embeds")
            return text
        if text is not None:
            raise ValueError(f"{name} and {name}_embeds were both given: give one")
        width = self.dit.config.text_dim
        rows = embeds[None] if embeds.ndim == 2 else embeds
        if rows.ndim != 3 or rows.shape[0] != 1 or rows.shape[1] < 1 or rows.shape[2] != width:
            raise ValueError(f"{name}_embeds must be [L, {width}] or [1, L, {width}], got {list(embeds.shape)}")
        return rows

    def _context(self, text: str | Tensor) -> Tensor:
        if isinstance(text, str):
            assert self.text_encoder is not None
            text = self.text_encoder.encode([text])
        return text.to(self.device)

    def _start(self, request: _Request) -> tuple[Tensor, Any]:
        """Latents before the first step, on the device, and their schedule."""
        settings, plan, scale = request.settings, request.plan, self.vae.config.spatial_factor

        def video(medium: int) -> Tensor:
            from pusa_fast.video import fit

            frames = request.media[medium].read(plan.frames_needed[medium])
            return conditioning.to_video(fit(frames, (settings.width, settings.height), settings.fit), self.device)

        clean = conditioning.encode_conditions(plan, self.vae, video, request.encode_tiling)
        shape = (1, self.vae.config.z_dim, plan.latent_frames, settings.height // scale, settings.width // scale)
        noise = conditioning.initial_noise(settings.seed, shape)
        schedule = lift(sigma_grid(settings.steps, settings.shift), plan.multipliers, settings.compat)
        return conditioning.initial_latents(noise.to(self.device), schedule, plan.placements, clean), schedule

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Record how long a stage takes; out of memory names the option that helps."""
        start = time.perf_counter()
        with out_of_memory(name, self.device):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.last_run["seconds"][name] = time.perf_counter() - start
