"""LoRA files of every key style (spec 4.3) -> updates by official parameter name.

Scale is alpha / rank if the file, or an adapter_config.json next to it, states alpha; else 1. The
released Pusa LoRA states none: its "lora_alpha" is the user's strength (spec 4.2), so strength 1.4
here is `--lora_alpha 1.4` there.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pusa_fast.weights import files, keymap
from pusa_fast.weights.files import listing

LoRASource = str | os.PathLike[str] | Mapping[str, Tensor]

# Endings of a LoRA's keys after the module's name (spec 4.3) -> the part of the update they hold.
_SUFFIXES = tuple(
    (re.compile(rf"(?P<module>.+?)(?:{pattern})$"), part)
    for part, pattern in (
        *(
            (
                part,
                rf"\.lora_(?:{part}|{way})(?:\.[^.]+)?\.weight|\.lora_{part}|[._]lora(?:_linear_layer)?\.{way}\.weight",
            )
            for part, way in (("A", "down"), ("B", "up"))
        ),
        ("alpha", r"\.alpha"),
        ("bias_B", r"\.lora_B(?:\.[^.]+)?\.bias"),
        ("weight", r"\.diff"),
        ("bias", r"\.diff_b"),
        ("modulation", r"\.diff_m"),
    )
)
# Other methods that share the suffix `.safetensors` with LoRA, by a piece of their keys.
_REFUSED = {
    "DoRA": re.compile(r"\.dora_scale$|lora_magnitude_vector"),
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoCon with a Tucker core": re.compile(r"\.lora_mid\."),
    "OFT": re.compile(r"\.oft_"),
}
_REFUSED_CONFIG = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}

# Kohya and musubi write `lora_unet_blocks_0_self_attn_q`: underscores for dots.
_KOHYA = re.compile(r"lora_(?:unet|transformer)_")
_FLAT = tuple(
    (re.compile(re.escape(name.replace(".", "_")).replace(re.escape("{}"), r"(\d+)")), name)
    for pair in keymap.DIT_MODULES
    for name in pair
)
_PLACES = files.Places(
    "a LoRA", ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin", "pusa_v1.pt")
)


@dataclass(frozen=True)
class LoRAEntry:
    """Update of a parameter: scale * (B A), A [r, in], B [out, r], and/or a full difference."""

    A: Tensor | None = None
    B: Tensor | None = None
    alpha: float | None = None
    diff: Tensor | None = None

    @property
    def scale(self) -> float:
        """alpha / rank where alpha is stated, else 1."""
        return 1.0 if self.alpha is None or self.A is None else self.alpha / self.A.shape[0]

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """The shape that this updates, if not `shape`; kernels count as flattened matrices."""
        if self.A is not None and self.B is not None:
            own = (self.B.shape[0], math.prod(self.A.shape[1:]))
            if len(shape) < 2 or own != (shape[0], math.prod(shape[1:])):
                return str(list(own))
        if self.diff is not None and self.diff.shape != shape:
            return str(list(self.diff.shape))
        return None

    def add_to(self, weight: Tensor, strength: float) -> None:
        """weight += strength * update, in place and in weight's dtype."""
        if self.A is not None and self.B is not None:
            # Moved before it is widened: half the bytes over the bus.
            A, B = (m.to(weight.device).to(weight.dtype).flatten(1) for m in (self.A, self.B))
            weight.view(weight.shape[0], -1).addmm_(B, A, alpha=strength * self.scale)
        if self.diff is not None:
            weight.add_(self.diff.to(weight.device).to(weight.dtype), alpha=strength)


def read_lora(source: LoRASource) -> dict[str, LoRAEntry]:
    """Updates by official parameter name, from a file, a directory or a state dict.

    The directory is one that PEFT or diffusers wrote. Raises FileNotFoundError; ValueError for a
    damaged file, a key that no known style explains, half a pair, two updates of one parameter, and
    for DoRA, rsLoRA, LoHa, LoKr and the like, which are named.
    """
    label, entries, unknown = read_with_unknown(source)
    if unknown:
        found = f"{listing(unknown)}{_checkpoint_hint(unknown)}"
        raise ValueError(f"{label}: {len(unknown)} keys are of no known LoRA style: {found}")
    return entries


