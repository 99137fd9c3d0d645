"""`pusa-fast doctor`: what this machine has, which backends work here, and why others do not."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import typer

from pusa_fast import attention, ops
from pusa_fast.commands import record
from pusa_fast.native import tiles
from pusa_fast.weights.pretrained import find_model

_CODECS = ("libx264", "h264", "hevc", "vp9", "av1", "gif")


def run(as_json: bool) -> None:
    found = examine()
    typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))


def examine() -> dict[str, Any]:
    """Every finding by section. A value is the reason why a thing cannot be used; None: it can."""
    return {
        "versions": record.versions(),
        "commit": record.commit(),
        "devices": _devices(),
        "native": _native(),
        "ops": ops.backends(),
        "attention": attention.backends(),
        "nano": _nano(),
        "codecs": _codecs(),
    }


def _devices() -> list[str]:
    found = [
        f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    ]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} ({card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor})")
    return found


def _native() -> dict[str, Any]:
    """The compiled part: the `reason` it is missing, or its version and the CPU's features."""
    try:
        module = importlib.import_module("pusa_fast._native")
    except ImportError as error:
        return {"reason": f"{error}; plain torch replaces it. To build it: pip install -e ."}
    features = sorted(name for name, there in module.cpu_features().items() if there)
    failing = {f"cuda:{index}": tiles.cuda_reason(index) for index in range(torch.cuda.device_count())}
    return {
        "reason": None, "version": module.__version__, "cpu": features, "cuda": module.cuda_built(),
        "cuda_fails_on": {device: reason for device, reason in failing.items() if reason is not None},
    }  # fmt: skip


def _nano() -> dict[str, Any]:
    try:
        files = find_model("nano")
    except ValueError as error:
        return {"reason": str(error)}
    size = sum(path.stat().st_size for path in record.model_files(files))
    return {"reason": None, "folder": str(files.dit.parent), "megabytes": round(size / 1e6, 1)}


def _codecs() -> dict[str, str | None]:
    try:
        import av
    except ImportError as error:
        return dict.fromkeys(_CODECS, f"PyAV does not load ({error}): pip install av")
    return {name: None if name in av.codecs_available else "this FFmpeg was built without it" for name in _CODECS}


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    if found["commit"]:
        yield f"commit {found['commit']}"
    for section, value in found.items():
        if section in ("versions", "commit"):
            continue
        yield ""
        yield f"{section}:"
        if isinstance(value, list):
            yield from (f"  {entry}" for entry in value)
        elif "reason" in value:  # one thing, present or not
            details = ", ".join(f"{name} {_plain(detail)}" for name, detail in value.items() if name != "reason")
            yield f"  no: {value['reason']}" if value["reason"] else f"  yes: {details}"
        else:
            yield from (f"  {name}: {f'no: {reason}' if reason else 'yes'}" for name, reason in value.items())


def _plain(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
