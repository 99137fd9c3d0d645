"""Sample clips of a model in training: files, and a contact sheet for people to look at."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pusa_fast import video
from pusa_fast.config import Geometry
from pusa_fast.data.store import LatentStore
from pusa_fast.device import default_dtype, usable_memory, weight_bytes
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.pipeline import Pipeline
from pusa_fast.request import Request
from pusa_fast.sampling.task import Condition
from pusa_fast.training.parallel import World
from pusa_fast.weights import load_vae
from pusa_fast.weights.pretrained import ModelFiles, load_text_encoder

if TYPE_CHECKING:
    from pusa_fast.training.config import TrainConfig

SAMPLES = "samples"


@dataclass
class Previews:
    """Makes the samples of `config.validation` in out/samples/step-000100/.

    The text encoder is loaded once, then dropped.
    """

    config: TrainConfig
    files: ModelFiles
    store: LatentStore
    world: World
    _texts: dict[str, Tensor] | None = None
    _vae: Any = None

    def make(self, dit: WanDiT, step: int, held: int = 0) -> None:
        """One clip per sample, and sheet.png, a row each. Every process computes, the first writes.

        `held`: bytes that training keeps on the device in addition to the weights.
        """
        samples = self.config.validation.samples
        texts, pipe = self._encoded(), Pipeline(dit, self._decoder(), None, defaults=self.files.defaults)
        folder = self.config.out / SAMPLES / f"step-{step:06d}"
        num_frames, height, width = self._size(dit)
        tiling = self._tiling(dit, held)
        rows = []
        for number, sample in enumerate(samples):
            request = Request(
                prompt_embeds=texts[sample.prompt],
                negative_prompt_embeds=texts[self.files.defaults["negative_prompt"]],
                conditions=[] if sample.image is None else [Condition(sample.image)], seed=sample.seed,
                steps=self.config.validation.steps, guidance_scale=self.config.validation.guidance_scale,
                num_frames=num_frames, height=height, width=width, tiling=tiling,
            )  # fmt: skip
            frames = pipe.run(request).frames
            assert frames is not None
            rows.append(frames)
            if self.world.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                video.write_video(folder / f"{number:02d}.mp4", frames, self.files.defaults["fps"])
        if self.world.is_first:
            with video.staged(folder / "sheet.png") as path:
                video.contact_sheet(torch.cat(rows)).save(path, format="PNG")

    def _size(self, dit: WanDiT) -> tuple[int, int, int]:
        """Frames, height and width of the samples: as asked for, or those of the largest clip."""
        chosen, geometry = self.config.validation, Geometry.of(dit.config, self._decoder().config)
        frames, height, width = geometry.clip(max((clip.shape for clip in self.store.clips), key=math.prod))
        return chosen.num_frames or frames, chosen.height or height, chosen.width or width

    def _tiling(self, dit: WanDiT, held: int) -> Tiling | None:
        """Whole frames where the memory left by training allows it, or where memory is unknown."""
        device = self.world.device
        try:
            memory = usable_memory(device)
        except ValueError:
            return None
        return Tiling.auto(max(1, memory - weight_bytes(device, dit, self._decoder()) - held))

    def _encoded(self) -> dict[str, Tensor]:
        if self._texts is None:
            encoder = load_text_encoder(self.files, self.world.device, default_dtype(self.world.device))
            wanted = {
                self.files.defaults["negative_prompt"],
                *(sample.prompt for sample in self.config.validation.samples),
            }
            self._texts = {prompt: encoder.encode([prompt]).clone() for prompt in sorted(wanted)}
            del encoder
            gc.collect()
        return self._texts

    def _decoder(self) -> Any:
        if self._vae is None:
            kind = default_dtype(self.world.device)
            self._vae = load_vae(self.files.vae, device=self.world.device, dtype=kind).eval()
        return self._vae
