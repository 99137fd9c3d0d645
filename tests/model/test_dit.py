"""The transformer against the reference and diffusers, and its promises on timesteps and state."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pusa_fast import ops
from pusa_fast.config import DiTConfig
from pusa_fast.model.dit import KEPT_LEVELS, WanDiT, sinusoid
from pusa_fast.testing import make_input, relative_error
from pusa_fast.weights import load_dit

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = DiTConfig(dim=48, ffn_dim=80, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=24, freq_dim=32)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "dit_forward.safetensors")


@pytest.fixture(scope="module")
def golden_dit() -> WanDiT:
    raw = json.loads((GOLDEN / "meta.json").read_text())["dit"]
    sizes = {name: raw[name] for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "freq_dim", "eps")}
    return load_dit(
        load_file(GOLDEN / "dit_weights.safetensors"), DiTConfig(**sizes, patch_size=tuple(raw["patch_size"]))
    )


def tiny_dit(config: DiTConfig = TINY, seed: int = 0) -> WanDiT:
    """A small model, with every parameter random: a fresh one's head is zero."""
    dit = WanDiT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in dit.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return dit


def tiny_inputs(B: int = 2, F: int = 3, tokens: int = 5, config: DiTConfig = TINY) -> tuple[Tensor, Tensor, Tensor]:
    timestep = torch.linspace(1000, 3.3, max(B * F, 1))[: B * F].view(B, F)
    return make_input(B, config.in_channels, F, 4, 6), timestep, make_input(B, tokens, config.text_dim, seed=1)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "recording"])
@pytest.mark.parametrize("case", ["vec", "batch", "single_frame"])
def test_golden(golden: dict[str, Tensor], golden_dit: WanDiT, case: str, grad: bool, ops_backend: str) -> None:
    x, timestep, context = (golden[f"{case}.{name}"] for name in ("x", "timestep", "context"))
    with torch.set_grad_enabled(grad):
        assert relative_error(golden_dit(x, timestep, context), golden[f"{case}.out"]) < 1e-5
        synchronous = golden_dit(x, torch.full((len(x),), 437.0), context)
    assert relative_error(synchronous, golden[f"{case}.sync_out"]) < 1e-5


def diffusers_model(config: DiTConfig) -> Any:
    WanTransformer3DModel = pytest.importorskip("diffusers").WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=config.eps, rope_max_seq_len=64,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


@pytest.mark.parametrize(("dim", "heads", "patch"), [(48, 2, (1, 2, 2)), (40, 2, (1, 1, 2)), (64, 1, (1, 2, 2))])
@torch.no_grad()
def test_diffusers(dim: int, heads: int, patch: tuple[int, int, int]) -> None:
    """As diffusers runs Wan2.1 (scalar timesteps) and Wan2.2 5B (one per token)."""
    config = DiTConfig(dim, 80, heads, 2, in_channels=4, out_channels=4, text_dim=24, freq_dim=32, patch_size=patch)
    theirs = diffusers_model(config)
    ours = load_dit(theirs.state_dict(), config)
    x, timestep_BF, context = tiny_inputs(config=config)
    for level in (
        437.0,
        62.5,
        3.3,
    ):  # their float32 sinusoid is off by 1e-5 of the output towards 1000, ours is float64
        expected = theirs(x, torch.full((2,), level), context, return_dict=False)[0]
        assert relative_error(ours(x, torch.tensor(level), context), expected) < 1e-5
    tokens_per_frame = 4 * 6 // (patch[1] * patch[2])
    expected = theirs(x, timestep_BF.repeat_interleave(tokens_per_frame, 1), context, return_dict=False)[0]
    assert relative_error(ours(x, timestep_BF, context), expected) < 1e-5


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "recording"])
def test_equal_timesteps_are_the_scalar_model_bit_for_bit(grad: bool) -> None:
    dit = tiny_dit()
    x, _, context = tiny_inputs()
    with torch.set_grad_enabled(grad):
        per_frame = dit(x, torch.tensor([[437.5] * 3, [9.25] * 3]), context)
        assert torch.equal(dit(x, torch.tensor([437.5, 9.25]), context), per_frame)
        assert torch.equal(dit(x, torch.tensor(437.5), context), dit(x, torch.full((2, 3), 437.5), context))


