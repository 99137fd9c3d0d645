"""A trained LoRA as other tools read it: every style gives the trained model, in diffusers too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from films import real_file
from pusa_fast import cli
from pusa_fast.data.store import LatentStore
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import adapters, add_lora
from pusa_fast.testing import make_input, relative_error
from pusa_fast.training.adapters import STYLES, read_updates, start_from, trained_updates, write_lora
from pusa_fast.training.config import dump_config
from pusa_fast.training.parallel import World
from pusa_fast.training.preflight import check
from pusa_fast.training.trainer import Trainer, train
from pusa_fast.weights import apply_lora, load_dit
from pusa_fast.weights.lora_file import read_lora
from pusa_fast.weights.pretrained import find_model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return make_input(1, 16, 3, 4, 4, seed=1), torch.tensor([[900.0, 300.0, 20.0]]), make_input(1, 6, 64, seed=2)


@torch.no_grad()
def answer(dit: WanDiT) -> Tensor:
    return dit(*inputs())


@pytest.fixture
def trained(tiny: Any) -> WanDiT:
    """Adapters far from zero, at a scale of 3."""
    dit = load_dit(tiny.dit)
    torch.manual_seed(4)
    for matrix in add_lora(dit, rank=4, alpha=12.0):
        torch.nn.init.normal_(matrix, std=0.1)
    return dit


@pytest.mark.parametrize("style", STYLES)
def test_every_style_reads_back(tiny: Any, trained: WanDiT, tmp_path: Path, style: str) -> None:
    updates = trained_updates(trained)
    write_lora(tmp_path / "l.safetensors", updates, style)
    entries = read_lora(tmp_path / "l.safetensors")
    assert {name.removesuffix(".weight") for name in entries} == updates.keys() and len(updates) == 20
    assert {entry.scale for entry in entries.values()} == {1.0}
    for name, (A, B) in read_updates(tmp_path / "l.safetensors").items():
        assert torch.equal(A, updates[name][0]) and torch.equal(B, updates[name][1])
    for name, adapter in adapters(trained):
        assert torch.equal(updates[name][1], adapter.lora_B * 3), "alpha is not in B"
    base = load_dit(tiny.dit)
    before = answer(base)
    apply_lora(base, tmp_path / "l.safetensors")
    assert relative_error(answer(base), answer(trained)) < 1e-5 < relative_error(before, answer(trained))
    again = load_dit(tiny.dit)
    add_lora(again, rank=4, alpha=2.0)
    start_from(again, tmp_path / "l.safetensors")
    assert relative_error(answer(again), answer(trained)) < 1e-5


def test_names_of_the_styles(trained: WanDiT, tmp_path: Path) -> None:
    expected = {
        "released": ("blocks.0.cross_attn.k.lora_A.default.weight", "blocks.1.ffn.2.lora_B.default.weight"),
        "diffusers": ("transformer.blocks.0.attn2.to_k.lora_A.weight", "transformer.blocks.1.ffn.net.2.lora_B.weight"),
        "comfyui": (
            "diffusion_model.blocks.0.cross_attn.k.lora_down.weight",
            "diffusion_model.blocks.1.ffn.2.lora_up.weight",
        ),
    }
    for style, names in expected.items():
        write_lora(tmp_path / "l.safetensors", trained_updates(trained), style, torch.bfloat16)
        found = load_file(tmp_path / "l.safetensors")
        assert set(names) <= found.keys() and len(found) == 20 * (3 if style == "comfyui" else 2)
        assert {t.dtype for t in found.values()} == {torch.bfloat16, *([torch.float32] if style == "comfyui" else [])}
        with safe_open(tmp_path / "l.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}, "the order of more entries would differ from run to run"
    assert float(found["diffusion_model.blocks.0.ffn.0.alpha"]) == 4
    with pytest.raises(ValueError, match="style 'kohya' is unknown: choose one of released, diffusers, comfyui"):
        write_lora(tmp_path / "l.safetensors", {}, "kohya")


def in_diffusers(path: Path) -> Any:
    """Its transformer with the weights of a file of ours."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from pusa_fast.weights import keymap

    config = load_dit(path, device="meta").config
    theirs = diffusers.WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads, in_channels=16, out_channels=16, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=config.eps, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    theirs.load_state_dict({keymap.dit_to_diffusers(name): t.float() for name, t in load_file(path).items()})
    return theirs


