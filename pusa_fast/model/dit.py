"""The Wan video transformer with one timestep per latent frame (arXiv 2507.16116; spec 1.2 to 1.5).

Shape suffixes: B batch, C latent channels, F latent frames, h/w grid of tokens in a frame (latent
pixels in `x_BCFhw`), L tokens = F*h*w in that order, D width, H heads, K head width, T context
tokens, E context width, S steps, R distinct timesteps, 6 = (shift, scale, gate) of self-attention,
then of the feed-forward.

Modulation is a table with one row per frame [B, F, 6, D]; kernels find a token's row by index. A
block's own row is added to the table before its kernels run. In inference that happens in
`prepare`, which also makes keys and values of the context. The residual then travels with its last
update still `Pending`, so that the next norm adds it in the same pass over memory. A `closed` block
does all of this itself and returns one tensor: under autograd, where that tensor is what activation
checkpointing saves, and with FSDP, which gathers a block's weights only while the block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from pusa_fast import ops
from pusa_fast.attention import attention
from pusa_fast.config import DiTConfig
from pusa_fast.model.rope import RopeCache

Grid = tuple[int, int, int]
Rope = tuple[Tensor, Tensor]
Cross = tuple[Tensor, Tensor] | Tensor  # keys and values [B, T, H, K], or their context [B, T, D]


# Up to this many distinct timesteps, a state keeps the sums of modulation rows for every block: 4.9
# MB per timestep at 14B. Beyond it, `denoise` adds them at each step.
KEPT_LEVELS = 64


class Pending(NamedTuple):
    """An update still to be added to the residual x [B, L, D]: x + gate[f] * y. y None: none."""

    y_BLD: Tensor | None = None
    gate_BFD: Tensor | None = None


@dataclass(frozen=True)
class DiTState:
    """What `WanDiT.prepare` computes once for all steps.

    `rows_SBF`: the row that each frame reads from the tables over R. `tables_R6D`: t_mod plus a
    block's own row, one table per block; empty where the rows are added at each step.
    """

    t_emb_RD: Tensor
    t_mod_R6D: Tensor
    rows_SBF: Tensor
    tables_R6D: tuple[Tensor, ...]
    cross: tuple[Cross, ...]  # one per block
    weights_version: int


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_heads, config.eps
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)

    def forward(self, x_BLD: Tensor, rope: Rope, grid: Grid, backend: str) -> Tensor:
        qkv_BL3HK = torch.unflatten(self.qkv(x_BLD), -1, (3, self.num_heads, -1))
        weights = self.norm_q.weight, self.norm_k.weight
        q, k, v = ops.qk_rope(qkv_BL3HK, *weights, *rope, grid, self.eps, inplace=not torch.is_grad_enabled())
        y: Tensor = self.o(attention(q, k, v, backend).flatten(2))
        return y


class CrossAttention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q = Linear(config.dim, config.dim)
        self.kv = Linear(config.dim, 2 * config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, config.eps)
        self.norm_k = nn.RMSNorm(config.dim, config.eps)

    def prepare(self, context_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, H, K]: the same at every step."""
        k, v = self.kv(context_BTD).chunk(2, dim=-1)
        k = ops.rms_norm(k, self.norm_k.weight, self.eps)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x_BLD: Tensor, cross: Cross, backend: str) -> Tensor:
        k, v = cross if isinstance(cross, tuple) else self.prepare(cross)
        q = split_heads(ops.rms_norm(self.q(x_BLD), self.norm_q.weight, self.eps), self.num_heads)
        y: Tensor = self.o(attention(q, k, v, backend).flatten(2))
        return y


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does its matmul and nothing else: no adapter, no hook, no patched forward."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is Linear and not hooks and "forward" not in layer.__dict__


class FeedForward(nn.Sequential):
    """Linear, tanh GELU, linear, with `nn.Sequential`'s names; the GELU is fused if it can be."""

    def __init__(self, config: DiTConfig) -> None:
        D, hidden = config.dim, config.ffn_dim
        super().__init__(Linear(D, hidden), nn.GELU(approximate="tanh"), Linear(hidden, D))

    def forward(self, x_BLD: Tensor) -> Tensor:
        up, _, down = self
        if isinstance(up, nn.Linear) and _is_plain(up):
            hidden = ops.linear_gelu(x_BLD, up.weight, up.bias)
        else:
            hidden = ops.gelu(up(x_BLD), inplace=not torch.is_grad_enabled())
        out: Tensor = down(hidden)
        return out


