"""Names of the same weights in every file layout, as tables, and their rows in packed tensors.

"Official" names are those of the Wan release: every other layout is translated to them. The model
itself holds `self_attn.{q,k,v}` as one `self_attn.qkv` and `cross_attn.{k,v}` as one
`cross_attn.kv` (`PACKED`). Sources: Wan2.1 wan/modules/{model,vae,t5}.py; diffusers
scripts/convert_wan_to_diffusers.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import torch

# Wrappers (DeepSpeed, Lightning, PEFT, torch.compile, DDP) and containers (ComfyUI, diffusers, the
# reference's pipeline) in front of a weight's own name, in any combination. No weight's own name
# starts with one of these.
_PREFIX = re.compile(
    r"(?:(?:_forward_module|_orig_mod|module|pipe|dit|model|diffusion_model|base_model|transformer|first_stage_model|vae)\.)+"
)

# (official, diffusers); `{}` is the number of the block. Linear and norm modules of the
# transformer.
_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q",) * 2, ("norm_k",) * 2)
DIT_MODULES: tuple[tuple[str, str], ...] = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    *((f"blocks.{{}}.self_attn.{official}", f"blocks.{{}}.attn1.{diffusers}") for official, diffusers in _ATTENTION),
    *((f"blocks.{{}}.cross_attn.{official}", f"blocks.{{}}.attn2.{diffusers}") for official, diffusers in _ATTENTION),
    ("blocks.{}.norm3", "blocks.{}.norm2"),
    ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
)
# Parameters that are no module's weight or bias.
DIT_TABLES: tuple[tuple[str, str], ...] = (
    ("head.modulation", "scale_shift_table"),
    ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
)

PACKED: Mapping[str, tuple[str, ...]] = {"self_attn.qkv": ("q", "k", "v"), "cross_attn.kv": ("k", "v")}

# What an image-input variant (I2V, FLF2V, VACE, Fun-Control) has and a text-to-video model lacks.
IMAGE_INPUT = re.compile(r"img_emb\.|\.k_img\.|\.v_img\.|norm_k_img|image_embedder|add_k_proj|add_v_proj|^vace_")
# Scales and inputs of quantised checkpoints.
QUANTISED = re.compile(
    r"scaled_fp8|scale_weight$|weight_scale|scale_input|input_scale|\.comfy_quant$|\.(absmax|qweight)$"
)

_DIT_MARKS = {
    "packed": re.compile(r"\.self_attn\.qkv\.|\.cross_attn\.kv\."),
    "diffusers": re.compile(r"^condition_embedder\.|^proj_out\.|\.attn1\."),
    "official": re.compile(r"^time_projection\.|^head\.head\.|\.self_attn\.q\."),
}
_VAE_MARKS = {
    "official": re.compile(r"^encoder\.downsamples\.\d+\.(residual|resample|shortcut|time_conv)"),
    "diffusers": re.compile(r"^encoder\.down_blocks\.\d+\.(norm1|conv1|resample|time_conv)"),
    "wan2.2": re.compile(r"^encoder\.(downsamples\.\d+\.downsamples|down_blocks\.\d+\.(resnets|downsampler))\."),
}
_NUMBER = re.compile(r"(?<=^blocks\.)\d+(?=\.)")
_DIT_OFFICIAL = {diffusers: official for official, diffusers in (*DIT_MODULES, *DIT_TABLES)}
_DIT_DIFFUSERS = dict((*DIT_MODULES, *DIT_TABLES))

# VAE: (official, diffusers) inside a residual block, and around the stages. `_vae_table` numbers
# the stages.
_RESIDUAL = (
    ("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"), ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)  # fmt: skip
_VAE_FIXED = (
    ("conv1", "quant_conv"), ("conv2", "post_quant_conv"),
    *((f"{half}.{o}", f"{half}.{d}") for half in ("encoder", "decoder") for o, d in (
        ("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"),
        ("middle.1.norm", "mid_block.attentions.0.norm"), ("middle.1.to_qkv", "mid_block.attentions.0.to_qkv"),
        ("middle.1.proj", "mid_block.attentions.0.proj"),
    )),
)  # fmt: skip

# UMT5 encoder: (original, transformers) inside a block, and around them.
_UMT5_BLOCK = (
    ("norm1", "layer.0.layer_norm"), ("attn.q", "layer.0.SelfAttention.q"), ("attn.k", "layer.0.SelfAttention.k"),
    ("attn.v", "layer.0.SelfAttention.v"), ("attn.o", "layer.0.SelfAttention.o"),
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"), ("norm2", "layer.1.layer_norm"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"), ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo"),
)  # fmt: skip
_UMT5 = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    **{f"blocks.{{}}.{o}": f"encoder.block.{{}}.{t}" for o, t in _UMT5_BLOCK},
}


def strip_prefix(name: str) -> str:
    """A weight's own name without wrappers: `module.pipe.dit.blocks.0...` -> `blocks.0...`."""
    found = _PREFIX.match(name)
    return name[found.end() :] if found else name


