"""Errors in settings, files and clips that can be found before a run loads its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pusa_fast.config import DiTConfig
from pusa_fast.data.catalog import FILES, Catalog
from pusa_fast.data.planning import model_hashes
from pusa_fast.data.store import LatentStore
from pusa_fast.media import open_media
from pusa_fast.sampling import task
from pusa_fast.training import metrics
from pusa_fast.training.saved import Checkpoints
from pusa_fast.weights.pretrained import ModelFiles, model_geometry

if TYPE_CHECKING:
    from pusa_fast.training.config import TrainConfig

_PARTS = {"vae": "VAE", "text": "text encoder or tokenizer"}  # named in a store by their hashes


def check(config: TrainConfig) -> tuple[ModelFiles, LatentStore]:
    """The model's files and the clips. Raises ValueError or OSError where they do not fit."""
    metrics.check_loggers(config)
    files, store = config.files(), LatentStore(config.data.path)
    stills = [clip.source for clip in store.clips if clip.shape[1] == 1]
    if config.objective.first_frame_clean and stills:
        nothing = f"{stills[0]} has one latent frame, of which objective.first_frame_clean leaves nothing to learn"
        raise ValueError(f"{nothing}: leave it out")
    if config.dit is not None and not config.dit.exists():
        raise FileNotFoundError(f"dit {config.dit} does not exist: give a transformer's file or folder")
    if config.out.exists() and not config.out.is_dir():
        raise NotADirectoryError(f"out {config.out} is a file: give a folder")
    start, begun = config.lora and config.lora.start, Checkpoints(config.out)
    if start and not start.exists() and not begun.steps():
        raise FileNotFoundError(f"lora.start {start} does not exist: give the path of a LoRA file")
    _check_samples(config, files)
    return files, store


def _check_samples(config: TrainConfig, files: ModelFiles) -> None:
    chosen, geometry = config.validation, model_geometry(files)
    given = {name: getattr(chosen, name) for name in ("num_frames", "height", "width", "steps", "guidance_scale")}
    try:
        task.settings(given, files.defaults, geometry.multiples, geometry.temporal_factor)
    except ValueError as error:
        raise ValueError(f"validation.{error}") from None
    for sample in chosen.samples:
        if sample.image is None:
            continue
        if not sample.image.is_file():
            raise FileNotFoundError(f"validation picture {sample.image} does not exist")
        open_media(sample.image)  # reads a picture; a clip's frames are read when they are needed


def check_encoders(config: TrainConfig, store: LatentStore, files: ModelFiles) -> None:
    """Raises ValueError where the clips were encoded by other models than those in `files`.

    Uses the hashes that `prepare` kept: hashing a text encoder of 11 GB takes half a minute.
    """
    if not config.data.same_encoders:
        return
    hashes = model_hashes(files, Catalog(store.folder / FILES))
    for name, what in _PARTS.items():
        if store.model.get(name) != hashes[name]:
            raise ValueError(
                f"{store.folder} was prepared with another {what} than that of {files.vae.parent}: prepare the clips "
                "with this model, or set model to the one that they were prepared with; where it is the same in "
                "another layout, set data.same_encoders to false"
            )


def check_clips(store: LatentStore, dit: DiTConfig) -> None:
    """Raises ValueError where a transformer cannot take the clips' channels, text width or size."""
    for name, value in {"channels": dit.in_channels, "text_dim": dit.text_dim}.items():
        if int(store.model[name]) != value:
            other = f"its {name} is {store.model[name]}, this one's {value}"
            raise ValueError(
                f"{store.folder} was prepared for another model: {other}. Prepare the clips with this model"
            )
    _, ph, pw = dit.patch_size
    for clip in store.clips:
        if clip.shape[2] % ph or clip.shape[3] % pw:
            wrong = f"latents {list(clip.shape)} are not multiples of the patch {ph}x{pw}"
            raise ValueError(f"{clip.source}: {wrong}: prepare at another size")
