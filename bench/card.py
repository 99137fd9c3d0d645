"""The environment card of every result file: hardware, library versions and commit."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pusa_fast

ROOT = Path(pusa_fast.__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "transformers",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "liger-kernel",
    "quack-kernels",
)


def card(device: torch.device) -> dict[str, Any]:
    """All that tells a figure from one measured elsewhere; None where this machine cannot say."""
    commit, dirty = checkout(ROOT)
    return {
        "device": device.type,
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "cpu": {
            "model": _cpu_model(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "native": _native(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "pusa_fast": pusa_fast.__version__,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def title(found: dict[str, Any]) -> str:
    """A table's caption: "NVIDIA H200; torch 2.11.0; commit 0123456789; 2026-11-23"."""
    gpu, cpu = found.get("gpu"), found["cpu"]
    machine = gpu["name"] if gpu else f"{cpu['model']}, {cpu['threads']} threads, {cpu['isa']}"
    commit = f"commit {found['commit'][:10]}" if found.get("commit") else "no commit"
    commit += " with changes" if found.get("dirty") else ""
    return f"{machine}; torch {found['versions'].get('torch', '?')}; {commit}; {found['date'][:10]}"


def machine(found: dict[str, Any]) -> str:
    """Times are comparable between cards where this agrees: the GPU, or the CPU and its threads."""
    gpu, cpu = found.get("gpu"), found["cpu"]
    return str(gpu["name"]) if gpu else f"{cpu['model']}, {cpu['threads']} threads"


def checkout(root: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it). PUSA_BENCH_COMMIT: a copy without git."""
    if not (root / ".git").exists():
        return os.environ.get("PUSA_BENCH_COMMIT"), None
    head = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head or None, None if changes is None else bool(changes)


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "sm": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _native() -> list[str] | None:
    """The CPU features that the compiled part found; None where it is not built."""
    try:
        features: dict[str, bool] = importlib.import_module("pusa_fast._native").cpu_features()
    except ImportError:
        return None
    return sorted(name for name, there in features.items() if there)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
