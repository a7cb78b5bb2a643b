"""One training input, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, and for an edit its source image. Images are float32 [3, H, W] in [-1, 1].

    target: the image wanted, where it is known; only ``states: data`` needs it.
    size: (height, width) of the image wanted, where there is no target; the source's by default, or else the family's.
    """

    prompt: str
    source: Tensor | None = None
    target: Tensor | None = None
    size: tuple[int, int] | None = None

    @property
    def wanted_size(self) -> tuple[int, int] | None:
        """(height, width) of the image to be made; None is the family's own."""
        image = self.source if self.target is None else self.target
        if self.target is None and self.size is not None:
            return self.size
        return None if image is None else (image.shape[-2], image.shape[-1])

    @property
    def signature(self) -> tuple[object, ...]:
        """Examples of equal signature can be encoded as one batch."""
        return self.wanted_size, self.target is None, None if self.source is None else tuple(self.source.shape)


class ExampleSource(Protocol):
    """A finite, indexable set of examples; the same index always gives the same example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def digest(self) -> str:
        """A hash that changes with the examples."""
        ...


class Bucket:
    """Seeded endless passes over a source: a new permutation each epoch, nothing repeated within one.

    rank, count: which of ``count`` buckets over the source this is; each has every ``count``-th of the permutation.

    Raises:
        ValueError: if there are fewer examples than buckets.
    """

    def __init__(self, source: ExampleSource, *, seed: int, rank: int = 0, count: int = 1) -> None:
        if len(source) < count:
            needed = "at least one training example" if count == 1 else f"an example for each of {count} processes"
            raise ValueError(f"a route needs {needed}, found {len(source)}")
        self.source = source
        self.seed = seed
        self._part = slice(rank, None, count)
        self.epoch = 0
        self.position = 0
        self._order = self._permutation()

    def draw(self, count: int) -> list[Example]:
        """The next ``count`` examples."""
        drawn = []
        for _ in range(count):
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation()
            drawn.append(self.source[int(self._order[self.position])])
            self.position += 1
        return drawn

    def state(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position, "size": len(self.source)}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: if the state is of another seed or of a source of another size.
        """
        if (state["seed"], state["size"]) != (self.seed, len(self.source)):
            raise ValueError(
                f"the data changed since the checkpoint: it had seed {state['seed']} and {state['size']} examples, "
                f"now seed {self.seed} and {len(self.source)}"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(len(self.source), generator=generator)[self._part]
