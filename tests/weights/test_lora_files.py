"""LoRA files: every key style gives the same weights, and which scale applies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_states import GLOBAL, MODULES, RANK, STYLES, State, model, official, same_bits, updates
from pusa_fast.config import MODELS, DiTConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.weights import apply_lora, load_dit, read_lora

Golden = Callable[[str], dict[str, Tensor]]


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("modules", [None, GLOBAL], ids=["blocks", "embeddings"])
def test_every_style_gives_the_same_weights(name: str, modules: tuple[str, ...] | None) -> None:
    pairs = updates(modules=modules)
    dit = model()
    expected = official(dit)
    for module, (A, B) in pairs.items():
        expected[f"{module}.weight"] += 0.7 * (B @ A)
    handle = apply_lora(dit, STYLES[name](pairs), 0.7)
    assert sorted(handle.targets) == sorted(f"{m}.weight" for m in pairs)
    assert handle.unmatched == ()
    held = official(dit)
    for target, tensor in expected.items():
        torch.testing.assert_close(held[target], tensor, rtol=1e-5, atol=1e-6)
    plain = model()
    apply_lora(plain, STYLES["2 peft"](pairs), 0.7)
    assert same_bits(held, official(plain))


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_full_differences(prefix: str) -> None:
    """Style 7: weights, biases, norms, modulation and the patch convolution."""
    dit = model()
    before = official(dit)
    endings = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    targets = [
        *("blocks.1.self_attn.k.weight", "blocks.1.self_attn.v.bias", "blocks.0.cross_attn.v.bias"),
        *("blocks.0.self_attn.norm_q.weight", "blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.1.modulation"),
        *("head.modulation", "patch_embedding.weight", "patch_embedding.bias", "time_projection.1.bias"),
    ]
    parts = {
        f"{module}.{endings[leaf]}": f"{module}.{leaf}" for module, _, leaf in (t.rpartition(".") for t in targets)
    }
    state = {prefix + key: torch.randn_like(before[target]) for key, target in parts.items()}
    handle = apply_lora(dit, state, 0.5)
    assert set(handle.targets) == set(parts.values())
    after = official(dit)
    for key, target in parts.items():
        torch.testing.assert_close(after[target], before[target] + 0.5 * state[prefix + key])
    assert all(torch.equal(after[n], t) for n, t in before.items() if n not in parts.values())
    handle.remove()
    assert same_bits(official(dit), before)


def test_difference_and_low_rank_on_one_weight_add_up() -> None:
    dit, name = model(), "blocks.0.self_attn.q"
    before, (A, B) = official(dit), updates()[name]
    diff = torch.randn(24, 24)
    state = {"lora_down.weight": A, "lora_up.weight": B, "diff": diff, "alpha": torch.tensor(6.0)}
    apply_lora(dit, {f"{name}.{part}": tensor for part, tensor in state.items()}, 2.0)
    torch.testing.assert_close(official(dit)[f"{name}.weight"], before[f"{name}.weight"] + 2 * (2 * B @ A + diff))


def test_convolution_and_peft_bias() -> None:
    dit = model()
    before = official(dit)
    A, B, bias = torch.randn(2, 4, 1, 2, 2), torch.randn(24, 2, 1, 1, 1), torch.randn(24)
    state = {"lora_A.weight": A, "lora_B.weight": B, "lora_B.bias": bias, "alpha": torch.tensor([1.0])}
    apply_lora(dit, {f"patch_embedding.{part}": tensor for part, tensor in state.items()})
    after = official(dit)
    expected = before["patch_embedding.weight"] + 0.5 * torch.einsum("or,rcxyz->ocxyz", B[:, :, 0, 0, 0], A)
    torch.testing.assert_close(after["patch_embedding.weight"], expected)
    torch.testing.assert_close(after["patch_embedding.bias"], before["patch_embedding.bias"] + 0.5 * bias)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_golden_forward(golden: Golden, golden_meta: dict[str, Any], suffix: str, ops_backend: str) -> None:
    meta = golden_meta["dit"]
    config = DiTConfig(**{n: meta[n] for n in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "freq_dim")})
    dit, case = load_dit(golden("dit_weights"), config), golden("lora_forward")
    handle = apply_lora(dit, Path(__file__).parents[1] / "golden" / f"lora.{suffix}")
    for strength, key in ((1.0, "out_scale1"), (1.4, "out_alpha1.4")):
        handle.set_strength(strength)
        with torch.no_grad():
            out = dit(case["x"], case["timestep"], case["context"])
        assert (out - case[key]).norm() / case[key].norm() < 1e-5


def test_released_manifest_finds_its_400_targets(manifest: Callable[[str], Any]) -> None:
    config = MODELS["wan2.1-t2v-14b"]
    assert isinstance(config, DiTConfig)
    with torch.device("meta"):
        dit = WanDiT(config)
    state = {
        n: torch.empty(shape, device="meta", dtype=torch.bfloat16) for n, shape in manifest("pusa-v1-lora-peft").items()
    }
    handle = apply_lora(dit, state, 1.4)
    assert len(handle.targets) == 400
    assert set(handle.targets) == {f"blocks.{i}.{m}.weight" for i in range(40) for m in MODULES}
    assert handle.unmatched == ()
    handle.remove()


def shift_of(state: State | Path, strength: float = 1.0, module: str = "blocks.0.ffn.0") -> Tensor:
    dit = model()
    before = official(dit)[f"{module}.weight"]
    apply_lora(dit, state, strength)
    return official(dit)[f"{module}.weight"] - before


def delta(module: str = "blocks.0.ffn.0", factor: float = 1.0) -> Tensor:
    A, B = updates()[module]
    return factor * (B @ A)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_scale_is_one_without_alpha_and_alpha_over_rank_with_it() -> None:
    state = STYLES["1 released"](updates())
    close(shift_of(state, 1.4), delta(factor=1.4))
    close(shift_of(state | {"blocks.0.ffn.0.alpha": torch.tensor(6.0)}, 1.4), delta(factor=1.4 * 6 / RANK))
    assert read_lora(state)["blocks.0.ffn.0.weight"].scale == 1.0


def test_alpha_in_kohya_style() -> None:
    state = STYLES["5 kohya"](updates()) | {"lora_unet_blocks_0_ffn_0.alpha": torch.tensor(1.5, dtype=torch.bfloat16)}
    close(shift_of(state), delta(factor=0.5))


def adapter(
    folder: Path,
    state: State,
    name: str = "adapter_model.safetensors",
    metadata: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    save_file(state, folder / name, metadata)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder / name


def test_adapter_config_beside_the_file(tmp_path: Path) -> None:
    state = STYLES["3 base_model"](updates())
    path = adapter(tmp_path, state, r=RANK, lora_alpha=12, use_rslora=False, use_dora=False)
    close(shift_of(path), delta(factor=4))
    close(shift_of(tmp_path), delta(factor=4))
    adapter(tmp_path, state | {"base_model.model.blocks.0.ffn.0.alpha": torch.tensor(3.0)}, r=RANK, lora_alpha=12)
    close(shift_of(path), delta(factor=1))


def test_adapter_config_patterns(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {".*": RANK}, "alpha_pattern": {"ffn.net.0.proj": 6, "blocks.1.attn1.to_q": 1}}
    path = adapter(tmp_path, STYLES["6 diffusers"](updates()), r=8, lora_alpha=12, **patterns)
    close(shift_of(path), delta(factor=2))
    close(shift_of(path, module="blocks.0.ffn.2"), delta("blocks.0.ffn.2", 4))
    close(shift_of(path, module="blocks.1.self_attn.q"), delta("blocks.1.self_attn.q", 1 / 3))


def test_settings_that_diffusers_puts_into_the_metadata(tmp_path: Path) -> None:
    settings = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 9})}
    path = adapter(tmp_path, STYLES["6 diffusers"](updates()), "pytorch_lora_weights.safetensors", settings)
    close(shift_of(path), delta(factor=3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_rslora": True}, "rsLoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 64}, r"rank 3, but .*adapter_config\.json.* says 64"),
    ],
)
def test_adapter_config_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    path = adapter(tmp_path, STYLES["2 peft"](updates()), **{"r": RANK, "lora_alpha": RANK, **config})
    with pytest.raises(ValueError, match=message):
        read_lora(path)


def test_adapter_config_that_is_no_json(tmp_path: Path) -> None:
    path = adapter(tmp_path, STYLES["2 peft"](updates()))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is no JSON"):
        read_lora(path)
