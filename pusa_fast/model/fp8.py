"""The transformer's large matmuls on e4m3 rows: half the weight memory, twice the rate, lossy.

Six projections of a block (self-attention's packed qkv and o, cross-attention's q and o, the two of
the feed-forward) hold their weights as e4m3 with one scale per output row and multiply activations
quantised per token: `ops.scaled_linear`. The norms emit those rows in the pass that computes them.
Attention, the residual stream, embeddings, modulation, the head and cross-attention's keys and
values (computed once a run) stay in bf16. What it costs in quality: docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from pusa_fast import ops
from pusa_fast.model.dit import Block, WanDiT, linears
from pusa_fast.model.experts import ExpertPair
from pusa_fast.model.linear import AdaptedLinear
from pusa_fast.ops.registry import fp8_reason

Rows = tuple[Tensor, Tensor]  # e4m3 [..., D], float32 scale [..., 1]

Model = TypeVar("Model", WanDiT, ExpertPair)

MULTIPLE = 16  # of every width that enters or leaves an e4m3 matmul (cuBLASLt, CUTLASS)
_PROJECTIONS = (("self_attn", "qkv"), ("self_attn", "o"), ("cross_attn", "q"), ("cross_attn", "o"))


class FP8Linear(nn.Module):
    """x W^T + b in bf16 with e4m3 weight rows; x: a tensor, or rows that a norm has quantised.

    Inference only.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = ops.quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves between devices; `.to(dtype)` and its like leave rows and scales as they are."""
        before = {name: getattr(self, name) for name in ("weight", "weight_scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def forward(self, x: Tensor | Rows) -> Tensor:
        rows = ops.quantize_rows(x) if isinstance(x, Tensor) else x
        return ops.scaled_linear(rows, (self.weight, self.weight_scale), self.bias)


class FP8FeedForward(nn.Sequential):
    def __init__(self, ffn: nn.Sequential) -> None:
        up, activation, down = ffn
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        super().__init__(FP8Linear(up), activation, FP8Linear(down))

    def forward(self, x: Tensor | Rows) -> Tensor:
        up, _, down = self
        out: Tensor = down(ops.gelu_quantize_rows(up(x)))
        return out


def check_precision(precision: str | None, device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to load in. Raises ValueError for a precision that `device` does not have."""
    if precision is None:
        return dtype
    if precision != "fp8":
        raise ValueError(f"precision {precision!r} does not exist: choose fp8, or leave it out")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"precision fp8 runs in bfloat16 around its products, got dtype {dtype}: leave dtype out")
    if reason := fp8_reason(device):
        raise ValueError(f"precision fp8 cannot be used: {reason}")
    return torch.bfloat16


@torch.no_grad()
def quantize(dit: Model, emulate: bool = False) -> Model:
    """Turn the blocks' projections to fp8 in place, for inference, and return the model.

    Each bf16 weight is freed as its block is done. LoRAs go on before (`apply_lora(...,
    keep_base=False)`); afterwards they are refused, and so is saving in a published layout.
    `emulate` allows devices without fp8 matmuls, slowly: for measuring the loss. Raises ValueError,
    before any expert is changed, for such a device otherwise, and for a model that is not bfloat16,
    is quantised already, has unmerged adapters or LoRAs whose base is kept, or has widths that are
    not multiples of 16.
    """
    networks = list(dict.fromkeys(dit.networks.values()))
    for network in networks:
        _check(network, emulate)
    for network in networks:
        for block in network.blocks:
            assert isinstance(block, Block)
            for parent, name in _PROJECTIONS:
                layer = getattr(block, parent)
                setattr(layer, name, FP8Linear(getattr(layer, name)))
            block.ffn = FP8FeedForward(block.ffn)
            block.residual_norm = ops.residual_norm_fp8
        network.precision = "fp8"
        network.weights_version += 1
    return dit.requires_grad_(False)


def _check(dit: WanDiT, emulate: bool) -> None:
    """Raises ValueError for a network that `quantize` cannot turn to fp8."""
    if not emulate and (reason := fp8_reason(dit.device)):
        raise ValueError(reason)
    if dit.precision is not None:
        raise ValueError(f"this model is quantised to {dit.precision} already")
    if dit.dtype != torch.bfloat16:
        raise ValueError(f"fp8 matmuls return bfloat16, the model is {dit.dtype}: load it with dtype=torch.bfloat16")
    for name, width in (("dim", dit.config.dim), ("ffn_dim", dit.config.ffn_dim)):
        if width % MULTIPLE:
            raise ValueError(f"fp8 matmuls need widths that are multiples of {MULTIPLE}, {name} is {width}")
    if adapted := sum(isinstance(layer, AdaptedLinear) for layer in linears(dit.blocks)):
        raise ValueError(f"{adapted} projections have unmerged adapters: merge them before quantising")
    if getattr(dit.__dict__.get("_lora_stack"), "layers", None):
        raise ValueError(
            "a LoRA on this model keeps its base, which quantised weights cannot go back to: "
            "apply it with keep_base=False"
        )


@torch.no_grad()
def block_errors(candidate: WanDiT, reference: WanDiT, x: Tensor, timestep: Tensor, context: Tensor) -> list[float]:
    """Relative error of the residual stream after each block, then of the velocity.

    The error is the norm of the difference over the norm. Both models run whole, so errors
    accumulate over depth. x, timestep, context as for `WanDiT.forward`.
    """
    streams: list[list[Tensor]] = []
    for dit in (candidate, reference):
        seen: list[Tensor] = []
        hooks = [block.register_forward_hook(_collect(seen)) for block in dit.blocks]
        try:
            velocity = dit(x, timestep, context)
        finally:
            for hook in hooks:
                hook.remove()
        streams.append([*seen, velocity.double()])
    return [float((a - b).norm() / b.norm()) for a, b in zip(*streams, strict=True)]


def _collect(seen: list[Tensor]) -> Callable[[nn.Module, object, Any], None]:
    def hook(_module: nn.Module, _args: object, output: Any) -> None:
        x, pending = output
        seen.append(ops.gated_residual(x, *pending).double())

    return hook
