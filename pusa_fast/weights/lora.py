"""LoRAs on the weights of a transformer or of two experts, changeable and removable to the bit.

A weight that LoRAs change is always recomputed as base + sum of strength_i * scale_i * (B_i A_i),
in the order of application, in float32 and rounded once; adding and subtracting would not lead back
to the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pusa_fast.model.dit import WanDiT
from pusa_fast.model.experts import ExpertPair
from pusa_fast.model.linear import projections
from pusa_fast.weights import keymap
from pusa_fast.weights.files import listing
from pusa_fast.weights.lora_file import LoRAEntry, LoRASource, read_lora, read_with_unknown

__all__ = ["LoRAEntry", "LoRAHandle", "apply_lora", "read_lora", "resolve_experts"]

_Parts = dict[str, list[tuple[slice, LoRAEntry]]]  # our parameter name -> (rows, update) each

BOTH = "both"
_FORMS = (
    'this model has two experts, so say which of them a LoRA is for: {"high": file, "low": file}, or experts="high", '
    '"low" or "both"; in a pipeline {"high": {path: strength}, "low": {path: strength}}, or "both"; '
    "on the command line high=PATH:STRENGTH, low=PATH:STRENGTH or both=PATH:STRENGTH"
)


@dataclass(eq=False)
class _Layer:
    """One LoRA on one network."""

    parts: _Parts
    strength: float


@dataclass
class _Stack:
    """A network's LoRAs in order of application, and the base of every parameter they change."""

    base: dict[str, Tensor] = field(default_factory=dict)
    layers: list[_Layer] = field(default_factory=list)


class LoRAHandle:
    """An applied LoRA.

    `targets`: official names of the parameters it changes; `unmatched`: keys left out. On a pair of
    experts they start with "high." or "low.", and methods act on all networks that it changes.
    """

    def __init__(
        self, layers: list[tuple[WanDiT, _Layer]], targets: Iterable[str], unmatched: Iterable[str], merged: bool
    ) -> None:
        self._layers, self._merged = layers, merged
        self.targets, self.unmatched = tuple(targets), tuple(unmatched)

    @property
    def strength(self) -> float:
        return self._layers[0][1].strength

    def set_strength(self, strength: float) -> None:
        """Recompute the weights from the base at another strength; 0 gives the base's own bits.

        Raises ValueError for a strength that is not finite, RuntimeError after `remove` or with
        keep_base=False.
        """
        if len(self._kept()) < len(self._layers):
            raise RuntimeError("this LoRA was removed: apply it again")
        strength = _finite(strength)
        for dit, layer in self._layers:
            layer.strength = strength
            _recompute(dit, layer.parts)

    def remove(self) -> None:
        """Take this LoRA off; the last one restores base weights to the bit and frees their copy.

        Calling it again does nothing. Raises RuntimeError with keep_base=False.
        """
        for dit, layer in self._kept():
            _stack_of(dit).layers.remove(layer)
            _recompute(dit, layer.parts)

    def _kept(self) -> list[tuple[WanDiT, _Layer]]:
        if self._merged:
            raise RuntimeError("this LoRA was merged with keep_base=False: load the model again to change or remove it")
        return [(dit, layer) for dit, layer in self._layers if layer in _stack_of(dit).layers]


