"""`prepare` with a model whose VAE and transformer have factors of their own: sizes, counts and
reports follow them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import unusual_model
from pusa_fast import WanDiT, video
from pusa_fast.data.prepare import REPORT, prepare
from pusa_fast.data.store import LatentStore
from pusa_fast.weights import checkpoint, keymap
from pusa_fast.weights.pretrained import find_model, model_geometry


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return unusual_model(tmp_path / "model")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    video.write_video(folder / "a.mp4", torch.randint(256, (7, 20, 32, 3), dtype=torch.uint8), fps=8)
    (folder / "a.txt").write_text("a clip")
    return folder


def test_buckets_and_counts(model: Path, clips: Path, tmp_path: Path) -> None:
    made = prepare(clips, tmp_path / "out", model=model, buckets=["32x20x7"], device="cpu")
    assert made.buckets == json.loads((tmp_path / "out" / REPORT).read_text())["buckets"] == {"32x20x7": 1}
    assert LatentStore(tmp_path / "out").clips[0].shape == (16, 4, 5, 8)


@pytest.mark.parametrize(
    ("bucket", "said"),
    [
        ("24x20x7", "width 24 is not a multiple of 16 pixels: use 16 or 32"),
        ("32x18x7", "height 18 is not a multiple of 4 pixels: use 16 or 20"),
        ("32x20x6", "6 frames is not 2k\\+1: use 5 or 7"),
    ],
)
def test_sizes_that_the_model_cannot_take(model: Path, clips: Path, tmp_path: Path, bucket: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"bucket {bucket}: {said}"):
        prepare(clips, tmp_path / "out", model=model, buckets=[bucket], device="cpu")


@pytest.mark.parametrize(("shape", "fits"), [((16, 3, 5, 8), True), ((16, 3, 5, 6), False), ((16, 3, 3, 4), True)])
def test_the_reference_s_tensors(model: Path, clips: Path, tmp_path: Path, shape: tuple[int, ...], fits: bool) -> None:
    """Odd heights pass where the patch is one latent high."""
    context: dict[str, Any] = {"context": torch.ones(1, 3, 64)}
    torch.save({"latents": torch.ones(shape), "prompt_emb": context}, clips / "a.mp4.tensors.pth")
    if not fits:
        with pytest.raises(ValueError, match=r"needs \[16, F, h, w\] with h and w multiples of the patch 1x4"):
            prepare(clips, tmp_path / "out", model=model, buckets=["32x20x7"], device="cpu")
        return
    made = prepare(clips, tmp_path / "out", model=model, buckets=["32x20x7"], device="cpu")
    assert made.buckets == {f"{4 * shape[3]}x{4 * shape[2]}x5": 1}


def test_a_transformer_of_another_text_width(model: Path, clips: Path, tmp_path: Path) -> None:
    """Text rows that the transformer cannot take are refused, not stored."""
    files = find_model(model)
    config = replace(checkpoint.read_config(checkpoint.DIT, files.dit), text_dim=32)
    checkpoint.save(files.dit, keymap.unpack(WanDiT(config).state_dict()), config)
    assert model_geometry(files).text_dim == 32
    with pytest.raises(ValueError, match=r"a\.mp4: text must be \[1\.\.24, 32\], got \[\d+, 64\]"):
        prepare(clips, tmp_path / "out", model=model, buckets=["32x20x7"], device="cpu")
