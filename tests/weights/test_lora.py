"""Strength, removal and several LoRAs: weights always lead back to the base."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_states import STYLES, model, official, same_bits, updates
from pusa_fast.model.linear import projections
from pusa_fast.weights import apply_lora


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