class Block(nn.Module):
    """One layer. `checkpoint`, if set, runs `compute` under autograd and decides what is saved."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn: nn.Sequential = FeedForward(config)
        self.residual_norm: Callable[..., tuple[Tensor, Any]] = ops.residual_norm  # or one that quantises
        self.checkpoint: Callable[..., tuple[Tensor, Pending]] | None = None

    def forward(self, *inputs: Any) -> tuple[Tensor, Pending]:
        """`compute`, through `checkpoint` if that is set and autograd records."""
        if self.checkpoint is None or not torch.is_grad_enabled():
            return self.compute(*inputs)
        return self.checkpoint(self.compute, *inputs)

    def compute(
        self,
        x_BLD: Tensor,
        pending: Pending,
        table_BF6D: Tensor,
        cross: Cross,
        rope: Rope,
        grid: Grid,
        backend: str = "auto",
        closed: bool = False,
    ) -> tuple[Tensor, Pending]:
        """The residual stream before this block -> after it, with its last update pending.

        `closed`: the update is added, `cross` may be the context itself, and `table_BF6D` lacks
        `modulation`, which is added here.
        """
        if closed:
            table_BF6D = table_BF6D + self.modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table_BF6D.unbind(2)
        x, n = self.residual_norm(x_BLD, *pending, shift=shift, scale=scale, eps=self.eps)
        y = self.self_attn(n, rope, grid, backend)
        x, n = self.residual_norm(x, y, gate, weight=self.norm3.weight, bias=self.norm3.bias, eps=self.eps)
        y = self.cross_attn(n, cross, backend)
        x, n = self.residual_norm(x, y, shift=ffn_shift, scale=ffn_scale, eps=self.eps)
        y = self.ffn(n)
        return (ops.gated_residual(x, y, ffn_gate), Pending()) if closed else (x, Pending(y, ffn_gate))


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, config.out_channels * config.patch_size[1] * config.patch_size[2])
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x_BLD: Tensor, pending: Pending, t_emb_BFD: Tensor) -> Tensor:
        # Shift and scale start from one time vector: t_emb, not t_mod (spec 1.5).
        shift, scale = (t_emb_BFD.unsqueeze(2) + self.modulation).unbind(2)
        _, n = ops.residual_norm(x_BLD, *pending, shift=shift, scale=scale, eps=self.eps)
        out: Tensor = self.head(n)
        return out


class WanDiT(nn.Module):
    """Predicts the velocity noise - x0 of latents whose frames may have different noise levels.

    Parameters have official Wan names, except two packed ones: `blocks.i.self_attn.qkv` (rows q, k,
    v) and `blocks.i.cross_attn.kv` (rows k, v). A new model is initialised as official Wan is.

    Attributes: `config`; `attention_backend`, a name of `pusa_fast.attention`; `precision`, "fp8"
    if matmuls are quantised (`model.fp8`), else None; `weights_version`, incremented by whoever
    changes weights in place, so that states prepared before are refused; `closed_blocks`, set if a
    block's weights exist only while it runs (FSDP): then, as always under autograd, nothing is
    computed from them before the block or used after it.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = "auto"
        self.precision: str | None = None
        self.weights_version = 0
        self.closed_blocks = False
        self._rope = RopeCache(config.head_dim)
        D = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, D, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, D), nn.GELU(approximate="tanh"), Linear(D, D))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, D), nn.SiLU(), Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self._initialise()

    @property
    def networks(self) -> Mapping[str, WanDiT]:
        """The networks of this denoiser by name; a pair of experts has two."""
        return {"dit": self}

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def forward(self, x_BCFhw: Tensor, timestep: Tensor, context_BTE: Tensor) -> Tensor:
        """Velocity, in shape and dtype of x.

        x [B, C, F, h, w] with h and w multiples of the patch; timestep a scalar, [B] or [B, F] in
        [0, 1000], never truncated; context [B, T, text_dim]. Raises ValueError otherwise.
        """
        self._grid(x_BCFhw)
        B, F = x_BCFhw.shape[0], x_BCFhw.shape[2]
        if timestep.shape not in ((), (B,), (B, F)):
            raise ValueError(f"timestep must be a scalar, [B={B}] or [B={B}, F={F}], got {list(timestep.shape)}")
        timestep_BF = timestep.unsqueeze(-1).expand(B, F) if timestep.ndim == 1 else timestep.expand(B, F)
        return self.denoise(x_BCFhw, 0, self.prepare(timestep_BF.unsqueeze(0), context_BTE))

    def prepare(self, timesteps: Tensor, contexts_BTE: Tensor, global_sigmas: Tensor | None = None) -> DiTState:
        """What does not depend on the latents, for S steps: modulation tables, keys and values.

        timesteps [S, F] (all batch items alike) or [S, B, F], in [0, 1000]; contexts [B, T,
        text_dim]. `global_sigmas` only matters to a pair of experts. Raises ValueError.
        """
        if contexts_BTE.ndim != 3 or contexts_BTE.shape[2] != self.config.text_dim:
            raise ValueError(f"context must be [B, T, text_dim={self.config.text_dim}], got {list(contexts_BTE.shape)}")
        B = contexts_BTE.shape[0]
        if timesteps.ndim not in (2, 3) or (timesteps.ndim == 3 and timesteps.shape[1] != B):
            raise ValueError(f"timesteps must be [S, F] or [S, B={B}, F] for {B} contexts, got {list(timesteps.shape)}")
        timesteps_SBF = timesteps if timesteps.ndim == 3 else timesteps.unsqueeze(1).expand(-1, B, -1)
        t_emb_RD, t_mod_R6D, rows_SBF = self._time_tables(timesteps_SBF.to(self.device, torch.float32))
        context_BTD = self.text_embedding(contexts_BTE.to(self.device, self.dtype))
        closed = self._closed()
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        keep = not closed and len(t_mod_R6D) <= KEPT_LEVELS
        tables = tuple(t_mod_R6D + block.modulation for block in blocks if keep)
        cross = tuple(context_BTD if closed else block.cross_attn.prepare(context_BTD) for block in blocks)
        return DiTState(t_emb_RD, t_mod_R6D, rows_SBF, tables, cross, self.weights_version)

    def denoise(self, x_BCFhw: Tensor, step: int, state: DiTState) -> Tensor:
        """Velocity at step `step` of a prepared run, in x's shape (out_channels for C) and dtype.

        Raises ValueError for latents of another size than prepared for, RuntimeError for a state
        older than the weights.
        """
        if state.weights_version != self.weights_version:
            raise RuntimeError(
                f"this state was prepared with version {state.weights_version} of the weights, which are now at "
                f"version {self.weights_version} (a LoRA changed): call prepare again"
            )
        grid = self._grid(x_BCFhw)
        S, B, F = state.rows_SBF.shape
        if not 0 <= step < S:
            raise ValueError(f"step {step} is outside the {S} prepared steps: 0 to {S - 1}")
        if (x_BCFhw.shape[0], grid[0]) != (B, F):
            raise ValueError(f"x must have the batch {B} and the {F} frames prepared for, got {list(x_BCFhw.shape)}")
        rows_BF = state.rows_SBF[step]
        # Decided here, once: a checkpoint runs the block again in another gradient mode.
        rope, closed = self._rope(grid, x_BCFhw.device), self._closed()
        # Under autocast matmuls run in bf16 while the residual stream keeps the weights' dtype.
        x_BLD, pending = self._patchify(x_BCFhw.to(self.dtype)).to(self.dtype), Pending()
        t_mod_BF6D = state.t_mod_R6D[rows_BF]
        for index, (block, cross) in enumerate(zip(self.blocks, state.cross, strict=True)):
            table_BF6D = t_mod_BF6D
            if not closed:
                kept = state.tables_R6D
                table_BF6D = kept[index][rows_BF] if kept else t_mod_BF6D + block.get_parameter("modulation")
            x_BLD, pending = block(x_BLD, pending, table_BF6D, cross, rope, grid, self.attention_backend, closed)
        return self._unpatchify(self.head(x_BLD, pending, state.t_emb_RD[rows_BF]), grid).to(x_BCFhw.dtype)

    def _closed(self) -> bool:
        return self.closed_blocks or torch.is_grad_enabled()

    def _grid(self, x_BCFhw: Tensor) -> Grid:
        _, ph, pw = self.config.patch_size
        if x_BCFhw.ndim != 5 or x_BCFhw.shape[1] != self.config.in_channels:
            raise ValueError(f"x must be [B, C={self.config.in_channels}, F, h, w], got {list(x_BCFhw.shape)}")
        F, height, width = x_BCFhw.shape[2:]
        if F == 0 or height == 0 or width == 0 or height % ph or width % pw:
            raise ValueError(
                f"x must hold frames of height and width divisible by {ph} and {pw}, got {list(x_BCFhw.shape)}"
            )
        return F, height // ph, width // pw

    def _patchify(self, x_BCFhw: Tensor) -> Tensor:
        """The patch convolution as a matmul: its stride is its kernel size."""
        _, ph, pw = self.config.patch_size
        patches = torch.unflatten(torch.unflatten(x_BCFhw, 4, (-1, pw)), 3, (-1, ph))  # B C F h ph w pw
        patches_BLE = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        return nnf.linear(patches_BLE, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, out_BLE: Tensor, grid: Grid) -> Tensor:
        """Undo patches, whose channels come as (ph, pw, c), unlike the input's (spec 1.3.10)."""
        _, ph, pw = self.config.patch_size
        out = torch.unflatten(torch.unflatten(out_BLE, 2, (ph, pw, -1)), 1, grid)  # B F h w ph pw C
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def _time_tables(self, timesteps_SBF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t_emb [R, D] and t_mod [R, 6, D] in float32 or better; the row of each frame [S, B, F].

        Inference computes each distinct timestep once and alone: a matmul rounds differently with
        the number of rows, an activation with an element's place in the vector loop, and a frame's
        result must not depend on the other frames. Under autograd one matmul takes all rows.
        """
        recording = torch.is_grad_enabled()
        if recording:
            levels_R = timesteps_SBF.flatten()
            rows_SBF = torch.arange(levels_R.numel(), device=levels_R.device).view(timesteps_SBF.shape)
        else:
            levels_R, rows_SBF = torch.unique(timesteps_SBF, return_inverse=True)
        dtype = torch.promote_types(self.dtype, torch.float32)
        first, second, projection = (*linears(self.time_embedding), *linears(self.time_projection))

        def rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return function(x) if recording else torch.cat([function(row) for row in torch.split(x, 1)])

        def linear(layer: nn.Linear, x_RD: Tensor) -> Tensor:
            if not recording:
                return ops.linear_rows(x_RD, layer.weight, layer.bias)
            return nnf.linear(x_RD, layer.weight.to(dtype), layer.bias.to(dtype))

        with _no_autocast(levels_R.device):
            embedded_RD = rows(lambda levels: sinusoid(levels, self.config.freq_dim).to(dtype), levels_R)
            t_emb_RD = linear(second, rows(nnf.silu, linear(first, embedded_RD)))
            t_mod_RD = linear(projection, rows(nnf.silu, t_emb_RD))
        return t_emb_RD, torch.unflatten(t_mod_RD, 1, (6, -1)), rows_SBF

    @torch.no_grad()
    def _initialise(self) -> None:
        """Official Wan's initialisation; a packed weight counts as several matrices."""
        if self.device.type == "meta":  # a loader fills it; random numbers on meta import a compiler
            return
        D = self.config.dim
        for name, module in self.named_modules():
            if isinstance(module, (Block, Head)):
                nn.init.normal_(module.modulation, std=D**-0.5)
            if isinstance(module, nn.Linear):
                packed = name.endswith((".qkv", ".kv"))
                for rows in torch.split(module.weight, D if packed else len(module.weight)):
                    nn.init.xavier_uniform_(rows)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (*linears(self.text_embedding), *linears(self.time_embedding)):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)


def sinusoid(timestep_R: Tensor, dim: int) -> Tensor:
    """[R] -> [R, dim] float64: cosines, then sines, of timestep * 10000^(-2i / dim).

    Without a factor of 1000.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=timestep_R.device) / (dim // 2)
    angles = torch.outer(timestep_R.to(torch.float64), 10_000.0**-exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def split_heads(x_BLD: Tensor, num_heads: int) -> Tensor:
    return torch.unflatten(x_BLD, -1, (num_heads, -1))


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
