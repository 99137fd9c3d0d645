"""LoRAs that are refused, before any weight is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_states import STYLES, State, model, official, same_bits, updates
from pusa_fast.weights import apply_lora, read_lora

FFN = "blocks.0.ffn.0"


def refuses(state: Any, message: str, **options: Any) -> None:
    dit = model()
    before, version = official(dit), dit.weights_version
    with pytest.raises(ValueError, match=message) as error:
        apply_lora(dit, state, **options)
    assert "\n" not in str(error.value)
    assert same_bits(official(dit), before) and dit.weights_version == version


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_strength_must_be_finite(strength: float) -> None:
    refuses(STYLES["2 peft"](updates()), "finite", strength=strength)
    dit = model()
    handle = apply_lora(dit, STYLES["2 peft"](updates()))
    before = official(dit)
    with pytest.raises(ValueError, match="finite"):
        handle.set_strength(strength)
    assert handle.strength == 1.0 and same_bits(official(dit), before)


def test_unmatched_keys_are_named_or_reported() -> None:
    extra = {f"blocks.0.self_attn.x{i}.lora_{m}.weight": torch.zeros(3, 3) for i in range(5) for m in "AB"}
    state = STYLES["2 peft"](updates()) | extra | {"blocks.0.self_attn.q.oddity": torch.zeros(1)}
    refuses(
        state,
        r"6 updates have no place in this model: blocks\.0\.self_attn\.q\.oddity, .* and 3 more; pass allow_unmatched",
    )
    dit, plain = model(), model()
    handle = apply_lora(dit, state, allow_unmatched=True)
    apply_lora(plain, STYLES["2 peft"](updates()))
    assert handle.unmatched[0] == "blocks.0.self_attn.q.oddity" and len(handle.unmatched) == 6
    assert len(handle.targets) == 20
    assert same_bits(official(dit), official(plain))
    with pytest.raises(ValueError, match="1 keys are of no known LoRA style"):
        read_lora(state)


def test_kohya_key_of_another_model() -> None:
    refuses(
        {
            "lora_unet_mid_block_attn1.lora_down.weight": torch.zeros(3, 3),
            "lora_unet_mid_block_attn1.lora_up.weight": torch.zeros(3, 3),
        },
        "holds no LoRA",
    )


def test_lora_for_another_width_or_depth(manifest: Callable[[str], Any]) -> None:
    big = {n: torch.empty(shape, device="meta") for n, shape in manifest("pusa-v1-lora-peft").items()}
    refuses(big, r"this LoRA is for a model of dim 5120, yours is 24")
    deep = updates()
    deep |= {n.replace("blocks.1", "blocks.7"): pair for n, pair in deep.items() if "blocks.1" in n}
    refuses(STYLES["2 peft"](deep), r"10 updates .*the LoRA is for 8 blocks, yours has 2")
    image = updates() | {"blocks.0.cross_attn.k_img": (torch.zeros(3, 24), torch.zeros(24, 3))}
    refuses(STYLES["2 peft"](image), "image-input variant")


def test_shapes_that_do_not_fit() -> None:
    pairs = updates() | {"blocks.0.ffn.0": (torch.zeros(3, 23), torch.zeros(40, 3))}
    refuses(STYLES["2 peft"](pairs), r"blocks\.0\.ffn\.0\.weight is \[40, 24\], the LoRA's \[40, 23\]")
    refuses(STYLES["2 peft"](pairs), "does not fit", allow_unmatched=True)
    refuses({"blocks.0.norm3.diff": torch.zeros(23)}, r"is \[24\], the LoRA's \[23\]")
    refuses(
        {"blocks.0.norm3.lora_A.weight": torch.zeros(1, 1), "blocks.0.norm3.lora_B.weight": torch.zeros(24, 1)},
        "does not fit",
    )


@pytest.mark.parametrize(("drop", "left"), [("lora_B", "lora_A without lora_B"), ("lora_A", "lora_B without lora_A")])
def test_half_a_pair(drop: str, left: str) -> None:
    refuses(
        {n: t for n, t in STYLES["2 peft"](updates()).items() if f"blocks.0.ffn.0.{drop}" not in n},
        rf"blocks\.0\.ffn\.0 has {left}",
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"blocks.0.ffn.0.alpha": torch.tensor(1.0)}, "without lora_A and lora_B"),
        ({f"{FFN}.lora_A.weight": torch.zeros(3, 24), f"{FFN}.lora_B.weight": torch.zeros(40, 2)}, "differ in rank"),
        ({f"{FFN}.lora_A.weight": torch.zeros(3), f"{FFN}.lora_B.weight": torch.zeros(40, 3)}, "differ in rank"),
        ({f"{FFN}.lora_A.a.weight": torch.zeros(3, 24), f"{FFN}.lora_A.b.weight": torch.zeros(3, 24)}, "twice"),
        ({"blocks.0.ffn.0.dora_scale": torch.zeros(1)}, "is DoRA"),
        ({"blocks.0.ffn.0.lora_magnitude_vector.default.weight": torch.zeros(1)}, "is DoRA"),
        ({"lora_unet_blocks_0_ffn_0.hada_w1_a": torch.zeros(1)}, "is LoHa"),
        ({"lora_unet_blocks_0_ffn_0.lokr_w1": torch.zeros(1)}, "is LoKr"),
        ({"blocks.0.ffn.0.lora_mid.weight": torch.zeros(1)}, "Tucker"),
        ({"x": torch.zeros(1)}, "holds no LoRA: its keys are x"),
        ({f"{FFN}.lora_A.weight": torch.zeros(3, 24).char(), f"{FFN}.lora_B.weight": torch.zeros(40, 3)}, "quantised"),
    ],
)  # fmt: skip
def test_broken_or_foreign_files(state: State, message: str) -> None:
    refuses(state, message)


@pytest.mark.parametrize("alpha", [torch.zeros(2), torch.tensor(float("nan"))])
def test_alpha_that_is_no_number(alpha: Tensor) -> None:
    refuses(STYLES["2 peft"](updates()) | {"blocks.0.ffn.0.alpha": alpha}, "alpha of blocks.0.ffn.0 is no number")


def test_a_whole_model_is_no_lora() -> None:
    refuses(official(model()), "a whole model: open it with load_dit")


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        apply_lora(model(), tmp_path / "absent.safetensors")
    path = tmp_path / "l.safetensors"
    save_file(STYLES["2 peft"](updates()), path)
    path.write_bytes(path.read_bytes()[:-10])
    refuses(path, r"l\.safetensors is damaged")
    path.unlink()
    refuses(tmp_path, "not a directory of a LoRA")


def test_values_on_meta_cannot_go_onto_real_weights() -> None:
    refuses({n: t.to("meta") for n, t in STYLES["2 peft"](updates()).items()}, "meta device")
