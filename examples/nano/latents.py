"""Stage 3 of nano: renders the clips for base and LoRA and stores them as `prepare` does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import data
import stage
import torch
from rich.progress import track
from text import TEXT_LEN

from pusa_fast.data import sprites
from pusa_fast.data.catalog import FILES, Catalog
from pusa_fast.data.planning import model_hashes
from pusa_fast.data.store import StoreWriter
from pusa_fast.model.text import TextEncoder
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.weights import load_vae
from pusa_fast.weights.pretrained import find_model

CLIPS, SHARD = 10_000, 400
PHOTO_SHARE = 0.1  # their errors are four times those of other clips: more would drown the rest
_TOGETHER = 20


def folder(run: Path, model: Path) -> Path:
    """Named by a hash of VAE, text encoder and recipe, so that no other latents are ever used."""
    drawn = (PHOTO_SHARE, data.STILL_SHARE, data.SHAPE_RATES, *sprites.GRAMMAR)
    return run / f"latents-{hashlib.sha256(repr((*_encoders(run, model).values(), drawn)).encode()).hexdigest()[:12]}"


def _encoders(run: Path, model: Path) -> dict[str, str]:
    """Their hashes, as `prepare` computes them."""
    return model_hashes(find_model(model), Catalog(run / FILES))


def sample(seed: int, index: int) -> tuple[data.Sample, str]:
    """Training clip number `index` and its caption."""
    generator = stage.step_generator(seed + 10, index)
    drawn = data.draw(generator, photo_share=PHOTO_SHARE)
    return drawn, data.caption(drawn, generator)


def prepare(run: Path, model: Path, seed: int, clips: int) -> Path:
    """Render, encode and store the first `clips` training clips; resumes after a kill."""
    out = folder(run, model)
    vae = load_vae(model / "vae.safetensors", dtype=torch.float32)
    text = TextEncoder.from_directory(
        model / "text_encoder", model / "tokenizer", dtype=torch.float32, text_len=TEXT_LEN
    )
    text.cache_size = 100_000  # captions repeat
    about = {
        **_encoders(run, model), "channels": vae.config.z_dim, "text_dim": text.model.config.d_model,
        "text_len": text.text_len,
    }  # fmt: skip
    with StoreWriter(out, about, SHARD) as writer:
        writer.write_empty_text(_rows(text, ""))
        for start in track(range(0, clips, _TOGETHER), "latents"):
            wanted = [i for i in range(start, min(start + _TOGETHER, clips)) if f"{seed}-{i:06d}" not in writer.keys]
            if wanted:
                _add(writer, vae, text, seed, wanted)
    return out


@torch.no_grad()
def _add(writer: StoreWriter, vae: WanVAE, text: TextEncoder, seed: int, wanted: list[int]) -> None:
    samples, captions = zip(*(sample(seed, i) for i in wanted), strict=True)
    video = data.render(samples).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    for i, latents, caption in zip(wanted, vae.encode(video).half(), captions, strict=True):
        writer.add(f"{seed}-{i:06d}", latents, _rows(text, caption), source=f"sprites {seed}/{i}", caption=caption)


def _rows(text: TextEncoder, caption: str) -> torch.Tensor:
    rows = text.encode([caption])[0]
    return rows[: 1 + int(rows.any(-1).nonzero().max())].half()
