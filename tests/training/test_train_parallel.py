"""Two processes against one: the same steps, and checkpoints that any number go on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import worker
from programs import module
from pusa_fast.model.dit import WanDiT
from pusa_fast.testing import make_input, relative_error
from pusa_fast.training.config import Validation, dump_config, load_config, parse_config
from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.parallel import World, distribute
from pusa_fast.training.trainer import export_run, train
from pusa_fast.weights import load_dit

Start = Callable[..., Any]
AS_TORCHRUN = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # no port: they meet at a file
PLAIN: dict[str, Any] = {
    "steps": 4, "accumulate": 2, "optim": {"ema_decay": 0.5, "schedule": "constant", "clip_norm": 0.5},
    "data": {"caption_dropout": 0.2, "validation_clips": 3}, "validation": {"every": 2},
}  # fmt: skip
FULL = {"lora": None, "optim": {"lr": 1e-3, "clip_norm": 0.5, "ema_decay": 0.5}}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp", "validation": {"every": 4, "samples": [{"prompt": "a"}, {"prompt": "b"}], "steps": 1}},
    "fsdp-bf16": {"parallel": "fsdp", "dtype": "bfloat16"},
    "fsdp-full": {"parallel": "fsdp", **FULL},
    "fsdp-full-bf16": {"parallel": "fsdp", "dtype": "bfloat16", **FULL},
    "ddp-muon": {
        "parallel": "ddp",
        "lora": None,
        "optim": {"name": "muon", "lr": 1e-3, "muon_lr": 3e-3, "ema_decay": 0.5},
    },
}
BEGUN = ("ddp", "fsdp", "fsdp-full")  # also in a folder where one process took the first two steps


def torchrun(start: Start, *words: str | Path, **environment: str) -> Any:
    options = ("--standalone", "--nproc-per-node", "2", worker.__file__)
    return start(module, "torch.distributed.run", *options, *words, **environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture
def ran(tiny: Any, start: Start, folder: Path) -> Path:
    """A folder with every run of `RUNS` and `BEGUN`, trained once by two processes."""
    if not (folder / "said").exists():
        for name, changes in RUNS.items():
            config = tiny.config(**PLAIN).model_dump(mode="json") | {"out": str(folder / name)}
            parts = {n: {**config[n], **v} if isinstance(v, dict) else v for n, v in changes.items()}
            (folder / f"{name}.yaml").write_text(dump_config(parse_config(config | parts)))
        for name in BEGUN:
            begun = alone(folder, name, folder / f"{name}-begun", steps=2, validation=Validation())
            (folder / f"{name}-begun.yaml").write_text(dump_config(begun.model_copy(update={"steps": 4})))
        paths = [folder / f"{name}.yaml" for name in (*RUNS, *(f"{name}-begun" for name in BEGUN))]
        both = [
            start(worker.train_each, folder / "store", int(rank), paths, **AS_TORCHRUN, RANK=rank, LOCAL_RANK=rank)
            for rank in "01"
        ]
        codes, _, errors = zip(*(process.finish(120) for process in both), strict=True)
        (folder / "said").write_text("\n".join([str(max(map(abs, codes))), *errors]))
    code, errors = (folder / "said").read_text().split("\n", 1)
    assert code == "0", errors[-3000:]
    return folder


def alone(folder: Path, name: str, out: Path, **changes: Any) -> Any:
    config = load_config(folder / f"{name}.yaml").model_copy(update={"out": out, **changes})
    train(config)
    return config


def told(out: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(out) if name in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next(out.glob("*.safetensors")))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_what_one_does(ran: Path, tmp_path: Path, name: str) -> None:
    low = "bf16" in name
    alone(ran, name, tmp_path / "one", validation=Validation(every=load_config(ran / f"{name}.yaml").validation.every))
    two = ran / name
    for value in ("loss", "gradient_norm", "validation_loss"):
        mine, theirs = told(tmp_path / "one", value), told(two, value)
        assert len(mine) == (4 if value != "validation_loss" else 1 if name == "fsdp" else 2)
        assert theirs == pytest.approx(
            mine, rel=(0.03 if low else 1e-4) if value != "loss" else (0.01 if low else 1e-5)
        ), value
    a, b = weights(tmp_path / "one"), weights(two)
    assert a.keys() == b.keys() and {t.dtype for t in b.values()} == {torch.float32}
    if not low:
        # Adam divides by the gradient's size: where that is next to nothing, rounding decides,
        # hence the norm of all.
        flat = [torch.cat([t.flatten() for _, t in sorted(table.items())]) for table in (b, a)]
        assert relative_error(*flat) < 2e-3
    assert {"best.json", "step-000004"} <= {
        p.name for p in (two / "checkpoints").iterdir()
    }  # and the best, where another is
    assert json.loads((two / "checkpoints" / "step-000004" / "state.json").read_text())["processes"] == 2


@pytest.mark.parametrize("name", RUNS)
def test_one_process_goes_on_from_two(ran: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(ran / name, tmp_path / "on")
    alone(ran, name, tmp_path / "on", steps=6, validation=Validation())
    alone(ran, name, tmp_path / "whole", steps=6, validation=Validation())
    mine, theirs = told(tmp_path / "whole", "loss"), told(tmp_path / "on", "loss")
    assert len(theirs) == 6 and theirs == pytest.approx(mine, rel=0.01 if "bf16" in name else 1e-4)


@pytest.mark.parametrize("name", BEGUN)
def test_two_processes_go_on_from_one(ran: Path, name: str) -> None:
    mine, theirs = told(ran / name, "loss"), told(ran / f"{name}-begun", "loss")
    assert len(theirs) == 4 and theirs == pytest.approx(mine, rel=1e-4)
    state = json.loads((ran / f"{name}-begun" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["processes"] == 2 and weights(ran / f"{name}-begun").keys() == weights(ran / name).keys()


def test_samples_of_a_sharded_model(ran: Path) -> None:
    made = sorted(str(p.relative_to(ran)) for p in (ran / "fsdp" / "samples").rglob("*.*"))
    assert made == [f"fsdp/samples/step-000004/{name}" for name in ("00.mp4", "01.mp4", "sheet.png")]


def test_exporting_the_checkpoint_of_two_gives_the_same_file(ran: Path, tmp_path: Path) -> None:
    for name in ("ddp", "fsdp", "fsdp-full"):
        shutil.copytree(ran / name, tmp_path / name)
        config = load_config(ran / f"{name}.yaml").model_copy(update={"out": tmp_path / name})
        written = export_run(config).weights
        assert written is not None
        mine, theirs = load_file(written), weights(ran / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_timesteps_of_a_bf16_sharded_model_are_not_rounded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    plain = WanDiT._time_tables
    monkeypatch.setattr(WanDiT, "_time_tables", lambda self, t: seen.append(t) or plain(self, t))
    dist.init_process_group("gloo", store=dist.FileStore(str(tiny.runs / "store"), 1), rank=0, world_size=1)
    try:
        forward = distribute(load_dit(tiny.dit), "fsdp", World(torch.device("cpu"), 0, 2), torch.bfloat16)
        with torch.no_grad():
            forward(make_input(1, 16, 2, 4, 4), torch.tensor([[997.3, 4.98]]), make_input(1, 6, 64))
    finally:
        dist.destroy_process_group()
    assert torch.equal(seen[0].flatten(), torch.tensor([997.3, 4.98]))


def _wait(check: Callable[[], bool], process: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert process.is_alive() and time.monotonic() < end, process.finish(5)
        time.sleep(0.05)


def test_a_signal_to_one_process_stops_both_with_one_checkpoint(tiny: Any, start: Start) -> None:
    config = tiny.config(steps=100_000)
    (tiny.runs / "c.yaml").write_text(dump_config(config))
    process = torchrun(start, "train", tiny.runs / "c.yaml")
    metrics = config.out / "metrics.jsonl"
    _wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, process)
    os.kill(int((tiny.runs / "1.pid").read_text()), signal.SIGTERM)
    code, out, err = process.finish()
    assert code == 0, err
    (last,) = (config.out / "checkpoints").iterdir()
    step = json.loads((last / "state.json").read_text())["step"]
    assert step == read_metrics(config.out)[-1]["step"] and f"stopped after step {step} of 100000" in out
    assert not (config.out / "lora.safetensors").exists()


def test_an_error_in_one_process_ends_both(tiny: Any, start: Start) -> None:
    """Nobody waits for ever for one that is gone."""
    config = tiny.config(steps=100_000)
    (tiny.runs / "c.yaml").write_text(dump_config(config))
    process = torchrun(start, "train", tiny.runs / "c.yaml", FAILING_RANK="1")
    code, _, err = process.finish()
    assert code != 0 and "error: shard: input/output error" in err
