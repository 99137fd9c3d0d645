"""Settings of the whole suite, and recorded outputs of the reference implementation as fixtures."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

from programs import PRELOADED, Program

HERE = Path(__file__).parent
ROOT = HERE.parent
HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which no import above does
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The tensors of the suite are small: more than two threads cost more than they give. Workers of
# pytest-xdist share the cores.
CORES = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, min(2, CORES)))))

settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

# Marker -> whether this machine can run its tests.
RUNNABLE = {"gpu": HAS_CUDA, "weights": "PUSA_WEIGHTS" in os.environ}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if any(item.get_closest_marker(m) and not can for m, can in RUNNABLE.items())]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@functools.cache
def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@functools.cache
def _document(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """`golden("vae")`: copies of the tensors of tests/golden/vae.safetensors, read once."""
    return lambda name: {key: t.clone() for key, t in _tensors(HERE / "golden" / f"{name}.safetensors").items()}


@pytest.fixture(scope="session")
def golden_meta() -> dict[str, Any]:
    """tests/golden/meta.json: configurations, seed, arguments of each recorded run. Read only."""
    meta: dict[str, Any] = _document(HERE / "golden" / "meta.json")
    return meta


@pytest.fixture(scope="session")
def interpreter_as_the_hardware() -> None:
    """Makes Triton's interpreter round to bf16 and fp8 as GPUs do: tests/support/interpreter.py."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        import interpreter

        interpreter.patch()


@pytest.fixture(params=["reference", "native", "triton"])
def ops_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend of the ops; without a GPU, on Triton's interpreter."""
    from pusa_fast import ops

    if reason := ops.backends()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    if request.param == "triton":
        request.getfixturevalue("interpreter_as_the_hardware")
    with ops.use(request.param):
        yield request.param


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], Any]:
    """`manifest("wan2.1-vae")`: a copy of tests/manifests/wan2.1-vae.json, a published file."""
    return lambda name: copy.deepcopy(_document(HERE / "manifests" / f"{name}.json"))


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    tables = {
        n: {**values[n], **v} for n, v in changes.items() if isinstance(v, dict) and isinstance(values.get(n), dict)
    }
    return values | changes | tables


@dataclass(frozen=True)
class TinyTraining:
    """Two random blocks of width 48, eleven clips of two shapes, settings for very short steps."""

    dit: Path
    clips: Path
    runs: Path

    def values(self, run: str = "run", **changes: Any) -> dict[str, Any]:
        """Plain settings of a run in `runs`. A change to a table is merged into it."""
        found: dict[str, Any] = {
            "data": {"path": str(self.clips)}, "out": str(self.runs / run), "model": "nano", "dit": str(self.dit),
            "device": "cpu", "steps": 6, "batch_size": 4, "seed": 3, "lora": {"rank": 4}, "optim": {"lr": 0.01},
            "checkpoints": {"every": 0},
        }  # fmt: skip
        return merged(found, changes)

    def config(self, run: str = "run", **changes: Any) -> Any:
        from pusa_fast.training.config import parse_config

        return parse_config(self.values(run, **changes))


@pytest.fixture(scope="session")
def _tiny_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from pusa_fast import DiTConfig, WanDiT
    from pusa_fast.data.catalog import Catalog
    from pusa_fast.data.planning import model_hashes
    from pusa_fast.data.store import StoreWriter
    from pusa_fast.testing import make_input
    from pusa_fast.weights import checkpoint, keymap
    from pusa_fast.weights.pretrained import find_model

    folder = tmp_path_factory.mktemp("tiny")
    config = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=64, freq_dim=32)
    torch.manual_seed(11)
    dit = WanDiT(config)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)  # an untrained head is zero, and so would be every gradient
    checkpoint.save(folder / "dit.safetensors", keymap.unpack(dit.state_dict()), config)
    about = {
        **model_hashes(find_model("nano"), Catalog(folder / "none")),
        "channels": 16,
        "text_dim": 64,
        "text_len": 6,
    }
    with StoreWriter(folder / "clips", about, shard_clips=4) as writer:
        writer.write_empty_text(make_input(1, 64, seed=99))
        for i in range(11):
            writer.add(
                f"{i:03d}", make_input(16, 2 + i % 2, 4, 4, seed=i), make_input(1 + i % 6, 64, seed=50 + i),
                source=f"{i}.mp4", caption=f"clip {i}",
            )  # fmt: skip
    return folder / "dit.safetensors", folder / "clips"


@pytest.fixture
def tiny(_tiny_files: tuple[Path, Path], tmp_path: Path) -> TinyTraining:
    return TinyTraining(*_tiny_files, tmp_path)


@pytest.fixture(scope="session")
def finished(_tiny_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`finished(**changes)`: settings as of `tiny.config`, of a run trained to its end.

    Trained once for all tests, so read only.
    """
    from pusa_fast.training.trainer import train

    runs = TinyTraining(*_tiny_files, tmp_path_factory.mktemp("finished"))
    made: dict[str, Any] = {}

    def find(**changes: Any) -> Any:
        if (key := repr(changes)) not in made:
            config = runs.config(f"run-{len(made)}", **changes)
            train(config)
            made[key] = config
        return made[key]

    return find


@pytest.fixture(scope="session")
def _fork_server() -> None:
    """Starts the process that all programs are forked from."""
    forkserver.set_forkserver_preload(PRELOADED)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        # One thread in the server: a lock that another thread holds during a fork stays locked in
        # the child.
        for name, value in {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


@pytest.fixture
def start(tmp_path: Path, _fork_server: None) -> Iterator[Callable[..., Program]]:
    """`start(function, *words, NAME="value of the environment")` calls it in a `Program`.

    Programs that still run at the end of the test are killed.
    """
    running: list[Program] = []

    def begin(function: Callable[..., None], *words: Any, **environment: str) -> Program:
        running.append(Program(tmp_path, f"program-{len(running)}", environment, function, *words))
        running[-1].start()
        return running[-1]

    yield begin
    for program in running:
        program.kill()
        program.join(30)