@torch.no_grad()
def test_timesteps_are_not_truncated() -> None:
    dit = tiny_dit()
    x, _, context = tiny_inputs()
    assert not torch.equal(dit(x, torch.tensor(437.9), context), dit(x, torch.tensor(437.0), context))


def test_sinusoid_is_cosines_first_in_float64() -> None:
    out = sinusoid(torch.tensor([0.0, 437.25]), 8)
    angles = 437.25 * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(out[1], torch.cat([angles.cos(), angles.sin()]), rtol=1e-15, atol=1e-15)
    assert out[0].tolist() == [1.0] * 4 + [0.0] * 4


@torch.no_grad()
def test_prepared_steps_are_single_calls_bit_for_bit() -> None:
    dit = tiny_dit()
    x, _, context = tiny_inputs()
    timesteps_SF = torch.tensor([[1000.0, 1000, 1000], [300, 900, 900], [0, 600.5, 600.5]])
    timesteps_SBF = torch.stack([timesteps_SF, timesteps_SF / 3], dim=1)
    for timesteps in (timesteps_SF, timesteps_SBF):
        state = dit.prepare(timesteps, context)
        for step in range(3):
            single = dit(x, timesteps[step].expand(2, 3), context)
            assert torch.equal(dit.denoise(x, step, state), single)


