"""clip.json: everything needed to make a clip again, and the versions that made it."""

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
# Suffixes of the files that belong to a model.
_MODEL_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".model", ".json"})
FORMAT = "pusa-fast clip 1"

# The fields that `prepare` reads from a record, and their JSON types; null counts as absent.
_FIELDS: Mapping[str, tuple[type, ...]] = {
    **{option.key: option.json_types for option in declared(GenerateOptions).values() if option.name not in INPUTS},
    **dict.fromkeys(("height", "width", "seed"), (int,)),
    **dict.fromkeys(("conditions", "written"), (list,)),
    **dict.fromkeys(("lora", "hashes"), (dict,)),
}


def versions() -> dict[str, str]:
    """Versions of the packages that make a clip, from their metadata: nothing is imported."""
    found = {"pusa_fast": pusa_fast.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The git commit of this package's checkout, "+changes" if files differ; None outside one."""
    root = Path(pusa_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # the package may be installed inside another project's checkout
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
    """Every file of a model, its own LoRAs included, sorted."""
    parts = (files.dit, files.vae, files.text_encoder, files.tokenizer, *files.loras)
    return sorted({file for part in parts for file in _walk(part)})


def _walk(part: Path) -> Iterator[Path]:
    if part.is_file():
        yield part
    else:
        yield from (file for file in part.rglob("*") if file.suffix in _MODEL_SUFFIXES and file.is_file())


class Hashes:
    """SHA-256 of files, in the background: gigabytes of weights take a minute. `result()` waits."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._found: dict[str, str] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)  # never delays an interrupted run
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
    """A clip.json by `text`, its types checked. Raises OSError, or ValueError for anything else."""
    with open(path, "rb") as file:
        content = file.read(10_000_000)
    try:
        found = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"--from {path} is not valid JSON ({error}): give a clip's .json") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"""--from {path} is not a clip's record ("format" is not "{FORMAT}"): give a clip's .json""")
    for name, kinds in _FIELDS.items():
        if found.get(name) is not None:
            try:
                check_json(name, found[name], kinds)
            except ValueError as error:
                raise ValueError(f"--from {path}: {error}: restore the file") from None
    for name in ("model", "lora"):
        if not isinstance((found.get("hashes") or {}).get(name, {}), dict):
            raise ValueError(f"--from {path}: hashes.{name} is not a dict: restore the file")
    if found.get("written") == []:
        raise ValueError(f"--from {path}: written=[] leaves nothing to write: restore the file")
    return {name: value for name, value in found.items() if value is not None or name not in _FIELDS}
