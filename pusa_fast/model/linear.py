"""The transformer's projections by official name, and unmerged LoRA adapters for training.

Packed weights hold several official projections; an adapter acts on the rows of one. Low-rank
update (spec section 4): y[rows] += scale * (x A^T) B^T with A [r, in], B [out, r], scale = alpha /
r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pusa_fast import ops
from pusa_fast.model.dit import WanDiT

# Official name in a block -> (module, its share of that module's rows as (index, equal shares)).
_BLOCK_LAYERS = {
    "self_attn.q": ("self_attn.qkv", (0, 3)),
    "self_attn.k": ("self_attn.qkv", (1, 3)),
    "self_attn.v": ("self_attn.qkv", (2, 3)),
    "self_attn.o": ("self_attn.o", (0, 1)),
    "cross_attn.q": ("cross_attn.q", (0, 1)),
    "cross_attn.k": ("cross_attn.kv", (0, 2)),
    "cross_attn.v": ("cross_attn.kv", (1, 2)),
    "cross_attn.o": ("cross_attn.o", (0, 1)),
    "ffn.0": ("ffn.0", (0, 1)),
    "ffn.2": ("ffn.2", (0, 1)),
}
_EMBEDDINGS = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1")

LORA_TARGETS = tuple(_BLOCK_LAYERS)  # what Pusa trains (spec 4.1)

# How A starts; B is zero, so an untrained adapter changes nothing. As PEFT's `init_lora_weights`;
# Pusa uses the first.
LORA_INITS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "kaiming": lambda A: nn.init.kaiming_uniform_(A, a=math.sqrt(5)),
    "gaussian": lambda A: nn.init.normal_(A, std=1 / len(A)),
}


class LoRAAdapter(nn.Module):
    """Float32 matrices of a low-rank update of `rows` of a linear layer's output."""

    def __init__(self, base: nn.Linear, rows: slice, rank: int, alpha: float, init: str) -> None:
        super().__init__()
        self.rows, self.scale = rows, alpha / rank
        device, out_features = base.weight.device, rows.stop - rows.start
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        LORA_INITS[init](self.lora_A)


class AdaptedLinear(nn.Linear):
    """A linear layer with LoRA adapters; `weight` and `bias` are the base layer's parameters."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        adapters = [adapter for adapter in self.adapters.values() if isinstance(adapter, LoRAAdapter)]
        layout = [(adapter.rows, adapter.scale) for adapter in adapters]
        matrices = [m for adapter in adapters for m in (adapter.lora_A, adapter.lora_B)]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: Tensor = _LowRankUpdates.apply(x, self.weight.to(x.dtype), bias, layout, *matrices)  # type: ignore[no-untyped-call]
        return out


class _LowRankUpdates(torch.autograd.Function):
    """y = x W^T + b ; y[rows_i] += scale_i * (x A_i^T) B_i^T.

    x [..., I]; matrices A_1 [r_1, I], B_1 [rows_1, r_1], A_2 ... In float32, if there are more
    tokens than inputs, the updates are added to the weight, which is less work for the same result.
    A bf16 weight would round them away, so there the B matmuls add to y. The A matmuls of all
    adapters are one. Composed from torch's operators, each adapter would copy the packed gradient
    once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Sequence[tuple[slice, float]],
        *matrices: Tensor,
    ) -> Tensor:
        A, Bs = _cast(matrices, x.dtype)
        rows_x = x.reshape(-1, x.shape[-1])
        ctx.merged = x.dtype.itemsize >= 4 and rows_x.shape[0] > rows_x.shape[1]
        ranks = [B.shape[1] for B in Bs]
        hidden = None if ctx.merged else rows_x @ A.t()
        weight = weight.clone() if ctx.merged else weight
        if ctx.merged:
            for (rows, scale), B, own in zip(layout, Bs, torch.split(A, ranks), strict=True):
                weight[rows].addmm_(B, own, alpha=scale)
        out = ops.linear(rows_x, weight, bias)
        if hidden is not None:
            for (rows, scale), B, part in zip(layout, Bs, torch.split(hidden, ranks, 1), strict=True):
                out[:, rows].addmm_(part, B.t(), alpha=scale)
        ctx.layout, ctx.x_shape = layout, x.shape
        ctx.save_for_backward(rows_x, weight, hidden, *matrices)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, weight, hidden, *matrices = ctx.saved_tensors
        A, Bs = _cast(matrices, x.dtype)
        hidden = x @ A.t() if hidden is None else hidden
        ranks = [B.shape[1] for B in Bs]
        dy = dout.reshape(-1, dout.shape[-1])
        dhidden = torch.empty_like(hidden)
        dBs = []
        for (rows, scale), B, part, into in zip(
            ctx.layout, Bs, torch.split(hidden, ranks, 1), torch.split(dhidden, ranks, 1), strict=True
        ):
            torch.addmm(into, dy[:, rows], B, beta=0, alpha=scale, out=into)
            dBs.append((dy[:, rows].t() @ part).mul_(scale))
        dA = dhidden.t() @ x
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx = (dx if ctx.merged else dx.addmm_(dhidden, A)).view(ctx.x_shape)
        dweight = dy.t() @ x if ctx.needs_input_grad[1] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        pairs = zip(torch.split(dA, ranks), dBs, strict=True)
        return dx, dweight, dbias, None, *(m for pair in pairs for m in pair)


