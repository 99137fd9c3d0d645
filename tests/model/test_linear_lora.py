"""Official projection names on packed weights, and training adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pusa_fast.config import DiTConfig
from pusa_fast.model import linear
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import LORA_TARGETS, add_lora, lora_state_dict, projections
from pusa_fast.testing import assert_within_budget, make_input, relative_error
from pusa_fast.weights import load_dit

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def dit() -> WanDiT:
    """The golden model: three blocks, width 96, ffn 192."""
    torch.manual_seed(0)
    raw = json.loads((GOLDEN / "meta.json").read_text())["dit"]
    sizes = {name: raw[name] for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "freq_dim", "eps")}
    return load_dit(load_file(GOLDEN / "dit_weights.safetensors"), DiTConfig(**sizes))


def fill(dit: WanDiT, values: dict[str, Tensor]) -> None:
    for name, parameter in lora_state_dict(dit).items():
        parameter.copy_(values[name])  # shares memory with the adapter


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    golden = load_file(GOLDEN / "lora_forward.safetensors")
    return golden["x"], golden["timestep"], golden["context"]


def test_projections_are_the_official_weights(dit: WanDiT) -> None:
    official = load_file(GOLDEN / "dit_weights.safetensors")
    found = projections(dit)
    assert set(found) == {
        name.removesuffix(".weight") for name, t in official.items() if name.endswith("weight") and t.ndim == 2
    }
    for name, (module, rows) in found.items():
        assert torch.equal(module.weight[rows], official[f"{name}.weight"]), name
        assert torch.equal(module.bias[rows], official[f"{name}.bias"]), name


def test_golden_adapters_at_scale_one(dit: WanDiT) -> None:
    lora = load_file(GOLDEN / "lora.safetensors")
    add_lora(dit, rank=8)
    assert {name: t.shape for name, t in lora_state_dict(dit).items()} == {name: t.shape for name, t in lora.items()}
    fill(dit, lora)
    expected = load_file(GOLDEN / "lora_forward.safetensors")["out_scale1"]
    with torch.no_grad():
        assert relative_error(dit(*inputs()), expected) < 1e-5
    assert relative_error(dit(*inputs()), expected) < 1e-5


@torch.no_grad()
def test_untrained_adapters_change_nothing_but_the_version(dit: WanDiT) -> None:
    x, timestep, context = inputs()
    before, state = dit(x, timestep, context), dit.prepare(timestep.unsqueeze(0), context)
    names = set(dit.state_dict())
    add_lora(dit, rank=4)
    assert torch.equal(dit(x, timestep, context), before)
    assert names <= set(dit.state_dict()) and set(projections(dit)) >= {f"blocks.2.{t}" for t in LORA_TARGETS}
    with pytest.raises(RuntimeError, match="call prepare again"):
        dit.denoise(x, 0, state)


def test_alpha_scales_the_update_as_a_merge_would(dit: WanDiT) -> None:
    add_lora(dit, rank=4, alpha=6.0, targets=("q", "cross_attn.v", "ffn.2", "text_embedding.0", "head.head"))
    values = {name: make_input(*t.shape, seed=i, scale=0.1) for i, (name, t) in enumerate(lora_state_dict(dit).items())}
    fill(dit, values)
    with torch.no_grad():
        adapted = dit(*inputs())
        merged = load_dit(load_file(GOLDEN / "dit_weights.safetensors"), dit.config)
        touched = {name.split(".lora_")[0] for name in values}
        assert len(touched) == 3 * 4 + 2
        for name in touched:
            module, rows = projections(merged)[name]
            a, b = (values[f"{name}.{matrix}.default.weight"] for matrix in ("lora_A", "lora_B"))
            module.weight[rows] += 1.5 * b @ a
        assert relative_error(adapted, merged(*inputs())) < 1e-5


@pytest.mark.parametrize("mode", ["float32", "autocast", "bf16 base"])
def test_training_moves_the_adapters_and_only_them(dit: WanDiT, mode: str) -> None:
    if mode == "bf16 base":
        dit.bfloat16()
    parameters = add_lora(dit, rank=2)
    assert len(parameters) == 3 * 10 * 2 and all(p.dtype == torch.float32 for p in parameters)
    assert {id(p) for p in parameters} == {id(p) for p in dit.parameters() if p.requires_grad}
    base = {name: p.detach().clone() for name, p in dit.named_parameters() if not p.requires_grad}
    x, timestep, context = inputs()
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    target = dit(x, timestep, context).detach() + 0.1
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = (dit(x, timestep, context) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None for p in parameters)
        if len(losses) == 2:  # before that B is zero, and so is the gradient of A
            assert all(bool(p.grad.any()) for p in parameters if p.grad is not None)
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, base[name]) for name, p in dit.named_parameters() if name in base)


def test_bad_requests_are_named(dit: WanDiT) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora(dit, rank=0)
    for target in ("self_attn.qkv", "time_embedding.0", "0.self_attn.q.weight"):
        with pytest.raises(ValueError, match=f"'{target}' matches no trainable projection"):
            add_lora(dit, rank=2, targets=("self_attn.q", target))
    with pytest.raises(ValueError, match="call add_lora first"):
        lora_state_dict(dit)
    add_lora(dit, rank=2, targets=("self_attn.q",))
    with pytest.raises(ValueError, match="already has LoRA adapters"):
        add_lora(dit, rank=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 50], ids=["fewer tokens than inputs", "more"])
def test_gradients_of_adapters_on_a_packed_layer(dtype: torch.dtype, tokens: int) -> None:
    """Two adapters on rows of one layer, added either way: output and all gradients."""
    layer = torch.nn.Linear(24, 36).to(dtype).requires_grad_(False)
    adapted = linear.AdaptedLinear(layer)
    for name, rows in (("q", slice(0, 12)), ("v", slice(24, 36))):
        adapted.adapters[name] = linear.LoRAAdapter(adapted, rows, 4, 6.0, "kaiming")
        torch.nn.init.normal_(adapted.adapters[name].lora_B, std=0.3)
    matrices = [m for a in adapted.adapters.values() for m in (a.lora_A, a.lora_B)]
    x, dy = make_input(2, tokens, 24, dtype=dtype), make_input(2, tokens, 36, seed=1, dtype=dtype)

    def composed(precision: torch.dtype) -> list[torch.Tensor]:
        leaf, own = x.to(precision).requires_grad_(), [m.detach().to(precision).requires_grad_() for m in matrices]
        y = torch.nn.functional.linear(leaf, layer.weight.to(precision), layer.bias.to(precision))
        for (A, B), a in zip((own[:2], own[2:]), adapted.adapters.values(), strict=True):
            y = torch.cat(
                [y[..., : a.rows.start], y[..., a.rows] + 1.5 * (leaf @ A.T) @ B.T, y[..., a.rows.stop :]], dim=-1
            )
        return [y.detach(), *torch.autograd.grad(y, [leaf, *own], dy.to(precision))]

    leaf = x.clone().requires_grad_()
    y = adapted(leaf)
    found = [y.detach(), *torch.autograd.grad(y, [leaf, *matrices], dy)]
    for ours, low, exact in zip(found, composed(dtype), composed(torch.float64), strict=True):
        assert_within_budget(ours.to(dtype), low, exact)
