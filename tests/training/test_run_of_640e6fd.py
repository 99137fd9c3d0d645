"""A run that commit 640e6fd began (see tests/written_by_640e6fd/make.py): it goes on to what
640e6fd would have made of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pusa_fast import ops
from pusa_fast.training.config import TrainConfig, load_config
from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.parallel import World
from pusa_fast.training.preflight import check
from pusa_fast.training.saved import Checkpoints
from pusa_fast.training.trainer import Trainer, train

WRITTEN = Path(__file__).parents[1] / "written_by_640e6fd"
UNREPEATABLE = ("seconds", "tokens_per_second", "memory_gib")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """That of the run, whose paths are relative."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return load_config("run/config.yaml")


def same_machine() -> bool:
    """Whether the last bits of a step are those of the machine that the files were made on."""
    if ops.backends()["native"] is not None:
        return False
    from pusa_fast import _native

    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    here = {
        "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "isa": _native.isa(),
    }  # fmt: skip
    made_on = json.loads((WRITTEN / "made_on.json").read_text())
    return made_on.pop("vendor") in processor and here == made_on


def rows(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in UNREPEATABLE} for row in read_metrics(path)]


def test_its_checkpoint_is_restored(config: TrainConfig) -> None:
    """Weights, averages, moments and rates, as they are in the file."""
    trainer = Trainer(config, *check(config), World(torch.device("cpu")))
    assert trainer.step == 3
    saved = Checkpoints(config.out, {}, 1, World(torch.device("cpu")))
    assert trainer.average is not None
    for part, own in (("model", dict(trainer.dit.named_parameters())), ("average", trainer.average.tensors)):
        held = saved.read(3, part)
        assert held and all(torch.equal(own[name], tensor) for name, tensor in held.items())
    (optimizer,) = trainer.optimizers
    assert [state["step"].item() for state in optimizer.state.values()] == [3.0] * 6
    assert all(state["exp_avg_sq"].abs().sum() > 0 for state in optimizer.state.values())
    assert optimizer.param_groups[0]["initial_lr"] == 0.01


def test_it_goes_on_to_its_end(config: TrainConfig) -> None:
    """To the same bytes where the machine computes the same bits, and close to them anywhere."""
    done = train(config)
    assert done.step == 6 and done.weights == Path("run/lora.safetensors")
    made, expected = rows(Path("run")), rows(Path("finished"))
    assert made[:4] == expected[:4]  # the rows of the steps before the checkpoint are kept as they are
    assert [row["step"] for row in made] == [row["step"] for row in expected]
    for row, other in zip(made, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    mine, theirs = load_file("run/lora.safetensors"), load_file("finished/lora.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-5) for name in theirs)
    if same_machine():
        assert made == expected
        assert Path("run/lora.safetensors").read_bytes() == Path("finished/lora.safetensors").read_bytes()
