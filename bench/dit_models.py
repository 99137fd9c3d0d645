"""Our transformer and diffusers' WanTransformer3DModel with the same weights, and the floor.

The floor is what any implementation has to compute: per block a packed QKV matmul, three D x D,
two of the feed-forward, and two attentions, on tensors that are already in place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from bench.registry import Shape
from pusa_fast import DiTConfig, WanDiT, ops
from pusa_fast.attention import attention
from pusa_fast.testing import assert_within_budget, relative_error
from pusa_fast.weights import keymap

Call = Callable[[], Any]
_GATE_GRID = (3, 2, 4)


@dataclass(frozen=True)
class Case:
    """Latents x; timestep per frame [1, F], per token [1, L], one for all [1]; text [1, T, E]."""

    x: Tensor
    per_frame: Tensor
    per_token: Tensor
    scalar: Tensor
    text: Tensor


def make_case(
    config: DiTConfig, grid: tuple[int, int, int], text: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """Every frame has its own noise level: the most work for our time network."""
    frames, rows, columns = grid
    generator = torch.Generator(device).manual_seed(5)
    _, ph, pw = config.patch_size
    x = torch.randn(1, config.in_channels, frames, ph * rows, pw * columns, generator=generator, device=device)
    context = torch.randn(1, text, config.text_dim, generator=generator, device=device)
    levels = torch.linspace(60, 480, frames, device=device)[None]  # their float32 sinusoid loses digits towards 1000
    return Case(x.to(dtype), levels, levels.repeat_interleave(rows * columns, dim=1), levels.mean(1), context.to(dtype))


def our_model(config: DiTConfig, dtype: torch.dtype, device: torch.device) -> WanDiT:
    """Official initialisation, but no parameter stays at zero or one: a missing bias must show."""
    torch.manual_seed(0)
    with device:
        dit = WanDiT(config)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if name.endswith("bias") or "norm" in name or name == "head.head.weight":
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return dit.to(dtype).eval().requires_grad_(False)


def their_model(dit: WanDiT) -> Any:
    """diffusers' model with `dit`'s weights, some in float32 as diffusers' loader keeps them."""
    from diffusers import WanTransformer3DModel

    config, dtype = dit.config, dit.dtype
    with dit.device:
        model = WanTransformer3DModel(
            patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
            in_channels=config.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
            freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", eps=config.eps,
        )  # fmt: skip
    model.load_state_dict(keymap.unpack(dit.state_dict(), keymap.dit_to_diffusers))
    kept = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def calls(dit: WanDiT, theirs: Any, case: Case) -> dict[str, Call]:
    """Forwards by provider. "pusa prepared": a step of a run, text and time tables already made."""
    state = dit.prepare(case.per_frame, case.text)
    found: dict[str, Call] = {
        "pusa": lambda: dit(case.x, case.per_frame, case.text),
        "pusa prepared": lambda: dit.denoise(case.x, 0, state),
    }
    if theirs is not None:
        found["diffusers per-token"] = lambda: theirs(case.x, case.per_token, case.text, return_dict=False)[0]
        found["diffusers scalar"] = lambda: theirs(case.x, case.scalar, case.text, return_dict=False)[0]
    return found


@torch.no_grad()
def check(dit: WanDiT, theirs: Any, text: int) -> dict[str, float]:
    """Errors on a small clip against our model in float64 on plain torch.

    Raises AssertionError unless each keeps the error budget that the other's error sets.
    """
    case = make_case(dit.config, _GATE_GRID, text, dit.dtype, dit.device)
    exact = copy.deepcopy(dit).double()
    found: dict[str, float] = {}
    for name, timestep, token in (("per-token", case.per_frame, case.per_token), ("scalar", case.scalar, case.scalar)):
        with ops.use("reference"):
            oracle = exact(case.x.double(), timestep, case.text.double())
        their = theirs(case.x, token, case.text, return_dict=False)[0]
        own = dit(case.x, timestep, case.text)
        assert_within_budget(own, their, oracle, f"pusa against diffusers {name}")
        assert_within_budget(their, own, oracle, f"diffusers {name} against pusa")
        found |= {f"pusa {name}": relative_error(own, oracle), f"diffusers {name}": relative_error(their, oracle)}
    return found


def same_function(value: Tensor, expected: Tensor, what: str, dtype: torch.dtype) -> None:
    """AssertionError unless both agree in half of the dtype's digits: rounding errs by less."""
    error, bound = relative_error(value, expected), math.sqrt(torch.finfo(dtype).eps)
    if not error < bound:
        raise AssertionError(
            f"{what} computes something else: relative error {error:.2e}; rounding explains at most {bound:.1e}"
        )


def floor_call(dit: WanDiT, shape: Shape, text: int) -> Call:
    """Matmuls and attention of all blocks, with the model's own weights."""
    device, dtype, heads = dit.device, dit.dtype, dit.config.num_heads
    width = dit.config.head_dim

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x, hidden = draw(1, shape.tokens, shape.dim), draw(1, shape.tokens, shape.ffn)
    q, k, v = (draw(1, shape.tokens, heads, width) for _ in range(3))
    text_k, text_v = (draw(1, text, heads, width) for _ in range(2))
    if device.type == "cpu":  # the layout that torch's attention runs fastest on
        q, k, v, text_k, text_v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, text_k, text_v))

    def call() -> None:
        for block in dit.blocks:
            up, _, down = block.ffn
            for layer in (block.self_attn.qkv, block.self_attn.o, block.cross_attn.q, block.cross_attn.o, up):
                nnf.linear(x, layer.weight, layer.bias)
            nnf.linear(hidden, down.weight, down.bias)
            attention(q, k, v)
            attention(q, text_k, text_v)

    return call


def at_depth(model: Any, depth: int, call: Call) -> Call:
    """`call` with only the first `depth` blocks of `model` in place."""
    whole = model.blocks
    some = nn.ModuleList(list(whole)[:depth])

    def run() -> Any:
        model.blocks = some
        try:
            return call()
        finally:
            model.blocks = whole

    return run
