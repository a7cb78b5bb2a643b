"""Many LoRA fields and one LoRA student on ONE backbone.

Which adapter a forward pass goes through is the only thing that is switched. PEFT's own ``set_adapter`` also flips
``requires_grad``: it would make a teacher trainable, freeze the student, and silently drop the student's gradient if
called between its forward and its backward pass. Nothing here touches ``requires_grad`` after an adapter is added.

One precision rule: adapters are float32, frozen ones and the student alike, whatever the backbone's own weights are. So
a student that equals its teacher has a loss of exactly 0, with and without autocast.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from danceopd.errors import UserError, nearest
from danceopd.fields.lora import Lora


class AdapterMismatch(UserError, ValueError):
    """A LoRA does not fit the backbone."""


class AdapterBackbone:
    """A module whose linear layers carry several named adapters.

    Held are the backbone's weights, once, and the adapters.

    fold: run a call through W + (alpha / r) B A, formed for that call, instead of through PEFT's two extra products on
        the activations. The same to rounding and differentiable. Faster wherever activations outweigh weights (small
        networks, CPUs); it also holds one copy of the adapted weights, however many adapters there are, from a call
        without gradient to the next with one. For float32 weights: a sum in bfloat16 would lose small deltas. Not with
        gradient checkpointing, whose second forward pass comes after the call and would not see those weights (torch
        raises). The copy is made again once an optimiser, an operation in place under ``no_grad`` or an assignment to
        ``.data`` changed a weight; ``weight.data.add_(...)`` leaves no trace in torch and is not seen.

    Raises:
        AdapterMismatch: from ``add`` and ``create``, naming modules that the backbone lacks or shapes that differ.
    """

    def __init__(self, module: nn.Module, *, fold: bool = False) -> None:
        self.module = module.requires_grad_(False).eval()
        self.fold = fold
        self.names: list[str] = []
        self._layers: list[LoraLayer] = []
        self._kept: tuple[Any, list[Tensor]] | None = None
        """The folded weights last made without gradient, behind the state of all that they were made of."""

    def add(self, name: str, lora: Lora, *, scale: float = 1.0) -> None:
        """Put a loaded LoRA on the backbone, frozen."""
        self._check(name, lora)
        config = LoraConfig(
            r=lora.rank, lora_alpha=_alpha(lora.alpha * scale), target_modules=exact_targets(lora.targets)
        )
        self._inject(name, config)
        result = set_peft_model_state_dict(self.module, dict(lora.weights), adapter_name=name)
        if result.unexpected_keys:
            raise AdapterMismatch(
                f"LoRA {name!r} holds tensors without a place: {', '.join(result.unexpected_keys[:5])}"
            )

    def create(
        self,
        name: str,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        generator: torch.Generator,
        start: Lora | None = None,
    ) -> None:
        """Put a new trainable LoRA on the backbone.

        Its A is uniform from ``generator`` and its B zero; ``start``, of the same rank or less, takes its first rows
        of A and columns of B, so that the LoRA computes what ``start`` does.
        """
        modules = exact_targets(self._linear(name, targets))
        self._inject(name, LoraConfig(r=rank, lora_alpha=_alpha(alpha), target_modules=modules))
        if start is not None:
            self._check(name, start)
            if start.rank > rank:
                raise AdapterMismatch(
                    f"the student cannot start from a LoRA of rank {start.rank} with rank {rank}: use at least rank "
                    f"{start.rank}, or student.init_mode merged"
                )
            own = self.state(name)
            if set(own) != set(start.weights):
                mine, theirs = {key.rsplit(".lora_", 1)[0] for key in own}, set(start.targets)
                raise AdapterMismatch(
                    "the student cannot start from a LoRA on other modules: the student's alone are "
                    f"{_listed(mine - theirs)}, the LoRA's alone {_listed(theirs - mine)}; give student.lora.targets "
                    "the LoRA's, or use student.init_mode merged"
                )
        with torch.no_grad():
            for key, parameter in self.named_parameters(name):
                if "lora_A" in key:
                    bound = parameter.shape[1] ** -0.5
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
                else:
                    parameter.zero_()
                if start is not None:
                    _place(start, alpha / rank, _plain(key, name), parameter)
        for parameter in self.parameters(name):
            parameter.requires_grad_(True)

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters, by their names in the module."""
        markers = f".lora_A.{name}.", f".lora_B.{name}."
        return ((key, value) for key, value in self.module.named_parameters() if any(mark in key for mark in markers))

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [value for _, value in self.named_parameters(name)]

    def state(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors under PEFT's keys, without the adapter's name."""
        return {_plain(key, name): value.detach() for key, value in self.named_parameters(name)}

    @contextmanager
    def use(self, *names: str) -> Iterator[None]:
        """Let forward passes inside go through exactly these adapters (none: the bare base), then restore.

        Raises:
            KeyError: for an adapter that the backbone does not have.
        """
        self._require(names)
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        self._switch(names)
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def activate(self, *names: str) -> None:
        """Let forward passes outside any ``use`` go through these adapters (the student's).

        Raises:
            KeyError: for an adapter that the backbone does not have.
        """
        self._require(names)
        self._switch(names)

    @contextmanager
    def folded(self, *names: str) -> Iterator[None]:
        """Let forward passes inside run the bare layers on W + sum of the adapters' (alpha / r) B A, then restore.

        Differentiable in the adapters. Without gradient the last sums are kept until a weight changes, other adapters
        are asked for, or a call needs gradient: a rollout forms them once, and no two copies stand at a time.
        """
        with self.use():
            layers = [layer.get_base_layer() for layer in self._layers]
            before = [layer._parameters["weight"] for layer in layers]
            weights = self._folded_weights(names)
            for layer, weight in zip(layers, weights, strict=True):
                layer._parameters["weight"] = cast(nn.Parameter, weight)
            try:
                yield
            finally:
                for layer, weight in zip(layers, before, strict=True):
                    layer._parameters["weight"] = weight

    def _folded_weights(self, names: tuple[str, ...]) -> list[Tensor]:
        pairs = [
            [
                (cast(Tensor, layer.lora_A[name].weight), cast(Tensor, layer.lora_B[name].weight), layer.scaling[name])
                for name in names
                if name in layer.lora_A
            ]
            for layer in self._layers
        ]
        own = [cast(Tensor, layer.get_base_layer().weight) for layer in self._layers]
        read = [*own, *(side for pair in pairs for a, b, _ in pair for side in (a, b))]
        state = names, [(weight.data_ptr(), weight._version) for weight in read]
        if not torch.is_grad_enabled() and self._kept is not None and self._kept[0] == state:
            return self._kept[1]
        self._kept = None
        weights = []
        with torch.autocast(own[0].device.type, enabled=False):
            for weight, pair in zip(own, pairs, strict=True):
                total = weight
                for a, b, scaling in pair:
                    total = total + scaling * (b @ a)
                weights.append(total.to(weight.dtype))
        if not torch.is_grad_enabled():
            self._kept = state, weights
        return weights

    def _require(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise KeyError(f"no adapter {unknown[0]!r} on this backbone; it has {', '.join(self.names) or 'none'}")

    def _linear(self, name: str, targets: Sequence[str]) -> set[str]:
        """The linear layers that targets name, each by a whole name or by the end of some; other layers stay out."""
        plain = {key for key, value in self.module.named_modules() if isinstance(value, nn.Linear)}
        linear = {key.removesuffix(".base_layer") for key in plain if ".lora_" not in key}
        for target in targets:
            if not any(key == target or key.endswith(f".{target}") for key in linear):
                hint = nearest(target, sorted({key.rpartition(".")[2] for key in linear}))
                raise AdapterMismatch(f"LoRA {name!r}: no linear layer of this backbone is named {target!r}{hint}")
        return {key for key in linear if any(key == target or key.endswith(f".{target}") for target in targets)}

    def _switch(self, names: Sequence[str]) -> None:
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = list(names), not names

    def _inject(self, name: str, config: LoraConfig) -> None:
        if name in self.names or "." in name:
            raise AdapterMismatch(f"adapter name {name!r} is taken or holds a dot; the backbone has {self.names}")
        trainable = {key for key, value in self.module.named_parameters() if value.requires_grad}
        active = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the purpose
                inject_adapter_in_model(config, self.module, name)
        except ValueError as error:
            raise AdapterMismatch(f"LoRA {name!r} does not fit this backbone: {error}") from error
        for key, value in self.module.named_parameters():
            value.requires_grad_(key in trainable)
        self._layers = [layer for layer in self.module.modules() if isinstance(layer, LoraLayer)]
        self.names.append(name)
        for parameter in self.parameters(name):
            parameter.data = parameter.data.float()
        self._switch(())
        for layer, adapters, disabled in active:
            layer._active_adapter, layer._disable_adapters = adapters, disabled

    def _check(self, name: str, lora: Lora) -> None:
        shapes = {key: value for key, value in self.module.named_modules() if isinstance(value, nn.Linear)}
        layers = {
            key: value.get_base_layer() for key, value in self.module.named_modules() if isinstance(value, LoraLayer)
        }
        shapes |= {key: value for key, value in layers.items() if isinstance(value, nn.Linear)}
        missing = [target for target in lora.targets if target not in shapes]
        if missing:
            raise AdapterMismatch(
                f"LoRA {name!r} adapts {len(missing)} modules that this backbone lacks, first {missing[0]!r}; "
                "it was trained for another model"
            )
        for target in lora.targets:
            found_a, found_b = (lora.weights.get(f"{target}.lora_{side}.weight") for side in "AB")
            needed = (lora.rank, shapes[target].in_features), (shapes[target].out_features, lora.rank)
            found = tuple(None if part is None else tuple(part.shape) for part in (found_a, found_b))
            if found != needed:
                raise AdapterMismatch(f"LoRA {name!r} at {target!r}: found shapes {found}, needed {needed}")


def _listed(modules: set[str]) -> str:
    """How many modules these are, and the first."""
    return f"{len(modules)}, first {min(modules)!r}" if modules else "none"


def exact_targets(modules: Iterable[str]) -> str:
    """PEFT's ``target_modules`` for these modules alone; in a list, a name also means every module that ends in it."""
    return f"^(?:{'|'.join(re.escape(module) for module in sorted(modules))})$"


def _plain(key: str, name: str) -> str:
    """A parameter's name under PEFT's keys, without the adapter's name."""
    return key.replace(f".lora_A.{name}.", ".lora_A.").replace(f".lora_B.{name}.", ".lora_B.")


def _alpha(alpha: float) -> int:
    """PEFT computes with any number and declares an int."""
    return cast(int, alpha)


class AdapterModel(nn.Module):
    """``model`` under chosen adapters of its backbone (none: the bare base), called like the model itself.

    model: ``model(z, sigma, condition) -> v``, whose network is (or contains) ``backbone.module``.
    """

    def __init__(self, backbone: AdapterBackbone, model: nn.Module, *adapters: str) -> None:
        super().__init__()
        self.backbone, self.model, self.adapters = backbone, model, adapters

    def forward(self, z: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        if not self.backbone.fold or not self.adapters:
            with self.backbone.use(*self.adapters):
                return self.model(z, sigma, condition)
        with self.backbone.folded(*self.adapters):
            return self.model(z, sigma, condition)


class AdapterField:
    """A frozen field on a shared backbone; see ``AdapterModel``."""

    calls_per_velocity = 1

    def __init__(self, backbone: AdapterBackbone, model: nn.Module, *adapters: str) -> None:
        self.model = AdapterModel(backbone, model, *adapters)

    @torch.no_grad()
    def velocity(self, z: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return self.model(z, sigma, condition)


def _place(start: Lora, scaling: float, key: str, parameter: Tensor) -> None:
    """Write a tensor of ``start`` into the first rows of an A, or the first columns of a B under ``scaling``."""
    weight = start.weights[key]
    if "lora_A" in key:
        parameter[: weight.shape[0]] = weight
    else:
        parameter[:, : weight.shape[1]] = weight * (start.alpha / start.rank / scaling)
