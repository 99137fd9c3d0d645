"""Checkpoints -> models: find the configuration, translate names, fill a module.

The module is built on the meta device and stored tensors are put in place one at a time, so nothing
is held twice. Files kept in their own dtype on the CPU stay mapped; only packed projections are
copied together.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
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
M = TypeVar("M", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Family(Generic[C, M]):
    """What distinguishes the loading of one kind of model from another."""

    what: str
    places: files.Places
    config: type[C]
    build: Callable[[C], M]
    layout: Callable[[Iterable[str]], str | None]
    to_official: Callable[[Iterable[str]], dict[str, str]]
    aliases: Mapping[str, str]  # configuration fields as others write them -> ours
    marks: frozenset[str]  # fields that only this kind's configuration has
    fingerprint: Callable[[C], Shapes]  # shapes by which a published model is recognised


def _dit_to_official(names: Iterable[str]) -> dict[str, str]:
    return {name: keymap.dit_to_official(name) for name in names}


DIT = Family(
    "a Wan transformer", files.DIT, DiTConfig, WanDiT, keymap.dit_layout, _dit_to_official,
    {"num_attention_heads": "num_heads", "in_dim": "in_channels", "out_dim": "out_channels"},
    frozenset({"num_heads", "num_layers", "ffn_dim"}),
    lambda c: {"patch_embedding.weight": (c.dim, c.in_channels, *c.patch_size),
               "blocks.0.ffn.0.weight": (c.ffn_dim, c.dim)},
)  # fmt: skip
VAE = Family(
    "a Wan VAE", files.VAE, VAEConfig, WanVAE, keymap.vae_layout, keymap.vae_names_to_official,
    {"dim": "base_dim", "temperal_downsample": "temporal_downsample"},
    frozenset({"base_dim", "z_dim"}),
    lambda c: {"encoder.conv1.weight": (c.base_dim, 3, 3, 3, 3),
               "decoder.conv1.weight": (c.base_dim * c.dim_mult[-1], c.z_dim, 3, 3, 3)},
)  # fmt: skip


def load_dit(
    path: StateSource,
    config: DiTConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    precision: str | None = None,
) -> WanDiT:
    """A transformer from a file, its shards, a directory or a state dict.

    The layout may be official, diffusers or packed (ours). dtype None keeps what is stored. The
    configuration is `config`, else the file's own or that of a config.json next to it, else that of
    a published model with the same names and shapes. Tensors of a state dict are copied, never
    shared. precision "fp8": the blocks' matmuls on e4m3 rows (`model.fp8`), bfloat16 around them;
    lossy, inference only, and too late for a LoRA, which has to go on before
    (`Pipeline.from_pretrained` does both in order).

    Raises FileNotFoundError; ValueError for a damaged file, another kind of model, an image-input
    variant, quantised tensors, an unknown configuration, for every tensor that is unknown, missing
    or of the wrong shape, and, before anything is read, for a precision that does not exist or
    cannot run on `device`.
    """
    dtype = check_precision(precision, torch.device(device), dtype)
    dit = _load(DIT, path, config, device, dtype)
    return dit if precision is None else quantize(dit)


def load_vae(
    path: StateSource,
    config: VAEConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> WanVAE:
    """A Wan2.1 VAE, official (.pth or safetensors) or diffusers layout. Otherwise as `load_dit`."""
    return _load(VAE, path, config, device, dtype)


def load_text_encoder_state(
    path: StateSource, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """State dict of transformers' UMT5EncoderModel, from its files or the original release.

    Raises FileNotFoundError, or ValueError for a file that is damaged, quantised or not a UMT5
    encoder.
    """
    found = files.open_source(path, files.TEXT)
    _refuse_quantised(found, dtype)
    names = {name: keymap.umt5_to_transformers(name) for name in found.tensors}
    strange = [name for name, to in names.items() if not to.startswith(("shared.", "encoder."))]
    if strange or "encoder.final_layer_norm.weight" not in names.values():
        raise ValueError(f"{found.label} holds no UMT5 encoder: {listing(strange) or 'the final norm is missing'}")
    state = {to: _placed([found.tensors[name]], found, device, dtype) for name, to in names.items()}
    # One table under two names: transformers ties them, files keep either.
    tied = ("shared.weight", "encoder.embed_tokens.weight")
    for name, other in (tied, tied[::-1]):
        if other in state:
            state.setdefault(name, state[other])
    return state


def read_config(family: Family[C, M], where: StateSource) -> C:
    """The configuration that `load_dit` and `load_vae` would use, from headers alone. Raises as
    they do."""
    found = files.open_source(where, family.places)
    _refuse_other_kinds(family, found)
    return _resolve_config(family, found, _by_official_name(family, found))


def _load(
    family: Family[C, M], where: StateSource, config: C | None, device: str | torch.device, dtype: torch.dtype | None
) -> M:
    found = files.open_source(where, family.places)
    _refuse_other_kinds(family, found)
    _refuse_quantised(found, dtype)
    stored = _by_official_name(family, found)
    resolved = config or _resolve_config(family, found, stored)
    with torch.device("meta"):
        module = family.build(resolved)
    _fill(module, stored, found, device, dtype)
    return module.eval()


def _resolve_config(family: Family[C, M], found: Source, stored: dict[str, Stored]) -> C:
    return _config_of(family, found) or _published(family, stored, found.label)


def _by_official_name(family: Family[C, M], found: Source) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for name, official in family.to_official(found.tensors).items():
        if official in stored:
            raise ValueError(f"{found.label} holds {official} twice, once as {name}: it mixes layouts")
        stored[official] = found.tensors[name]
    return stored


def _refuse_other_kinds(family: Family[C, M], found: Source) -> None:
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


def _config_of(family: Family[C, M], found: Source) -> C | None:
    """The configuration in the file's metadata or a config.json next to it, if of this kind."""
    sidecar = found.folder / "config.json" if found.folder else None
    texts = {
        f"the metadata of {found.label}": found.metadata.get("config"),
        str(sidecar): sidecar.read_text() if sidecar and sidecar.is_file() else None,
    }
    given = ((files.parse_json(text, where), where) for where, text in texts.items() if text is not None)
    configs = (_parse(family, raw, where) for raw, where in given)
    return next((config for config in configs if config is not None), None)


