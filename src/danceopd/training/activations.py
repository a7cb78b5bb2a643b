"""How much memory the backward pass of an update keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Activations:
    """Bytes of all storages that autograd keeps for one backward pass; ``peak`` of the largest pass so far.

    weights: tensors that are held anyway.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.peak = 0
        self._held = {weight.untyped_storage().data_ptr() for weight in weights}
        self._kept: dict[int, int] = {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def end_pass(self, loss: Tensor) -> None:
        """The pass that ``loss`` ends: stands where its backward pass would."""
        self.peak = max(self.peak, sum(self._kept.values()))
        self._kept.clear()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._held:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor
