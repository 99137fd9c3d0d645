"""What a run will take, before any weights are read: memory by part, work and time of a step.

Activations are found by running the step on tensors without storage, through the operators that the
device would use. Not counted: what allocators, CUDA and cuBLAS keep for themselves (about 1 GB on a
GPU), and the block that FSDP gathers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.config import MODELS, DiTConfig
from pusa_fast.data.store import LatentStore
from pusa_fast.device import parse_device
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import add_lora
from pusa_fast.model.vae.memory import Tracker
from pusa_fast.training import fafm, flops, metrics
from pusa_fast.training.data import auto_parts
from pusa_fast.training.memory import save_memory
from pusa_fast.training.optim import hidden_matrices
from pusa_fast.weights import load_dit

if TYPE_CHECKING:
    from pusa_fast.training.config import TrainConfig

# Shares of a GPU's dense bf16 rate that large matmuls and attention reach (docs/performance.md: 790
# and 640 of 989 TFLOP/s).
_MATMULS, _ATTENTION = 0.80, 0.65
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Of one process. `memory`: bytes by part; `tokens`, `flops` of a step; `seconds` by device."""

    memory: dict[str, int]
    tokens: int
    flops: float
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes of all parts together."""
        return sum(self.memory.values())

    def text(self) -> str:
        width = max(map(len, self.memory))
        sizes = {**self.memory, "together": self.peak}
        lines = [f"{name:<{width}}  {size / _GIB:9.3f} GiB" for name, size in sizes.items()]
        lines += [f"a step: {self.tokens} tokens, {self.flops / 1e12:.4g} TFLOP"]
        lines += [f"  about {seconds:.3g} s {where}" for where, seconds in self.seconds.items()]
        return "\n".join(lines)


def plan_run(config: TrainConfig, processes: int = 1) -> Plan:
    """For the largest clips, on one of `processes`. Raises as reading the store and model does."""
    store = LatentStore(config.data.path)
    if not store.clips:
        raise ValueError(f"{config.data.path} holds no clips: prepare some")
    shape = max((clip.shape for clip in store.clips), key=lambda shape: math.prod(shape[1:]))
    dit = load_dit(config.files().dit, device="meta").config
    return plan_step(config, dit, shape, store.text_len, processes=processes)


def plan_step(
    config: TrainConfig,
    dit: DiTConfig | str,
    shape: tuple[int, ...],
    text: int,
    device: torch.device | None = None,
    processes: int = 1,
) -> Plan:
    """A step on clips [C, F, h, w] with `text` context rows. `dit`: a configuration, or its name.

    `device`: where it will run (None: the config's). It decides which operators are traced, and
    what is estimated.
    """
    if isinstance(dit, str):
        known = {name: model for name, model in MODELS.items() if isinstance(model, DiTConfig)}
        if dit not in known:
            raise ValueError(f"{dit!r} is not a transformer of MODELS: choose one of {', '.join(known)}")
        dit = known[dit]
    where = device or parse_device(config.device)
    parts = config.accumulate or auto_parts(config.batch_size, processes, shape, dit.patch_size)
    if config.batch_size % (processes * parts):
        clips = f"a batch of {config.batch_size} clips"
        raise ValueError(f"{clips} cannot be shared by {processes} processes in {parts} parts")
    memory = _memory(config, dit, (config.batch_size // (processes * parts), *shape), text, where)
    if config.parallel == "fsdp":
        memory = {part: size if part == "activations" else size // processes for part, size in memory.items()}
    batch = (config.batch_size // processes, *shape)
    work = flops.training_step(config)(dit, batch, text)
    return Plan(memory, flops.tokens(dit, batch, text), work, _seconds(config, dit, batch, text, where))


def _memory(
    config: TrainConfig, dit_config: DiTConfig, latents: tuple[int, ...], text: int, where: torch.device
) -> dict[str, int]:
    meta, dtype = torch.device("meta"), config.dtype_on(where)
    weight_dtype = torch.float32 if config.lora is None else dtype
    with meta:
        dit = WanDiT(dit_config).to(weight_dtype)
    if config.lora is not None:
        add_lora(dit, config.lora.rank, config.lora.alpha, config.lora.targets, config.lora.init)
    # One operator with its log-sum-exp, as all backends on devices are. torch's splits on meta.
    dit.attention_backend = "fa4"
    save_memory(dit, config.memory.checkpointing, config.memory.offload)
    trained = {n: p for n, p in dit.named_parameters() if p.requires_grad}
    frozen = [p for p in dit.parameters() if not p.requires_grad]
    muon = hidden_matrices(trained) if config.optim.name == "muon" else {}
    shapes = (latents, latents, (latents[0], latents[2]), (latents[0], text, dit_config.text_dim))
    clean, noise, sigma, context = (torch.empty(shape, device=meta) for shape in shapes)
    autocast = config.lora is None and dtype is not torch.float32
    tracker = Tracker()
    tracker.ignore(dit.parameters())
    backend = "triton" if where.type == "cuda" else "native"
    with ops.use(backend, probe=False), tracker:
        noised, timestep, target = fafm.noised(clean, noise, sigma, weight_dtype)
        # autocast does not know the meta device; what counts is that matmuls run in bf16
        with torch.autocast("cpu", dtype, enabled=autocast):
            velocity = dit(noised, timestep, context)
        loss, _ = fafm.loss(velocity, target, sigma, "uniform")
        del velocity, noised, timestep, target
        torch.autograd.backward(loss)
    gradients = _bytes(p.grad for p in trained.values() if p.grad is not None)
    own = _bytes(trained.values())
    return {
        "frozen weights": _bytes(frozen),
        "trained weights": own,
        "optimiser": 2 * own - _bytes(muon.values()),
        **({"average": own} if config.optim.ema_decay else {}),
        "gradients": gradients,
        "activations": max(0, tracker.peak - gradients),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _seconds(
    config: TrainConfig, dit: DiTConfig, batch: tuple[int, ...], text: int, where: torch.device
) -> dict[str, float]:
    """Matmuls and attention alone, at the rates they reach, with what checkpointing repeats."""
    again = {"none": 0, "block": 1, "attention": 1}[config.memory.checkpointing]
    low_rank = 0.0 if config.lora is None else flops.low_rank(dit, batch, text, config.lora)
    matmuls = flops.products(dit, batch, text) * ((3 if config.lora is None else 2) + again) + low_rank * (3 + again)
    scores = flops.attention(dit, batch, text) * (3.5 + (config.memory.checkpointing == "block"))
    rates = {"on an H200": 1e12 * metrics.PEAK_TFLOPS["H200"]}
    if where.type == "cuda" and torch.cuda.is_available() and (peak := metrics.peak_flops(where)):
        rates["here"] = peak
    found = {name: matmuls / (peak * _MATMULS) + scores / (peak * _ATTENTION) for name, peak in rates.items()}
    if where.type == "cpu":
        found["here, on the CPU"] = (matmuls + scores) / _cpu_rate(config.dtype_on(where))
    return found


def _cpu_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a matmul of 256 rows, measured now; once where it is slow (bf16 on many CPUs)."""
    a, b = torch.randn(256, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    rounds: list[float] = []
    while len(rounds) < 9 and sum(rounds) < 0.3:
        start = time.perf_counter()
        a @ b
        rounds.append(time.perf_counter() - start)
    return 2.0 * 256 * 1024**2 / statistics.median(rounds)
