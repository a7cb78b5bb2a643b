"""Fields that wait in main memory and are on the accelerator for their own turn only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from danceopd.fields.field import VelocityField


class OffloadedField:
    """``field`` with the weights of ``module`` in main memory, on ``device`` only while a velocity is computed.

    The copies on the device are thrown away afterwards: nothing that is frozen has to be copied back. Main memory is
    pinned where the device is a CUDA one, which makes the copies faster. A turn costs one transfer of all weights, so
    this suits a field that is asked once per update, not one that rolls out.

    module: frozen, on the CPU; several fields over one module may each be wrapped.

    Raises:
        ValueError: if a parameter is trainable or not on the CPU.
    """

    def __init__(self, field: VelocityField, module: nn.Module, device: torch.device) -> None:
        self.field, self.module, self.device = field, module, device
        self.calls_per_velocity = field.calls_per_velocity
        for tensor in self._tensors():
            if tensor.requires_grad or tensor.device.type != "cpu":
                state = "trainable" if tensor.requires_grad else "frozen"
                raise ValueError(f"an offloaded field needs frozen weights on cpu, found {state} on {tensor.device}")
            if device.type == "cuda":
                tensor.data = tensor.data.pin_memory()

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    @torch.no_grad()
    def velocity(self, z: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        tensors = self._tensors()
        resting = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True, copy=True)
            return self.field.velocity(z, sigma, condition)
        finally:
            for tensor, rest in zip(tensors, resting, strict=True):
                tensor.data = rest