def _parse(family: Family[C, M], raw: Mapping[str, Any], where: str) -> C | None:
    """Our, diffusers' or the Wan release's field names -> a config; None if of something else."""
    heads, width = raw.get("num_attention_heads"), raw.get("attention_head_dim")
    derived = {"dim": heads * width} if isinstance(heads, int) and isinstance(width, int) else {}
    values = {family.aliases.get(name, name): value for name, value in {**derived, **raw}.items()}
    if not family.marks <= values.keys():
        return None
    image = values.get("model_type") in ("i2v", "flf2v", "vace")
    if image or values.get("image_dim") or values.get("added_kv_proj_dim"):
        raise ValueError(f"{where} describes an image-input variant, which is not supported: use the T2V checkpoint")
    fields = {field.name for field in dataclasses.fields(family.config)}
    try:
        return family.config(**{name: value for name, value in values.items() if name in fields})
    except TypeError as error:
        raise ValueError(f"{where}: incomplete configuration of {family.what} ({error})") from error


def _published(family: Family[C, M], stored: dict[str, Stored], label: str) -> C:
    """The published model of these sizes. Tensors that it lacks or has too many are named later."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for config in (config for config in MODELS.values() if isinstance(config, family.config)):
        same_depth = getattr(config, "num_layers", 0) == _depth(shapes)
        if same_depth and family.fingerprint(config).items() <= shapes.items():
            return config
    raise ValueError(f"{label} matches no published model and carries no configuration: {_advice(family, shapes)}")


def _depth(names: Iterable[str]) -> int:
    return 1 + max((int(n.split(".")[1]) for n in names if n.startswith("blocks.")), default=-1)


def _advice(family: Family[C, M], shapes: Shapes) -> str:
    """What to pass; the number of heads is the one thing that shapes do not tell."""
    names = ("patch_embedding", "blocks.0.ffn.0", "text_embedding.0", "time_embedding.0", "head.head")
    patch, ffn, text, time, head = (shapes.get(f"{name}.weight", ()) for name in names)
    if family.config is VAEConfig or not (len(patch) == 5 and ffn and text and time and head):
        return f"pass config={family.config.__name__}(...)"
    return (
        f"pass config=DiTConfig(dim={patch[0]}, ffn_dim={ffn[0]}, num_heads=?, num_layers={_depth(shapes)}, "
        f"in_channels={patch[1]}, out_channels={head[0] // (patch[3] * patch[4])}, text_dim={text[1]}, "
        f"freq_dim={time[1]}) with its num_heads"
    )


def _fill(
    module: nn.Module, stored: dict[str, Stored], found: Source, device: str | torch.device, dtype: torch.dtype | None
) -> None:
    """Put every stored tensor in its place.

    Raises ValueError, before reading any, that names all unknown, missing and misshapen ones.
    """
    parameters = dict(module.named_parameters())
    plan = {name: (name,) if name in stored else keymap.packed_parts(name) for name in parameters}
    needed: Shapes = {}  # of every official tensor
    for name, parts in plan.items():
        needed |= dict.fromkeys(parts, (parameters[name].shape[0] // len(parts), *parameters[name].shape[1:]))
    there = {name: stored[name].shape for name in needed if name in stored}
    problems = {
        "unknown": sorted(stored.keys() - needed.keys()),
        "missing": [name for name in needed if name not in stored],
        "wrong shape": [f"{n} {list(got)}, not {list(needed[n])}" for n, got in there.items() if got != needed[n]],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {kind}: {listing(names)}" for kind, names in problems.items() if names)
        shard = " (one shard of several: give its directory)" if problems["missing"] and "-of-" in found.label else ""
        raise ValueError(f"{found.label} does not fit the model{shard}: {told}")
    assert not list(module.buffers()), "a buffer built on the meta device would have no values"
    for name, parts in plan.items():
        owner, _, leaf = name.rpartition(".")
        tensor = _placed([stored[part] for part in parts], found, device, dtype)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor))


def _placed(parts: list[Stored], found: Source, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """The stored rows, one below the other, on `device` in `dtype` (None: theirs)."""
    dtype = dtype or reduce(torch.promote_types, (part.dtype for part in parts))
    if len(parts) == 1 and torch.device(device).type != "meta":
        return _read(parts[0], found).to(device, dtype, copy=found.shared).contiguous()
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) if len(parts) > 1 else parts[0].shape
    out = torch.empty(shape, dtype=dtype, device=device)
    if not out.is_meta:
        for rows, part in zip(torch.split(out, [part.shape[0] for part in parts]), parts, strict=True):
            rows.copy_(_read(part, found))
    return out


def _read(part: Stored, found: Source) -> Tensor:
    tensor = part.read()
    if tensor.is_meta:
        raise ValueError(f"{found.label} is on the meta device, without values: load it with device='meta'")
    return tensor


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: DiTConfig | VAEConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whose metadata holds the configuration for `load_dit`, `load_vae`.

    `keymap.unpack(model.state_dict())` has official names. The file appears under its name only
    when complete. Raises FileNotFoundError if its directory does not exist.
    """
    own = {"config": json.dumps(dataclasses.asdict(config))} if config else {}
    files.save(path, tensors, own | dict(metadata or {}))