def apply_lora(
    dit: WanDiT | ExpertPair,
    source: LoRASource | Mapping[str, LoRASource],
    strength: float = 1.0,
    *,
    experts: str | None = None,
    allow_unmatched: bool = False,
    keep_base: bool = True,
) -> LoRAHandle:
    """Add strength * (alpha / rank, if stated) * B A to the weights that a LoRA names, in place.

    On a pair of experts `source` is {"high": file, "low": file} (or one of them), or one file with
    `experts` "high", "low" or "both". Several LoRAs may be on one model. The base of each changed
    weight is kept once (on the host, for weights on an accelerator); keep_base=False saves that
    memory, merges for good, and makes the handle's methods raise. States prepared before are
    refused afterwards. While a LoRA is on, changes to its weights by others are lost at the next
    change here.

    Raises what `read_lora` does, and ValueError, before any weight of any expert is touched, for
    updates that find no parameter (allow_unmatched=True leaves them out and lists them in
    `handle.unmatched`), shapes that do not fit, a strength that is not finite, and a pair of
    experts without the names of those that are meant.
    """
    strength = _finite(strength)
    chosen = _by_network(dit, source, experts)
    read = {key: read_with_unknown(file) for key, file in {id(file): file for _, file in chosen}.items()}
    layers: list[tuple[WanDiT, _Layer]] = []
    targets, unmatched = [], []
    for name, file in chosen:
        network, (label, entries, unknown) = dit.networks[name], read[id(file)]
        on, prefix = (f" (on expert {name})", f"{name}.") if len(dit.networks) > 1 else ("", "")
        parts, left = _match(network, entries, unknown, label + on, allow_unmatched)
        layers.append((network, _Layer(parts, strength)))
        targets += [prefix + official for official in entries if official not in left]
        unmatched += [prefix + key for key in left]
    handle = LoRAHandle(layers, targets, unmatched, not keep_base)
    try:
        for network, layer in layers:
            _put_on(network, layer, keep_base)
    except BaseException:  # out of memory: leave no expert changed
        if keep_base:
            handle.remove()
        raise
    return handle


def resolve_experts(lora: Mapping[Any, Any], networks: Collection[str]) -> list[tuple[str | None, Path, float]]:
    """(`experts` of `apply_lora`, file, strength) of all LoRAs for a model of these networks.

    `lora` is {path: strength} for one network; for two experts {"high": {path: strength}, "low":
    {...}, "both": {...}}. Raises ValueError for the other form, an unknown expert, a file that does
    not exist and a strength that is not finite.
    """
    by_expert = {key: files for key, files in lora.items() if isinstance(files, Mapping)}
    if len(networks) == 1 and by_expert:
        keys = listing(by_expert)
        raise ValueError(f"this model has no experts: give its LoRAs as {{path: strength}}, not by {keys}")
    if len(networks) > 1 and len(by_expert) < len(lora):
        raise ValueError(f"LoRA {listing(str(key) for key in lora if key not in by_expert)}: {_FORMS}")
    found = []
    for expert, files in by_expert.items() if len(networks) > 1 else [(None, lora)]:
        if expert is not None:
            _check_expert(expert, networks)
        for path, strength in files.items():
            if not Path(path).exists():
                raise ValueError(f"LoRA {path} does not exist: give the path of a .safetensors or .pt file")
            if not isinstance(strength, Real) or not math.isfinite(strength):
                raise ValueError(f"LoRA {path}: strength must be a number, got {strength!r}")
            found.append((expert, Path(path), float(strength)))
    return found


def _by_network(
    dit: WanDiT | ExpertPair, source: LoRASource | Mapping[str, LoRASource], experts: str | None
) -> list[tuple[str, Any]]:
    """(name of a network, its LoRA file). "both" takes a network that is both experts once."""
    by_expert: Mapping[str, Any] | None = None
    if isinstance(source, Mapping) and source and not any(isinstance(value, Tensor) for value in source.values()):
        by_expert = source
    names = {network: name for name, network in dit.networks.items()}.values()
    if len(dit.networks) == 1:
        if experts is not None or (by_expert and by_expert.keys() & {"high", "low", BOTH}):
            raise ValueError("this model has no experts: give its LoRA alone, without names of experts")
        return [(name, source) for name in names]
    if by_expert is not None and experts is not None:
        raise ValueError(f"experts={experts!r} and a LoRA for each expert were both given: give one")
    if by_expert is None and experts is None:
        raise ValueError(_FORMS)
    chosen = {str(experts): source} if by_expert is None else by_expert
    for expert in chosen:
        _check_expert(expert, dit.networks)
    return [(name, file) for key, file in chosen.items() for name in (names if key == BOTH else (key,))]


def _check_expert(expert: object, networks: Collection[str]) -> None:
    if expert not in (*networks, BOTH):
        raise ValueError(f"there is no expert {expert!r}: choose {', '.join(networks)} or {BOTH}")


