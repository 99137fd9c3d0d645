"""LoRA files out of a trained model, in the styles that other tools read, and into a model that trains.

released    blocks.0.self_attn.q.lora_A.default.weight               Pusa's own, PEFT on official names; no alpha
diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight            load_lora_weights, load_lora_adapter
comfyui     diffusion_model.blocks.0.self_attn.q.lora_down.weight    with .alpha, the rank
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import LoRAAdapter, adapters
from pusa_fast.weights import keymap
from pusa_fast.weights.files import save
from pusa_fast.weights.lora_file import read_lora

Updates = Mapping[str, tuple[Tensor, Tensor]]  # official module name -> A [r, in], B [out, r], scale 1


def _released(updates: Updates) -> dict[str, Tensor]:
    return {
        f"{name}.lora_{m}.default.weight": t for name, pair in updates.items() for m, t in zip("AB", pair, strict=True)
    }


def _diffusers(updates: Updates) -> dict[str, Tensor]:
    named = {keymap.dit_to_diffusers(name): pair for name, pair in updates.items()}
    return {
        f"transformer.{name}.lora_{m}.weight": t
        for name, pair in named.items()
        for m, t in zip("AB", pair, strict=True)
    }


def _comfyui(updates: Updates) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (A, B) in updates.items():
        stem = f"diffusion_model.{name}"
        found |= {
            f"{stem}.lora_down.weight": A,
            f"{stem}.lora_up.weight": B,
            f"{stem}.alpha": torch.tensor(float(len(A))),
        }
    return found


STYLES: Mapping[str, Callable[[Updates], dict[str, Tensor]]] = {
    "released": _released, "diffusers": _diffusers, "comfyui": _comfyui,
}  # fmt: skip


def trained_updates(
    dit: WanDiT, whole: Callable[[Tensor], Tensor] = Tensor.detach, keep: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters of a model, their scale (alpha / rank) multiplied into B, on the CPU. `whole` gathers sharded tensors.

    `keep` False takes part in the gathering and keeps nothing.
    """
    found = {}
    for name, adapter in adapters(dit):
        A, B = whole(adapter.lora_A), whole(adapter.lora_B)
        if keep:
            found[name] = A.cpu(), (B * adapter.scale).cpu()
    return found


def saved_updates(parameters: Mapping[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The same from adapters by parameter name, as a checkpoint has them."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters.items():
        _, _, own = name.partition(".adapters.")
        module, _, matrix = own.rpartition(".")
        found.setdefault(module.replace("-", "."), {})[matrix] = tensor
    return {name: (pair["lora_A"], pair["lora_B"] * scale) for name, pair in found.items()}


def write_lora(
    path: str | os.PathLike[str], updates: Updates, style: str = "released", dtype: torch.dtype | None = None
) -> None:
    """Write updates as safetensors in a style of `STYLES`, cast to `dtype` (None: as they are). Raises ValueError for another."""
    if style not in STYLES:
        raise ValueError(f"LoRA style {style!r} is unknown: choose one of {', '.join(STYLES)}")
    cast = {name: (A.to(dtype or A.dtype), B.to(dtype or B.dtype)) for name, (A, B) in updates.items()}
    save(Path(path), STYLES[style](cast))  # no metadata of our own: safetensors writes several entries in any order


def read_updates(path: str | os.PathLike[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The low-rank updates of a LoRA file of any style, scale multiplied into B. ValueError where it holds other updates too."""
    found = {}
    for name, entry in read_lora(path).items():
        if entry.A is None or entry.B is None or entry.diff is not None:
            raise ValueError(
                f"{path}: the update of {name} is no low-rank one: this file cannot be converted or trained on"
            )
        found[name.removesuffix(".weight")] = (entry.A.float(), entry.B.float() * entry.scale)
    return found


@torch.no_grad()
def start_from(dit: WanDiT, path: str | os.PathLike[str]) -> None:
    """Put a LoRA file's matrices into the model's adapters. Raises ValueError where targets or ranks differ."""
    updates = read_updates(path)
    mine: dict[str, LoRAAdapter] = dict(adapters(dit))
    if updates.keys() != mine.keys():
        odd = sorted(updates.keys() ^ mine.keys())
        raise ValueError(
            f"{path} and lora.targets name different projections ({len(odd)}, such as {odd[0]}): make targets those of the file"
        )
    for name, (A, B) in updates.items():
        adapter = mine[name]
        if A.shape != adapter.lora_A.shape or B.shape != adapter.lora_B.shape:
            raise ValueError(
                f"{path}: {name} has rank {len(A)} and maps {A.shape[1]} to {len(B)}: set lora.rank to {len(A)}, on the model it is for"
            )
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B / adapter.scale)
