"""What a step sees is a function of store, seed and step, however many processes share it."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast.data.store import LatentStore, StoreWriter
from pusa_fast.testing import make_input
from pusa_fast.training.data import Batch, ClipOrder, TrainingData, auto_parts, training_clips, validation_batches
from pusa_fast.training.ptss import TimestepSampling

SAMPLING = TimestepSampling()
SHAPES = [(16, 2, 4, 4)] * 5 + [(16, 3, 4, 4)] * 7


@pytest.fixture
def store(tiny: Any) -> LatentStore:
    return LatentStore(tiny.clips)


def data(store: LatentStore, **changes: Any) -> TrainingData:
    return TrainingData(store, SAMPLING, **{"batch_size": 8, "accumulate": 1, "patch": (1, 2, 2), "seed": 3, **changes})


def take(source: TrainingData, count: int, start: int = 0) -> list[list[Batch]]:
    return list(itertools.islice(source.steps(start), count))


def tensors(parts: list[Batch]) -> dict[str, Tensor]:
    return {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "noise", "sigma", "context")
    }


def same(a: list[Batch], b: list[Batch]) -> bool:
    mine, theirs = tensors(a), tensors(b)
    clips = [c.key for p in a for c in p.clips] == [c.key for p in b for c in p.clips]
    return clips and all(torch.equal(mine[name], theirs[name]) for name in mine)


# Order.


def test_order_is_a_function_of_seed_and_step() -> None:
    order = list(itertools.islice(ClipOrder(SHAPES, 4, seed=3).batches(), 40))
    assert order == list(itertools.islice(ClipOrder(SHAPES, 4, seed=3).batches(), 40))
    assert order != list(itertools.islice(ClipOrder(SHAPES, 4, seed=4).batches(), 40))
    for step in (0, 1, 17, 39):
        assert next(ClipOrder(SHAPES, 4, seed=3).batches(step)) == order[step]


def test_a_step_takes_one_shape_as_often_as_it_has_clips() -> None:
    order = list(itertools.islice(ClipOrder(SHAPES, 2, seed=0).batches(), 2000))
    shapes = [{SHAPES[i] for i in batch} for batch in order]
    assert all(len(found) == 1 for found in shapes)
    share = sum(found == {SHAPES[0]} for found in shapes) / len(shapes)
    assert abs(share - 5 / 12) < 0.05


def test_every_clip_comes_once_a_pass_in_a_new_order() -> None:
    shown = [i for batch in itertools.islice(ClipOrder(SHAPES, 3, seed=1).batches(), 400) for i in batch]
    for members in (range(5), range(5, 12)):
        own = [i for i in shown if i in members]
        passes = [own[at : at + len(members)] for at in range(0, len(own) - len(members), len(members))]
        assert len(passes) > 50 and all(sorted(p) == list(members) for p in passes)
        assert len({tuple(p) for p in passes}) > len(passes) / 3
    assert max(Counter(shown).values()) - min(Counter(shown).values()) < 40


def test_no_clips() -> None:
    with pytest.raises(ValueError, match="no clips to train on: prepare some"):
        ClipOrder([], 4, 0)


# Batches.


def test_any_step_can_be_the_first(store: LatentStore) -> None:
    whole = take(data(store, caption_dropout=0.3), 7)
    for step in (0, 3, 6):
        assert same(take(data(store, caption_dropout=0.3), 1, step)[0], whole[step])
    other = take(data(store, caption_dropout=0.3, seed=4), 7)
    assert not any(same(a, b) for a, b in zip(whole, other, strict=True))
    seen = torch.cat([tensors(parts)["noise"].flatten(1)[:, :9] for parts in whole])
    assert len({tuple(row.tolist()) for row in seen}) == len(seen), "noise came twice"


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_put_together_are_the_same_batch(store: LatentStore, world: int, accumulate: int) -> None:
    wanted = {"batch_size": 16, "caption_dropout": 0.4}
    whole = take(data(store, **wanted), 4)
    ranks = [take(data(store, **wanted, accumulate=accumulate, rank=rank, world=world), 4) for rank in range(world)]
    for step in range(4):
        assert all(len(own[step]) == accumulate for own in ranks)
        # Part by part, in each the processes in turn.
        together = [own[step][part] for part in range(accumulate) for own in ranks]
        assert {len(part.clips) for part in together} == {16 // (world * accumulate)}
        assert same(together, whole[step])


def test_levels_and_noise_of_a_clip_are_its_own(store: LatentStore) -> None:
    batch = take(data(store), 1)[0][0]
    F = batch.latents.shape[2]
    assert batch.sigma.shape == (8, F) and len({tuple(row.tolist()) for row in batch.sigma}) == 8
    assert float(batch.sigma.min()) > 0 and float(batch.sigma.max()) <= 1
    for place, clip in enumerate(batch.clips):
        index = store.clips.index(clip)
        assert torch.equal(batch.latents[place], store.latents(index)) and torch.equal(
            batch.context[place], store.text(index)
        )
    assert batch.latents.dtype == batch.noise.dtype == batch.sigma.dtype == torch.float32


def test_captions_are_dropped_as_often_as_asked(store: LatentStore) -> None:
    def dropped(share: float) -> Tensor:
        context = torch.cat([tensors(parts)["context"] for parts in take(data(store, caption_dropout=share), 60)])
        return torch.tensor([torch.equal(row, store.empty_text) for row in context])

    assert not dropped(0.0).any()
    quarter, half = dropped(0.25), dropped(0.5)
    assert abs(float(quarter.float().mean()) - 0.25) < 0.06 and abs(float(half.float().mean()) - 0.5) < 0.07
    assert bool((half | ~quarter).all()), "the same draw decides, whatever the share"


def test_dropping_captions_moves_no_other_draw(store: LatentStore) -> None:
    plain, dropped = (tensors(take(data(store, caption_dropout=share), 1)[0]) for share in (0.0, 0.9))
    assert all(torch.equal(plain[name], dropped[name]) for name in ("latents", "noise", "sigma"))


def test_held_out_clips_are_never_trained_on(store: LatentStore) -> None:
    trained = {c.key for parts in take(data(store, held_out=4), 40) for part in parts for c in part.clips}
    assert trained == {c.key for c in store.clips[:7]}
    held = list(validation_batches(store, 4, 3, SAMPLING, 3))
    assert sorted(c.key for batch in held for c in batch.clips) == [c.key for c in store.clips[7:]]
    assert all(len({c.shape for c in batch.clips}) == 1 for batch in held)


def test_validation_never_changes(store: LatentStore) -> None:
    def by_clip(size: int) -> dict[str, tuple[Tensor, Tensor]]:
        batches = validation_batches(store, 5, size, SAMPLING, 3)
        return {c.key: (b.noise[i], b.sigma[i]) for b in batches for i, c in enumerate(b.clips)}

    one, three = by_clip(1), by_clip(3)
    assert one.keys() == three.keys() and len(one) == 5
    assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], three[key], strict=True))
    assert not list(validation_batches(store, 0, 3, SAMPLING, 3))


def test_what_cannot_be_shared_is_named(store: LatentStore) -> None:
    with pytest.raises(
        ValueError, match="batch of 8 clips cannot be shared by 3 processes in 2 parts: make batch_size a multiple of 6"
    ):
        data(store, world=3, accumulate=2)
    for held_out in (11, 12):
        with pytest.raises(ValueError, match=f"validation_clips {held_out} leaves none of 11 clips"):
            data(store, held_out=held_out)


def test_caption_dropout_needs_the_empty_caption(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pusa_fast.data.store.EMPTY", "none.safetensors")
    data(store)
    with pytest.raises(ValueError, match="holds no empty caption"):
        data(store, caption_dropout=0.1)


# The thread that reads ahead.


def test_an_error_while_reading_reaches_the_caller_and_no_thread_stays(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, latents, calls = threading.active_count(), LatentStore.latents, itertools.count()

    def failing(self: LatentStore, index: int) -> Tensor:
        if next(calls) >= 20:
            raise OSError(5, "Input/output error", "shard")
        return latents(self, index)

    monkeypatch.setattr(LatentStore, "latents", failing)
    seen = []
    with pytest.raises(OSError, match="Input/output error"):
        for parts in data(store).steps(0):
            seen.append(parts)
    assert len(seen) == 2
    assert threading.active_count() == before


def test_leaving_the_loop_ends_the_thread(store: LatentStore) -> None:
    before = threading.active_count()
    for _ in data(store).steps(0):
        break
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="mine"):
        for _ in data(store).steps(0):
            raise RuntimeError("mine")
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("batch", "world", "shape", "parts"),
    [
        (32, 1, (16, 5, 8, 8), 1),  # nano
        (8, 1, (16, 21, 60, 104), 8),  # 480p: a clip at a time
        (8, 8, (16, 21, 60, 104), 1),
        (8, 2, (16, 21, 30, 52), 1),  # 8,190 tokens a clip
        (12, 1, (16, 21, 30, 52), 3),  # at most 4 together
    ],
)
def test_parts_hold_forty_thousand_tokens_or_one_clip(
    batch: int, world: int, shape: tuple[int, ...], parts: int
) -> None:
    assert auto_parts(batch, world, shape, (1, 2, 2)) == parts


def test_windows_of_a_held_out_file_are_not_trained_on(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, {"vae": "", "text": "", "channels": 16, "text_dim": 64, "text_len": 6}) as writer:
        for i, file in enumerate("aabbc"):
            writer.add(
                str(i),
                make_input(16, 2, 4, 4, seed=i),
                make_input(2, 64),
                source=file,
                caption="x",
                details={"file": file},
            )
    store = LatentStore(tmp_path)
    assert training_clips(store, 0) == [0, 1, 2, 3, 4] and training_clips(store, 2) == [0, 1]
    with pytest.raises(ValueError, match="cut from files that are"):
        training_clips(store, 4)


def test_the_reference_s_tensors_of_a_held_out_film_are_not_trained_on(tmp_path: Path) -> None:
    identities: list[dict[str, str]] = [
        {"file": "a"}, {"tensors": "ta"}, {"tensors": "tb2"}, {"tensors": "tb2", "file": "b"},
        {"tensors": "tb", "file": "b"}, {}, {"file": "ta"}, {"tensors": "tc"}, {"tensors": "tc"},
    ]  # fmt: skip
    with StoreWriter(tmp_path, {"vae": "", "text": "", "channels": 16, "text_dim": 64, "text_len": 6}) as writer:
        for i, details in enumerate([*identities, {"tensors": "tb"}, {"tensors": "ta"}]):
            writer.add(
                str(i), make_input(16, 2, 4, 4, seed=i), make_input(2, 64), source="x", caption="x", details=details
            )
    store = LatentStore(tmp_path)
    # The last is ta; the one before tb, which clip 4 says is of film b, of which clip 3 says that
    # tb2 is, too.
    assert training_clips(store, 1) == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert training_clips(store, 2) == [0, 5, 6, 7, 8]
    assert training_clips(store, 3) == [0, 5, 6]
