"""A tiny transformer in files of every layout and container."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pusa_fast.config import DiTConfig
from pusa_fast.weights import keymap

Golden = Callable[[str], dict[str, Tensor]]
Manifest = Callable[[str], Any]
TINY = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=10, freq_dim=8)
DIFFUSERS = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40,
    "num_layers": 2, "in_channels": 4, "out_channels": 4, "text_dim": 10, "freq_dim": 8, "eps": 1e-6,
    "patch_size": [1, 2, 2], "image_dim": None, "added_kv_proj_dim": None, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip


def assert_holds(model: torch.nn.Module, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    held = keymap.unpack(model.state_dict())
    assert held.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(held[name], tensor.to(dtype or tensor.dtype)), name


def metas(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}


def shards(state: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    names = sorted(state)
    return [{n: state[n].contiguous() for n in names[i::count]} for i in range(count)]


def single(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "any.safetensors")
    return folder / "any.safetensors"


def pth(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "any.pth")
    return folder / "any.pth"


def pth_wrapped(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": {f"model.{n}": t for n, t in state.items()}, "step": 3}, folder / "any.ckpt")
    return folder / "any.ckpt"


def pth_old(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "any.pt", _use_new_zipfile_serialization=False)
    return folder / "any.pt"


def shard_list(folder: Path, state: dict[str, Tensor]) -> list[Path]:
    paths = [folder / f"part{i}.safetensors" for i in range(3)]
    for path, part in zip(paths, shards(state, 3), strict=True):
        save_file(part, path)
    return paths


def official_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    """As Wan2.1-T2V-14B is published, the VAE beside it."""
    for i, part in enumerate(shards(state, 3), 1):
        save_file(part, folder / f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors")
    torch.save({"conv1.weight": torch.zeros(1)}, folder / "Wan2.1_VAE.pth")
    return folder


def indexed(folder: Path, state: dict[str, Tensor]) -> Path:
    parts = shards(state, 2)
    weight_map = {n: f"part{i}.safetensors" for i, part in enumerate(parts) for n in part}
    for i, part in enumerate(parts):
        save_file(part, folder / f"part{i}.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def index_file(folder: Path, state: dict[str, Tensor]) -> Path:
    return indexed(folder, state) / "diffusion_pytorch_model.safetensors.index.json"


def nano_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file({"x": torch.zeros(1)}, folder / "vae.safetensors")
    save_file(state, folder / "dit.safetensors")
    return folder


def diffusers_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    inner = folder / "transformer"
    inner.mkdir()
    save_file({keymap.dit_to_diffusers(n): t for n, t in state.items()}, inner / "diffusion_pytorch_model.safetensors")
    return folder
