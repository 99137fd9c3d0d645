"""Settings of the whole suite, and the recorded outputs of the reference implementation as fixtures."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
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
