"""Geometry of a model: from its files' headers in every layout, and never from its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pusa_fast.config import Geometry, VAEConfig
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.weights import checkpoint, files, keymap
from pusa_fast.weights.pretrained import ModelFiles, find_model, model_geometry

Manifest = Callable[[str], Any]
WAN = Geometry(spatial_factor=8, temporal_factor=4, patch=(1, 2, 2), channels=16, text_dim=4096, text_len=512)


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoint, "_read", read)


def save_vae(path: Path, **changes: Any) -> Path:
    """A small VAE of random weights under official names, with its configuration."""
    config = VAEConfig(**{"base_dim": 4, "num_res_blocks": 1, **changes})
    checkpoint.save(path, keymap.unpack(WanVAE(config).state_dict()), config)
    return path


def hollow(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes in a file of a few kilobytes: all of them views of one number."""
    return {name: torch.zeros(1, dtype=torch.bfloat16).expand(shape) for name, shape in shapes.items()}


def test_the_embedded_model() -> None:
    assert model_geometry(find_model("nano")) == Geometry(8, 4, (1, 2, 2), channels=16, text_dim=64, text_len=24)


@pytest.mark.parametrize(
    ("levels", "temporal", "factors"),
    [(4, (False, True, False), (8, 2)), (3, (True, True), (4, 4)), (2, (False,), (2, 1))],
)
def test_another_vae(tmp_path: Path, levels: int, temporal: tuple[bool, ...], factors: tuple[int, int]) -> None:
    path = save_vae(tmp_path / "vae.safetensors", dim_mult=(1,) * levels, temporal_downsample=temporal)
    found = model_geometry(replace(find_model("nano"), vae=path))
    assert (found.spatial_factor, found.temporal_factor) == factors
    assert found.multiples == (2 * factors[0], 2 * factors[0])


def test_published_files_without_a_configuration(tmp_path: Path, manifest: Manifest) -> None:
    """The VAE's .pth is mapped, the transformer known by its shapes."""
    torch.save(hollow(manifest("wan2.1-vae")), tmp_path / "Wan2.1_VAE.pth")
    dit = hollow(manifest("wan2.1-t2v-1.3b"))
    torch.save(dit, tmp_path / "dit.pth")
    found = ModelFiles("wan", tmp_path / "dit.pth", tmp_path / "Wan2.1_VAE.pth", tmp_path, tmp_path)
    assert model_geometry(found) == WAN


def test_a_config_beside_the_files(tmp_path: Path) -> None:
    """As diffusers writes them, in folders of their own."""
    small = find_model("nano")
    for name, source, config in (
        ("transformer", small.dit, {"num_attention_heads": 6, "attention_head_dim": 32, "ffn_dim": 768, "num_layers": 6,
                                    "text_dim": 64, "freq_dim": 64, "patch_size": [1, 2, 4]}),
        ("vae", small.vae, {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 8], "num_res_blocks": 1,
                            "temperal_downsample": [False, False, True]}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        tensors = {n: t.read() for n, t in files.open_file(source)[0].items()}
        save_file(tensors, tmp_path / name / "diffusion_pytorch_model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = model_geometry(ModelFiles("x", tmp_path / "transformer", tmp_path / "vae", tmp_path, tmp_path, text_len=7))
    assert found == Geometry(8, 2, (1, 2, 4), channels=16, text_dim=64, text_len=7)
    assert found.multiples == (16, 32)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    nano = find_model("nano")
    other = save_vae(tmp_path / "vae.safetensors", z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    with pytest.raises(ValueError, match="the transformer maps 16 to 16 channels, the VAE's latents have 4"):
        model_geometry(replace(nano, vae=other))
    with pytest.raises(ValueError, match=r"vae.safetensors is not a Wan transformer but a Wan VAE"):
        model_geometry(replace(nano, dit=nano.vae))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model_geometry(replace(nano, vae=tmp_path / "nowhere.safetensors"))


def test_the_size_of_latents_in_pixels() -> None:
    assert WAN.clip((16, 21, 60, 104)) == (81, 480, 832)
