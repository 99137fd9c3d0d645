"""Stage 2 of nano: the text encoder, a two-layer UMT5, its tokenizer made from the sprites' words.

It learns to predict a caption's attributes from the mean of its rows, then is frozen, as Wan's is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import stage
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pusa_fast.data import sprites

TEXT_LEN, WIDTH = 24, 64
STEPS, BATCH = 500, 128
_ATTRIBUTES = ("shape", "color", "size", "direction", "speed", "background")
_EXTRA = "a an the moves slides is moving to on background with and in of from clip video shape slow fast still photo"


def build_tokenizer() -> Any:
    """A PreTrainedTokenizerFast: lower case, words and punctuation, `</s>` at the end as in T5."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    grammar = sprites.GRAMMAR
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *dict.fromkeys([*(w for table in grammar for w in table), *_EXTRA.split(), ".", ","]),
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class TextStack(nn.Module):
    """Tokenizer and encoder with gradients: captions -> [B, TEXT_LEN, D], zero rows at the end."""

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer

    @classmethod
    def build(cls, width: int) -> TextStack:
        from transformers import UMT5Config, UMT5EncoderModel

        tokenizer = build_tokenizer()
        config = UMT5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, num_heads=4, d_ff=2 * width, num_layers=2,
            dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
        return cls(UMT5EncoderModel(config), tokenizer)

    @classmethod
    def load(cls, folder: Path) -> TextStack:
        from transformers import AutoTokenizer, UMT5EncoderModel

        encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        return cls(encoder, AutoTokenizer.from_pretrained(folder / "tokenizer"))

    def forward(self, captions: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=TEXT_LEN, return_tensors="pt"
        )
        mask = tokens["attention_mask"]
        hidden: Tensor = self.encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return hidden * mask[..., None]

    def save(self, folder: Path) -> None:
        """The layout that the pipeline reads: text_encoder/ in bf16 and tokenizer/."""
        encoder: Any = self.encoder
        encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


def train(run: Path, seed: int, scale: float) -> TextStack:
    """A new encoder, trained to predict what its captions say."""
    torch.manual_seed(seed)
    stack = TextStack.build(WIDTH)
    tables = [[*table, "", "photo"] for table in sprites.GRAMMAR]  # "": the caption does not say
    heads = nn.ModuleList(nn.Linear(WIDTH, len(table)) for table in tables)
    both = nn.ModuleDict({"text": stack, "heads": heads})
    optimizer = torch.optim.AdamW(both.parameters(), lr=2e-3, weight_decay=0.0)
    # Word embeddings start at standard deviation 1, as T5's do: rows differ from the first step on.
    right = [0.0]

    def loss_fn(step: int) -> Tensor:
        generator = stage.step_generator(seed + 5, step)
        samples = [data.draw(generator) for _ in range(BATCH)]
        captions = [data.caption(sample, generator) for sample in samples]
        rows = stack(captions)
        mean = rows.sum(1) / rows.any(-1).sum(1, keepdim=True)
        logits = [head(mean) for head in heads]
        wanted = [
            torch.tensor([_said(s, c, column, tables[column]) for s, c in zip(samples, captions, strict=True)])
            for column in range(6)
        ]
        right[0] = sum(float((x.argmax(1) == y).float().mean()) for x, y in zip(logits, wanted, strict=True)) / 6
        return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, wanted, strict=True)]).sum()

    stage.train("text", {"both": both}, [optimizer], loss_fn, steps(scale), run,
                plan=f"seed {seed}, {steps(scale)} steps", validate=lambda: {"right": round(right[0], 4)})  # fmt: skip
    return stack


def steps(scale: float) -> int:
    return max(1, round(STEPS * scale))


def _said(sample: data.Sample, caption: str, column: int, table: list[str]) -> int:
    """Which entry of the table a caption names in this column of the grammar."""
    word = getattr(sample.scene, _ATTRIBUTES[column])
    if _ATTRIBUTES[column] == "background" and sample.photo is not None:
        word = "photo"
    return table.index(word if word in caption.split() else "")