def _look_up(name: str, table: Mapping[str, str]) -> str:
    """Translate a parameter, or the module it belongs to; a name not in the table stays."""
    if name in table:
        return table[name]
    stem, _, leaf = name.rpartition(".")
    return f"{table[stem]}.{leaf}" if stem in table else name


def _translate(name: str, table: Mapping[str, str]) -> str:
    """`_look_up` with the number of the block set aside."""
    number = _NUMBER.search(name)
    if number is None:
        return _look_up(name, table)
    return _look_up(f"{name[: number.start()]}{{}}{name[number.end() :]}", table).replace("{}", number.group(), 1)


def dit_to_official(name: str) -> str:
    """Official name of a transformer parameter or module of the official or diffusers layout."""
    return _translate(strip_prefix(name), _DIT_OFFICIAL)


def dit_to_diffusers(name: str) -> str:
    """Diffusers name of a transformer parameter or module given by its official name."""
    return _translate(name, _DIT_DIFFUSERS)


def _layout(names: Iterable[str], marks: Mapping[str, re.Pattern[str]]) -> str | None:
    own = [strip_prefix(name) for name in names]
    return next((layout for layout, mark in marks.items() if any(mark.search(name) for name in own)), None)


def dit_layout(names: Iterable[str]) -> str | None:
    """'official', 'diffusers' or 'packed' (ours), by names that only one of them has; else None."""
    return _layout(names, _DIT_MARKS)


def vae_layout(names: Iterable[str]) -> str | None:
    """'official' or 'diffusers' for a Wan2.1 VAE; 'wan2.2' for that of the 5B model; else None."""
    return _layout(names, _VAE_MARKS)


@lru_cache(maxsize=8)
def _vae_table(levels: int, num_res_blocks: int) -> dict[str, str]:
    """official -> diffusers, module by module, for a VAE of `levels` entries in dim_mult.

    diffusers numbers the encoder's layers straight through as the release does, but groups those of
    the decoder into up_blocks of num_res_blocks + 1 residual blocks and an upsampler.
    """
    table = dict(_VAE_FIXED)
    blocks = {
        f"{half}.middle.{middle}": f"{half}.mid_block.resnets.{i}"
        for half in ("encoder", "decoder")
        for i, middle in enumerate((0, 2))
    }
    for k in range(levels * (num_res_blocks + 1) - 1):
        blocks[f"encoder.downsamples.{k}"] = f"encoder.down_blocks.{k}"
    for level in range(levels):
        first = level * (num_res_blocks + 2)
        for j in range(num_res_blocks + 1):
            blocks[f"decoder.upsamples.{first + j}"] = f"decoder.up_blocks.{level}.resnets.{j}"
        if level < levels - 1:
            blocks[f"decoder.upsamples.{first + num_res_blocks + 1}"] = f"decoder.up_blocks.{level}.upsamplers.0"
    for official, diffusers in blocks.items():
        table |= {f"{official}.{o}": f"{diffusers}.{d}" for o, d in _RESIDUAL}
        table |= {f"{official}.{same}": f"{diffusers}.{same}" for same in ("resample.1", "time_conv")}
    return table


def vae_names_to_official(names: Iterable[str]) -> dict[str, str]:
    """Stored name -> official name, for VAE parameters in the official or diffusers layout.

    The sizes of the groups are read off the names, so any dim_mult and num_res_blocks works.
    """
    stored = {name: strip_prefix(name) for name in names}
    if vae_layout(stored) != "diffusers":
        return stored
    found = (re.match(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", own) for own in stored.values())
    ups = [(int(match[1]), int(match[2])) for match in found if match]
    levels, per_level = (1 + max(column) for column in zip(*ups, strict=True)) if ups else (1, 1)
    back = {diffusers: official for official, diffusers in _vae_table(levels, per_level - 1).items()}
    return {name: _look_up(own, back) for name, own in stored.items()}


def vae_to_diffusers(name: str, levels: int, num_res_blocks: int) -> str:
    """Diffusers name of an official VAE parameter; `levels` is len(dim_mult)."""
    return _look_up(name, _vae_table(levels, num_res_blocks))


def umt5_to_transformers(name: str) -> str:
    """transformers' name of a UMT5 encoder's parameter, given that or the original release's."""
    return _translate(strip_prefix(name), _UMT5)


def packed_parts(name: str) -> tuple[str, ...]:
    """Official names whose rows, in this order, make up our parameter: its own if not packed."""
    for packed, parts in PACKED.items():
        before, found, leaf = name.partition(f".{packed}.")
        if found:
            branch = packed.partition(".")[0]
            return tuple(f"{before}.{branch}.{part}.{leaf}" for part in parts)
    return (name,)


def unpack(tensors: Mapping[str, torch.Tensor], rename: Callable[[str], str] = str) -> dict[str, torch.Tensor]:
    """Our state dict -> official names, as views; `rename` translates, e.g. `dit_to_diffusers`."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts = packed_parts(name)
        out |= {rename(part): rows for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True)}
    return out
