"""Checkpoints -> models: whose configuration it is, names to official, tensors into a module built without memory.

The module is built on the meta device and each stored tensor is put in its place, one at a time: nothing is held twice.
Files kept in their own dtype on the CPU stay mapped; only packed projections are copied together.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pusa_fast.config import MODELS, DiTConfig, VAEConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.fp8 import check_precision, quantize
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.weights import files, keymap
from pusa_fast.weights.files import Source, StateSource, Stored, listing

C = TypeVar("C", DiTConfig, VAEConfig)
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Family(Generic[C]):
    """What distinguishes the loading of one kind of model from another."""

    what: str
    places: files.Places
    config: type[C]
    build: Callable[[C], nn.Module]
    layout: Callable[[Iterable[str]], str | None]
    to_official: Callable[[Iterable[str]], dict[str, str]]
    # Configuration fields as others write them -> ours; a mapping with all of `marks` is taken for this kind's.
    aliases: Mapping[str, str]
    marks: frozenset[str]
    fingerprint: tuple[str, ...]  # tensors by whose shapes the nearest published model is recognised


def _dit_to_official(names: Iterable[str]) -> dict[str, str]:
    return {name: keymap.dit_to_official(name) for name in names}


DIT = Family(
    "a Wan transformer", files.DIT, DiTConfig, WanDiT, keymap.dit_layout, _dit_to_official,
    {"num_attention_heads": "num_heads", "in_dim": "in_channels", "out_dim": "out_channels"},
    frozenset({"num_heads", "num_layers", "ffn_dim"}),
    ("patch_embedding.weight", "blocks.0.ffn.0.weight"),
)  # fmt: skip
VAE = Family(
    "a Wan VAE", files.VAE, VAEConfig, WanVAE, keymap.vae_layout, keymap.vae_names_to_official,
    {"dim": "base_dim", "temperal_downsample": "temporal_downsample"},
    frozenset({"base_dim", "z_dim"}),
    ("encoder.conv1.weight", "decoder.conv1.weight"),
)  # fmt: skip


def load_dit(
    path: StateSource,
    config: DiTConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    precision: str | None = None,
) -> WanDiT:
    """A transformer from a file, its shards, a directory or a state dict, in the official, diffusers or packed layout.

    dtype None keeps what is stored. The configuration is `config`, else the file's own or the config.json beside it,
    else that of a published model with the same names and shapes. Tensors of a state dict are copied, never shared.
    precision "fp8": the blocks' products on e4m3 rows (`model.fp8`), bfloat16 around them; lossy, inference only, and too
    late for a LoRA, which goes on before (`Pipeline.from_pretrained` does both in order).

    Raises FileNotFoundError; ValueError for a damaged file, another kind of model, an image-input variant, quantised
    tensors, an unknown configuration, for every tensor that is unknown, missing or of the wrong shape, and, before
    anything is read, for a precision that does not exist or cannot run on `device`.
    """
    dtype = check_precision(precision, torch.device(device), dtype)
    dit = _load(DIT, WanDiT, path, config, device, dtype)
    return dit if precision is None else quantize(dit)


def load_vae(
    path: StateSource,
    config: VAEConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> WanVAE:
    """A Wan2.1 VAE, official (.pth or safetensors) or diffusers layout. Otherwise as `load_dit`."""
    return _load(VAE, WanVAE, path, config, device, dtype)


def load_text_encoder_state(
    path: StateSource, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """State dict of transformers' UMT5EncoderModel from the original release (.pth, safetensors) or transformers' own files.

    Raises FileNotFoundError, or ValueError for a file that is damaged, quantised or no UMT5 encoder.
    """
    found = files.open_source(path, files.TEXT)
    _refuse_quantised(found, dtype)
    names = {name: keymap.umt5_to_transformers(name) for name in found.tensors}
    strange = [name for name, to in names.items() if not to.startswith(("shared.", "encoder."))]
    if strange or "encoder.final_layer_norm.weight" not in names.values():
        raise ValueError(f"{found.label} holds no UMT5 encoder: {listing(strange) or 'the final norm is missing'}")
    state = {to: _placed([found.tensors[name]], found, device, dtype) for name, to in names.items()}
    # One table under two names: transformers ties them, files keep either.
    for name, other in (
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
    ):
        if other in state:
            state.setdefault(name, state[other])
    return state


def read_config(family: Family[C], where: StateSource) -> C:
    """The configuration that `load_dit` and `load_vae` would use, from the headers of the files alone. Raises as they do."""
    found = files.open_source(where, family.places)
    _refuse_other_kinds(family, found)
    return _resolve_config(family, found, _by_official_name(family, found))


M = TypeVar("M", bound=nn.Module)


def _load(
    family: Family[C],
    model: type[M],
    where: StateSource,
    config: C | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> M:
    found = files.open_source(where, family.places)
    _refuse_other_kinds(family, found)
    _refuse_quantised(found, dtype)
    stored = _by_official_name(family, found)
    resolved = config or _resolve_config(family, found, stored)
    with torch.device("meta"):
        module = family.build(resolved)
    assert isinstance(module, model)
    _fill(module, stored, found, device, dtype)
    return module.eval()


def _resolve_config(family: Family[C], found: Source, stored: dict[str, Stored]) -> C:
    return _config_of(family, found) or _published(family, stored, found.label)


def _by_official_name(family: Family[C], found: Source) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for name, official in family.to_official(found.tensors).items():
        if official in stored:
            raise ValueError(f"{found.label} holds {official} twice, once as {name}: it mixes layouts")
        stored[official] = found.tensors[name]
    return stored


def _refuse_other_kinds(family: Family[C], found: Source) -> None:
    names = list(found.tensors)
    if any(re.search(r"[._]lora[._]|\.lora_[AB]$", n) for n in names):
        raise ValueError(f"{found.label} is a LoRA, not {family.what}: load the base model and use apply_lora")
    image = [n for n in names if keymap.IMAGE_INPUT.search(keymap.strip_prefix(n))]
    if image and keymap.dit_layout(names):
        raise ValueError(
            f"{found.label} is an image-input variant ({listing(image)}), which is not supported: Pusa conditions a "
            "text-to-video model by its timesteps, so use the T2V checkpoint"
        )
    layout = family.layout(names)
    if layout == "wan2.2":
        raise ValueError(f"{found.label} is the VAE of Wan2.2-5B, which is not supported: use the Wan2.1 VAE")
    if layout is None:
        other = {"a Wan transformer": keymap.dit_layout(names), "a Wan VAE": keymap.vae_layout(names)}
        is_one = next((what for what, known in other.items() if known), None)
        raise ValueError(f"{found.label} is not {family.what} but {is_one or f'unknown: it holds {listing(names)}'}")


def _refuse_quantised(found: Source, dtype: torch.dtype | None) -> None:
    named = [n for n in found.tensors if keymap.QUANTISED.search(n)]
    kinds = {n: t.dtype for n, t in found.tensors.items() if not t.dtype.is_floating_point}
    if named or kinds:
        raise ValueError(f"{found.label} is quantised ({listing(named or kinds)}): use a bf16, fp16 or fp32 checkpoint")
    small = [n for n, t in found.tensors.items() if t.dtype.itemsize == 1]
    if small and dtype is None:
        raise ValueError(
            f"{found.label} stores 8-bit floats ({listing(small)}): pass dtype=torch.bfloat16 to widen them"
        )


def _config_of(family: Family[C], found: Source) -> C | None:
    """The configuration in the file's metadata or in config.json beside it; None where neither describes this kind."""
    beside = found.folder / "config.json" if found.folder else None
    texts = {
        f"the metadata of {found.label}": found.metadata.get("config"),
        str(beside): beside.read_text() if beside and beside.is_file() else None,
    }
    configs = (_parse(family, _json(text, where), where) for where, text in texts.items() if text is not None)
    return next((config for config in configs if config is not None), None)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: the model configuration is no JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _parse(family: Family[C], raw: Mapping[str, Any], where: str) -> C | None:
    """Our, diffusers' or the Wan release's field names -> a config; None for the configuration of something else."""
    heads, width = raw.get("num_attention_heads"), raw.get("attention_head_dim")
    derived = {"dim": heads * width} if isinstance(heads, int) and isinstance(width, int) else {}
    values = {family.aliases.get(name, name): value for name, value in {**derived, **raw}.items()}
    if not family.marks <= values.keys():
        return None
    if (
        values.get("model_type") in ("i2v", "flf2v", "vace")
        or values.get("image_dim")
        or values.get("added_kv_proj_dim")
    ):
        raise ValueError(f"{where} describes an image-input variant, which is not supported: use the T2V checkpoint")
    fields = {field.name for field in dataclasses.fields(family.config)}
    try:
        return family.config(**{name: value for name, value in values.items() if name in fields})
    except TypeError as error:
        raise ValueError(f"{where}: incomplete configuration of {family.what} ({error})") from error


