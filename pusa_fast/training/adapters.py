"""LoRA files from a trained model, in the styles of other tools, and into a model to train.

released   blocks.0.self_attn.q.lora_A.default.weight              PEFT, on official names
diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight           load_lora_weights
comfyui    diffusion_model.blocks.0.self_attn.q.lora_down.weight   with .alpha, the rank
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import LoRAAdapter, adapters
from pusa_fast.weights import keymap
from pusa_fast.weights.files import save
from pusa_fast.weights.lora_file import read_lora

Updates = Mapping[str, tuple[Tensor, Tensor]]  # official module name -> A [r, in], B [out, r], scale 1


@dataclass(frozen=True)
class Style:
    """Tensor names of a style: `prefix`, module, `A` or `B`. `alpha`: it stores the rank."""

    prefix: str
    rename: Callable[[str], str]
    A: str
    B: str
    alpha: bool = False


STYLES: Mapping[str, Style] = {
    "released": Style("", str, "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": Style("transformer.", keymap.dit_to_diffusers, "lora_A.weight", "lora_B.weight"),
    "comfyui": Style("diffusion_model.", str, "lora_down.weight", "lora_up.weight", alpha=True),
}


def trained_updates(
    dit: WanDiT, whole: Callable[[Tensor], Tensor] = Tensor.detach, keep: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters of a model on the CPU, their scale (alpha / rank) multiplied into B.

    `whole` gathers sharded tensors. `keep` False: only take part in the gathering.
    """
    found = {}
    for name, adapter in adapters(dit):
        A, B = whole(adapter.lora_A), whole(adapter.lora_B)
        if keep:
            found[name] = A.cpu(), (B * adapter.scale).cpu()
    return found


def saved_updates(parameters: Mapping[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The same, from adapters by parameter name as in a checkpoint."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters.items():
        _, _, own = name.partition(".adapters.")
        module, _, matrix = own.rpartition(".")
        found.setdefault(module.replace("-", "."), {})[matrix] = tensor
    return {name: (pair["lora_A"], pair["lora_B"] * scale) for name, pair in found.items()}


def write_lora(
    path: str | os.PathLike[str], updates: Updates, style: str = "released", dtype: torch.dtype | None = None
) -> None:
    """Write updates as safetensors in a style of `STYLES`, cast to `dtype` (None: unchanged).

    Raises ValueError for another style.
    """
    if style not in STYLES:
        raise ValueError(f"LoRA style {style!r} is unknown: choose one of {', '.join(STYLES)}")
    form, tensors = STYLES[style], dict[str, Tensor]()
    for name, (A, B) in updates.items():
        stem = form.prefix + form.rename(name)
        tensors |= {f"{stem}.{form.A}": A.to(dtype or A.dtype), f"{stem}.{form.B}": B.to(dtype or B.dtype)}
        if form.alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(float(len(A)))
    save(Path(path), tensors)  # no metadata of our own: safetensors writes several entries in any order


def read_updates(path: str | os.PathLike[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The low-rank updates of a LoRA file of any style, scale multiplied into B.

    Raises ValueError where it holds other updates.
    """
    found = {}
    for name, entry in read_lora(path).items():
        if entry.A is None or entry.B is None or entry.diff is not None:
            raise ValueError(f"{path}: {name} has an update without low rank: it cannot be converted or trained on")
        found[name.removesuffix(".weight")] = (entry.A.float(), entry.B.float() * entry.scale)
    return found


@torch.no_grad()
def start_from(dit: WanDiT, path: str | os.PathLike[str]) -> None:
    """Load a LoRA file into the model's adapters. Raises ValueError for other targets or ranks."""
    updates = read_updates(path)
    mine: dict[str, LoRAAdapter] = dict(adapters(dit))
    if updates.keys() != mine.keys():
        odd = sorted(updates.keys() ^ mine.keys())
        differing = f"different projections ({len(odd)}, such as {odd[0]})"
        raise ValueError(f"{path} and lora.targets name {differing}: make targets those of the file")
    for name, (A, B) in updates.items():
        adapter = mine[name]
        if A.shape != adapter.lora_A.shape or B.shape != adapter.lora_B.shape:
            shape = f"{name} has rank {len(A)} and maps {A.shape[1]} to {len(B)}"
            raise ValueError(f"{path}: {shape}: set lora.rank to {len(A)}, on the model it is for")
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B / adapter.scale)
