"""Checkpoint files as tables of tensors that are read one at a time: find, open, save.

safetensors and .pth files are mapped, so a tensor takes memory only when it is used, and only once.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
StateSource = Paths | Mapping[str, torch.Tensor]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)$")


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, not yet read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint. `folder`: where a config.json may be; `shared`: caller's own."""

    label: str
    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    shared: bool = False


@dataclass(frozen=True)
class Places:
    """File patterns and sub-directories ('name/') of one part of a model; the first hit wins."""

    what: str
    entries: tuple[str, ...]


_STEMS = (("diffusion_pytorch_model", "safetensors"), ("model", "safetensors"), ("diffusion_pytorch_model", "bin"))
_GENERIC = tuple(
    f"{stem}{tail}" for stem, suffix in _STEMS for tail in (f".{suffix}.index.json", f".{suffix}", f"-*-of-*.{suffix}")
)
DIT = Places("a Wan transformer", ("dit.safetensors", "transformer/", *_GENERIC))
VAE = Places("a Wan VAE", ("vae.safetensors", "Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth", "vae/", *_GENERIC))
_T5 = "models_t5_umt5-xxl-enc-*"
TEXT = Places(
    "a UMT5 encoder",
    (f"{_T5}.safetensors", f"{_T5}.pth", "text_encoder/", "umt5-xxl/", *_GENERIC, "pytorch_model.bin"),
)


def open_source(source: StateSource, places: Places) -> Source:
    """Tensors of a file, shards, a directory or a state dict.

    Raises FileNotFoundError for a path, or a shard that an index names, that does not exist;
    ValueError for a directory without a model, a file that is damaged, of an unknown kind or not a
    plain table of tensors, and shards that overlap.
    """
    if isinstance(source, Mapping):
        return Source("the state dict", _from_mapping(source, "the state dict"), shared=True)
    if isinstance(source, (str, os.PathLike)):
        label, files = str(source), _find(Path(source), places)
    elif source:
        label, files = str(Path(source[0])), [Path(path) for path in source]
    else:
        raise ValueError(f"no path given for {places.what}: name a file, its shards or a directory")
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, about = open_file(file)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ValueError(f"{file}: {listing(twice)} are also in another shard: give the shards of one model only")
        tensors |= found
        metadata = about | metadata
    if not tensors:
        raise ValueError(f"{files[0]} holds no tensors")
    return Source(label, tensors, metadata, folder=files[0].parent)


def open_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of one safetensors or pickle file. Raises as `open_source`."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory: name the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _open_pickle(path), {}
    kind = path.suffix or "a file without suffix"
    raise ValueError(f"{path}: cannot read {kind}: use .safetensors, .pth, .pt, .bin or .ckpt")


def listing(names: Iterable[str], most: int = 3) -> str:
    """The first few names and how many more there are, for one-line messages."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _find(path: Path, places: Places) -> list[Path]:
    """Files that make up the model at `path`: a file, a shard index, or a directory."""
    if path.name.endswith(".index.json") and path.is_file():
        return _indexed(path)
    if not path.is_dir():
        return [path]
    for entry in places.entries:
        if entry.endswith("/") and (path / entry).is_dir():
            return _find(path / entry, places)
        hits = [] if entry.endswith("/") else sorted(path.glob(entry))
        if hits:
            return _indexed(hits[0]) if entry.endswith(".index.json") else _complete(hits)
    experts = [p.name for p in (path / "high_noise_model", path / "low_noise_model") if p.is_dir()]
    hint = f"; name one of its experts: {' or '.join(experts)}" if experts else ""
    raise ValueError(f"{path} is not a directory of {places.what}: looked for {', '.join(places.entries)}{hint}")


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a shard index: it needs a weight_map of tensor names to files") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {listing(missing)}, not in {index.parent}: download the missing shards")
    return [index.parent / name for name in names]


def _complete(files: list[Path]) -> list[Path]:
    """The shards of one model, all of them present."""
    shard = _SHARD.match(files[0].name)
    if shard:
        wanted = [f"{shard[1]}-{n:0{len(shard[2])}d}-of-{shard[3]}{shard[4]}" for n in range(1, int(shard[3]) + 1)]
        missing = sorted(set(wanted) - {f.name for f in files})
        if missing:
            raise FileNotFoundError(f"{files[0].parent} lacks {listing(missing)}: download the missing shards")
        return [files[0].parent / name for name in wanted]
    return files[:1]


def _open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    try:
        handle: Any = safe_open(path, framework="pt", device="cpu")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file: {_first_line(error)}{_pointer(path)}"
        ) from error
    unknown = sorted({s.get_dtype() for s in slices.values()} - _DTYPES.keys())
    if unknown:
        kinds = ", ".join(unknown)
        raise ValueError(
            f"{path} holds tensors of type {kinds}: quantised files cannot be read, use bf16, fp16 or fp32"
        )

    def stored(name: str, header: Any) -> Stored:
        return Stored(tuple(header.get_shape()), _DTYPES[header.get_dtype()], partial(handle.get_tensor, name))

    return {name: stored(name, header) for name, header in slices.items()}, metadata


# What torch.load raises for a file of another kind, a truncated or a damaged one.
_DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip


def load_pickle(path: Path) -> Any:
    """What torch saved in a file: plain tables and tensors only, mapped. Raises ValueError."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # the format before torch 1.6 cannot be mapped
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        wrong = f"{path} is damaged or not a table of tensors"
        raise ValueError(f"{wrong}: {_first_line(error)}{_pointer(path)}") from error


def _open_pickle(path: Path) -> dict[str, Stored]:
    state = load_pickle(path)
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    return _from_mapping(state, str(path))


def _from_mapping(state: object, label: str) -> dict[str, Stored]:
    if not isinstance(state, Mapping):
        raise ValueError(f"{label} holds a {type(state).__name__}: a table of names and tensors is needed")
    strange = [str(n) for n, t in state.items() if not (isinstance(n, str) and isinstance(t, torch.Tensor))]
    if strange:
        raise ValueError(f"{label} is not a plain table of tensors: {listing(strange)} is not a tensor")
    return {n: Stored(tuple(t.shape), t.dtype, t.detach) for n, t in state.items()}


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object; other valid JSON counts as empty. Raises ValueError naming `where`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _pointer(path: Path) -> str:
    with path.open("rb") as file:
        return " (a Git LFS pointer: download the file itself)" if file.read(20) == b"version https://git-" else ""


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, under a temporary name that replaces `path` when complete.

    Raises FileNotFoundError when the directory does not exist, and the disk's own OSError where it
    is full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: {path.parent} is not a directory")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(plain, temporary, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # holds the system's error as text: "... (os error 28)"
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
            raise
        os.chmod(temporary, 0o644)  # safetensors gives the owner access only; data sets are shared
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(path: str | os.PathLike[str], places: Places) -> str:
    """Identifies the weights of a model without reading them whole.

    A hash of the sizes and of the first and last MiB of its files. Raises as `open_source`.
    """
    found = hashlib.sha256()
    for file in _find(Path(path), places):
        size = file.stat().st_size
        with file.open("rb") as opened:
            found.update(f"{size}/".encode() + opened.read(1 << 20))
            opened.seek(max(0, size - (1 << 20)))
            found.update(opened.read())
    return found.hexdigest()[:16]


def file_hash(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
