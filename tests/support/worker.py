"""One process of a run of several: `pusa-fast train` for torchrun, or many runs in one world."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pusa_fast import cli
from pusa_fast.data.store import LatentStore


def train_each(store: Path, rank: int, paths: list[Path]) -> None:
    """Trains the runs in turn as one of two processes: connecting the two takes seconds."""
    import torch.distributed as dist

    from pusa_fast.training.config import load_config
    from pusa_fast.training.trainer import train

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for path in paths:
        train(load_config(path))
    dist.destroy_process_group()


def fail_after(count: int) -> None:
    """Lets this process read so many latents, and no more."""
    calls: list[int] = []
    plain = LatentStore.latents

    def failing(self: LatentStore, index: int) -> Any:
        calls.append(index)
        if len(calls) > count:
            raise OSError(5, "Input/output error", "shard")
        return plain(self, index)

    LatentStore.latents = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    rank = os.environ["RANK"]
    Path(f"{rank}.pid").write_text(str(os.getpid()))
    if rank == os.environ.get("FAILING_RANK"):
        fail_after(9)
    cli.main()
