"""The noise level of each frame of a training clip: probabilistic timestep sampling.

arXiv 2507.16116, PTSS: with probability `p_async` every frame draws its own level, else the clip
draws one for all. The published recipe is p_async = 1 over the 1000 levels of the shifted grid
(docs/reference.md, 5.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from pusa_fast.sampling.limits import check_shift
from pusa_fast.sampling.schedule import shifted, sigma_grid
from pusa_fast.training.fafm import SHIFT, STEPS

LEVELS = ("reference", "continuous")


@dataclass(frozen=True)
class TimestepSampling:
    """`levels`: "reference" draws from the training grid's 1000 levels, "continuous" from (0, 1].

    Both go through `shift`. `first_frame_clean`: frame 0 is at level 0, as a given picture is; the
    reference never does that. Raises ValueError for a probability outside [0, 1], unknown levels,
    or a shift that is not a positive number.
    """

    p_async: float = 1.0
    first_frame_clean: bool = False
    levels: str = "reference"
    shift: float = SHIFT

    def __post_init__(self) -> None:
        p = self.p_async
        if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= float(p) <= 1:  # nan compares false
            raise ValueError(f"p_async must be a probability from 0 (one level a clip) to 1 (one a frame); got {p!r}")
        if not isinstance(self.first_frame_clean, bool):
            raise ValueError(f"first_frame_clean must be True or False; got {self.first_frame_clean!r}")
        if self.levels not in LEVELS:
            raise ValueError(f"unknown levels {self.levels!r}: choose one of {', '.join(LEVELS)}")
        check_shift(self.shift)

    def draw(self, frames: int, generator: torch.Generator) -> Tensor:
        """Levels [frames] of one clip, float32 in [0, 1], on the generator's device.

        Settings other than `levels` do not change the random numbers taken: the coin, then a level
        per frame, the first of which serves all if the coin says so. Raises ValueError for fewer
        than one frame, or where the only one would be clean.
        """
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"frames must be a whole number of at least 1; got {frames!r}")
        if self.first_frame_clean and frames == 1:
            nothing = "first_frame_clean leaves nothing to learn in a clip of one latent frame"
            raise ValueError(f"{nothing}: give longer clips, or turn it off")
        device = generator.device
        asynchronous = float(torch.rand((), generator=generator, device=device)) < self.p_async  # 0: never, 1: always
        if self.levels == "reference":
            ids = torch.randint(STEPS, (frames,), generator=generator, device=device)
            sigma = sigma_grid(STEPS, self.shift)[:-1].to(device)[ids]
        else:  # 1 - u: includes pure noise, but not clean frames, of which nothing can be learnt
            sigma = shifted(1 - torch.rand(frames, generator=generator, device=device), self.shift)
        if not asynchronous:
            sigma = sigma[:1].repeat(frames)
        if self.first_frame_clean:
            sigma[0] = 0
        return sigma