@torch.no_grad()
def test_a_time_row_does_not_depend_on_its_neighbours() -> None:
    """437 gives the same bits for any number of frames, steps or batch items."""
    dit = tiny_dit()

    def row(timesteps: Tensor, batch: int, at: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        state = dit.prepare(timesteps, make_input(batch, 2, TINY.text_dim))
        index = state.rows_SBF[at]
        return state.t_mod_R6D[index], state.t_emb_RD[index]

    alone = row(torch.full((1, 1), 437.0), 1, (0, 0, 0))
    many = torch.linspace(0, 1000, 77).view(7, 11)
    many[4, 9] = 437
    mixed = many.view(7, 1, 11).repeat(1, 2, 1)
    for other in (
        row(many, 1, (4, 0, 9)),
        row(many, 3, (4, 2, 9)),
        row(mixed, 2, (4, 1, 9)),
        row(many[4:5, 9:].expand(5, 2), 2, (3, 1, 0)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    state = dit.prepare(torch.full((6, 9), 5.0), make_input(2, 2, TINY.text_dim))
    assert len(state.t_mod_R6D) == 1  # each distinct timestep once


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("levels", "kept"), [(KEPT_LEVELS, True), (KEPT_LEVELS + 1, False)])
def test_modulation_sums_are_kept_up_to_a_limit_with_equal_bits_on_both_sides(
    dtype: torch.dtype, levels: int, kept: bool
) -> None:
    dit = tiny_dit().to(dtype)
    x, _, context = tiny_inputs(B=1)
    timesteps_SF = torch.linspace(1000, 0, levels)[torch.arange(3 * 40).view(40, 3) % levels]
    state = dit.prepare(timesteps_SF, context)
    assert len(state.t_mod_R6D) == levels and len(state.tables_R6D) == (TINY.num_layers if kept else 0)
    for step in (0, 21, 39):
        assert torch.equal(dit.denoise(x, step, state), dit(x, timesteps_SF[step : step + 1], context))


@torch.no_grad()
def test_closed_blocks_add_their_own_modulation_with_equal_bits() -> None:
    """As FSDP runs them: nothing of a block's weights is used before the block runs."""
    dit = tiny_dit()
    x, timestep, context = tiny_inputs()
    expected, open_state = dit(x, timestep, context), dit.prepare(timestep.unsqueeze(0), context)
    dit.closed_blocks = True
    state = dit.prepare(timestep.unsqueeze(0), context)
    assert state.tables_R6D == () and not isinstance(state.cross[0], tuple)
    assert torch.equal(dit.denoise(x, 0, state), expected)
    assert torch.equal(dit.denoise(x, 0, open_state), expected), "sums kept before are not added to again"


def test_gradients_of_the_modulation(ops_backend: str) -> None:
    x, timestep, context = tiny_inputs()
    grads: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        with ops.use("reference") if dtype == torch.float64 else nullcontext():
            dit = tiny_dit().to(dtype)
            dit(x.to(dtype), timestep, context.to(dtype)).square().sum().backward()
        grads[dtype] = {
            name: p.grad for name, p in dit.named_parameters() if "modulation" in name and p.grad is not None
        }
    assert len(grads[torch.float32]) == TINY.num_layers + 1
    for name, exact in grads[torch.float64].items():
        assert relative_error(grads[torch.float32][name], exact) < 1e-5, name


@torch.no_grad()
def test_batch_items_keep_to_their_own_context_timesteps_and_latents() -> None:
    dit = tiny_dit()
    x, timestep, context = tiny_inputs()
    both = dit(x, timestep, context)
    for i in range(2):
        assert relative_error(both[i : i + 1], dit(x[i : i + 1], timestep[i : i + 1], context[i : i + 1])) < 1e-5
    assert dit(*(t[:0] for t in (x, timestep, context))).shape == (0, 4, 3, 4, 6)


@torch.no_grad()
def test_strided_latents() -> None:
    dit = tiny_dit()
    x, timestep, context = tiny_inputs()
    strided = x.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(dit(strided, timestep, context), dit(x, timestep, context))


@torch.no_grad()
def test_bf16_weights_take_and_return_the_latents_dtype() -> None:
    dit, inputs = tiny_dit(), tiny_inputs()
    exact = tiny_dit().double()(inputs[0].double(), *inputs[1:])
    assert relative_error(dit(*inputs), exact) < 1e-5
    out = dit.bfloat16()(*inputs)
    assert out.dtype == torch.float32 and relative_error(out, exact) < 5e-2
    state = dit.prepare(inputs[1].unsqueeze(0), inputs[2])
    assert state.t_mod_R6D.dtype == state.t_emb_RD.dtype == torch.float32
    assert state.cross[0][0].dtype == torch.bfloat16


def test_autocast_trains_with_the_time_path_in_float32() -> None:
    dit = tiny_dit()
    x, timestep, context = tiny_inputs()
    dit(x, timestep, context).square().mean().backward()
    exact = {name: parameter.grad for name, parameter in dit.named_parameters()}
    assert all(gradient is not None for gradient in exact.values())
    dit.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        state = dit.prepare(timestep.unsqueeze(0), context)
        out = dit(x, timestep, context)
    assert torch.equal(state.t_mod_R6D, dit.prepare(timestep.unsqueeze(0), context).t_mod_R6D)
    assert out.dtype == torch.float32 and state.cross[0][0].dtype == torch.bfloat16
    out.square().mean().backward()
    for name, parameter in dit.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert relative_error(parameter.grad, exact[name]) < 0.1, name


@torch.no_grad()
def test_a_state_older_than_the_weights_is_refused() -> None:
    dit = tiny_dit()
    x, timestep, context = tiny_inputs()
    state = dit.prepare(timestep.unsqueeze(0), context)
    dit.denoise(x, 0, state)
    dit.weights_version += 1
    with pytest.raises(RuntimeError, match="call prepare again"):
        dit.denoise(x, 0, state)


def test_a_fresh_model_is_initialised_as_official_wan() -> None:
    dit = WanDiT(TINY)
    assert not dit.head.head.weight.any() and not dit.get_parameter("blocks.1.self_attn.qkv.bias").any()
    bound = (6 / (2 * TINY.dim)) ** 0.5  # xavier for D x D: the packed rows count as three matrices
    assert 0.95 * bound < float(dit.get_parameter("blocks.0.self_attn.qkv.weight").detach().abs().max()) <= bound
    assert 0.01 < float(dit.get_parameter("time_embedding.0.weight").detach().std()) < 0.03


def test_parameter_names_are_official_but_for_the_packed_ones() -> None:
    official = load_file(GOLDEN / "dit_weights.safetensors")
    with torch.device("meta"):
        names = set(WanDiT(DiTConfig(96, 192, 3, 3, text_dim=48, freq_dim=32)).state_dict())
    packed = {n for n in names if ".self_attn.qkv." in n or ".cross_attn.kv." in n}
    replaced = {n for n in official if n.split(".")[2:3] == ["self_attn"] and n.split(".")[3] in ("q", "k", "v")}
    replaced |= {n for n in official if n.split(".")[2:3] == ["cross_attn"] and n.split(".")[3] in ("k", "v")}
    assert names - packed == set(official) - replaced and len(packed) == 3 * 4


X, T, C = tiny_inputs()
BAD: dict[str, tuple[Callable[[WanDiT], object], str]] = {
    "channels": (lambda dit: dit(X[:, :3], T, C), r"x must be \[B, C=4"),
    "rank": (lambda dit: dit(X[0], T, C), r"x must be \[B, C=4"),
    "height": (lambda dit: dit(X[..., :3, :], T, C), "divisible by 2 and 2"),
    "width": (lambda dit: dit(X[..., :5], T, C), "divisible by 2 and 2"),
    "no frames": (lambda dit: dit(X[:, :, :0], T[:, :0], C), "must hold frames"),
    "timestep [F]": (lambda dit: dit(X, T[0], C), r"timestep must be a scalar, \[B=2\] or \[B=2, F=3\], got \[3\]"),
    "timestep per token": (lambda dit: dit(X, torch.zeros(2, 18), C), "timestep must be"),
    "context width": (lambda dit: dit(X, T, C[..., :5]), r"context must be \[B, T, text_dim=24\]"),
    "context rank": (lambda dit: dit(X, T, C[0]), "context must be"),
    "context batch": (lambda dit: dit(X, T, C[:1]), r"timesteps must be .* for 1 contexts"),
    "prepare rank": (lambda dit: dit.prepare(T[0], C), r"timesteps must be \[S, F\] or \[S, B=2, F\]"),
    "step": (lambda dit: dit.denoise(X, 1, dit.prepare(T[None], C)), "step 1 is outside the 1 prepared steps"),
    "frames": (lambda dit: dit.denoise(X[:, :, :2], 0, dit.prepare(T[None], C)), "batch 2 and the 3 frames prepared"),
    "batch": (lambda dit: dit.denoise(X[:1], 0, dit.prepare(T[None], C)), "the batch 2 and the 3 frames prepared"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(tiny_dit())


def test_the_attention_backend_is_the_models_choice() -> None:
    dit = tiny_dit()
    dit.attention_backend = "nonsense"
    with pytest.raises(ValueError, match="attention backend 'nonsense' does not exist"):
        dit(X, T, C)


def test_a_checkpointed_block_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        dit = tiny_dit()
        if checkpointed:
            for block in dit.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        dit(*tiny_inputs()).square().sum().backward()
        gradients.append({name: p.grad for name, p in dit.named_parameters()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)


@torch.no_grad()
def test_what_others_hang_on_the_first_layer_of_the_feed_forward_runs() -> None:
    dit, given = tiny_dit(), tiny_inputs()
    plain, called = dit(*given), []
    hook = dit.blocks[0].ffn[0].register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(dit(*given), plain)
    hook.remove()
    up = dit.blocks[0].ffn[0]
    up.forward = lambda x: 0 * type(up).forward(up, x)
    assert called and not torch.allclose(dit(*given), plain)
