"""A model of unusual geometry, for what has to ask the model rather than assume Wan's."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from pusa_fast import VAEConfig, WanDiT, WanVAE
from pusa_fast.config import DiTConfig
from pusa_fast.weights import checkpoint, keymap
from pusa_fast.weights.pretrained import find_model

VAE = VAEConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, False))
DIT = DiTConfig(dim=12, ffn_dim=8, num_heads=1, num_layers=1, text_dim=64, freq_dim=8, patch_size=(1, 1, 4))


def unusual_model(folder: Path) -> Path:
    """nano's files with a VAE of 4 pixels and 2 frames per latent, and a patch of 1 x 4 latents.

    So heights are multiples of 4, widths of 16, and lengths are 2n+1. Weights are random.
    """
    shutil.copytree(find_model("nano").vae.parent, folder)
    torch.manual_seed(1)
    for name, config, module in (("vae", VAE, WanVAE(VAE)), ("dit", DIT, WanDiT(DIT))):
        checkpoint.save(folder / f"{name}.safetensors", keymap.unpack(module.state_dict()), config)
    return folder
