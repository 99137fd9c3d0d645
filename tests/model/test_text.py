"""Prompt cleaning and the text encoder, on a tiny UMT5 and a tokenizer made on the spot."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pusa_fast.model.text import TextEncoder, clean_prompt, umt5_config

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moves", "left", "right"]


def tokenizer(eos: bool = True) -> Any:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if eos:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def umt5() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=2, dropout_rate=0.1)
    return UMT5EncoderModel(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    umt5().save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def encoder(text_len: int = 8, **kwargs: Any) -> TextEncoder:
    return TextEncoder(umt5(), tokenizer(), text_len, **kwargs)


class Counted(torch.nn.Module):
    """Counts the forward passes of the model inside, and keeps their masks."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.masks = model, list[list[int]]()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.masks.append(attention_mask[0].tolist())
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("  a  red\n\tcircle ", "a red circle"),
        ("", ""),
        (" \n ", ""),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("a&nbsp;&nbsp;b", "a b"),
        ("cafÃ©", "café"),
        ("“a red circle”", '"a red circle"'),
        ("红色 圆", "红色 圆"),
    ],
)
def test_cleaning(given: str, cleaned: str) -> None:
    assert clean_prompt(given) == cleaned
    assert clean_prompt(cleaned) == cleaned


def test_rows_are_the_encoders_output_then_zeros() -> None:
    text = encoder()
    rows = text.encode(["a red circle"])
    assert rows.shape == (1, 8, 16) and not rows.requires_grad
    with torch.no_grad():
        ids = torch.tensor([[3, 4, 6, 1]])
        alone = text.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(rows[:, :4], alone)  # so padding was masked inside
    assert rows[:, 4:].count_nonzero() == 0


def test_a_prompt_does_not_depend_on_its_neighbours() -> None:
    prompts = ["a red circle moves left", "blue", ""]
    together = encoder().encode(prompts)
    for i, prompt in enumerate(prompts):
        assert torch.equal(together[i], encoder().encode([prompt])[0]), prompt
    assert together[0].count_nonzero(1).tolist() == [16] * 6 + [0] * 2
    assert together[1].count_nonzero(1).tolist() == [16] * 2 + [0] * 6
    assert together[2].count_nonzero(1).tolist() == [16] + [0] * 7


@pytest.mark.parametrize("cache_size", [0, 3])
def test_threads_that_share_an_encoder_get_what_each_gets_alone(cache_size: int) -> None:
    prompts = [" ".join(words) for n in (1, 2, 3) for words in itertools.permutations(WORDS[4:8], n)]
    alone = {prompt: encoder().encode([prompt]) for prompt in prompts}
    text = encoder(cache_size=cache_size)

    def encode(part: int) -> list[tuple[str, torch.Tensor]]:
        return [(prompt, text.encode([prompt])) for _ in range(4) for prompt in prompts[part::4]]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(encode, [*range(4)] * 2):
            assert all(torch.equal(rows, alone[prompt]) for prompt, rows in found)
    assert len(text._cache) == cache_size


def test_mask_covers_the_prompt_alone() -> None:
    text = encoder()
    text.model = Counted(text.model)
    text.encode(["a red circle"])
    assert text.model.masks == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_nothing_at_all_gives_zero_rows() -> None:
    """A tokenizer without an end token makes no token of an empty prompt."""
    text = TextEncoder(umt5(), tokenizer(eos=False), 8)
    assert text.encode([""]).count_nonzero() == 0 and text.encode([""]).shape == (1, 8, 16)


