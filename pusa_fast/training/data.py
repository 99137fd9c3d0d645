"""The clips, levels and noise of a step: a function of the store, the seed and the step's number.

So a resumed run, or one on another number of processes, sees the same. Shapes: B clips, C latent
channels, F latent frames, h/w latent pixels, L text rows, D text width.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pusa_fast.data.store import LatentStore, StoredClip
from pusa_fast.training.ptss import TimestepSampling


@dataclass(frozen=True, eq=False)
class Batch:
    """Clips of one shape: what they are, and tensors of them.

    latents, noise [B, C, F, h, w] float32; sigma [B, F] float32; context [B, L, D].
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    context: Tensor
    clips: tuple[StoredClip, ...]


class ClipOrder:
    """Endless batches of clip numbers, each of one shape; `batches(step)` starts at that step.

    The clips of a shape are shuffled again after each pass. A step takes one shape, in proportion
    to its number of clips.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], batch_size: int, seed: int) -> None:
        if not shapes:
            raise ValueError("there are no clips to train on: prepare some, or lower validation_clips")
        self.batch_size, self.seed = batch_size, seed
        self._groups = _by_shape(dict(enumerate(shapes)))

    def batches(self, step: int = 0) -> Iterator[list[int]]:
        choose = random.Random(f"{self.seed}/shape")
        keys = sorted(self._groups)
        sizes = [len(self._groups[key]) for key in keys]
        streams = {key: self._stream(key) for key in keys}
        for number in itertools.count():
            key = choose.choices(keys, sizes)[0]
            picked = [next(streams[key]) for _ in range(self.batch_size)]
            if number >= step:
                yield picked

    def _stream(self, key: tuple[int, ...]) -> Iterator[int]:
        members, shuffle = self._groups[key], random.Random(f"{self.seed}/{key}")
        while True:
            order = list(members)
            shuffle.shuffle(order)
            yield from order


PART_TOKENS = 40_000


def auto_parts(batch_size: int, world: int, latents: tuple[int, ...], patch: tuple[int, int, int]) -> int:
    """Parts of a batch: each within `PART_TOKENS`, or one clip. `latents` of one: [C, F, h, w]."""
    own = max(1, batch_size // world)
    fit = max(1, PART_TOKENS * math.prod(patch) // math.prod(latents[1:]))
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
    """The training clips of one process. `steps`: its share of each batch, in `accumulate` parts.

    Clip i of a step's batch goes to part i // (batch_size / accumulate), and in it to the process
    of its place. `accumulate` None: as `auto_parts` for the largest clip and the model's `patch`.
    """

    def __init__(
        self,
        store: LatentStore,
        sampling: TimestepSampling,
        *,
        batch_size: int,
        accumulate: int | None = None,
        patch: tuple[int, int, int],
        seed: int,
        caption_dropout: float = 0.0,
        held_out: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if held_out >= len(store):
            left = f"validation_clips {held_out} leaves none of {len(store)} clips to train on"
            raise ValueError(f"{left}: lower it, or prepare more")
        chosen = training_clips(store, held_out)
        if accumulate is None:
            largest = max((store.clips[i].shape for i in chosen), key=lambda shape: math.prod(shape[1:]))
            accumulate = auto_parts(batch_size, world, largest, patch)
        if batch_size % (shares := accumulate * world):
            wrong = f"a batch of {batch_size} clips cannot be shared by {world} processes in {accumulate} parts"
            raise ValueError(f"{wrong}: make batch_size a multiple of {shares}")
        if caption_dropout:
            _ = store.empty_text  # raises now rather than at the first caption that is dropped
        self.store, self.sampling, self.seed, self.caption_dropout = store, sampling, seed, caption_dropout
        self.accumulate, self.rank, self.share = accumulate, rank, batch_size // (accumulate * world)
        self._part = batch_size // accumulate
        self._chosen = chosen
        self._order = ClipOrder([store.clips[i].shape for i in chosen], batch_size, seed)

    def steps(self, start: int) -> Generator[list[Batch]]:
        """Each step's parts, from step `start`; the next step's are read while the caller works."""
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
            clips, labels = [self._chosen[picked[p]] for p in places], [(self.seed, "step", step, p) for p in places]
            parts.append(load_batch(self.store, clips, labels, self.sampling, self.caption_dropout))
        return parts


def training_clips(store: LatentStore, held_out: int) -> list[int]:
    """All clips but the last `held_out`, and but windows of their videos: windows overlap.

    A video is known by its own hash and by that of the reference's tensors of it. Raises ValueError
    where no clip is left.
    """
    first = len(store) - held_out
    known_by = ("file", "tensors")
    videos = [{(name, clip.details[name]) for name in known_by if name in clip.details} for clip in store.clips]
    seen, before = set().union(*videos[first:]), None
    while seen != before:  # a clip that shares a hash with these may add another
        before, seen = seen, seen.union(*(own for own in videos[:first] if own & seen))
    chosen = [i for i in range(first) if not videos[i] & seen]
    if not chosen:
        held = f"all {len(store)} clips are held out, or cut from files that are"
        raise ValueError(f"{held}: lower validation_clips, or prepare more files")
    return chosen


def validation_batches(
    store: LatentStore,
    count: int,
    batch_size: int,
    sampling: TimestepSampling,
    seed: int,
    mine: Callable[[int], bool] = lambda _: True,
) -> Iterator[Batch]:
    """The last `count` clips in batches of one shape, at levels and noise that never change.

    Batch number n only where `mine(n)`.
    """
    start = len(store) - count
    groups = _by_shape({i: store.clips[i].shape for i in range(start, len(store))})
    batches = (clips[at : at + batch_size] for clips in groups.values() for at in range(0, len(clips), batch_size))
    for number, chosen in enumerate(batches):
        if mine(number):
            yield load_batch(store, chosen, [(seed, "validation", i - start) for i in chosen], sampling, 0.0)


def _by_shape(shapes: Mapping[int, tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, shape in shapes.items():
        groups.setdefault(tuple(shape), []).append(index)
    return groups
