"""What a run measures: a line of metrics.jsonl per step, TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pusa_fast.data.durable import write_text

if TYPE_CHECKING:
    from pusa_fast.training.config import TrainConfig

METRICS = "metrics.jsonl"
LEVEL_EDGES = (0.25, 0.5, 0.75)  # between the quarters of noise levels that errors are reported for
# Dense bf16 TFLOP/s of a device whose name contains this.
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "H800": 989, "B200": 2250, "A100": 312, "A800": 312, "4090": 165,
    "L40S": 362,
}  # fmt: skip


class Metrics:
    """Writes rows {"step": n, ...}. `start`: where a run resumes; later rows are dropped."""

    def __init__(self, config: TrainConfig, start: int) -> None:
        self.path = config.out / METRICS
        if self.path.exists():
            steps = ((line, _step(line)) for line in self.path.read_text().splitlines())
            write_text(self.path, "".join(f"{line}\n" for line, step in steps if step is not None and step <= start))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(config.out) if config.logging.tensorboard else None
        self._wandb = _wandb(config, start) if config.logging.wandb else None

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a run, without a line that a kill cut short."""
    lines = (Path(out) / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if _step(line) is not None]


def check_loggers(config: TrainConfig) -> None:
    """Raises ValueError where a logger is set but not installed."""
    wanted = {"tensorboard": config.logging.tensorboard, "wandb": config.logging.wandb is not None}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            missing = f"logging.{package} is set, but {package} is not installed"
            raise ValueError(f"{missing}: pip install {package}, or leave it out")


def level_errors(sigma: Tensor, errors: Tensor) -> Tensor:
    """Sums and counts [2, 4] of frame errors [B, F] by the quarter of (0, 1] of their level.

    Frames at level 0 do not count.
    """
    edges = torch.tensor(LEVEL_EDGES, device=sigma.device)
    quarter = torch.bucketize(sigma, edges).flatten()
    seen = (sigma > 0).flatten().double()
    sums = torch.zeros(2, 4, dtype=torch.float64, device=sigma.device)
    sums[0].index_add_(0, quarter, errors.detach().double().flatten() * seen)
    sums[1].index_add_(0, quarter, seen)
    return sums


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known device; None elsewhere."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * value for part, value in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the allocator on a GPU, of the process on the CPU (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _tensorboard(out: Path) -> Any:
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"))


def _wandb(config: TrainConfig, start: int) -> Any:
    where = config.out.resolve()
    run_id = f"{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:8]}"
    return importlib.import_module("wandb").init(
        project=config.logging.wandb, name=where.name, id=run_id, dir=str(config.out),
        resume="allow" if start else None, config=config.model_dump(mode="json"),
    )  # fmt: skip