def test_long_prompts_are_cut_with_a_warning() -> None:
    text = encoder(text_len=4)
    with pytest.warns(UserWarning, match=r"the prompt has 7 tokens, the model reads 4: the last 3 are dropped"):
        cut = text.encode(["a red circle moves left right"])
    assert cut.shape == (1, 4, 16) and cut.count_nonzero(2).tolist() == [[16] * 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(text.encode(["a red circle moves left right"]), cut), "the second time it is remembered"
        text.encode(["a red circle"])


def test_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    text = encoder(cache_size=2)
    text.model = Counted(text.model)
    calls = []
    for prompt in ("red", "blue", " red ", "left", "red", "blue"):
        first = text.encode([prompt])
        calls.append(len(text.model.masks))
        first.zero_()  # what the caller does with it must not reach the cache
        assert text.encode([prompt]).count_nonzero() > 0
    assert calls == [1, 2, 2, 3, 3, 4]


def test_without_cache() -> None:
    text = encoder(cache_size=0)
    assert torch.equal(text.encode(["red"]), text.encode(["red"]))


def test_from_directory_and_from_state_agree(saved: Path) -> None:
    expected = encoder().encode(["a red circle"])
    whole = TextEncoder.from_directory(saved / "text_encoder", saved / "tokenizer", text_len=8)
    assert torch.equal(whole.encode(["a red circle"]), expected) and not whole.model.training
    state = load_file(saved / "text_encoder" / "model.safetensors")
    parts = TextEncoder.from_state(state, saved / "tokenizer", text_len=8)
    assert torch.equal(parts.encode(["a red circle"]), expected)
    assert parts.model.shared.weight.data_ptr() == parts.model.encoder.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype(saved: Path, dtype: torch.dtype) -> None:
    text = TextEncoder.from_directory(saved / "text_encoder", saved / "tokenizer", dtype=dtype, text_len=8)
    assert text.encode(["red"]).dtype == dtype


def test_umt5_xxl_is_recognised_by_its_shapes(manifest: Any) -> None:
    shapes = manifest("umt5-xxl-encoder-transformers")
    config = umt5_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert (config.vocab_size, config.d_model, config.num_heads, config.d_kv) == (256384, 4096, 64, 64)
    assert (config.d_ff, config.num_layers, config.relative_attention_num_buckets) == (10240, 24, 32)
    with torch.device("meta"):
        built = UMT5EncoderModel(config).state_dict()
    assert {name: list(tensor.shape) for name, tensor in built.items()} == shapes


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (
        lambda d: (d / "text_encoder" / "model.safetensors").write_bytes(b"short"),
        "holds no text encoder that can",
    ),
    "no config": (
        lambda d: (d / "text_encoder" / "config.json").unlink(),
        "it needs config.json and model.safetensors",
    ),
    "no encoder": (lambda d: shutil.rmtree(d / "text_encoder"), "it needs config.json and model.safetensors"),
    "no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "is no directory with a tokenizer"),
    "broken tokenizer": (
        lambda d: (d / "tokenizer" / "tokenizer.json").write_text("{"),
        "holds no tokenizer that can be loaded",
    ),
    "lost tensor": (
        lambda d: without(d / "text_encoder" / "model.safetensors", "encoder.final_layer_norm.weight"),
        "first encoder.final",
    ),
    "lost table": (
        lambda d: without(d / "text_encoder" / "model.safetensors", "shared.weight"),
        "do not fit: 2 missing",
    ),
}


def without(file: Path, name: str) -> None:
    state = load_file(file)
    save_file({n: t.clone() for n, t in state.items() if n != name}, file)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directories(saved: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        TextEncoder.from_directory(folder / "text_encoder", folder / "tokenizer", text_len=8)
    assert "\n" not in str(caught.value)


def test_loading_is_silent(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TextEncoder.from_directory(saved / "text_encoder", saved / "tokenizer", text_len=8)
    assert capfd.readouterr() == ("", "")


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not the weights of a UMT5 encoder: no tensor 'shared\.weight'"):
        umt5_config({"blocks.0.weight": torch.zeros(2)})


def test_a_bare_string_is_refused() -> None:
    with pytest.raises(ValueError, match="takes a list of prompts"):
        encoder().encode("a red circle")  # type: ignore[arg-type]


@pytest.mark.parametrize(("text_len", "cache_size"), [(0, 4), (8, -1)])
def test_sizes_are_checked(text_len: int, cache_size: int) -> None:
    with pytest.raises(ValueError, match="text_len must be at least 1 and cache_size at least 0"):
        encoder(text_len, cache_size=cache_size)
