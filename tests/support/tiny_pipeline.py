"""A tiny random model in nano's layout, LoRA included."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pusa_fast import DiTConfig, VAEConfig, WanDiT, WanVAE
from pusa_fast.weights import checkpoint, keymap

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moves", "left", "right"]
DIT = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16)
VAE = VAEConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
)
DEFAULTS = {
    "num_frames": 5,
    "height": 32,
    "width": 48,
    "fps": 8,
    "steps": 2,
    "guidance_scale": 3.0,
    "shift": 3.0,
    "negative_prompt": "blue",
}
LORA_KEY = "blocks.0.self_attn.q"


def write_model(folder: Path) -> Path:
    """Into `folder`, which is made. Returns it."""
    torch.manual_seed(0)
    folder.mkdir()
    dit, vae = WanDiT(DIT), WanVAE(VAE)
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)
    checkpoint.save(folder / "dit.safetensors", keymap.unpack(dit.state_dict()), DIT)
    checkpoint.save(folder / "vae.safetensors", vae.state_dict(), VAE)
    lora = {
        f"{LORA_KEY}.lora_A.default.weight": torch.randn(2, 48),
        f"{LORA_KEY}.lora_B.default.weight": torch.randn(48, 2),
    }
    checkpoint.save(folder / "pusa_lora.safetensors", lora)
    config = UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=1)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    spec = {
        "name": "tiny", "dit": "dit.safetensors", "vae": "vae.safetensors",
        "text": {"encoder": "text_encoder", "tokenizer": "tokenizer", "text_len": 8},
        "lora": {"pusa_lora.safetensors": 1.0}, "defaults": DEFAULTS, "training": {"seed": 0},
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(spec))
    return folder
