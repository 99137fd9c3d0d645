"""Prompts -> context rows for the transformer: cleaning, and a UMT5 encoder from transformers.

Shapes: B prompts, L = text_len rows, D width of the encoder.
"""

from __future__ import annotations

import html
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Tokenizers keep padding and truncation as state: both are done here, one thread at a time.
_LOCK = threading.Lock()


def clean_prompt(prompt: str) -> str:
    """Mend broken unicode, undo HTML escapes twice, make all white space one space, and strip.

    Reference: `whitespace_clean`.
    """
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class TextEncoder:
    """Encodes prompts one by one and remembers the last `cache_size` of them. Threads may share it.

    `model`: a UMT5EncoderModel, or anything that takes `input_ids`, `attention_mask` [1,L] and
    returns `last_hidden_state` [1,L,D]; `tokenizer`: a transformers tokenizer; `text_len`: rows
    given to the transformer, which attends to all of them.
    """

    def __init__(self, model: Any, tokenizer: Any, text_len: int = 512, cache_size: int = 64) -> None:
        if text_len < 1 or cache_size < 0:
            raise ValueError(f"text_len must be at least 1 and cache_size at least 0; got {text_len} and {cache_size}")
        self.model, self.tokenizer, self.text_len, self.cache_size = model.eval(), tokenizer, text_len, cache_size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_len, D] in the encoder's dtype and on its device, zero after the last token.

        Prompts never share a forward pass, so a prompt's rows do not depend on the others, to the
        last bit. A prompt of more than `text_len` tokens is cut there, with a warning that says how
        many were dropped.
        """
        if isinstance(prompts, str):
            raise ValueError("encode takes a list of prompts; got one string: wrap it in a list")
        rows = [self._rows(clean_prompt(prompt)) for prompt in prompts]
        return torch.stack([torch.cat([r, r.new_zeros(self.text_len - r.shape[0], r.shape[1])]) for r in rows])

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the cleaned prompt with its end mark; those past `text_len` are dropped."""
        return len(self._ids(clean_prompt(prompt)))

    def _ids(self, prompt: str) -> list[int]:
        with _LOCK:
            return list(self.tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"])

    def _rows(self, prompt: str) -> Tensor:
        """The encoder's output [tokens of the prompt, D], from the cache if it is there."""
        with _LOCK:
            rows = self._cache.get(prompt)
        if rows is None:
            rows = self._forward(prompt)
        with _LOCK:
            self._cache[prompt] = rows
            self._cache.move_to_end(prompt)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return rows

    @torch.no_grad()
    def _forward(self, prompt: str) -> Tensor:
        ids = self._ids(prompt)
        if (dropped := len(ids) - self.text_len) > 0:
            warnings.warn(
                f"the prompt has {len(ids)} tokens, the model reads {self.text_len}: the last {dropped} are dropped",
                stacklevel=4,
            )
            marks = self.tokenizer.num_special_tokens_to_add(pair=False)  # at the end, as T5 has them; they stay
            ids = ids[: self.text_len - marks] + ids[len(ids) - marks :]
        padding, device = self.text_len - len(ids), next(self.model.parameters()).device
        tokens = torch.tensor([ids + [self.tokenizer.pad_token_id] * padding], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * padding], device=device)
        hidden: Tensor = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return hidden[0, : len(ids)].clone()

    @classmethod
    def from_directory(
        cls,
        encoder: str | Path,
        tokenizer: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        text_len: int = 512,
    ) -> TextEncoder:
        """Load an encoder (config.json, safetensors) and a tokenizer that transformers saved.

        `dtype` None: as stored. Nothing is downloaded. Raises ValueError if either is missing,
        damaged or incomplete.
        """
        from transformers import UMT5Config

        folder = Path(encoder)
        files = sorted(folder.glob("*.safetensors"))
        if not files or not (folder / "config.json").is_file():
            need = "it needs config.json and model.safetensors, or shards of it"
            raise ValueError(f"{folder} holds no text encoder: {need}")
        with _loading("text encoder", folder):
            config = UMT5Config.from_pretrained(str(folder), local_files_only=True)
            state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return cls.from_state(state, tokenizer, device, dtype, text_len, config)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        tokenizer: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        text_len: int = 512,
        config: Any = None,
    ) -> TextEncoder:
        """Build the encoder from tensors under transformers' names.

        `config`: a UMT5Config; None: read from the shapes. Raises ValueError for a tensor that is
        missing, left over or of another shape.
        """
        from transformers import UMT5EncoderModel

        words = load_tokenizer(tokenizer)
        ready = {n: tensor.to(device, dtype) for n, tensor in state.items() if n != "encoder.embed_tokens.weight"}
        if "shared.weight" in ready:  # the table of words has two names and stays one tensor
            ready["encoder.embed_tokens.weight"] = ready["shared.weight"]
        with torch.device("meta"):
            model: Any = UMT5EncoderModel(umt5_config(state) if config is None else config)
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        wrong = sorted(n for n in wanted.keys() | ready.keys() if n not in ready or ready[n].shape != wanted.get(n))
        if wrong:
            raise ValueError(
                f"the text encoder's weights do not fit: {len(wrong)} missing, left over or misshapen, first {wrong[0]}"
            )
        model.load_state_dict(ready, assign=True)
        return cls(model, words, text_len)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a directory; ValueError if there is none. Nothing is downloaded."""
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ValueError(f"{path} is no directory with a tokenizer: give one that transformers saved")
    with _loading("tokenizer", path):
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)


@contextmanager
def _loading(what: str, path: str | Path) -> Iterator[None]:
    """Put errors of transformers and safetensors, which span lines, in one line with the path."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} holds no {what} that can be loaded ({reason}): restore it") from error


def umt5_config(state: Mapping[str, Tensor]) -> Any:
    """UMT5Config whose encoder has exactly these tensors, under transformers' names.

    Raises ValueError if they are not a UMT5 encoder.
    """
    from transformers import UMT5Config

    attention, dense = (f"encoder.block.0.layer.{i}." for i in (0, 1))
    try:
        vocab_size, d_model = state["shared.weight"].shape
        buckets, heads = state[f"{attention}SelfAttention.relative_attention_bias.weight"].shape
        width = state[f"{attention}SelfAttention.q.weight"].shape[0]
        d_ff = state[f"{dense}DenseReluDense.wi_0.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"these are not the weights of a UMT5 encoder: no tensor {error}") from None
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.block."))
    return UMT5Config(
        vocab_size=vocab_size, d_model=d_model, d_kv=width // heads, num_heads=heads, d_ff=d_ff, num_layers=layers,
        relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
