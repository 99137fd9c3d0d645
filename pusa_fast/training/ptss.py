"""Which noise level each frame of a training clip gets: probabilistic timestep sampling (arXiv 2507.16116, PTSS).

With probability `p_async` every frame has a level of its own, else the clip has one for all. The published recipe is p_async = 1 over
the 1000 levels of the shifted grid (docs/reference.md, 5.2).
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
    """`levels`: "reference" draws from the 1000 levels of the training grid, "continuous" from (0, 1] through the same shift.

    `first_frame_clean`: frame 0 is at level 0, as a given picture is; the reference never does that.
    Raises ValueError for a probability outside [0, 1], unknown levels, or a shift that is not a positive number.
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
        """Levels [frames], float32 in [0, 1], of one clip, on the generator's device.

        Takes the same random numbers whatever the settings are but `levels`: the coin, then a level for each frame, of which
        the first serves all where the coin says so. Raises ValueError for fewer than one frame, or where the only one would be
        clean.
        """
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"frames must be a whole number of at least 1; got {frames!r}")
        if self.first_frame_clean and frames == 1:
            raise ValueError(
                "first_frame_clean leaves nothing to learn in a clip of one latent frame: give longer clips, or turn it off"
            )
        device = generator.device
        asynchronous = (
            float(torch.rand((), generator=generator, device=device)) < self.p_async
        )  # never at 0, always at 1
        if self.levels == "reference":
            ids = torch.randint(STEPS, (frames,), generator=generator, device=device)
            sigma = sigma_grid(STEPS, self.shift)[:-1].to(device)[ids]
        else:  # 1 - u: pure noise belongs to training, a clean frame has nothing to teach
            sigma = shifted(1 - torch.rand(frames, generator=generator, device=device), self.shift)
        if not asynchronous:
            sigma = sigma[:1].repeat(frames)
        if self.first_frame_clean:
            sigma[0] = 0
        return sigma
