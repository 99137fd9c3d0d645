"""Devices: which one, in which dtype, how much memory it has, and what running out of it says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The share of a device's memory to plan with. The rest is for the driver, library workspaces and
# fragmentation.
_USABLE = 0.8
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

# Stage -> what helps when it runs out of memory, in terms of the Python API. The command line has
# its own words.
_RELIEF = {
    "text": "load the model in a smaller dtype, or give prompt_embeds made elsewhere",
    "encode": "use tiling='auto' (or Tiling(mode='exact') with smaller tiles), or a smaller height and width",
    "denoise": "use fewer num_frames, a smaller height and width, or guidance_scale=1",
    "decode": "use tiling='auto' (or Tiling(mode='exact') with smaller tiles), a smaller height and width, or fewer "
    "num_frames",
    "prepare": "use tiling='auto', or a smaller bucket",
    "train": "raise accumulate, set memory.checkpointing to attention or memory.offload to true, or parallel to fsdp "
    "on more processes; train --plan says what it takes",
    "validation": "make validation.num_frames, validation.width and validation.height smaller, or leave out "
    "validation.samples; the steps so far are saved",
}


class OutOfMemory(torch.OutOfMemoryError):
    """Any kind of running out of memory. `stage` is a key of the relief table."""

    def __init__(self, stage: str, where: str) -> None:
        super().__init__(f"out of memory in {stage} {where}: {_RELIEF[stage]}")
        self.stage, self.where = stage, where


@contextmanager
def out_of_memory(stage: str, where: str | torch.device) -> Iterator[None]:
    """Turn any kind of running out of memory into `OutOfMemory`; the outermost stage is named.
    `where`: a device, or words."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(stage, f"on {where}" if isinstance(where, torch.device) else where) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. torch's CPU allocator says it in a plain
    RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device by name; None: a GPU where there is one. Raises ValueError for a name that torch
    does not know."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from None


def resolve_device(device: str | torch.device | None) -> torch.device:
    """As `parse_device`, and raises ValueError for a device that models do not run on, or that does
    not exist here."""
    where = parse_device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device} is not supported: use cpu, cuda or cuda:N")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} does not exist here ({torch.cuda.device_count()} CUDA devices): use device='cpu'"
        )
    return where


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, within the limits of this container. Raises ValueError
    where it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):
        raise ValueError("this system does not say how much memory it has: give Tiling.auto(memory=BYTES)")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _CONTAINER_LIMITS:
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def usable_memory(device: torch.device) -> int:
    """Bytes of a device to plan with: a share of its total memory, never of what is free."""
    return int(_USABLE * total_memory(device))


def weight_bytes(device: torch.device, *modules: torch.nn.Module | None) -> int:
    """Bytes of the modules' parameters and buffers on `device`, each storage once; of sharded ones
    this process's part."""
    tensors = (t for m in modules if m is not None for t in (*m.parameters(), *m.buffers()) if t.device == device)
    storages = ((t.to_local() if hasattr(t, "to_local") else t).untyped_storage() for t in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
