"""Settings of a run: defaults, YAML, overrides, and the one line that answers each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pusa_fast.model.linear import LORA_TARGETS
from pusa_fast.training.config import TrainConfig, dump_config, load_config, parse_config

LEAST: dict[str, Any] = {"data": {"path": "clips"}, "out": "run"}


def changed(**parts: Any) -> TrainConfig:
    return parse_config({**LEAST, **parts})


def test_defaults_are_the_published_recipe() -> None:
    config = parse_config(LEAST)
    lora, optim, objective = config.lora, config.optim, config.objective
    assert lora is not None and (lora.rank, lora.alpha, lora.init, lora.start) == (512, None, "kaiming", None)
    assert set(lora.targets) == set(LORA_TARGETS) and len(lora.targets) == 10
    assert (optim.name, optim.lr, optim.betas, optim.eps, optim.weight_decay) == (
        "adamw",
        1e-5,
        (0.9, 0.999),
        1e-8,
        0.01,
    )
    assert (optim.schedule, optim.warmup_steps, optim.clip_norm, optim.ema_decay) == ("constant", 0, None, None)
    assert (config.steps, config.batch_size, config.accumulate, config.data.caption_dropout) == (900, 8, None, 0.0)
    assert (objective.p_async, objective.first_frame_clean, objective.levels, objective.weighting) == (
        1.0,
        False,
        "reference",
        "reference",
    )
    sampling = config.sampling(5.0)
    assert (sampling.p_async, sampling.levels, sampling.shift) == (1.0, "reference", 5.0)
    assert changed(objective={"shift": 3.0}).sampling(5.0).shift == 3.0


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = changed(
        steps=7, model="m", dtype="bfloat16",
        lora={"rank": 8, "alpha": 4.0, "targets": ["q", "ffn.0"], "start": "a/b.safetensors"},
        optim={"schedule": "cosine", "warmup_steps": 3, "final_lr": 0.1, "betas": [0.8, 0.99],
               "ema_decay": 0.9, "clip_norm": 1.0},
        validation={"every": 2, "samples": [{"prompt": "é: a #cat", "image": "x.png", "seed": 4}],
                    "guidance_scale": 2.5},
        logging={"wandb": "project"}, memory={"checkpointing": "block", "offload": True},
    )  # fmt: skip
    for each in (config, changed(lora=None, optim={"name": "muon", "muon_lr": 0.02})):
        (tmp_path / "c.yaml").write_text(dump_config(each), encoding="utf-8")
        assert load_config(tmp_path / "c.yaml") == each


def test_overrides_win_in_order(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {path: clips}\nout: run\nlora: null\noptim: {lr: 0.5, eps: 0.1}\n")
    config = load_config(
        path, ["optim.lr=1e-5", "optim.lr=2e-5", "steps=3", "lora.rank=16", "out=a=b", "optim.betas=[0.5, 0.6]"]
    )
    assert (config.optim.lr, config.optim.eps, config.optim.betas) == (2e-5, 0.1, (0.5, 0.6))
    assert config.lora is not None and (config.steps, config.lora.rank, config.out) == (3, 16, Path("a=b"))
    assert load_config(path, ["lora={}", "lora=null"]).lora is None
    assert load_config(None, ["data.path=clips", "out=run"]) == parse_config(LEAST)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"step": 3}, r"step: Extra inputs are not permitted"),
        ({"lora": {"ranks": 3}}, r"lora\.ranks: Extra inputs are not permitted"),
        ({"steps": "many"}, r"steps: .*integer.*got 'many'"),
        ({"steps": 0}, r"steps: .*greater than or equal to 1 \(got 0\)"),
        ({"optim": {"lr": float("inf")}}, r"optim\.lr: .*finite number"),
        ({"out": True}, r"out: .*path"),
        ({"optim": {"lr": -1}}, r"optim\.lr: .*greater than 0 \(got -1\)"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas"),
        ({"optim": {"ema_decay": 1.0}}, r"optim\.ema_decay: .*less than 1"),
        ({"objective": {"p_async": 1.1}}, r"objective\.p_async: .*less than or equal to 1"),
        ({"objective": {"weighting": "wan"}}, r"objective\.weighting: .*'reference', 'per_frame' or 'uniform'"),
        ({"memory": {"checkpointing": "some"}}, r"memory\.checkpointing: .*'none', 'block' or 'attention'"),
        ({"lora": {"init": "zero"}}, r"lora\.init: .*'kaiming' or 'gaussian'"),
        ({"data": {"caption_dropout": 0.1}}, r"data\.path: Field required"),
        ({"data": {"path": "c", "caption_dropout": 1}}, r"data\.caption_dropout: .*less than 1"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6 is not a multiple of accumulate 4: change one of them"),
        ({"optim": {"name": "muon"}}, "optim.name muon is for full fine-tuning: use adamw with a LoRA, or lora: null"),
        (
            {"steps": 5, "optim": {"schedule": "cosine", "warmup_steps": 5}},
            "warmup_steps 5 leaves nothing of 5 steps: lower it",
        ),
        ({"memory": {"checkpointing": "none", "offload": True}}, "set checkpointing to attention or block"),
    ],
)
def test_every_mistake_is_named(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        changed(**parts)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("out: run\nsteps: x\nseed: -1\n")
    with pytest.raises(ValueError, match=r"c\.yaml: data: Field required; .*steps: .*; seed: "):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, ", r"c\.yaml is not YAML: "),
        ("- a\n- b\n", r"c\.yaml holds a list: it must map settings to values"),
        ("3", r"c\.yaml holds a str: it must map settings to values"),
        ("", r"data: Field required; out: Field required"),
        ("data: {path: c}\nout: r\n1: 2\n", r"c\.yaml: .*1"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "c.yaml")


def test_a_file_that_is_no_text_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"out: \xff\n")
    with pytest.raises(ValueError, match=r"c\.yaml is not YAML"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["steps", "=3", ""])
def test_overrides_that_are_none(override: str) -> None:
    with pytest.raises(ValueError, match=r"is not a setting: write it as optim\.lr=1e-5"):
        load_config(None, [override])


def test_identity_is_what_a_checkpoint_depends_on() -> None:
    base = parse_config(LEAST)
    for free in (
        {"out": "b"}, {"device": "cpu"}, {"accumulate": 2}, {"parallel": "fsdp"}, {"steps": 10},
        {"logging": {"every": 1}}, {"memory": {"checkpointing": "none"}}, {"checkpoints": {"keep": 9}},
        {"validation": {"every": 3}}, {"data": {"path": "moved"}}, {"dtype": "float32"}, {"dit": "moved"},
        {"model": "moved"},
    ):  # fmt: skip
        assert changed(**free).identity() == base.identity(), free
    for fixed in (
        {"seed": 1}, {"batch_size": 16}, {"lora": {"rank": 8}}, {"optim": {"lr": 1.0}},
        {"objective": {"p_async": 0.5}}, {"data": {"path": "clips", "validation_clips": 1}},
    ):  # fmt: skip
        assert changed(**fixed).identity() != base.identity(), fixed
    cosine: dict[str, Any] = {"optim": {"schedule": "cosine"}}
    assert changed(**cosine, steps=10).identity() != changed(**cosine, steps=11).identity()


def test_names_that_yaml_takes_for_numbers_and_dates(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "data: {path: 007}\nout: 2026-11-27\nmodel: 1_0\nsteps: 20\noptim: {betas: [0.5, 1e-1]}\n"
    )
    found = load_config(
        tmp_path / "c.yaml",
        ["logging.wandb=12:30:00", "lora.start=3.50", "logging.tensorboard=true", "optim.ema_decay=null"],
    )
    assert (found.data.path, found.out, found.model, found.logging.wandb) == (
        Path("007"),
        Path("2026-11-27"),
        "1_0",
        "12:30:00",
    )
    assert found.lora is not None and found.lora.start == Path("3.50") and changed().lora.start is None
    assert (found.steps, found.optim.betas, found.logging.tensorboard, found.optim.ema_decay) == (
        20,
        (0.5, 0.1),
        True,
        None,
    )
    assert load_config(None, ["data.path=a", "out=b", "lora=null"]).lora is None
    (tmp_path / "again.yaml").write_text(dump_config(found))
    assert load_config(tmp_path / "again.yaml") == found


def test_what_is_to_be_looked_at_is_made_with_the_checkpoints() -> None:
    assert changed(checkpoints={"every": 7}).validate_every == 0
    assert changed(checkpoints={"every": 7}, data={"path": "c", "validation_clips": 2}).validate_every == 7
    assert changed(checkpoints={"every": 7}, validation={"samples": [{"prompt": "a"}]}).validate_every == 7
    assert changed(checkpoints={"every": 7}, validation={"every": 3}).validate_every == 3
    assert changed(validation={"every": 0, "samples": [{"prompt": "a"}]}).validate_every == 0
    assert (
        changed(steps=30, checkpoints={"every": 0}, data={"path": "c", "validation_clips": 2}).validate_every == 30
    )  # at the end
