"""clip.json: what a clip was made with, enough to make it again. And the versions that made it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pusa_fast
from pusa_fast.media_plan import INPUTS
from pusa_fast.options import GenerateOptions, declared
from pusa_fast.request import check_json
from pusa_fast.weights.files import file_hash
from pusa_fast.weights.pretrained import ModelFiles

PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "sentencepiece", "av", "pillow", "typer", "rich")
# Files in a model's folders that are part of it.
_MODEL_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".model", ".json"})
FORMAT = "pusa-fast clip 1"

# What `prepare` reads of a record, and the types that JSON may give it; null counts as absent.
_FIELDS: Mapping[str, tuple[type, ...]] = {
    **{option.key: option.json_types for option in declared(GenerateOptions).values() if option.name not in INPUTS},
    **dict.fromkeys(("height", "width", "seed"), (int,)),
    **dict.fromkeys(("conditions", "written"), (list,)),
    **dict.fromkeys(("lora", "hashes"), (dict,)),
}


def versions() -> dict[str, str]:
    """Versions of what computes a clip, read from package metadata: nothing is imported."""
    found = {"pusa_fast": pusa_fast.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The git commit of the checkout that this package runs from, with "+changes" where files differ; None outside one."""
    root = Path(pusa_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie inside another project's checkout
        return None

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def model_files(files: ModelFiles) -> list[Path]:
    """Every file that a model consists of, its own LoRAs included, sorted."""
    parts = (files.dit, files.vae, files.text_encoder, files.tokenizer, *files.loras)
    return sorted({file for part in parts for file in _walk(part)})


def _walk(part: Path) -> Iterator[Path]:
    if part.is_file():
        yield part
    else:
        yield from (file for file in part.rglob("*") if file.suffix in _MODEL_SUFFIXES and file.is_file())


class Hashes:
    """SHA-256 of files, computed while the clip is made: gigabytes of weights take a minute. `result()` waits."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._found: dict[str, str] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)  # an interrupted run must not wait for it
        self._thread.start()

    def _run(self) -> None:
        try:
            for path in self._paths:
                self._found[str(path)] = file_hash(path)
        except OSError as error:
            self._error = error

    def result(self) -> dict[str, str]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found


def named_hashes(files: ModelFiles, hashes: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a model's own files, named relative to its folder."""
    own = [str(path) for path in model_files(files)]
    folder = os.path.commonpath([os.path.dirname(path) for path in own])
    return {os.path.relpath(path, folder): hashes[path] for path in own}


def text(record: Mapping[str, Any]) -> str:
    """The content of clip.json."""
    return json.dumps({"format": FORMAT, **record}, indent=1, ensure_ascii=False) + "\n"


def read(path: str) -> dict[str, Any]:
    """A clip.json made from `text`, its fields of their types. Raises OSError, or ValueError for anything else."""
    with open(path, "rb") as file:
        content = file.read(10_000_000)
    try:
        found = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"--from {path} is not valid JSON ({error}): give the .json beside a clip") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(
            f'--from {path} is not the record of a clip ("format" is not "{FORMAT}"): give the .json beside a clip'
        )
    for name, kinds in _FIELDS.items():
        if found.get(name) is not None:
            try:
                check_json(name, found[name], kinds)
            except ValueError as error:
                raise ValueError(f"--from {path}: {error}: restore the file") from None
    for name in ("model", "lora"):
        if not isinstance((found.get("hashes") or {}).get(name, {}), dict):
            raise ValueError(f"--from {path}: hashes.{name} is no dict: restore the file")
    if found.get("written") == []:
        raise ValueError(f"--from {path}: written=[] leaves nothing to write: restore the file")
    return {name: value for name, value in found.items() if value is not None or name not in _FIELDS}
