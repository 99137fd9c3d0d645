"""`train --plan` against what a step really takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.memory import peak_bytes
from pusa_fast import cli, ops
from pusa_fast.config import DiTConfig
from pusa_fast.data.store import LatentStore, StoreWriter
from pusa_fast.model.dit import WanDiT
from pusa_fast.testing import make_input
from pusa_fast.training import flops
from pusa_fast.training.config import TrainConfig, parse_config
from pusa_fast.training.parallel import World
from pusa_fast.training.plan import plan_run, plan_step
from pusa_fast.training.trainer import Trainer
from pusa_fast.weights import checkpoint, keymap
from pusa_fast.weights.pretrained import find_model

DIT = DiTConfig(dim=64, ffn_dim=160, num_heads=2, num_layers=3, text_dim=64, freq_dim=32)
SHAPE, TEXT = (16, 3, 8, 12), 24
CLIP_480P, CUDA = (16, 21, 60, 104), torch.device("cuda")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    folder = tmp_path_factory.mktemp("clips")
    with StoreWriter(folder, {"vae": "", "text": "", "channels": 16, "text_dim": 64, "text_len": TEXT}) as writer:
        for i in range(8):
            writer.add(str(i), make_input(*SHAPE, seed=i), make_input(5, 64, seed=i), source=f"{i}.mp4", caption="x")
    return LatentStore(folder)


@pytest.fixture
def small_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(store: LatentStore, out: Path, **more: Any) -> TrainConfig:
    return parse_config(
        {
            "data": {"path": store.folder},
            "out": out,
            "batch_size": 8,
            "lora": {"rank": 8},
            "objective": {"shift": 5.0},
            **more,
        }
    )


@pytest.mark.usefixtures("small_threads")
@pytest.mark.parametrize("mode", ["none", "block", "attention"])
@pytest.mark.parametrize("change", [{}, {"accumulate": 2}, {"lora": None}, {"dtype": "bfloat16"}], ids=str)
def test_activations_and_gradients_are_as_planned(
    store: LatentStore, tmp_path: Path, mode: str, change: dict[str, Any]
) -> None:
    if ops.backends()["native"] is not None:
        pytest.skip("without the compiled part other operators run than the plan follows")
    config = _config(store, tmp_path, memory={"checkpointing": mode}, **change)
    torch.manual_seed(0)
    base = WanDiT(DIT).to(torch.bfloat16 if change.get("dtype") else torch.float32)
    trainer = Trainer(config, find_model("nano"), store, World(torch.device("cpu")), base)
    steps = trainer.data.steps(0)
    parts = next(steps)
    steps.close()
    trainer.train_step(parts)  # makes the optimiser's state
    for parameter in trainer.parameters:
        parameter.grad = None
    measured = peak_bytes(lambda: trainer.train_step(parts), torch.device("cpu"))
    memory = plan_step(config, DIT, SHAPE, TEXT, torch.device("cpu")).memory
    assert memory["activations"] + memory["gradients"] == pytest.approx(measured, rel=0.1)
    own = sum(p.numel() * 4 for p in trainer.parameters)
    assert (memory["trained weights"], memory["optimiser"], memory["gradients"]) == (own, 2 * own, own)


def test_checkpointing_and_offload_show_in_the_plan(store: LatentStore, tmp_path: Path) -> None:
    def activations(**memory: Any) -> int:
        return plan_step(_config(store, tmp_path, memory=memory), DIT, SHAPE, TEXT, torch.device("cpu")).memory[
            "activations"
        ]

    assert activations(checkpointing="attention", offload=True) == activations(
        checkpointing="attention"
    )  # all of it is small
    assert (
        activations(checkpointing="block") < activations(checkpointing="attention") < activations(checkpointing="none")
    )


def test_the_published_recipe_fits_one_gpu_of_141_gb() -> None:
    config = parse_config({"data": {"path": "x"}, "out": "y"})
    plan = plan_step(config, "wan2.1-t2v-14b", CLIP_480P, 512, CUDA)
    assert plan.tokens == 8 * 32_760 and plan.peak < 130e9  # eight clips, one after the other
    residuals = 40 * 32_760 * 5120 * 2
    assert plan.memory["activations"] > 2 * residuals  # a block's input and its attention's result
    assert 4e15 < plan.flops / 8 < 5e15 and plan.seconds["on an H200"] < 80
    assert "activations" in plan.text() and "GiB" in plan.text() and "on an H200" in plan.text()
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"):
        plan_step(config, "wan2.1-t2v-14b", CLIP_480P, 512, CUDA, processes=3)
    with pytest.raises(ValueError, match=r"wan2\.1-t2v-14b"):
        plan_step(config, "wan-huge", CLIP_480P, 512)


def test_what_processes_and_offload_change() -> None:
    config = parse_config({"data": {"path": "x"}, "out": "y"})
    dit = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=6)  # the 14B model's blocks
    plan, eighth = (plan_step(config, dit, CLIP_480P, 512, CUDA, processes=n) for n in (1, 8))
    assert (
        eighth.memory == plan.memory
        and (plan.tokens, eighth.tokens) == (8 * 32_760, 32_760)
        and eighth.flops == plan.flops / 8
    )
    sharded = plan_step(config.model_copy(update={"parallel": "fsdp"}), dit, CLIP_480P, 512, CUDA, processes=8)
    assert (
        sharded.memory["frozen weights"] == plan.memory["frozen weights"] // 8
        and sharded.memory["activations"] == plan.memory["activations"]
    )
    away = config.model_copy(update={"memory": config.memory.model_copy(update={"offload": True})})
    offloaded = plan_step(away, dit, CLIP_480P, 512, CUDA)
    assert (
        plan.memory["activations"] - offloaded.memory["activations"] > 4 * 32_760 * 5120 * 2
    )  # nearly all inputs of blocks
    refused = CliRunner().invoke(
        cli.app, ["train", "--set", "data.path=x", "--set", "out=y", "--plan", "--processes", "0"]
    )
    assert refused.exit_code == 2 and "--processes must be at least 1, got 0" in refused.stderr


def test_flops_against_the_table_of_the_performance_notes() -> None:
    """480p, one forward: 1.678 PFLOP in blocks, without the keys and values of the text."""
    config = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    latents = (1, 16, 21, 60, 104)
    text_kv = 40 * 4.0 * 512 * 5120**2
    assert flops.products(config, latents, 512) + flops.attention(config, latents, 512) - text_kv == pytest.approx(
        1.678e15, rel=2e-3
    )
    lora = parse_config({"data": {"path": "x"}, "out": "y"}).lora
    assert lora is not None
    per_token = (
        40 * 512 * (6 * 2 * 5120 + 2 * (5120 + 13824))
    )  # those on tokens; the two on the text's 512 rows add little
    assert flops.low_rank(config, latents, 512, lora) == pytest.approx(2 * per_token * 32_760, rel=0.01)


def test_a_plan_reads_headers_only(store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dit.safetensors"
    dit = WanDiT(DIT)
    checkpoint.save(path, keymap.unpack(dit.state_dict()), dit.config)
    plan = plan_run(_config(store, tmp_path / "run", dit=path, device="cpu"))
    assert plan.memory["frozen weights"] == sum(p.numel() * 4 for p in dit.parameters())
    assert plan.seconds["here, on the CPU"] > 0
    assert not (tmp_path / "run").exists()
