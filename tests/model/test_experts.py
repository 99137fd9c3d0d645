"""Two experts as one denoiser: which of them computes a step, and what holds for both."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from pusa_fast.config import DiTConfig
from pusa_fast.device import weight_bytes
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.experts import ExpertPair
from pusa_fast.model.fp8 import FP8Linear, quantize
from pusa_fast.sampling import sampler
from pusa_fast.sampling.schedule import lift, sigma_grid
from pusa_fast.testing import make_input
from pusa_fast.weights import apply_lora

CONFIG = DiTConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=8, freq_dim=16
)


def network(seed: int, config: DiTConfig = CONFIG, dtype: torch.dtype = torch.float32) -> WanDiT:
    torch.manual_seed(seed)
    dit = WanDiT(config).to(dtype).eval()
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)
    return dit


@pytest.fixture
def pair() -> ExpertPair:
    return ExpertPair(network(1), network(2))


X, CONTEXT, OTHER = make_input(1, 4, 3, 4, 6), make_input(1, 5, 8, seed=1), make_input(1, 5, 8, seed=2)
SCHEDULE = lift(sigma_grid(4, 5.0), [0.0, 0.2, 1.0])  # the third step is the first of the low-noise expert


def test_it_is_a_module_of_two_networks(pair: ExpertPair) -> None:
    assert sampler.ExpertPair is ExpertPair
    assert list(pair.networks) == ["high", "low"] and list(pair.networks.values()) == [pair.high, pair.low]
    assert pair.config is CONFIG and pair.device == torch.device("cpu") and pair.dtype == torch.float32
    assert {name.split(".")[0] for name, _ in pair.named_parameters()} == {"high", "low"}
    cpu = torch.device("cpu")
    assert weight_bytes(cpu, pair) == 2 * weight_bytes(cpu, pair.high)
    other = ExpertPair(network(3), network(4))
    other.load_state_dict(pair.state_dict())
    assert torch.equal(sample(other), sample(pair)) and pair.bfloat16().low.dtype == torch.bfloat16
    dit = network(1)
    assert dict(dit.networks) == {"dit": dit} and not any("networks" in name for name in dit.state_dict())


def sample(denoiser: WanDiT | ExpertPair, context: Tensor = CONTEXT) -> Tensor:
    return sampler.sample(denoiser, X, SCHEDULE, context)


@torch.no_grad()
def test_each_step_is_the_one_of_its_expert(pair: ExpertPair) -> None:
    state = pair.prepare(SCHEDULE.timesteps, CONTEXT, SCHEDULE.global_sigmas)
    assert state.switch == 2
    for step in range(4):
        expert = pair.high if step < 2 else pair.low
        alone = expert(X, SCHEDULE.timesteps[step][None], CONTEXT)
        assert torch.equal(pair.denoise(X, step, state), alone)
    assert not torch.equal(sample(pair), sample(pair.high))
    assert torch.equal(sample(ExpertPair(pair.high, pair.low, boundary=0.0)), sample(pair.high))
    with pytest.raises(ValueError, match="step 2 is outside the 2 prepared steps"):
        pair.denoise(X, 4, state)


@torch.no_grad()
def test_runs_that_take_turns_give_what_each_gives_alone(pair: ExpertPair) -> None:
    runs = [(SCHEDULE, CONTEXT), (lift(sigma_grid(4, 3.0), [1.0, 0.5, 0.0], "exact"), OTHER)]
    states = [pair.prepare(s.timesteps, context, s.global_sigmas) for s, context in runs]
    latents = [X.clone() for _ in runs]
    for step in range(4):
        for run, (schedule, _) in enumerate(runs):
            velocity = pair.denoise(latents[run], step, states[run])
            latents[run] += velocity * schedule.deltas()[step].view(1, 1, -1, 1, 1)
    for run, (schedule, context) in enumerate(runs):
        torch.testing.assert_close(latents[run], sampler.sample(pair, X, schedule, context), rtol=1e-5, atol=1e-5)
        fresh = pair.prepare(schedule.timesteps, context, schedule.global_sigmas)
        for step in range(4):
            assert torch.equal(pair.denoise(X, step, states[run]), pair.denoise(X, step, fresh))


@torch.no_grad()
def test_a_lora_on_one_expert_makes_the_pairs_states_old(pair: ExpertPair) -> None:
    state = pair.prepare(SCHEDULE.timesteps, CONTEXT, SCHEDULE.global_sigmas)
    apply_lora(pair, {"low": {"blocks.0.norm3.diff_b": torch.ones(32)}})
    pair.denoise(X, 1, state)
    with pytest.raises(RuntimeError, match="call prepare again"):
        pair.denoise(X, 2, state)


def test_experts_that_do_not_belong_together() -> None:
    wide = dataclasses.replace(CONFIG, ffn_dim=64)
    for low, message in (
        (network(2, wide), r"must have the same config: high has DiTConfig\(.*ffn_dim=48.*ffn_dim=64"),
        (network(2, dataclasses.replace(CONFIG, in_channels=8)), "must have the same config"),
        (network(2).to("meta"), "must have the same device: high has cpu, low has meta"),
        (network(2).bfloat16(), r"must have the same dtype: high has torch\.float32, low has torch\.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertPair(network(1), low)
    for boundary in (875, -0.1, float("nan")):
        with pytest.raises(ValueError, match="boundary is a noise level from 0 to 1; got"):
            ExpertPair(network(1), network(2), boundary=boundary)


@torch.no_grad()
def test_both_experts_are_quantised_as_each_would_be_alone() -> None:
    pair = ExpertPair(network(1, dtype=torch.bfloat16), network(2, dtype=torch.bfloat16))
    alone = [quantize(copy.deepcopy(dit), emulate=True) for dit in pair.networks.values()]
    assert quantize(pair, emulate=True) is pair
    assert sum(isinstance(module, FP8Linear) for module in pair.modules()) == 2 * 6 * CONFIG.num_layers
    assert [dit.precision for dit in pair.networks.values()] == ["fp8", "fp8"]
    assert torch.equal(sample(pair), sample(ExpertPair(*alone)))
    with pytest.raises(ValueError, match="quantised to fp8 already"):
        quantize(pair, emulate=True)
    with pytest.raises(ValueError, match="its exact weight is gone"):
        apply_lora(pair, {"blocks.0.norm3.diff_b": torch.ones(32)}, experts="both")


def test_what_cannot_be_quantised_in_one_expert_leaves_the_other_as_it_is() -> None:
    pair = ExpertPair(network(1, dtype=torch.bfloat16), network(2, dtype=torch.bfloat16))
    handle = apply_lora(pair, {"low": {"blocks.0.norm3.diff_b": torch.ones(32)}})
    with pytest.raises(ValueError, match="apply it with keep_base=False"):
        quantize(pair, emulate=True)
    assert pair.high.precision is None and not any(isinstance(module, FP8Linear) for module in pair.modules())
    handle.remove()
    quantize(pair, emulate=True)


def test_one_network_as_both_experts_is_quantised_once() -> None:
    dit = network(1, dtype=torch.bfloat16)
    quantize(ExpertPair(dit, dit), emulate=True)
    assert dit.precision == "fp8" and dit.weights_version == 1
