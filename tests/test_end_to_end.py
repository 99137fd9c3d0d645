"""Whole runs against those recorded from the reference implementation, and proof that a broken step
would be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast import Condition, DiTConfig, Pipeline, Tiling, VAEConfig
from pusa_fast.sampling import conditioning
from pusa_fast.sampling.schedule import Schedule, lift, sigma_grid
from pusa_fast.sampling.task import Placement
from pusa_fast.testing import relative_error
from pusa_fast.weights import load_dit, load_vae

Golden = Callable[[str], dict[str, Tensor]]
RUNS = (
    "t2v",
    "t2v_nocfg4",
    "i2v_clean",
    "i2v_noise0.2",
    "i2v_30steps",
    "start_end",
    "start_end_clean",
    "extension",
    "completion",
)
TASKS = ("text-to-video",) * 2 + ("image-to-video",) * 3 + ("start-end",) * 2 + ("extension", "completion")
LATENT_LIMIT = 1e-4


def load_recorded(golden: Golden, meta: Mapping[str, Any]) -> Pipeline:
    d, v = meta["dit"], meta["vae"]
    dit_config = DiTConfig(
        dim=d["dim"],
        ffn_dim=d["ffn_dim"],
        num_heads=d["num_heads"],
        num_layers=d["num_layers"],
        in_channels=d["in_dim"],
        out_channels=d["out_dim"],
        text_dim=d["text_dim"],
        freq_dim=d["freq_dim"],
        patch_size=d["patch_size"],
        eps=d["eps"],
    )
    vae_config = VAEConfig(
        base_dim=v["dim"], z_dim=v["z_dim"], dim_mult=v["dim_mult"], num_res_blocks=v["num_res_blocks"]
    )
    return Pipeline(
        dit=load_dit(golden("dit_weights"), config=dit_config), vae=load_vae(golden("vae_weights"), config=vae_config)
    )


@pytest.fixture(scope="module")
def pipe(golden: Golden, golden_meta: dict[str, Any]) -> Pipeline:
    return load_recorded(golden, golden_meta)


@pytest.fixture(scope="module")
def recorded(golden: Golden) -> dict[str, Tensor]:
    return golden("end_to_end")


def arguments(meta: Mapping[str, Any], recorded: Mapping[str, Tensor], run: str) -> dict[str, Any]:
    """What makes a recorded run again: the reference's arguments in our words."""
    about = meta["runs"][run]
    conditions = [
        Condition(recorded[image], int(latent), noise)
        for latent, (image, noise) in about.get("multi_frame_images", {}).items()
    ]
    if "conditioning_video" in about:
        video = recorded[about["conditioning_video"]]
        conditions.append(Condition(video, about["conditioning_indices"], about["conditioning_noise_multipliers"]))
    return {
        "prompt_embeds": recorded["ctx_pos"], "negative_prompt_embeds": recorded["ctx_neg"], "conditions": conditions,
        "num_frames": 17, "height": 64, "width": 96, "steps": about["num_inference_steps"],
        "guidance_scale": about["cfg_scale"], "shift": 5.0, "seed": meta["seed"],
    }  # fmt: skip


def test_every_recorded_run_is_here(golden_meta: dict[str, Any]) -> None:
    assert set(golden_meta["runs"]) == set(RUNS)


def test_noise_is_the_reference_noise(golden_meta: dict[str, Any], recorded: dict[str, Tensor]) -> None:
    assert torch.equal(conditioning.initial_noise(golden_meta["seed"], (1, 16, 5, 8, 12)), recorded["noise"])


@pytest.mark.parametrize(("run", "name"), list(zip(RUNS, TASKS, strict=True)))
def test_recorded_run(
    pipe: Pipeline, golden_meta: dict[str, Any], recorded: dict[str, Tensor], run: str, name: str, ops_backend: str
) -> None:
    seen: list[Tensor] = []
    frames = pipe(**arguments(golden_meta, recorded, run), callback=lambda step, steps, x: seen.append(x))
    assert relative_error(seen[-1], recorded[f"{run}.latents"]) < LATENT_LIMIT
    assert frames.dtype == torch.uint8 and frames.shape == recorded[f"{run}.frames"].shape
    assert (frames.int() - recorded[f"{run}.frames"].int()).abs().max() <= 1
    assert pipe.last_run["task"] == name
    assert pipe.last_run["guidance_mode"] == ("off" if golden_meta["runs"][run]["cfg_scale"] == 1 else "batch")