def test_diffusers_and_peft_compute_the_same(tiny: Any, trained: WanDiT, tmp_path: Path) -> None:
    theirs = in_diffusers(tiny.dit)
    write_lora(tmp_path / "l.safetensors", trained_updates(trained), "diffusers")
    x, _, context = inputs()
    level = torch.tensor([300.0])

    @torch.no_grad()
    def both() -> tuple[Tensor, Tensor]:
        return theirs(x, level, context, return_dict=False)[0], trained(x, level, context)

    assert relative_error(*both()) > 1e-2
    theirs.load_lora_adapter(load_file(tmp_path / "l.safetensors"), prefix="transformer")
    assert relative_error(*both()) < 1e-5
    theirs.unload_lora()
    theirs.load_lora_adapter(str(tmp_path), weight_name="l.safetensors", prefix="transformer")
    assert relative_error(*both()) < 1e-5


def test_the_readme_s_way_from_real_videos_to_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for name, caption in (("bikes", "people ride bikes"), ("bigbuckbunny", "a rabbit looks around")):
        shutil.copyfile(real_file(f"{name}.mp4"), tmp_path / "clips" / f"{name}.mp4")
        (tmp_path / "clips" / f"{name}.txt").write_text(caption)

    def program(*words: str) -> None:
        result = CliRunner().invoke(cli.app, [*words])
        assert result.exit_code == 0, result.output

    program("prepare", "clips", "--out", "prepared", "--clips-per-video", "2", "--dtype", "float32")
    sets = (
        "data.path=prepared",
        "out=runs/mine",
        "steps=3",
        "batch_size=4",
        "lora.rank=4",
        "optim.lr=1e-2",
        "device=cpu",
    )
    program("train", *(word for value in sets for word in ("--set", value)))
    program("export", "runs/mine", "--out", "d.safetensors", "--style", "diffusers", "--dtype", "float32")
    nano = find_model("nano").dit
    ours, theirs = load_dit(nano, dtype=torch.float32), in_diffusers(nano)
    store = LatentStore("prepared")
    assert len(store) == 4 and store.clips[0].shape == (16, 5, 8, 8)
    x, context, level = store.latents(0)[None].float(), store.text(0)[None].float(), torch.tensor([400.0])
    with torch.no_grad():
        before = ours(x, level, context)
        assert relative_error(theirs(x, level, context, return_dict=False)[0], before) < 1e-5
        apply_lora(ours, "runs/mine/lora.safetensors", strength=1.0)
        theirs.load_lora_adapter(str(tmp_path), weight_name="d.safetensors", prefix="transformer")
        after = ours(x, level, context)
        assert relative_error(after, before) > 1e-3
        assert relative_error(theirs(x, level, context, return_dict=False)[0], after) < 1e-5


# The command line.


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["export", *map(str, words)])


def refused(message: str, *words: str | Path) -> None:
    result = run(*words)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output


def test_export_of_a_run(tiny: Any, tmp_path: Path) -> None:
    config = tiny.config(steps=3, checkpoints={"every": 1}, lora={"alpha": 2.0}, optim={"ema_decay": 0.5, "lr": 0.1})
    written = train(config).weights
    assert written is not None
    model = Trainer(config, *check(config), World(torch.device("cpu")))
    assert model.average is not None
    model.average.swap()
    base = load_dit(tiny.dit)
    apply_lora(base, written)
    assert (
        relative_error(answer(base), answer(model.dit))
        < 1e-5
        < relative_error(answer(load_dit(tiny.dit)), answer(model.dit))
    )
    whole = load_file(written)
    written.unlink()
    result = run(config.out, "--out", tmp_path / "x.safetensors", "--dtype", "float32")
    assert result.exit_code == 0 and result.stdout.endswith("x.safetensors (released, step 3)\n"), result.output
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in found)
    # From the file on, without the run.
    shutil.rmtree(config.out)
    assert run(tmp_path / "x.safetensors", "--out", tmp_path / "y.safetensors", "--style", "comfyui").exit_code == 0
    y = read_updates(tmp_path / "y.safetensors")
    assert all(
        torch.equal(y[n][0], A.bfloat16().float()) for n, (A, _) in read_updates(tmp_path / "x.safetensors").items()
    )