def _cast(matrices: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All A in one [sum of ranks, I], and the B, in the dtype of the matmuls."""
    As = [A.to(dtype) for A in matrices[::2]]
    return As[0] if len(As) == 1 else torch.cat(As), [B.to(dtype) for B in matrices[1::2]]


def projections(dit: WanDiT) -> dict[str, tuple[nn.Linear, slice]]:
    """Official projection name -> (module, its rows of that module's weight and bias).

    `<name>.weight` of an official checkpoint is `module.weight[rows]`. The patch embedding, a
    convolution, is not included. Raises ValueError for a quantised model.
    """
    return {name: _locate(dit, path, share) for name, (path, share) in _layer_paths(len(dit.blocks)).items()}


def _layer_paths(num_layers: int) -> dict[str, tuple[str, tuple[int, int]]]:
    blocks = {
        f"blocks.{index}.{name}": (f"blocks.{index}.{path}", share)
        for index in range(num_layers)
        for name, (path, share) in _BLOCK_LAYERS.items()
    }
    return blocks | {name: (name, (0, 1)) for name in (*_EMBEDDINGS, "head.head")}


def _locate(dit: WanDiT, path: str, share: tuple[int, int]) -> tuple[nn.Linear, slice]:
    module = dit.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{path} is quantised ({dit.precision}), its exact weight is gone: put LoRAs on first (load without "
            "precision, apply_lora(..., keep_base=False)), then call pusa_fast.model.fp8.quantize"
        )
    index, shares = share
    size = module.out_features // shares
    return module, slice(index * size, (index + 1) * size)


def add_lora(
    dit: WanDiT, rank: int, alpha: float | None = None, targets: Sequence[str] = LORA_TARGETS, init: str = "kaiming"
) -> list[nn.Parameter]:
    """Freeze the base, attach trainable float32 adapters, and return their parameters.

    Scale is alpha / rank, 1 if alpha is None. `targets` are official projection names or their
    endings ("q" takes every `.q`). `init` of A is a name of `LORA_INITS`, drawn from torch's global
    generator. Raises ValueError for an unknown one, a rank below 1, a target that matches nothing
    (the time embedding cannot be one: it does not run through its layers' forward), and for a model
    that is quantised or already has adapters.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {rank}")
    if init not in LORA_INITS:
        raise ValueError(f"LoRA init {init!r} is unknown: choose one of {', '.join(LORA_INITS)}")
    if dit.precision is not None:
        raise ValueError(
            f"this model is quantised to {dit.precision}, for inference only: load it without precision to train"
        )
    if next(adapters(dit), None):
        raise ValueError("this model already has LoRA adapters: train those, or load the base again")
    paths = {name: at for name, at in _layer_paths(len(dit.blocks)).items() if not name.startswith("time_")}
    for target in targets:
        if not any(_matches(name, target) for name in paths):
            raise ValueError(f"LoRA target {target!r} matches no trainable projection: try {', '.join(LORA_TARGETS)}")
    dit.requires_grad_(False)
    for name, (path, share) in paths.items():
        if not any(_matches(name, target) for target in targets):
            continue
        module, rows = _locate(dit, path, share)
        if not isinstance(module, AdaptedLinear):
            module = AdaptedLinear(module)
            dit.set_submodule(path, module)
        module.adapters[name.replace(".", "-")] = LoRAAdapter(
            module, rows, rank, rank if alpha is None else alpha, init
        )
    dit.weights_version += 1
    return [parameter for _, adapter in adapters(dit) for parameter in (adapter.lora_A, adapter.lora_B)]


def lora_state_dict(dit: WanDiT) -> dict[str, Tensor]:
    """The adapters under the released key names, as `blocks.N.self_attn.q.lora_A.default.weight`.

    Tensors are detached and share the adapters' memory. The format holds no scale: if alpha is not
    the rank, apply the file at strength alpha / rank. Raises ValueError for a model without
    adapters.
    """
    found = {
        f"{name}.{matrix}.default.weight": getattr(adapter, matrix).detach()
        for name, adapter in adapters(dit)
        for matrix in ("lora_A", "lora_B")
    }
    if not found:
        raise ValueError("this model has no LoRA adapters: call add_lora first")
    return found


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapters(dit: WanDiT) -> Iterator[tuple[str, LoRAAdapter]]:
    """Official projection names and adapters, in the order of the layers."""
    for module in dit.modules():
        if isinstance(module, AdaptedLinear):
            for key, adapter in module.adapters.items():
                assert isinstance(adapter, LoRAAdapter)
                yield key.replace("-", "."), adapter