def read_with_unknown(source: LoRASource) -> tuple[str, dict[str, LoRAEntry], list[str]]:
    """Label for messages, updates by official parameter name, and keys that no style explains."""
    found = files.open_source(source, _PLACES)
    for what, pattern in _REFUSED.items():
        if names := [name for name in found.tensors if pattern.search(name)]:
            raise ValueError(f"{found.label} is {what} ({listing(names)}), which is not supported: only LoRA is")
    settings = _settings(found)
    modules: dict[str, dict[str, Tensor]] = {}
    written: dict[str, str] = {}  # official module -> its name in the file and in adapter_config.json
    unknown: list[str] = []
    for key, stored in found.tensors.items():
        match, part = next(((m, part) for pattern, part in _SUFFIXES if (m := pattern.match(key))), (None, ""))
        module = _official_module(match["module"]) if match else None
        if match is None or module is None:
            unknown.append(key)
            continue
        if part in modules.setdefault(module, {}):
            second = f"the second time as {key}: it mixes adapters or styles"
            raise ValueError(f"{found.label} updates {module} twice, {second}")
        if not stored.dtype.is_floating_point and part != "alpha":
            raise ValueError(f"{found.label} is quantised ({key} is {stored.dtype}): use a bf16, fp16 or fp32 file")
        modules[module][part] = stored.read()
        written[module] = keymap.strip_prefix(match["module"])
    entries: dict[str, LoRAEntry] = {}
    for module, parts in modules.items():
        entries |= _entries(module, parts, _alpha(module, written[module], parts, settings, found.label), found.label)
    if not entries:
        raise ValueError(f"{found.label} holds no LoRA: its keys are {listing(unknown)}{_checkpoint_hint(unknown)}")
    return found.label, entries, unknown


def _official_module(name: str) -> str | None:
    """Official module name from any style; None for an underscored name of an unknown module."""
    flat = _KOHYA.match(name)
    if flat is None:
        return keymap.dit_to_official(name)
    hits = ((pattern.fullmatch(name, flat.end()), dotted) for pattern, dotted in _FLAT)
    return next((keymap.dit_to_official(dotted.format(*hit.groups())) for hit, dotted in hits if hit), None)


def _entries(module: str, parts: Mapping[str, Tensor], alpha: float | None, label: str) -> dict[str, LoRAEntry]:
    A, B = parts.get("A"), parts.get("B")
    if (A is None) != (B is None):
        here, missing = ("lora_B", "lora_A") if A is None else ("lora_A", "lora_B")
        raise ValueError(f"{label}: {module} has {here} without {missing}: the file is incomplete")
    if A is None and parts.keys() & {"alpha", "bias_B"}:
        raise ValueError(f"{label}: {module} has {listing(parts)} without lora_A and lora_B: the file is incomplete")
    if A is not None and B is not None and (min(A.ndim, B.ndim) < 2 or not 0 < A.shape[0] == B.shape[1:].numel()):
        shapes = f"lora_A {list(A.shape)} and lora_B {list(B.shape)} of {module}"
        raise ValueError(f"{label}: {shapes} differ in rank, or have none: the file is damaged")
    low_rank = LoRAEntry(A, B, alpha, parts.get("weight"))
    bias = parts.get("bias")
    if "bias_B" in parts:  # PEFT scales this bias as it scales B A
        scaled = parts["bias_B"].float() * low_rank.scale
        bias = scaled if bias is None else scaled + bias.float()
    entries = {"bias": LoRAEntry(diff=bias), "modulation": LoRAEntry(diff=parts.get("modulation"))}
    every = {"weight": low_rank, **entries}
    return {f"{module}.{leaf}": e for leaf, e in every.items() if e.A is not None or e.diff is not None}


def _settings(found: files.Source) -> dict[str, Any]:
    """PEFT's settings, from adapter_config.json next to the file or from diffusers' metadata."""
    where, text = f"the metadata of {found.label}", found.metadata.get("lora_adapter_metadata", "{}")
    if found.folder and (file := found.folder / "adapter_config.json").is_file():
        where, text = str(file), file.read_text()
    raw = files.parse_json(text, where)
    settings = {key.removeprefix("transformer."): value for key, value in raw.items()}
    kinds = [name for key, name in _REFUSED_CONFIG.items() if settings.get(key)]
    kind = settings.get("peft_type", "LORA")
    if kinds or kind != "LORA":
        raise ValueError(f"{where} says {', '.join(kinds) or kind}, which is not supported: only LoRA is")
    return settings


def _alpha(
    module: str, written: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any], label: str
) -> float | None:
    """alpha of one module: the file's own, else that of the adapter's settings, else None."""
    if "A" not in parts:
        return None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1 or not math.isfinite(float(parts["alpha"])):
            raise ValueError(f"{label}: alpha of {module} is no number: the file is damaged")
        return float(parts["alpha"])
    rank = _by_pattern(settings.get("rank_pattern"), written, settings.get("r"))
    if rank is not None and rank != parts["A"].shape[0]:
        raise ValueError(
            f"{label}: {module} has rank {parts['A'].shape[0]}, but the adapter_config.json next to it says {rank}: "
            "it belongs to another LoRA, move the file away from it"
        )
    alpha = _by_pattern(settings.get("alpha_pattern"), written, settings.get("lora_alpha"))
    return None if alpha is None else float(alpha)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float | None) -> float | None:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _checkpoint_hint(keys: Iterable[str]) -> str:
    return " (a whole model: open it with load_dit)" if keymap.dit_layout(keys) else ""