@pytest.mark.parametrize("run", ["i2v_clean", "start_end_clean", "extension"])
def test_clean_condition_frames_come_out_bit_for_bit(
    pipe: Pipeline, golden_meta: dict[str, Any], recorded: dict[str, Tensor], run: str
) -> None:
    """Latent 0 of these runs has noise 0: its encoding is still there after the last step."""
    latents = pipe(**arguments(golden_meta, recorded, run), output="latents")
    frames = recorded["video"][:5] if run == "extension" else recorded["image0"][None]
    encoded = pipe.vae.encode(conditioning.to_video(frames, pipe.device))
    assert torch.equal(latents[:, :, 0], encoded[:, :, 0])


def test_tiles_that_cover_the_clip_change_nothing(
    pipe: Pipeline, golden_meta: dict[str, Any], recorded: dict[str, Tensor]
) -> None:
    given = {**arguments(golden_meta, recorded, "extension"), "steps": 1, "output": "latents"}
    whole, tiled, halves = (pipe(**given, tiling=t) for t in (None, Tiling(), Tiling(tile=(8, 8), stride=(4, 4))))
    assert relative_error(tiled, whole) < 1e-5
    assert relative_error(halves, whole) > 1e-3, "smaller tiles must have been used where they were asked for"


# One break each. They replace a function by one that errs as a careless rewrite would.


def _misplaced(
    noise: Tensor, schedule: Schedule, placements: Sequence[Placement], clean: Mapping[int, Tensor]
) -> Tensor:
    latents = noise.clone()
    for p in placements:
        level = schedule.sigmas[0, p.latent]
        latents[0, :, (p.latent + 1) % 5] = (1 - level) * clean[p.latent] + level * noise[0, :, p.latent]
    return latents


def _wrong_slice(
    noise: Tensor, schedule: Schedule, placements: Sequence[Placement], clean: Mapping[int, Tensor]
) -> Tensor:
    latents = noise.clone()
    for p in placements:
        level = schedule.sigmas[0, p.latent]
        latents[0, :, p.latent] = (1 - level) * clean[p.latent] + level * noise[0, :, (p.latent + 1) % 5]
    return latents


def _no_last_step(steps: int, shift: float) -> Tensor:
    sigmas = sigma_grid(steps, shift)
    sigmas[-1] = sigmas[-2]
    return sigmas


def _float64(global_sigmas: Tensor, multipliers: Sequence[float], compat: str = "reference") -> Schedule:
    s = torch.linspace(1, 0, len(global_sigmas), dtype=torch.float64)
    sigmas = 5 * s / (1 + 4 * s)
    timesteps = torch.trunc(sigmas[:-1, None] * 1000 * torch.tensor(multipliers, dtype=torch.float64))
    return Schedule(global_sigmas, lift(global_sigmas, multipliers).sigmas, timesteps.float())


BREAKS = {
    "frame index": ("pusa_fast.sampling.conditioning.initial_latents", _misplaced, "start_end"),
    "noise slice": ("pusa_fast.sampling.conditioning.initial_latents", _wrong_slice, "i2v_noise0.2"),
    "last step": ("pusa_fast.sampling.schedule.sigma_grid", _no_last_step, "t2v"),
    "float64 schedule": ("pusa_fast.sampling.schedule.lift", _float64, "i2v_30steps"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_break_is_seen(
    pipe: Pipeline,
    golden_meta: dict[str, Any],
    recorded: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    target, wrong, run = BREAKS[broken]
    monkeypatch.setattr(target, wrong)
    error = relative_error(pipe(**arguments(golden_meta, recorded, run), output="latents"), recorded[f"{run}.latents"])
    assert math.isfinite(error) and error > LATENT_LIMIT, f"{broken}: {error:.1e}"
