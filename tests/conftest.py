"""Settings of the whole suite, and the recorded outputs of the reference implementation as fixtures."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parent
HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which no import above does
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The tensors of the suite are small: more than two threads cost more than they give.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))

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
    """`golden("vae")`: the tensors of tests/golden/vae.safetensors, read once; copies, which a test may change."""
    return lambda name: {key: t.clone() for key, t in _tensors(HERE / "golden" / f"{name}.safetensors").items()}


@pytest.fixture(scope="session")
def golden_meta() -> dict[str, Any]:
    """tests/golden/meta.json: configurations, seed and the arguments of each recorded run. Not to be changed."""
    meta: dict[str, Any] = _document(HERE / "golden" / "meta.json")
    return meta


@pytest.fixture(scope="session")
def interpreter_as_the_hardware() -> None:
    """Makes Triton's interpreter round to bf16 and fp8 as GPUs do (tests/kernels/interpreter.py)."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    # By its path: importlib mode gives test folders no package to import from.
    spec = importlib.util.spec_from_file_location("pusa_tests_interpreter", HERE / "kernels" / "interpreter.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.patch()


@pytest.fixture(params=["reference", "native", "triton"])
def ops_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each implementation of the ops forced; without a GPU, Triton's in its interpreter."""
    from pusa_fast import ops

    if reason := ops.backends()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    if request.param == "triton":
        request.getfixturevalue("interpreter_as_the_hardware")
    with ops.use(request.param):
        yield request.param


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], Any]:
    """`manifest("wan2.1-vae")`: tests/manifests/wan2.1-vae.json, the tensors of a published checkpoint; a copy."""
    return lambda name: copy.deepcopy(_document(HERE / "manifests" / f"{name}.json"))


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    tables = {
        n: {**values[n], **v} for n, v in changes.items() if isinstance(v, dict) and isinstance(values.get(n), dict)
    }
    return values | changes | tables


@dataclass(frozen=True)
class TinyTraining:
    """Two blocks of width 48 with random weights, eleven clips of two shapes, and settings that train on them in milliseconds."""

    dit: Path
    clips: Path
    runs: Path

    def values(self, run: str = "run", **changes: Any) -> dict[str, Any]:
        """Plain settings of a run in `runs`; those that are tables are merged with a change, not replaced by it."""
        found: dict[str, Any] = {
            "data": {"path": str(self.clips)}, "out": str(self.runs / run), "model": "nano", "dit": str(self.dit), "device": "cpu",
            "steps": 6, "batch_size": 4, "seed": 3, "lora": {"rank": 4}, "optim": {"lr": 0.01}, "checkpoints": {"every": 0},
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
    """`finished(**changes)`: the settings of a run as `tiny.config` gives them, trained to its end once for all tests. Not to be changed."""
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


# Of a forked program: a session and a folder of its own, its output to files, then what `python` does with such words.
_PROGRAM = """
import os, runpy, sys
import torch
os.setsid()
os.chdir(folder)
os.environ.update(environment)
for number, path in enumerate(outputs, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
torch.set_num_threads(1)
sys.path.insert(0, folder)
sys.argv = words[1:] if words[0] == "-m" else words
if words[0] == "-m":
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(words[0], run_name="__main__")
"""


class Program:
    """Python with these words (`"-m", module, ...` or `file, ...`) as a process; as `subprocess.Popen`, where it has the same names."""

    def __init__(
        self, forks: ForkServerContext, folder: Path, name: str, words: list[str], environment: dict[str, str]
    ) -> None:
        self.outputs = [folder / f"{name}.{stream}" for stream in ("out", "err")]
        given = {
            "folder": str(folder),
            "environment": environment,
            "outputs": [str(path) for path in self.outputs],
            "words": words,
        }
        self._process = forks.Process(target=exec, args=(_PROGRAM, given), daemon=False)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, (
            f"still running after {timeout} s: {[path.read_text() for path in self.outputs]}"
        )
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end. Returns (stdout, stderr)."""
        self.wait(timeout)
        out, err = (path.read_text() for path in self.outputs)
        return out, err

    def kill(self) -> None:
        self._process.kill()


@pytest.fixture(scope="session")
def _forks() -> ForkServerContext:
    """Forks processes that have torch and the trainer imported, which costs five seconds each time otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pusa_fast.data.prepare", "pusa_fast.training.trainer"])
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        # No thread in the server: what a thread holds while another forks stays held.
        for name, value in {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(tmp_path: Path, _forks: ForkServerContext) -> Iterator[Callable[..., Program]]:
    """`start("-m", "pusa_fast.cli", ..., NAME="value of the environment")`: a `Program` in `tmp_path`; what still runs at the end is killed."""
    running: list[Program] = []

    def begin(*words: str | Path, **environment: str) -> Program:
        running.append(Program(_forks, tmp_path, f"program-{len(running)}", [str(word) for word in words], environment))
        return running[-1]

    yield begin
    for program in running:
        if program.poll() is None:
            program.kill()
        program.wait(30)
