"""What can be known to be wrong before a run loads its model: settings, files and clips that do not belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pusa_fast.config import VAEConfig
from pusa_fast.data.catalog import FILES, Catalog
from pusa_fast.data.planning import model_hashes
from pusa_fast.data.store import LatentStore
from pusa_fast.media import open_media
from pusa_fast.model.dit import WanDiT
from pusa_fast.sampling.limits import latent_count
from pusa_fast.training import metrics
from pusa_fast.training.parallel import World
from pusa_fast.training.saved import Checkpoints
from pusa_fast.weights.pretrained import ModelFiles, find_model

if TYPE_CHECKING:
    from pusa_fast.training.config import TrainConfig

_PARTS = {"vae": "VAE", "text": "text encoder or tokenizer"}  # that a store names by hash


def check(config: TrainConfig) -> tuple[ModelFiles, LatentStore]:
    """The model's files and the clips. Raises ValueError and OSError for settings, files and clips that cannot work together."""
    metrics.check_loggers(config)
    files, store = find_model(config.model), LatentStore(config.data.path)
    stills = [clip.source for clip in store.clips if clip.shape[1] == 1]
    if config.objective.first_frame_clean and stills:
        raise ValueError(
            f"{stills[0]} has one latent frame, of which objective.first_frame_clean leaves nothing to learn: leave it out"
        )
    if config.dit is not None and not config.dit.exists():
        raise FileNotFoundError(f"dit {config.dit} does not exist: give a transformer's file or folder")
    if config.out.exists() and not config.out.is_dir():
        raise NotADirectoryError(f"out {config.out} is a file: give a folder")
    start = config.lora.start if config.lora else None
    if (
        start is not None
        and not start.exists()
        and not Checkpoints(config.out, {}, 1, World(torch.device("cpu"))).steps()
    ):
        raise FileNotFoundError(f"lora.start {start} does not exist: give the path of a LoRA file")
    _check_samples(config)
    return files, store


def _check_samples(config: TrainConfig) -> None:
    chosen, multiple = config.validation, 2 * VAEConfig().spatial_factor  # of the VAE and the transformer's patches
    for name, size in (("width", chosen.width), ("height", chosen.height)):
        if size is not None and size % multiple:
            raise ValueError(
                f"validation.{name} {size} is no multiple of {multiple} pixels: use {size // multiple * multiple or multiple}"
            )
    if chosen.num_frames is not None:
        try:
            latent_count(chosen.num_frames, VAEConfig().temporal_factor)
        except ValueError as error:
            raise ValueError(f"validation.{error}") from None
    for sample in chosen.samples:
        if sample.image is None:
            continue
        if not sample.image.is_file():
            raise FileNotFoundError(f"validation picture {sample.image} does not exist")
        open_media(sample.image)  # reads a picture; a clip's first frames are read when their time comes


def check_encoders(config: TrainConfig, store: LatentStore, files: ModelFiles) -> None:
    """Raises ValueError where the clips were encoded by another VAE or text encoder than the model's: latents of others teach noise.

    Hashes that `prepare` kept are not computed again: elsewhere than where it ran, a text encoder of 11 GB takes half a minute.
    """
    if not config.data.same_encoders:
        return
    hashes = model_hashes(files, Catalog(store.folder / FILES))
    for name, what in _PARTS.items():
        if store.model.get(name) != hashes[name]:
            raise ValueError(
                f"{store.folder} was prepared with another {what} than that of {files.vae.parent}: "
                "prepare the clips with this model, or set model to the one that they were prepared with; where it is the same in another layout, "
                "set data.same_encoders to false"
            )


def check_clips(store: LatentStore, dit: WanDiT) -> None:
    """Raises ValueError where the clips' channels, text width or size are not the transformer's."""
    wanted = {"channels": dit.config.in_channels, "text_dim": dit.config.text_dim}
    for name, value in wanted.items():
        if int(store.model[name]) != value:
            raise ValueError(
                f"{store.folder} was prepared for another model: its {name} is {store.model[name]}, this one's {value}. Prepare the clips with this model"
            )
    _, ph, pw = dit.config.patch_size
    for clip in store.clips:
        if clip.shape[2] % ph or clip.shape[3] % pw:
            raise ValueError(
                f"{clip.source}: latents {list(clip.shape)} are no multiple of the patch {ph}x{pw}: prepare at another size"
            )
