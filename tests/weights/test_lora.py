"""LoRA files of every key style, and weights that always lead back to the base."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pusa_fast.config import MODELS, DiTConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import projections
from pusa_fast.weights import apply_lora, keymap, load_dit, read_lora

Golden = Callable[[str], dict[str, Tensor]]
State = dict[str, Tensor]
TINY = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=10, freq_dim=8)
RANK = 3
MODULES = [f"{attn}.{p}" for attn in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn.0", "ffn.2"]
GLOBAL = (
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "head.head",
)


def model(dtype: torch.dtype = torch.float32) -> WanDiT:
    torch.manual_seed(7)
    dit = WanDiT(TINY).to(dtype)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.1)
    return dit


def official(dit: WanDiT) -> State:
    return {n: t.clone() for n, t in keymap.unpack(dit.state_dict()).items()}


def same_bits(a: State, b: State) -> bool:
    """torch.equal takes -0.0 for 0.0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.keys() == b.keys() and all(
        torch.equal(t.view(kinds[t.element_size()]), b[n].view(kinds[t.element_size()])) for n, t in a.items()
    )


def updates(seed: int = 1, modules: tuple[str, ...] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Official module -> (A, B), for ten projections of each block."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n.removesuffix(".weight"): t.shape for n, t in keymap.unpack(model().state_dict()).items()}
    names = modules or tuple(f"blocks.{i}.{m}" for i in range(TINY.num_layers) for m in MODULES)
    return {
        n: (torch.randn(RANK, shapes[n][1], generator=generator), torch.randn(shapes[n][0], RANK, generator=generator))
        for n in names
    }


def style(down: str, up: str, prefix: str = "", rename: Callable[[str], str] = str) -> Callable[[Any], State]:
    def write(pairs: dict[str, tuple[Tensor, Tensor]]) -> State:
        keys = {prefix + rename(name): pair for name, pair in pairs.items()}
        return {key + suffix: t for key, pair in keys.items() for suffix, t in zip((down, up), pair, strict=True)}

    return write


PEFT = (".lora_A.weight", ".lora_B.weight")
DOWN = (".lora_down.weight", ".lora_up.weight")
STYLES = {
    "1 released": style(".lora_A.default.weight", ".lora_B.default.weight"),
    "1 any token": style(".lora_A.pusa_v1.weight", ".lora_B.pusa_v1.weight"),
    "2 peft": style(*PEFT),
    "3 diffusion_model": style(*PEFT, "diffusion_model."),
    "3 diffusion_model, token": style(".lora_A.default.weight", ".lora_B.default.weight", "diffusion_model."),
    "3 transformer": style(*PEFT, "transformer."),
    "3 base_model": style(*PEFT, "base_model.model."),
    "3 module": style(*PEFT, "module."),
    "3 pipe": style(".lora_A.default.weight", ".lora_B.default.weight", "pipe.dit."),
    "3 deepspeed": style(".lora_A.default.weight", ".lora_B.default.weight", "_forward_module.pipe.dit."),
    "4 down up": style(*DOWN),
    "4 down up, prefix": style(*DOWN, "diffusion_model."),
    "5 kohya": style(*DOWN, "lora_unet_", lambda n: n.replace(".", "_")),
    "5 kohya, diffusers names": style(
        *DOWN, "lora_transformer_", lambda n: keymap.dit_to_diffusers(n).replace(".", "_")
    ),
    "6 diffusers": style(*PEFT, "transformer.", keymap.dit_to_diffusers),
    "6 diffusers, bare": style(*PEFT, "", keymap.dit_to_diffusers),
    "8 _lora": style("_lora.down.weight", "_lora.up.weight"),
    "8 .lora": style(".lora.down.weight", ".lora.up.weight"),
    "8 no weight": style(".lora_A", ".lora_B"),
    "8 linear layer": style(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


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
    parts = {
        "blocks.1.self_attn.k.diff": "blocks.1.self_attn.k.weight", "blocks.1.self_attn.v.diff_b": "blocks.1.self_attn.v.bias",
        "blocks.0.cross_attn.v.diff_b": "blocks.0.cross_attn.v.bias", "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight", "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.1.diff_m": "blocks.1.modulation", "head.diff_m": "head.modulation", "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias", "time_projection.1.diff_b": "time_projection.1.bias",
    }  # fmt: skip
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
    apply_lora(
        dit,
        {
            f"{name}.lora_down.weight": A,
            f"{name}.lora_up.weight": B,
            f"{name}.diff": diff,
            f"{name}.alpha": torch.tensor(6.0),
        },
        2.0,
    )
    torch.testing.assert_close(official(dit)[f"{name}.weight"], before[f"{name}.weight"] + 2 * (2 * B @ A + diff))


def test_convolution_and_peft_bias() -> None:
    dit = model()
    before = official(dit)
    A, B, bias = torch.randn(2, 4, 1, 2, 2), torch.randn(24, 2, 1, 1, 1), torch.randn(24)
    apply_lora(
        dit,
        {
            "patch_embedding.lora_A.weight": A,
            "patch_embedding.lora_B.weight": B,
            "patch_embedding.lora_B.bias": bias,
            "patch_embedding.alpha": torch.tensor([1.0]),
        },
    )
    after = official(dit)
    expected = before["patch_embedding.weight"] + 0.5 * torch.einsum("or,rcxyz->ocxyz", B[:, :, 0, 0, 0], A)
    torch.testing.assert_close(after["patch_embedding.weight"], expected)
    torch.testing.assert_close(after["patch_embedding.bias"], before["patch_embedding.bias"] + 0.5 * bias)


# --- the released file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_golden_forward(golden: Golden, golden_meta: dict[str, Any], suffix: str, ops_backend: str) -> None:
    meta = golden_meta["dit"]
    config = DiTConfig(
        meta["dim"],
        meta["ffn_dim"],
        meta["num_heads"],
        meta["num_layers"],
        text_dim=meta["text_dim"],
        freq_dim=meta["freq_dim"],
    )
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


# --- scale ------------------------------------------------------------------------------------------------------------


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
    state = STYLES["6 diffusers"](updates())
    path = adapter(
        tmp_path,
        state,
        r=8,
        lora_alpha=12,
        rank_pattern={".*": RANK},
        alpha_pattern={"ffn.net.0.proj": 6, "blocks.1.attn1.to_q": 1},
    )
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


# --- strength, removal, several ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=12)
@given(strengths=st.lists(st.floats(-1e3, 1e3), max_size=4))
def test_any_strengths_lead_back_to_the_base(dtype: torch.dtype, strengths: list[float]) -> None:
    dit = model(dtype)
    with torch.no_grad():
        dit.blocks[0].ffn[0].weight[0, :4] = -0.0
    before = official(dit)
    handle = apply_lora(dit, STYLES["1 released"](updates()), 1.4)
    once = official(dit)
    assert not same_bits(once, before)
    for strength in strengths:
        handle.set_strength(strength)
        assert handle.strength == strength
    handle.set_strength(0)
    assert same_bits(official(dit), before)
    handle.set_strength(1.4)
    assert same_bits(official(dit), once)
    handle.remove()
    assert same_bits(official(dit), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_compose_and_leave_in_any_order(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    files = [
        STYLES["1 released"](updates(1)),
        STYLES["5 kohya"](updates(2, ("blocks.0.self_attn.k", "blocks.1.cross_attn.v", "head.head"))),
        {"blocks.0.self_attn.v.diff": torch.randn(24, 24), "blocks.0.norm3.diff_b": torch.randn(24)},
    ]
    dit = model(dtype)
    before = official(dit)
    handles = [apply_lora(dit, file, strength) for file, strength in zip(files, (1.4, 0.5, -2.0), strict=True)]
    left = dict(enumerate(handles))
    for index in order:
        left.pop(index).remove()
        fresh = model(dtype)
        for i, handle in left.items():
            apply_lora(fresh, files[i], handle.strength)
        assert same_bits(official(dit), official(fresh))
    assert same_bits(official(dit), before)


def test_strength_zero_is_the_base_whatever_the_update_holds() -> None:
    dit = model()
    with torch.no_grad():
        dit.blocks[0].norm3.bias.fill_(-0.0)
    before = official(dit)
    handle = apply_lora(dit, {"blocks.0.norm3.diff_b": torch.tensor([float("inf"), 1.0] * 12)}, 0.0)
    assert same_bits(official(dit), before)
    handle.remove()


def test_weights_are_rounded_once() -> None:
    """Two updates that would each vanish in bf16 do not vanish together."""
    dit, name = model(torch.bfloat16), "blocks.0.ffn.0"
    with torch.no_grad():
        dit.get_parameter(f"{name}.weight").fill_(1.0)
    step = {f"{name}.diff": torch.full((40, 24), 2.0**-9)}
    for _ in range(4):
        apply_lora(dit, step)
    assert dit.get_parameter(f"{name}.weight")[0, 0] == 1 + 2.0**-7


def test_base_is_kept_once_and_freed() -> None:
    dit = model()
    first = apply_lora(dit, STYLES["2 peft"](updates(1)))
    kept = dit.__dict__["_lora_stack"].base
    held = {name: tensor.data_ptr() for name, tensor in kept.items()}
    assert len(held) == 2 * 7, "qkv and kv count once: 7 weights in each block"
    second = apply_lora(dit, STYLES["2 peft"](updates(2)))
    assert {name: tensor.data_ptr() for name, tensor in kept.items()} == held
    first.remove()
    assert len(kept) == 14
    second.remove()
    assert not kept


def test_parameters_keep_their_storage_and_version_moves() -> None:
    dit = model()
    pointers = {name: p.data_ptr() for name, p in dit.named_parameters()}
    state = dit.prepare(torch.full((1, 2), 500.0), torch.randn(1, 3, 10))
    versions = [dit.weights_version]
    handle = apply_lora(dit, STYLES["2 peft"](updates()))
    versions.append(dit.weights_version)
    handle.set_strength(0.3)
    versions.append(dit.weights_version)
    handle.remove()
    versions.append(dit.weights_version)
    assert versions == sorted(set(versions))
    assert {name: p.data_ptr() for name, p in dit.named_parameters()} == pointers
    with pytest.raises(RuntimeError, match="call prepare again"):
        dit.denoise(torch.randn(1, 4, 2, 4, 4), 0, state)


def test_packed_rows_of_one_projection_only() -> None:
    dit = model()
    before = {n: p.clone() for n, p in dit.named_parameters()}
    pairs = updates(modules=("blocks.0.self_attn.k", "blocks.1.cross_attn.v"))
    apply_lora(dit, STYLES["2 peft"](pairs))
    for module, (A, B) in pairs.items():
        linear, rows = projections(dit)[module]
        name = next(n for n, p in dit.named_parameters() if p is linear.weight)
        change = linear.weight.detach() - before.pop(name)
        torch.testing.assert_close(change[rows], B @ A, rtol=1e-4, atol=1e-5)
        change[rows] = 0
        assert not change.any()
    assert all(torch.equal(dit.get_parameter(n), p) for n, p in before.items())


def test_gradients_and_files_are_left_alone(tmp_path: Path) -> None:
    save_file(STYLES["2 peft"](updates()), tmp_path / "l.safetensors")
    bits = (tmp_path / "l.safetensors").read_bytes()
    dit = model()
    apply_lora(dit, tmp_path / "l.safetensors", 2.0).set_strength(1.0)
    assert all(p.requires_grad and p.is_leaf for p in dit.parameters())
    assert (tmp_path / "l.safetensors").read_bytes() == bits


def test_model_moved_to_another_dtype_meanwhile() -> None:
    dit = model()
    before = official(dit)
    handle = apply_lora(dit, STYLES["2 peft"](updates()))
    dit.to(torch.bfloat16)
    handle.set_strength(0.5)
    handle.remove()
    assert same_bits(official(dit), {n: t.bfloat16() for n, t in before.items()})


def test_a_copied_model_has_its_own_base() -> None:
    dit = model()
    before = official(dit)
    handle = apply_lora(dit, STYLES["2 peft"](updates()))
    with_lora = official(dit)
    twin = copy.deepcopy(dit)
    handle.remove()
    assert same_bits(official(dit), before)
    assert same_bits(official(twin), with_lora)
    assert twin.__dict__["_lora_stack"].base


def test_removed_twice_and_used_after() -> None:
    dit = model()
    handle = apply_lora(dit, STYLES["2 peft"](updates()))
    handle.remove()
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.set_strength(1.0)


def test_merged_for_good() -> None:
    dit, reference = model(), model()
    kept = apply_lora(dit, STYLES["2 peft"](updates(1)), 0.5)
    merged = apply_lora(dit, STYLES["2 peft"](updates(2)), 0.7, keep_base=False)
    assert merged.strength == 0.7
    for act in (merged.remove, lambda: merged.set_strength(1.0)):
        with pytest.raises(RuntimeError, match="keep_base=False"):
            act()
    kept.remove()
    apply_lora(reference, STYLES["2 peft"](updates(2)), 0.7, keep_base=False)
    assert "_lora_stack" not in reference.__dict__ or not reference.__dict__["_lora_stack"].base
    assert same_bits(official(dit), official(reference))
    assert not same_bits(official(dit), official(model()))


# --- errors: before any weight is touched -----------------------------------------------------------------------------


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
        r"6 updates have no place in this model: blocks\.0\.self_attn\.q\.oddity, .* and 3 more; pass allow_unmatched=True",
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
        ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(3, 24), "blocks.0.ffn.0.lora_B.weight": torch.zeros(40, 2)}, "differ in rank"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(3), "blocks.0.ffn.0.lora_B.weight": torch.zeros(40, 3)}, "differ in rank"),
        ({"blocks.0.ffn.0.lora_A.a.weight": torch.zeros(3, 24), "blocks.0.ffn.0.lora_A.b.weight": torch.zeros(3, 24)}, "twice"),
        ({"blocks.0.ffn.0.dora_scale": torch.zeros(1)}, "is DoRA"),
        ({"blocks.0.ffn.0.lora_magnitude_vector.default.weight": torch.zeros(1)}, "is DoRA"),
        ({"lora_unet_blocks_0_ffn_0.hada_w1_a": torch.zeros(1)}, "is LoHa"),
        ({"lora_unet_blocks_0_ffn_0.lokr_w1": torch.zeros(1)}, "is LoKr"),
        ({"blocks.0.ffn.0.lora_mid.weight": torch.zeros(1)}, "Tucker"),
        ({"x": torch.zeros(1)}, "holds no LoRA: its keys are x"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(3, 24, dtype=torch.int8), "blocks.0.ffn.0.lora_B.weight": torch.zeros(40, 3)}, "quantised"),
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