@lru_cache(maxsize=16)
def _published_shapes(name: str) -> Shapes:
    config = MODELS[name]
    with torch.device("meta"):
        module = WanDiT(config) if isinstance(config, DiTConfig) else WanVAE(config)
    return {n: tuple(p.shape) for n, p in keymap.unpack(module.state_dict()).items()}


def _published(family: Family[C], stored: dict[str, Stored], label: str) -> C:
    """The published model with these names and shapes. One of the same sizes is taken too: what differs is named later."""
    unpacked = _official_shapes(stored)
    depth = _depth(unpacked)
    for name, config in MODELS.items():
        if isinstance(config, family.config):
            known = _published_shapes(name)
            if depth == _depth(known) and all(unpacked.get(n) == known[n] for n in family.fingerprint):
                return config
    raise ValueError(f"{label} matches no published model and carries no configuration: {_advice(family, unpacked)}")


def _official_shapes(stored: Mapping[str, Stored]) -> Shapes:
    shapes: Shapes = {}
    for name, tensor in stored.items():
        parts = keymap.packed_parts(name)
        rows = tuple(size // len(parts) for size in tensor.shape[:1])
        shapes |= dict.fromkeys(parts, (*rows, *tensor.shape[1:]))
    return shapes


def _depth(shapes: Iterable[str]) -> int:
    return 1 + max((int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")), default=-1)


def _advice(family: Family[C], shapes: Shapes) -> str:
    """What to pass; the number of heads is the one thing that shapes do not tell."""
    patch, ffn, text = (
        shapes.get(n, ()) for n in ("patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight")
    )
    time, head = (shapes.get(n, ()) for n in ("time_embedding.0.weight", "head.head.weight"))
    if family.config is VAEConfig or not (len(patch) == 5 and ffn and text and time and head):
        return f"pass config={family.config.__name__}(...)"
    return (
        f"pass config=DiTConfig(dim={patch[0]}, ffn_dim={ffn[0]}, num_heads=?, num_layers={_depth(shapes)}, in_channels={patch[1]}, "
        f"out_channels={head[0] // (patch[3] * patch[4])}, text_dim={text[1]}, freq_dim={time[1]}) with its num_heads"
    )


def _fill(
    module: nn.Module, stored: dict[str, Stored], found: Source, device: str | torch.device, dtype: torch.dtype | None
) -> None:
    """Put every stored tensor in its place; names all that is unknown, missing or misshapen before reading any."""
    used: set[str] = set()
    plan: dict[str, list[Stored]] = {}
    missing, misshapen = [], []
    for name, parameter in module.named_parameters():
        parts = (name,) if name in stored else keymap.packed_parts(name)
        used.update(parts)
        missing += [part for part in parts if part not in stored]
        plan[name] = [stored[part] for part in parts if part in stored]
        need = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        misshapen += [
            f"{part} {list(stored[part].shape)}, not {list(need)}"
            for part in parts
            if part in stored and stored[part].shape != need
        ]
    unknown = sorted(stored.keys() - used)
    problems = {"unknown": unknown, "missing": missing, "wrong shape": misshapen}
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {kind}: {listing(names)}" for kind, names in problems.items() if names)
        shard = " (one shard of several: give its directory)" if missing and "-of-" in found.label else ""
        raise ValueError(f"{found.label} does not fit the model{shard}: {told}")
    assert not list(module.buffers()), "a buffer built on the meta device would have no values"
    for name, parts_stored in plan.items():
        owner, _, leaf = name.rpartition(".")
        tensor = _placed(parts_stored, found, device, dtype)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor))


def _placed(parts: list[Stored], found: Source, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """The stored rows, one below the other, on `device` in `dtype` (None: theirs)."""
    device = torch.device(device)
    kind = dtype or parts[0].dtype
    for part in parts[1:]:
        kind = dtype or torch.promote_types(kind, part.dtype)
    if device.type == "meta":
        return torch.empty((sum(p.shape[0] for p in parts), *parts[0].shape[1:]), dtype=kind, device=device)
    if len(parts) == 1:
        return _read(parts[0], found).to(device, kind, copy=found.shared).contiguous()
    out = torch.empty((sum(p.shape[0] for p in parts), *parts[0].shape[1:]), dtype=kind, device=device)
    row = 0
    for part in parts:
        out[row : row + part.shape[0]] = _read(part, found)
        row += part.shape[0]
    return out


def _read(part: Stored, found: Source) -> Tensor:
    tensor = part.read()
    if tensor.is_meta:
        raise ValueError(f"{found.label} is on the meta device, without values: load it with device='meta'")
    return tensor


def config_metadata(config: DiTConfig | VAEConfig) -> dict[str, str]:
    """safetensors metadata from which `load_dit` and `load_vae` know the configuration."""
    return {"config": json.dumps(dataclasses.asdict(config))}


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: DiTConfig | VAEConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file that loads without a config beside it; `keymap.unpack(model.state_dict())` has official names.

    The file appears under its name only when complete. Raises FileNotFoundError when its directory is not there.
    """
    files.save(path, tensors, {**(config_metadata(config) if config else {}), **(metadata or {})})
