"""LoRAs onto a transformer's weights, changeable and removable to the bit.

A weight touched by LoRAs is always computed anew as base + sum of strength_i * scale_i * (B_i A_i), in the order of
application, in float32 and rounded once; adding and subtracting would not lead back to the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import projections
from pusa_fast.weights import keymap
from pusa_fast.weights.files import listing
from pusa_fast.weights.lora_file import LoRAEntry, LoRASource, read_lora, read_with_unknown

__all__ = ["LoRAEntry", "LoRAHandle", "apply_lora", "read_lora"]


@dataclass(eq=False)
class _Layer:
    """One applied LoRA: our parameter name -> (rows, update) each."""

    parts: dict[str, list[tuple[slice, LoRAEntry]]]
    strength: float


@dataclass
class _Stack:
    """All LoRAs of one model in the order of application, and the base of every parameter that any of them touches."""

    base: dict[str, Tensor] = field(default_factory=dict)
    layers: list[_Layer] = field(default_factory=list)


class LoRAHandle:
    """An applied LoRA. `targets`: official names of the parameters it changes; `unmatched`: keys left out."""

    def __init__(
        self, dit: WanDiT, layer: _Layer, targets: Iterable[str], unmatched: Iterable[str], merged: bool
    ) -> None:
        self._dit, self._layer, self._merged = dit, layer, merged
        self.targets, self.unmatched = tuple(targets), tuple(unmatched)

    @property
    def strength(self) -> float:
        return self._layer.strength

    def set_strength(self, strength: float) -> None:
        """Recompute the weights from the base at another strength; 0 gives the base's own bits.

        Raises ValueError for a strength that is not finite, RuntimeError after `remove` or with keep_base=False.
        """
        stack = self._kept()
        if self._layer not in stack.layers:
            raise RuntimeError("this LoRA was removed: apply it again")
        self._layer.strength = _finite(strength)
        _recompute(self._dit, stack, self._layer.parts)

    def remove(self) -> None:
        """Take this LoRA off; with the last one, base weights are restored bit for bit and their copy is freed.

        Calling it again does nothing. Raises RuntimeError with keep_base=False.
        """
        stack = self._kept()
        if self._layer in stack.layers:
            stack.layers.remove(self._layer)
            _recompute(self._dit, stack, self._layer.parts)

    def _kept(self) -> _Stack:
        if self._merged:
            raise RuntimeError("this LoRA was merged with keep_base=False: load the model again to change or remove it")
        return _stack_of(self._dit)


def apply_lora(
    dit: WanDiT, source: LoRASource, strength: float = 1.0, *, allow_unmatched: bool = False, keep_base: bool = True
) -> LoRAHandle:
    """Add strength * (alpha / rank, if stated) * B A to the weights that a LoRA names, in place.

    Several LoRAs may be on one model. The base of each changed weight is kept once (on the host, for weights on an
    accelerator); keep_base=False saves that memory, merges for good, and makes the handle's methods raise. States
    prepared before are refused afterwards. While a LoRA is on, changes to its weights by others are lost at the next one here.

    Raises what `read_lora` does, and ValueError, before any weight is touched, for updates that find no parameter
    (allow_unmatched=True leaves them out and lists them in `handle.unmatched`), shapes that do not fit, or a strength
    that is not finite.
    """
    strength = _finite(strength)
    label, entries, unknown = read_with_unknown(source)
    parts, homeless = _match(dit, entries, label)
    unmatched = unknown + homeless
    if unmatched and (not allow_unmatched or not parts):
        mend = "pass allow_unmatched=True to leave them out" if parts else "nothing of it fits"
        raise ValueError(
            f"{label}: {len(unmatched)} updates have no place in this model: {listing(unmatched)}"
            f"{_depth_hint(dit, homeless)}; {mend}"
        )
    layer = _Layer(parts, strength)
    stack = _stack_of(dit)
    _check_meta(dit, layer, label)
    if keep_base:
        for name, parameter in _parameters(dit, parts).items():
            if name not in stack.base:
                home = parameter.device if parameter.is_meta else torch.device("cpu")
                stack.base[name] = parameter.detach().to(home, copy=True)
        stack.layers.append(layer)
    else:
        _merge(dit, stack, layer)
    _recompute(dit, stack, parts)
    return LoRAHandle(dit, layer, (name for name in entries if name not in homeless), unmatched, not keep_base)


def _match(
    dit: WanDiT, entries: Mapping[str, LoRAEntry], label: str
) -> tuple[dict[str, list[tuple[slice, LoRAEntry]]], list[str]]:
    """Updates by our parameter name, and those without a parameter. Raises ValueError where shapes disagree."""
    modules = projections(dit)
    parameters = dict(dit.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    parts: dict[str, list[tuple[slice, LoRAEntry]]] = {}
    homeless, misfits = [], []
    for official, entry in entries.items():
        module, _, leaf = official.rpartition(".")
        home, rows = modules.get(module, (None, slice(None)))
        name = official if home is None else names.get(id(getattr(home, leaf, None)))
        if name is None or name not in parameters:
            homeless.append(official)
            continue
        shape = tuple(parameters[name][rows].shape)
        own = entry.misfit(shape)
        if own:
            misfits.append(f"{official} is {list(shape)}, the LoRA's {own}")
        parts.setdefault(name, []).append((rows, entry))
    if misfits:
        widths = (e.A.shape[1] for n, e in entries.items() if n.endswith("attn.q.weight") and e.A is not None)
        width = next(widths, dit.config.dim)
        hint = (
            f"; this LoRA is for a model of dim {width}, yours is {dit.config.dim}" if width != dit.config.dim else ""
        )
        raise ValueError(f"{label} does not fit this model: {listing(misfits)}{hint}")
    return parts, homeless


@torch.no_grad()
def _recompute(dit: WanDiT, stack: _Stack, names: Iterable[str]) -> None:
    """Parameters anew from their base and the LoRAs now on the model; a base that none needs any more is freed."""
    for name, parameter in _parameters(dit, names).items():
        if name not in stack.base:
            continue
        updates = [(u, layer.strength) for layer in stack.layers if layer.strength for u in layer.parts.get(name, ())]
        parameter.copy_(_sum(stack.base[name], updates, parameter) if updates else stack.base[name])
        if not any(name in layer.parts for layer in stack.layers):
            del stack.base[name]
    dit.weights_version += 1


def _sum(base: Tensor, updates: list[tuple[tuple[slice, LoRAEntry], float]], like: Tensor) -> Tensor:
    # Contiguous: the update is added through a flattened view, and of another layout `flatten` would make a copy.
    total = base.to(like.device).to(
        torch.promote_types(like.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format
    )
    for (rows, entry), strength in updates:
        entry.add_to(total[rows], strength)
    return total


@torch.no_grad()
def _merge(dit: WanDiT, stack: _Stack, layer: _Layer) -> None:
    """Into the base where one is kept, else into the weight itself."""
    for name, parameter in _parameters(dit, layer.parts).items():
        base = stack.base.get(name, parameter)
        base.copy_(_sum(base, [(update, layer.strength) for update in layer.parts[name]], parameter))


def _stack_of(dit: WanDiT) -> _Stack:
    # In the instance's dictionary: a copy of the model takes it along, and a model that is dropped takes it away.
    stack = dit.__dict__.setdefault("_lora_stack", _Stack())
    assert isinstance(stack, _Stack)
    return stack


def _parameters(dit: WanDiT, names: Iterable[str]) -> dict[str, nn.Parameter]:
    every = dict(dit.named_parameters())
    return {name: every[name] for name in names}


def _check_meta(dit: WanDiT, layer: _Layer, label: str) -> None:
    matrices = (m for parts in layer.parts.values() for _, e in parts for m in (e.A, e.B, e.diff) if m is not None)
    if any(m.is_meta for m in matrices) and not dit.patch_embedding.weight.is_meta:
        raise ValueError(f"{label} is on the meta device, without values: it can only go onto a model that is too")


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        raise ValueError(f"LoRA strength must be a finite number, got {strength}")
    return float(strength)


def _depth_hint(dit: WanDiT, homeless: Iterable[str]) -> str:
    if any(keymap.IMAGE_INPUT.search(name) for name in homeless):
        return " (the LoRA is for an image-input variant)"
    depth = 1 + max((int(name.split(".")[1]) for name in homeless if re.match(r"blocks\.\d", name)), default=-1)
    return f" (the LoRA is for {depth} blocks, yours has {len(dit.blocks)})" if depth > len(dit.blocks) else ""
