"""The transformer's projections by their official names, and unmerged LoRA adapters on them for training.

Packed weights hold several official projections; an adapter acts on the rows of one. Low-rank update (spec section 4):
y[rows] += scale * (x A^T) B^T with A [r, in], B [out, r], scale = alpha / r.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from pusa_fast.model.dit import WanDiT

# Official name in a block -> (module that holds it, which of that module's equal shares of rows: (index, shares)).
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


class LoRAAdapter(nn.Module):
    """A low-rank update of `rows` of a linear layer. B starts at zero: an untrained adapter changes nothing."""

    def __init__(self, base: nn.Linear, rows: slice, rank: int, alpha: float) -> None:
        super().__init__()
        self.rows, self.scale = rows, alpha / rank
        device, out_features = base.weight.device, rows.stop - rows.start
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nnf.linear(x, self.lora_A.to(x.dtype))
        return self.scale * nnf.linear(hidden, self.lora_B.to(hidden.dtype))


class AdaptedLinear(nn.Linear):
    """A linear layer with LoRA adapters; `weight` and `bias` are the base layer's own parameters, under the same names."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for adapter in self.adapters.values():
            assert isinstance(adapter, LoRAAdapter)
            y[..., adapter.rows] += adapter(x)
        return y


def projections(dit: WanDiT) -> dict[str, tuple[nn.Linear, slice]]:
    """Every official projection name -> (the module that holds it, its rows of that module's weight and bias).

    `<name>.weight` of an official checkpoint is `module.weight[rows]`. The patch embedding, a convolution, is not one.
    Raises ValueError for a quantised model.
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
            f"{path} is quantised ({dit.precision}), its exact weight is gone: put LoRAs on first (load without precision, "
            "apply_lora(..., keep_base=False)), then call pusa_fast.model.fp8.quantize"
        )
    index, shares = share
    size = module.out_features // shares
    return module, slice(index * size, (index + 1) * size)


def add_lora(
    dit: WanDiT, rank: int, alpha: float | None = None, targets: Sequence[str] = LORA_TARGETS
) -> list[nn.Parameter]:
    """Freeze the base and attach trainable adapters (float32, scale alpha / rank; alpha None: 1). Returns their parameters.

    `targets` are official projection names or their endings ("q" takes every `.q`). Raises ValueError for a rank below 1,
    a target that matches nothing (the time embedding counts as nothing: it does not run through its layers' forward),
    and for a model that has adapters already.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {rank}")
    if dit.precision is not None:
        raise ValueError(f"this model is quantised to {dit.precision}, for inference only: load it without precision to train")
    if next(_adapters(dit), None):
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
        module.adapters[name.replace(".", "-")] = LoRAAdapter(module, rows, rank, rank if alpha is None else alpha)
    dit.weights_version += 1
    return [parameter for _, adapter in _adapters(dit) for parameter in (adapter.lora_A, adapter.lora_B)]


def lora_state_dict(dit: WanDiT) -> dict[str, Tensor]:
    """The adapters under the released key names: `blocks.N.self_attn.q.lora_A.default.weight` and so on.

    Tensors are detached and share the adapters' memory. The format holds no scale: where alpha is not the rank, apply the
    file at strength alpha / rank. Raises ValueError for a model without adapters.
    """
    found = {
        f"{name}.{matrix}.default.weight": getattr(adapter, matrix).detach()
        for name, adapter in _adapters(dit)
        for matrix in ("lora_A", "lora_B")
    }
    if not found:
        raise ValueError("this model has no LoRA adapters: call add_lora first")
    return found


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _adapters(dit: WanDiT) -> Iterator[tuple[str, LoRAAdapter]]:
    for module in dit.modules():
        if isinstance(module, AdaptedLinear):
            for key, adapter in module.adapters.items():
                assert isinstance(adapter, LoRAAdapter)
                yield key.replace("-", "."), adapter
