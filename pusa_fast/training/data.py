"""Which clips, levels and noise a step sees: a function of the store, the seed and the step's number, and of nothing else.

So a resumed run, or one on another number of processes, sees what it would have seen. Shapes: B clips, C latent channels,
F latent frames, h/w latent pixels, L text rows, D text width.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pusa_fast.data.store import LatentStore, StoredClip
from pusa_fast.training.ptss import TimestepSampling


@dataclass(frozen=True, eq=False)
class Batch:
    """Clips of one shape. latents, noise [B, C, F, h, w] float32; sigma [B, F] float32; context [B, L, D]; `clips`: what they are."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    context: Tensor
    clips: tuple[StoredClip, ...]


class ClipOrder:
    """Batches of clip numbers, all of one shape, for ever: `batches(step)` gives those of that step and after.

    Each shape's clips are gone through in a new random order each time; a step takes one shape, as often as it has clips.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], batch_size: int, seed: int) -> None:
        if not shapes:
            raise ValueError("there are no clips to train on: prepare some, or lower validation_clips")
        self.batch_size, self.seed = batch_size, seed
        self._groups: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(shapes):
            self._groups.setdefault(tuple(shape), []).append(index)

    def batches(self, step: int = 0) -> Iterator[list[int]]:
        choose = random.Random(f"{self.seed}/shape")
        keys = sorted(self._groups)
        sizes = [len(self._groups[key]) for key in keys]
        streams = {key: self._stream(key) for key in keys}
        number = 0
        while True:
            key = choose.choices(keys, sizes)[0]
            picked = [next(streams[key]) for _ in range(self.batch_size)]
            if number >= step:
                yield picked
            number += 1

    def _stream(self, key: tuple[int, ...]) -> Iterator[int]:
        members, shuffle = self._groups[key], random.Random(f"{self.seed}/{key}")
        while True:
            order = list(members)
            shuffle.shuffle(order)
            yield from order


PART_TOKENS = 40_000


def auto_parts(batch_size: int, world: int, latents: tuple[int, ...]) -> int:
    """Parts of a batch that keep each within `PART_TOKENS` for clips [C, F, h, w] of patches of 2x2, or hold one clip."""
    own = max(1, batch_size // world)
    fit = max(1, PART_TOKENS * 4 // (latents[1] * latents[2] * latents[3]))
    return own // max(d for d in range(1, own + 1) if own % d == 0 and d <= fit)


def generator(*labels: object) -> torch.Generator:
    """A CPU generator whose numbers depend on the labels alone."""
    digest = hashlib.sha256("/".join(map(str, labels)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def load_batch(
    store: LatentStore,
    indices: Sequence[int],
    labels: Sequence[Sequence[object]],
    sampling: TimestepSampling,
    caption_dropout: float,
) -> Batch:
    """The clips `indices`, each with levels and noise from a generator of its own labels."""
    latents, noises, sigmas, contexts = [], [], [], []
    for index, own in zip(indices, labels, strict=True):
        draw = generator(*own)
        clean = store.latents(index).float()
        dropped = float(torch.rand((), generator=draw)) < caption_dropout
        sigmas.append(sampling.draw(clean.shape[1], draw))
        noises.append(torch.randn(clean.shape, generator=draw))
        latents.append(clean)
        contexts.append(store.empty_text if dropped else store.text(index))
    clips = tuple(store.clips[i] for i in indices)
    return Batch(torch.stack(latents), torch.stack(noises), torch.stack(sigmas), torch.stack(contexts), clips)


class TrainingData:
    """The training clips of one process. `parts(step)` is what the main loop asks: its share of a step's batch, in `accumulate` parts.

    Clip i of a step's batch goes to part i // (batch_size / accumulate), and there to the process of its place.
    """

    def __init__(
        self,
        store: LatentStore,
        sampling: TimestepSampling,
        *,
        batch_size: int,
        accumulate: int | None = None,
        seed: int,
        caption_dropout: float = 0.0,
        held_out: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if held_out >= len(store):
            raise ValueError(
                f"validation_clips {held_out} leaves none of {len(store)} clips to train on: lower it, or prepare more"
            )
        chosen = training_clips(store, held_out)
        if accumulate is None:
            accumulate = auto_parts(
                batch_size, world, max((store.clips[i].shape for i in chosen), key=lambda s: s[1] * s[2] * s[3])
            )
        if batch_size % (accumulate * world):
            raise ValueError(
                f"a batch of {batch_size} clips cannot be shared by {world} processes in {accumulate} parts: make batch_size a multiple of {accumulate * world}"
            )
        if caption_dropout:
            _ = store.empty_text  # now rather than at the first caption that is dropped
        self.store, self.sampling, self.seed, self.caption_dropout = store, sampling, seed, caption_dropout
        self.accumulate, self.rank, self.share = accumulate, rank, batch_size // (accumulate * world)
        self._part = batch_size // accumulate
        self._chosen = chosen
        self._order = ClipOrder([store.clips[i].shape for i in chosen], batch_size, seed)

    def steps(self, start: int) -> Generator[list[Batch]]:
        """Each step's parts from step `start` on; the next step's are read while the caller works on this one's."""
        indices = enumerate(self._order.batches(start), start)
        with ThreadPoolExecutor(1) as pool:
            waiting: Future[list[Batch]] = pool.submit(self._load, *next(indices))
            while True:
                ready = waiting.result()
                waiting = pool.submit(self._load, *next(indices))
                yield ready

    def _load(self, step: int, picked: list[int]) -> list[Batch]:
        parts = []
        for part in range(self.accumulate):
            first = part * self._part + self.rank * self.share
            places = range(first, first + self.share)
            labels = [(self.seed, "step", step, place) for place in places]
            parts.append(
                load_batch(
                    self.store, [self._chosen[picked[p]] for p in places], labels, self.sampling, self.caption_dropout
                )
            )
        return parts


def training_clips(store: LatentStore, held_out: int) -> list[int]:
    """All clips but the last `held_out`, and but those of the same films as these: windows of a film overlap.

    A film is known by its own hash and by that of the reference's tensors of it. Raises ValueError where that leaves no clip.
    """
    first = len(store) - held_out
    films = [
        {(name, clip.details[name]) for name in ("file", "tensors") if name in clip.details} for clip in store.clips
    ]
    seen, before = set().union(*films[first:]), None
    while seen != before:  # a clip that shares a hash with these may add another
        before, seen = seen, seen.union(*(own for own in films[:first] if own & seen))
    chosen = [i for i in range(first) if not films[i] & seen]
    if not chosen:
        raise ValueError(
            f"all {len(store)} clips are held out, or cut from files that are: lower validation_clips, or prepare more files"
        )
    return chosen


def validation_batches(
    store: LatentStore,
    count: int,
    batch_size: int,
    sampling: TimestepSampling,
    seed: int,
    mine: Callable[[int], bool] = lambda _: True,
) -> Iterator[Batch]:
    """The last `count` clips at levels and noise that never change, in batches of one shape; of batch number n only where `mine(n)`."""
    start, groups = len(store) - count, dict[tuple[int, ...], list[int]]()
    for index in range(start, len(store)):
        groups.setdefault(store.clips[index].shape, []).append(index)
    batches = [
        members[at : at + batch_size] for members in groups.values() for at in range(0, len(members), batch_size)
    ]
    for number, chosen in enumerate(batches):
        if mine(number):
            yield load_batch(store, chosen, [(seed, "validation", i - start) for i in chosen], sampling, 0.0)