@torch.no_grad()
def _put_on(dit: WanDiT, layer: _Layer, keep_base: bool) -> None:
    """Compute base + updates, or merge: into the base if one is kept, else into the weight."""
    stack = _stack_of(dit)
    if keep_base:
        stack.layers.append(layer)
    for name, parameter in _parameters(dit, layer.parts).items():
        if not keep_base:
            merged = stack.base.get(name, parameter)
            merged.copy_(_sum(merged, [(update, layer.strength) for update in layer.parts[name]], parameter))
        elif name not in stack.base:
            home = parameter.device if parameter.is_meta else torch.device("cpu")
            stack.base[name] = parameter.detach().to(home, copy=True)
    _recompute(dit, layer.parts)


def _match(
    dit: WanDiT, entries: Mapping[str, LoRAEntry], unknown: list[str], label: str, allow_unmatched: bool
) -> tuple[_Parts, list[str]]:
    """Updates by our parameter name, and the keys left out. Raises ValueError as `apply_lora`."""
    modules = projections(dit)
    parameters = dict(dit.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    parts: _Parts = {}
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
        hint = f"; this LoRA is for a model of dim {width}, yours is {dit.config.dim}"
        raise ValueError(
            f"{label} does not fit this model: {listing(misfits)}{hint if width != dit.config.dim else ''}"
        )
    left = unknown + homeless
    if left and (not allow_unmatched or not parts):
        mend = "pass allow_unmatched=True to leave them out" if parts else "nothing of it fits"
        hint = _depth_hint(dit, homeless)
        raise ValueError(f"{label}: {len(left)} updates have no place in this model: {listing(left)}{hint}; {mend}")
    matrices = (m for updates in parts.values() for _, e in updates for m in (e.A, e.B, e.diff) if m is not None)
    if any(m.is_meta for m in matrices) and not dit.device.type == "meta":
        raise ValueError(f"{label} is on the meta device, without values: it can only go onto a model that is too")
    return parts, left


@torch.no_grad()
def _recompute(dit: WanDiT, names: Iterable[str]) -> None:
    """Parameters from their base and the LoRAs on the model; a base not needed is freed."""
    stack = _stack_of(dit)
    for name, parameter in _parameters(dit, names).items():
        if name not in stack.base:
            continue
        updates = [(u, layer.strength) for layer in stack.layers if layer.strength for u in layer.parts.get(name, ())]
        parameter.copy_(_sum(stack.base[name], updates, parameter) if updates else stack.base[name])
        if not any(name in layer.parts for layer in stack.layers):
            del stack.base[name]
    dit.weights_version += 1


def _sum(base: Tensor, updates: list[tuple[tuple[slice, LoRAEntry], float]], like: Tensor) -> Tensor:
    # Contiguous: the update is added through a flattened view, of which another layout makes a
    # copy.
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = base.to(like.device).to(dtype, copy=True, memory_format=torch.contiguous_format)
    for (rows, entry), strength in updates:
        entry.add_to(total[rows], strength)
    return total


def _stack_of(dit: WanDiT) -> _Stack:
    # In the instance's dictionary: a copy of the model has its own, and it goes with the model.
    stack = dit.__dict__.setdefault("_lora_stack", _Stack())
    assert isinstance(stack, _Stack)
    return stack


def _parameters(dit: WanDiT, names: Iterable[str]) -> dict[str, nn.Parameter]:
    every = dict(dit.named_parameters())
    return {name: every[name] for name in names}


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        raise ValueError(f"LoRA strength must be a finite number, got {strength}")
    return float(strength)


def _depth_hint(dit: WanDiT, homeless: Iterable[str]) -> str:
    if any(keymap.IMAGE_INPUT.search(name) for name in homeless):
        return " (the LoRA is for an image-input variant)"
    depth = 1 + max((int(name.split(".")[1]) for name in homeless if re.match(r"blocks\.\d", name)), default=-1)
    return f" (the LoRA is for {depth} blocks, yours has {len(dit.blocks)})" if depth > len(dit.blocks) else ""
