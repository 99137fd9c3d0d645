"""What a block keeps for its backward pass, and where that waits.

Under "attention" a checkpointed block keeps its input and the results of attention with their
log-sum-exp, so the backward pass repeats the matmuls but never attention, which is half of the work
or more (docs/training.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pusa_fast.attention.flash  # noqa: F401 (registers torch.ops.pusa_fast.flash_attention)
from pusa_fast.model.dit import Block, WanDiT

Run = Callable[..., Any]

# Operators that compute attention and its log-sum-exp. torch's own may be missing from a build.
_SDPA = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
_ATTENTION = (
    torch.ops.pusa_fast.flash_attention.default,
    *(op.default for name in _SDPA if (op := getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None))),
)


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


# Nothing in a block draws random numbers.
_checkpoint = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
MODES: dict[str, Run | None] = {
    "none": None,
    "block": _checkpoint,
    "attention": functools.partial(
        _checkpoint, context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    ),
}


def save_memory(dit: WanDiT, mode: str, offload: bool = False) -> None:
    """Set how the blocks of `dit` run under autograd: a name of `MODES`.

    `offload`: block inputs wait in host memory. Raises ValueError for an unknown mode, or offload
    without checkpointing.
    """
    if mode not in MODES:
        raise ValueError(f"checkpointing {mode!r} is unknown: choose one of {', '.join(MODES)}")
    run = MODES[mode]
    if offload:
        if run is None:
            raise ValueError("offload moves what checkpoints keep: set checkpointing to attention or block")
        run = functools.partial(Offload(dit.device).run, run)
    for block in dit.blocks:
        assert isinstance(block, Block)
        block.checkpoint = run


@dataclass(eq=False)
class _Parked:
    """A tensor of block `block` (in running order) on its way to the host, there, or back."""

    host: Tensor
    device: torch.device
    block: int
    back: Tensor | None = None
    ready: Any = None  # the event after its copy back; the stream itself also copies for the next block
    used: bool = False
    shape: torch.Size | None = None  # on meta, where there is nothing to copy


class Offload:
    """Copies what a checkpoint keeps to pinned host memory while the next block computes.

    It comes back one block before its use. On the CPU the copies are plain. Written for CUDA
    streams; docs/performance.md says whether it has run on one.
    """

    def __init__(self, device: torch.device, smallest: int = 1 << 25) -> None:
        self._cuda, self._smallest = device.type == "cuda", smallest  # bytes
        self._away: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._home: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._parked: list[list[_Parked]] = []  # by block

    def run(self, checkpointed: Run, function: Run, *inputs: Any) -> Any:
        self._parked.append([])
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return checkpointed(function, *inputs)

    def _pack(self, tensor: Tensor) -> Tensor | _Parked:
        if tensor.numel() * tensor.element_size() < self._smallest:
            return tensor
        if tensor.is_meta:  # a plan: nothing of it stays on the device
            return _Parked(tensor.new_empty(0), tensor.device, 0, shape=tensor.shape)
        with self._on(self._away):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
            host.copy_(tensor.detach(), non_blocking=True)
        if self._away is not None:
            tensor.record_stream(self._away)
        parked = _Parked(host, tensor.device, len(self._parked) - 1)
        self._parked[-1].append(parked)
        return parked

    def _unpack(self, saved: Tensor | _Parked) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.shape is not None:
            return saved.host.new_empty(saved.shape)
        back = self._fetch(saved)
        saved.back, saved.used = None, True
        del self._parked[saved.block + 1 :]  # the backward pass is done with those
        for ahead in self._parked[saved.block - 1] if saved.block else ():
            if not ahead.used:
                self._fetch(ahead)
        if not saved.block:
            self._parked.clear()
        if self._home is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.ready)
            back.record_stream(torch.cuda.current_stream(saved.device))
        return back

    def _fetch(self, parked: _Parked) -> Tensor:
        if parked.back is None:
            with self._on(self._home, after=self._away):
                parked.back = parked.host.to(parked.device, non_blocking=True, copy=True)
                parked.ready = None if self._home is None else self._home.record_event()
        return parked.back

    def _on(self, stream: Any, after: Any = None) -> AbstractContextManager[Any]:
        if stream is None:
            return nullcontext()
        stream.wait_stream(torch.cuda.current_stream(stream.device) if after is None else after)
        return torch.cuda.stream(stream)
