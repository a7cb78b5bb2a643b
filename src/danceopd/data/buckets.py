"""Aspect-ratio buckets: image sizes of about one area that a network can take, so that no picture is stretched."""

from __future__ import annotations

import math
from dataclasses import dataclass

BUCKETS_PER_SIDE = 16
"""How finely a side of the square is divided: more buckets cut less off a picture and fill batches less."""

LONGEST = 4.0
"""How many times its shorter side a picture's longer one may be: of a longer picture most would be cut off."""


@dataclass(frozen=True)
class Buckets:
    """Sizes of about as many pixels as ``size`` (height, width) has, which is the first of them.

    The others' sides are multiples of g: a 16th of the side of the square of that area, brought up to a multiple of
    ``step``. The shorter side runs from half the square's to the whole, and with each goes the longer side that brings
    the area nearest to the square's, lying and standing. A picture's bucket is the one whose aspect ratio is nearest to
    its own, in the ratio's logarithm; of two as near, the first.

    step: what the network's image sides must be multiples of.
    """

    size: tuple[int, int]
    step: int

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) of a picture's bucket.

        Raises:
            ValueError: if the picture is longer than ``LONGEST``, and than ``size`` itself.
        """
        limit = max(LONGEST, max(self.size) / min(self.size))
        if max(height, width) > limit * min(height, width):
            raise ValueError(
                f"found a picture of {width} x {height}, at most 1:{limit:g} is taken: most of a longer one would be "
                "cut off; crop it to what matters"
            )
        aspect = math.log(height / width)
        return min(self.sizes(), key=lambda size: round(abs(math.log(size[0] / size[1]) - aspect), 6))

    def sizes(self) -> list[tuple[int, int]]:
        """All buckets: the given size, then the lying and the standing ones."""
        area, grain = self.size[0] * self.size[1], self.grain
        side = math.sqrt(area)
        shorter = range(math.ceil(side / 2 / grain) * grain, math.floor(side) + 1, grain)
        lying = [(height, round(area / height / grain) * grain) for height in shorter]
        return list(dict.fromkeys([self.size, *lying, *((width, height) for height, width in lying)]))

    @property
    def grain(self) -> int:
        return math.ceil(math.sqrt(self.size[0] * self.size[1]) / BUCKETS_PER_SIDE / self.step) * self.step