def test_export_of_a_run_on_another_machine(tiny: Any, tmp_path: Path) -> None:
    config = tiny.config(steps=1)
    train(config)
    there = {
        "device": "cuda:7",
        "attention": "fa3",
        "parallel": "fsdp",
        "validation": {"every": 1, "samples": [{"prompt": "", "image": "gone.png"}]},
    }
    (config.out / "config.yaml").write_text(dump_config(tiny.config(steps=1, **there)))
    assert run(config.out, "--out", tmp_path / "x.safetensors").exit_code == 0


def test_export_of_a_step_and_of_the_best(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(Trainer, "_validation_loss", lambda self: next(losses))
    config = tiny.config(steps=3, checkpoints={"every": 1}, validation={"every": 1}, optim={"lr": 0.1})
    train(config)
    out = tmp_path / "x.safetensors"
    found = {}
    for step in ("1", "2", "3", "best"):
        result = run(config.out, "--out", out, "--dtype", "float32", "--step", step, "--overwrite")
        assert result.exit_code == 0 and result.stdout.endswith(
            f"(released, step {'2' if step == 'best' else step})\n"
        ), result.output
        found[step] = out.read_bytes()
    assert found["best"] == found["2"] and len(set(found.values())) == 3
    refused(
        "has no checkpoint 7: choose one of 1, 2, 3, or best",
        config.out,
        "--out",
        tmp_path / "y.safetensors",
        "--step",
        "7",
    )
    (config.out / "checkpoints" / "best.json").unlink()
    refused(
        "has no best checkpoint: data.validation_clips",
        config.out,
        "--out",
        tmp_path / "y.safetensors",
        "--step",
        "best",
    )


def test_export_of_all_weights_before_the_end(tiny: Any, tmp_path: Path) -> None:
    whole = tiny.config(lora=None, steps=2, optim={"lr": 1e-3})
    train(whole)
    longer = tiny.config("longer", lora=None, steps=4, optim={"lr": 1e-3}, checkpoints={"every": 2})
    train(longer)
    (longer.out / "dit.safetensors").unlink()
    out = tmp_path / "x.safetensors"
    assert run(longer.out, "--out", out, "--step", "2", "--dtype", "float32").exit_code == 0
    assert torch.equal(answer(load_dit(out)), answer(load_dit(whole.out / "dit.safetensors")))
    refused("--style comfyui is for LoRAs", longer.out, "--out", out, "--style", "comfyui", "--overwrite")


def test_what_cannot_be_exported(tiny: Any, tmp_path: Path, trained: WanDiT) -> None:
    target = tmp_path / "x.safetensors"
    refused("does not exist", tmp_path / "gone.safetensors", "--out", target)
    refused("weights are written as .safetensors", tmp_path, "--out", tmp_path / "x.pt")
    refused("does not exist: create it first", tmp_path, "--out", tmp_path / "no" / "x.safetensors")
    target.write_bytes(b"")
    refused("give --overwrite to replace it", tmp_path, "--out", target)
    refused("x.safetensors", target, "--out", target, "--overwrite")  # an empty file is no LoRA
    target.unlink()
    (tmp_path / "run").mkdir()
    config = tiny.config("run")
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    refused("holds no checkpoint: train first", tmp_path / "run", "--out", target)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(tiny.config("run", lora=None)))
    refused("holds no checkpoint: train first", tmp_path / "run", "--out", target)
    refused("is not a run's folder", tiny.dit, "--out", target, "--step", "3")
    refused("", tiny.dit, "--out", target)  # a model is no LoRA
    assert not target.exists() and json.dumps(sorted(p.name for p in (tmp_path / "run").iterdir())) == '["config.yaml"]'


def test_files_that_are_not_low_rank(tiny: Any, trained: WanDiT, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"blocks.0.ffn.0.diff": torch.ones(96, 48)}, tmp_path / "d.safetensors")
    refused(
        "without low rank: it cannot be converted or trained on",
        tmp_path / "d.safetensors",
        "--out",
        tmp_path / "x.safetensors",
    )
    updates = trained_updates(trained)
    write_lora(tmp_path / "few.safetensors", {name: pair for name, pair in updates.items() if name.endswith(".q")})
    with pytest.raises(ValueError, match=r"different projections \(16, such as blocks\.0\.cross_attn\.k\)"):
        start_from(trained, tmp_path / "few.safetensors")
