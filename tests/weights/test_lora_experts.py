"""LoRAs on a pair of experts: one for each or for both, applied to all of them or to none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_states import STYLES, State, model, official, same_bits, updates
from pusa_fast.model.experts import ExpertPair
from pusa_fast.weights import apply_lora, lora
from pusa_fast.weights.lora import resolve_experts

FIRST, SECOND = STYLES["1 released"](updates(1)), STYLES["2 peft"](updates(2))


@pytest.fixture
def pair() -> ExpertPair:
    high, low = model(torch.bfloat16), model(torch.bfloat16)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.neg_()
    return ExpertPair(high, low)


def weights(pair: ExpertPair) -> dict[str, State]:
    return {name: official(dit) for name, dit in pair.networks.items()}


def changed(pair: ExpertPair, before: dict[str, State]) -> list[str]:
    return [name for name, state in weights(pair).items() if not same_bits(state, before[name])]


@pytest.mark.parametrize(
    ("source", "experts", "files"),
    [
        ({"high": FIRST, "low": SECOND}, None, {"high": FIRST, "low": SECOND}),
        ({"low": SECOND}, None, {"low": SECOND}),
        ({"both": FIRST}, None, {"high": FIRST, "low": FIRST}),
        (FIRST, "both", {"high": FIRST, "low": FIRST}),
        (FIRST, "high", {"high": FIRST}),
    ],
    ids=["each its own", "low alone", "both by name", "both", "high alone"],
)
def test_each_expert_gets_what_it_would_get_alone(
    pair: ExpertPair, source: Any, experts: str | None, files: dict[str, State]
) -> None:
    before, alone = weights(pair), copy.deepcopy(pair)
    versions = {name: dit.weights_version for name, dit in pair.networks.items()}
    handle = apply_lora(pair, source, 1.4, experts=experts)
    assert handle.strength == 1.4 and handle.unmatched == ()
    assert changed(pair, before) == list(files)
    assert [name for name, dit in pair.networks.items() if dit.weights_version > versions[name]] == list(files)
    assert {target.split(".")[0] for target in handle.targets} == set(files) and len(handle.targets) == 20 * len(files)
    for strength in (1.4, 0.3):
        handle.set_strength(strength)
        for name, file in files.items():
            own = apply_lora(alone.networks[name], file, strength)
            assert same_bits(official(pair.networks[name]), official(alone.networks[name])), (name, strength)
            own.remove()
    handle.set_strength(0)
    assert changed(pair, before) == []
    handle.set_strength(1.0)
    handle.remove()
    handle.remove()
    assert changed(pair, before) == []
    assert not any(dit.__dict__["_lora_stack"].base for dit in pair.networks.values() if "_lora_stack" in dit.__dict__)
    with pytest.raises(RuntimeError, match="was removed"):
        handle.set_strength(1.0)


def test_files_of_both_experts(pair: ExpertPair, tmp_path: Path) -> None:
    save_file(FIRST, tmp_path / "l.safetensors")
    before = weights(pair)
    apply_lora(pair, tmp_path / "l.safetensors", experts="both").remove()
    assert changed(pair, before) == []
    merged = apply_lora(pair, {"low": tmp_path / "l.safetensors"}, keep_base=False)
    assert changed(pair, before) == ["low"]
    with pytest.raises(RuntimeError, match="keep_base=False"):
        merged.remove()


def test_one_network_as_both_experts_is_changed_once() -> None:
    dit, alone = model(), model()
    apply_lora(ExpertPair(dit, dit), FIRST, experts="both")
    apply_lora(alone, FIRST)
    assert same_bits(official(dit), official(alone))


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (FIRST, {}, r'two experts, so say which.*\{"high": file, "low": file\}.*"both".*\{"high": \{path: strength\}'),
    ("l.safetensors", {}, "two experts, so say which of them"),
    (FIRST, {"experts": "middle"}, "there is no expert 'middle': choose high, low or both"),
    ({"hihg": FIRST, "low": SECOND}, {}, "there is no expert 'hihg'"),
    ({"high": FIRST}, {"experts": "low"}, "were both given"),
    ({"high": FIRST, "low": {"blocks.0.ffn.0.diff": torch.zeros(3, 3)}}, {}, r"\(on expert low\) does not fit"),
    ({"high": FIRST, "low": {"blocks.9.ffn.0.diff_b": torch.zeros(3)}}, {}, r"\(on expert low\): 1 updates have no"),
    ({"high": FIRST, "low": {"x": torch.zeros(1)}}, {}, "holds no LoRA"),
    ({"high": FIRST, "low": SECOND}, {"strength": float("nan")}, "finite"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "options", "message"), REFUSED)
def test_what_is_wrong_for_one_expert_changes_neither(
    pair: ExpertPair, source: Any, options: dict[str, Any], message: str
) -> None:
    before = weights(pair)
    with pytest.raises(ValueError, match=message) as error:
        apply_lora(pair, source, **options)
    assert "\n" not in str(error.value) and changed(pair, before) == []
    assert [dit.weights_version for dit in pair.networks.values()] == [0, 0]


def test_memory_that_runs_out_on_the_second_expert_leaves_the_first_unchanged(
    pair: ExpertPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, compute, calls = weights(pair), lora._sum, []

    def fail(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return compute(*args)

    monkeypatch.setattr(lora, "_sum", fail)
    with pytest.raises(torch.OutOfMemoryError):
        apply_lora(pair, FIRST, experts="both")
    assert changed(pair, before) == [] and len(calls) == 21
    assert not any(dit.__dict__["_lora_stack"].base for dit in pair.networks.values())


def test_updates_left_out_are_listed_by_expert(pair: ExpertPair) -> None:
    handle = apply_lora(pair, {"high": FIRST, "low": SECOND | {"odd": torch.zeros(1)}}, allow_unmatched=True)
    assert handle.unmatched == ("low.odd",) and len(handle.targets) == 40


@pytest.mark.parametrize("options", [{"experts": "both"}, {"experts": "dit"}])
def test_one_transformer_has_no_experts(options: dict[str, Any]) -> None:
    for source, given in ((FIRST, options), ({"high": FIRST}, {})):
        with pytest.raises(ValueError, match="this model has no experts: give its LoRA alone"):
            apply_lora(model(), source, **given)


def test_resolved_loras(tmp_path: Path) -> None:
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    for file in (a, b):
        file.touch()
    two, one = ("high", "low"), ("dit",)
    assert resolve_experts({a: 1, str(b): 0.5}, one) == [(None, a, 1.0), (None, b, 0.5)]
    assert resolve_experts({"low": {a: 1}, "both": {b: 0.5, a: 2}}, two) == [
        ("low", a, 1),
        ("both", b, 0.5),
        ("both", a, 2),
    ]
    assert resolve_experts({}, one) == resolve_experts({}, two) == resolve_experts({"high": {}}, two) == []
    for given, networks, message in (
        ({"high": {a: 1}}, one, r"no experts: give its LoRAs as \{path: strength\}, not by high"),
        ({a: 1.0}, two, r"a\.pt: this model has two experts.*\{path: strength\}"),
        ({"high": {a: 1}, b: 1.0}, two, r"b\.pt: this model has two experts"),
        ({"mid": {a: 1}}, two, "no expert 'mid': choose high, low or both"),
        ({"high": {tmp_path / "c.pt": 1}}, two, r"LoRA .*c\.pt does not exist"),
        ({a: float("inf")}, one, r"LoRA .*a\.pt: strength must be a number, got inf"),
        ({a: "1"}, one, "strength must be a number, got '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_experts(given, networks)
