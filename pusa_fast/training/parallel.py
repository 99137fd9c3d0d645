"""One process or many: torchrun's environment, DDP (replicas), FSDP2 (shards), sums."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pusa_fast.model.dit import WanDiT

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class World:
    """This process among all of them. `device` is its own."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, on the CPU in float64."""
        values = values.detach().double()
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def first_does(self, action: Callable[[], None]) -> None:
        """The first process does it, the others wait. Its ValueError or OSError rises in all."""
        failed: Exception | None = None
        if self.is_first:
            try:
                action()
            except (ValueError, OSError) as error:
                failed = error
        if (failed := self.gather(failed)[0]) is not None:
            raise failed

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, joined until the end of the block; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device)
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start the processes with torchrun"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    begun = not dist.is_initialized()
    if begun:  # the others wait while one process writes exports of tens of gigabytes
        dist.init_process_group(BACKENDS[device.type], timeout=timedelta(hours=2))
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        if begun:
            dist.destroy_process_group()


def distribute(dit: WanDiT, strategy: str, world: World, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """What to call in place of `dit` in training. `strategy`: "ddp", "fsdp", or "auto" (ddp).

    fsdp shards every block, in place. `dtype`: of float32 parameters while they are gathered
    (None: unchanged).
    """
    if world.size == 1:
        return dit
    if strategy == "fsdp":
        # Inputs are not cast: timesteps, modulation and rotary tables need float32.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        dit.closed_blocks = True
        for block in dit.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(dit, mp_policy=policy)
        return dit
    return cast(Callable[..., Tensor], DistributedDataParallel(dit, gradient_as_bucket_view=True))


def accumulating(model: Any, last: bool) -> AbstractContextManager[Any]:
    """Sum gradients over processes only in the last part of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


@contextmanager
def gathered(dit: nn.Module) -> Iterator[None]:
    """Gather what an FSDP model has outside its blocks, for calls other than its forward pass.

    Blocks gather themselves. Leave this after each use of averaged weights, which drops what was
    gathered of them.
    """
    if not isinstance(dit, FSDPModule):
        yield
        return
    dit.unshard()
    try:
        yield
    finally:
        dit.reshard()
