"""Where the configuration of a checkpoint comes from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dit_files import DIFFUSERS, TINY, Golden, Manifest, metas, single
from pusa_fast.config import DiTConfig, VAEConfig
from pusa_fast.weights import checkpoint, load_dit, load_vae


def test_config_from_metadata(state: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "dit.safetensors", state, TINY)
    (tmp_path / "config.json").write_text(json.dumps({**DIFFUSERS, "num_attention_heads": 1, "attention_head_dim": 24}))
    assert load_dit(tmp_path).config == TINY
    other = DiTConfig(**{**asdict(TINY), "num_heads": 6})
    assert load_dit(tmp_path, other).config == other, "the argument comes first"


WAN = {
    "dim": 24,
    "ffn_dim": 40,
    "num_heads": 2,
    "num_layers": 2,
    "in_dim": 4,
    "out_dim": 4,
    "freq_dim": 8,
    "text_dim": 10,
    "text_len": 512,
    "eps": 1e-6,
    "model_type": "t2v",
}


@pytest.mark.parametrize("config", [DIFFUSERS, WAN, asdict(TINY)], ids=["diffusers", "official", "ours"])
def test_config_beside_the_file(state: dict[str, Tensor], tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_dit(single(tmp_path, state)).config == TINY


def test_vae_config_beside_the_file(golden: Golden, golden_meta: dict[str, Any], tmp_path: Path) -> None:
    meta = golden_meta["vae"]
    config = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": meta["dim"],
        **{k: meta[k] for k in ("z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")},
    }
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps({**config, "latents_mean": [0.5] * 16, "latents_std": [2.0] * 16})
    )
    save_file(golden("vae_weights"), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    vae = load_vae(tmp_path)
    assert (vae.config.base_dim, vae.config.num_res_blocks, vae.config.latents_std) == (8, 1, (2.0,) * 16)


def test_config_of_another_kind_is_passed_over(golden: Golden, tmp_path: Path) -> None:
    """The official folder's config.json is the transformer's, and the VAE lies in it too."""
    (tmp_path / "config.json").write_text(json.dumps(WAN))
    torch.save(golden("vae_weights"), tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match=r"carries no configuration: pass config=VAEConfig\("):
        load_vae(tmp_path)
    assert load_vae(tmp_path, VAEConfig(8, num_res_blocks=1)).config.base_dim == 8


def test_unknown_configuration_asks_for_the_heads(state: dict[str, Tensor]) -> None:
    with pytest.raises(
        ValueError, match=r"dim=24, ffn_dim=40, num_heads=\?, num_layers=2, in_channels=4.*text_dim=10, freq_dim=8"
    ):
        load_dit(state)


def test_published_sizes_with_a_tensor_missing_name_it(manifest: Manifest) -> None:
    tensors = metas(manifest("wan2.1-t2v-1.3b"))
    del tensors["blocks.3.ffn.2.bias"]
    with pytest.raises(ValueError, match=r"1 missing: blocks\.3\.ffn\.2\.bias"):
        load_dit(tensors, device="meta")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        (json.dumps({k: v for k, v in WAN.items() if k != "dim"}), "incomplete"),
        (json.dumps({**WAN, "model_type": "i2v"}), "image-input"),
        (json.dumps({**WAN, "num_heads": 7}), "multiple"),
    ],
)
def test_bad_config(state: dict[str, Tensor], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dit(single(tmp_path, state))
