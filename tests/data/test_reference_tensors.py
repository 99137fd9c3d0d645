"""Tensors that the reference has encoded: taken where they fit, named where they do not."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from films import SMALL, write_csv
from pusa_fast import WanVAE
from pusa_fast.data.prepare import prepare
from pusa_fast.data.store import EMPTY, LatentStore
from pusa_fast.training.data import training_clips
from pusa_fast.weights.pretrained import find_model


def save_tensors(path: Path, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    context = torch.zeros(1, 512, 64)
    context[0, :7] = torch.randn(7, 64, generator=generator)
    content = {
        "latents": torch.randn(16, 2, 4, 6, generator=generator).bfloat16(), "prompt_emb": {"context": context},
        "image_emb": {}, **changes,
    }  # fmt: skip
    torch.save(content, path)
    return content


def test_reference_tensors_are_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = here / "dataset"
    (dataset / "train").mkdir(parents=True)
    shutil.copy("films/a.mp4", dataset / "train")
    first = save_tensors(dataset / "train" / "a.mp4.tensors.pth")
    save_tensors(dataset / "train" / "gone.mp4.tensors.pth", latents=torch.ones(16, 1, 2, 2))
    write_csv(dataset / "metadata.csv", "a.mp4,x", "gone.mp4.tensors.pth,y")
    with monkeypatch.context() as patch:
        patch.setattr(WanVAE, "encode", None)
        made = prepare(dataset, "out")
    assert made.buckets == {"16x16x1": 1, "48x32x5": 1}
    found = LatentStore("out")
    assert torch.equal(found.latents(0), first["latents"])
    assert found.clips[0].tokens == 7
    assert torch.equal(found.text(0)[:7], first["prompt_emb"]["context"][0, :7].bfloat16())
    assert found.empty_text.shape == (24, 64)
    ignored = prepare(dataset, "other", buckets=SMALL, ignore_tensors=True)
    assert ignored.buckets == {"32x32x5": 1}
    assert ignored.bad[0][1].startswith("missing")


def test_tensors_are_one_clip_whatever_the_caption_and_know_their_film(here: Path) -> None:
    save_tensors(here / "films" / "b.mp4.tensors.pth")
    save_tensors(here / "films" / "gone.mp4.tensors.pth", latents=torch.ones(16, 1, 2, 2))
    write_csv(here / "l.csv", "films/b.mp4,x", "films/b.mp4,y", "films/gone.mp4,x")
    made = prepare("l.csv", "out", buckets=SMALL)
    assert (made.clips, made.duplicates) == (2, 1)
    prepare("l.csv", "out", buckets=SMALL, ignore_tensors=True, add=True)
    tensors, gone, *encoded = LatentStore("out").clips
    film = hashlib.sha256((here / "films" / "b.mp4").read_bytes()).hexdigest()
    assert [clip.details["file"] for clip in (tensors, *encoded)] == [film] * 3
    assert tensors.details.keys() == {"tensors", "file"} and gone.details.keys() == {"tensors"}
    assert training_clips(LatentStore("out"), 1) == [1]


BAD_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"latents": torch.zeros(4, 2, 4, 6)}, "holds latents [4, 2, 4, 6], the model needs [16, F, h, w]"),
    "odd": ({"latents": torch.zeros(16, 2, 3, 6)}, "h and w multiples of the patch 2x2"),
    "width": (
        {"prompt_emb": {"context": torch.ones(1, 5, 4096)}},
        "holds text [1, 5, 4096], the model needs [1, L, 64]",
    ),
    "length": ({"prompt_emb": {"context": torch.ones(1, 25, 64)}}, "25 rows of text, the model reads 1 to 24"),
    "silence": ({"prompt_emb": {"context": torch.zeros(1, 25, 64)}}, "0 rows of text"),
    "no text": ({"prompt_emb": {}}, 'holds no "latents" with "prompt_emb"'),
    "nan": ({"latents": torch.full((16, 2, 4, 6), torch.nan)}, "not finite"),
}


def test_tensors_that_do_not_fit(here: Path) -> None:
    rows = ["films/b.mp4,x"]
    for name, (changes, _) in BAD_TENSORS.items():
        save_tensors(here / f"{name}.mp4.tensors.pth", **changes)
        rows.append(f"{name}.mp4,x")
    (here / "damaged.mp4.tensors.pth").write_bytes(b"PK nonsense")
    write_csv(here / "l.csv", *rows, "damaged.mp4,x")
    made = prepare("l.csv", "out", buckets=SMALL)
    assert made.clips == 1
    assert [name for name, _ in made.bad] == [*(f"{name}.mp4" for name in BAD_TENSORS), "damaged.mp4"]
    for (_, reason), (_, wanted) in zip(made.bad[:-1], BAD_TENSORS.values(), strict=True):
        assert wanted in reason
    assert made.bad[-1][1].startswith("cannot be loaded (")


def test_tensors_without_a_readable_text_encoder(here: Path) -> None:
    model = shutil.copytree(find_model("nano").vae.parent, here / "model")
    (model / "text_encoder" / "model.safetensors").write_bytes(b"")
    save_tensors(here / "x.mp4.tensors.pth")
    write_csv(here / "l.csv", "x.mp4,x")
    made = prepare("l.csv", "out", model=model)
    assert made.clips == 1 and "captions cannot be dropped" in made.notes[0]
    assert not (here / "out" / EMPTY).exists()
    assert torch.isfinite(LatentStore("out").text(0)).all()
    write_csv(here / "l.csv", "x.mp4,x", "films/a.mp4,x")
    with pytest.raises(ValueError, match="text encoder"):
        prepare("l.csv", "out", model=model, buckets=SMALL)
