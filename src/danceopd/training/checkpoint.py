"""Checkpoints: everything that the next update depends on, written aside and then renamed.

A checkpoint is a folder ``step-000200`` with ``student.safetensors``, ``ema.safetensors``,
``optimizer.safetensors`` and ``state.json``, and ``method.safetensors`` where the method carries anything from one
update to the next. Where several processes train, what each of the others carries is in ``state.json`` under
``others``, and in ``method-1.safetensors`` and so on. It exists whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from danceopd.errors import UserError

UNREACHED = "unreached"
"""In ``optimizer.safetensors``, beside a parameter's index: no gradient had reached it, so it has no state."""


class RunStateError(UserError, RuntimeError):
    """A checkpoint could not be written or does not belong to this run."""


class ProcessState(BaseModel):
    """What each process has of its own. generator: the torch generator's state, in hexadecimal."""

    model_config = ConfigDict(extra="forbid")

    generator: str
    buckets: dict[str, dict[str, int]]


class TrainingState(ProcessState):
    """What a checkpoint holds besides tensors. others: of all processes but the first, in their order."""

    step: int
    ema_updates: int
    others: list[ProcessState] = []
    hashes: dict[str, str]
    calls: dict[str, int]
    seconds: float


def pack_generator(generator: torch.Generator) -> str:
    """The generator's state in hexadecimal."""
    return bytes(generator.get_state().tolist()).hex()


def unpack_generator(text: str) -> Tensor:
    """The inverse of ``pack_generator``."""
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def save_checkpoint(
    folder: Path,
    *,
    state: TrainingState,
    student: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    methods: Sequence[dict[str, Tensor]],
    keep: int,
) -> Path:
    """Write ``folder/step-N`` and then delete all but the ``keep`` newest.

    methods: what the method carries, of each process in their order.
    A step's checkpoint is written once: one that stands is whole and is left alone.

    Raises:
        RunStateError: if writing failed (a full disk, say); earlier checkpoints are untouched.
    """
    target = folder / f"step-{state.step:06d}"
    aside = folder / f".writing-{state.step:06d}"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        files = {"student": student, "ema": ema, "optimizer": _flatten(optimizer)}
        files |= {_method_file(rank): method for rank, method in enumerate(methods) if method}
        for name, tensors in files.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                aside / f"{name}.safetensors",
            )
        (aside / "state.json").write_text(state.model_dump_json(indent=1))
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        aside.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        kept = latest_checkpoint(folder)
        raise RunStateError(
            f"could not write checkpoint {target}: {error}; "
            + (f"the previous one, {kept.name}, is whole" if kept else "there is no earlier one")
        ) from error
    for old in checkpoints(folder)[:-keep]:
        old.rename(old.with_name(f".writing-{old.name}"))  # so that none ever stands in part
    for left in folder.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)  # what cannot be removed now is tried again next time
    return target


def keep_averaged(checkpoint: Path, target: Path) -> None:
    """Copy what scoring needs of a checkpoint, its averaged weights and ``state.json``, where none is ever deleted.

    A copy that stands is whole and is left alone.
    """
    aside = target.with_name(f".writing-{target.name}-{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        for name in ("ema.safetensors", "state.json"):
            shutil.copyfile(checkpoint / name, aside / name)
            _sync(aside / name)
        _sync(aside)
        if not target.exists():
            aside.rename(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), key=lambda path: int(path.name[5:]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint_state(path: Path) -> TrainingState:
    """A checkpoint's ``state.json``.

    Raises:
        RunStateError: if it is missing or damaged.
    """
    try:
        return TrainingState.model_validate_json((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise RunStateError(f"{path / 'state.json'} cannot be read: {error}") from error


def load_tensors(path: Path, name: str, into: dict[str, Tensor]) -> None:
    """Copy a checkpoint's ``student`` or ``ema`` tensors into ``into``; names and shapes must be the same.

    Raises:
        RunStateError: if the file is damaged, or naming the first tensor that does not fit.
    """
    saved = _read(path / f"{name}.safetensors")
    _require_same(path / f"{name}.safetensors", saved, {key: tuple(tensor.shape) for key, tensor in into.items()})
    with torch.no_grad():
        for key, tensor in into.items():
            tensor.copy_(saved[key])


def load_process_state(path: Path, state: TrainingState, *, rank: int, count: int) -> ProcessState:
    """What the process ``rank`` of ``count`` had of its own.

    Raises:
        RunStateError: if the checkpoint is of another number of processes.
    """
    found = [state, *state.others]
    if len(found) != count:
        raise RunStateError(
            f"{path} was written by {_processes(len(found))}, and this run has {_processes(count)}: it goes on with as "
            "many as it began with"
        )
    return found[rank]


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def load_method_state(path: Path, rank: int = 0) -> dict[str, Tensor]:
    """What a process's method carried when the checkpoint was written; empty where it carries nothing.

    Raises:
        RunStateError: if the file is damaged.
    """
    file = path / f"{_method_file(rank)}.safetensors"
    return _read(file) if file.exists() else {}


def _method_file(rank: int) -> str:
    return f"method-{rank}" if rank else "method"


def restore_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Put a checkpoint's optimiser state back; hyperparameters stay those of the recipe.

    A parameter that no gradient had reached has no state, which the file says of it; a state that is merely missing is
    damage.

    Raises:
        RunStateError: if the file is damaged or holds the state of other parameters.
    """
    tensors = _read(path / "optimizer.safetensors")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    needed: dict[str, tuple[int, ...]] = {}
    plain = getattr(optimizer, "optimizer", optimizer)  # out of Accelerate's wrapper
    for index, parameter in enumerate(parameters):
        if f"{index}.{UNREACHED}" in tensors:
            needed[f"{index}.{UNREACHED}"] = (0,)
        elif isinstance(plain, torch.optim.Muon):
            needed[f"{index}.momentum_buffer"] = tuple(parameter.shape)
        else:
            needed |= {f"{index}.step": (), f"{index}.exp_avg": tuple(parameter.shape)}
            needed[f"{index}.exp_avg_sq"] = tuple(parameter.shape)
    _require_same(path / "optimizer.safetensors", tensors, needed)
    content = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if name == UNREACHED:
            continue
        state.setdefault(int(index), {})[name] = value
    content["state"] = state
    optimizer.load_state_dict(content)


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    content = optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, entry in content["state"].items() for name, value in entry.items()}
    indices = [index for group in content["param_groups"] for index in group["params"]]
    return tensors | {f"{index}.{UNREACHED}": torch.zeros(0) for index in indices if index not in content["state"]}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunStateError(f"{path} cannot be read: {error}") from error


def _require_same(path: Path, saved: dict[str, Tensor], needed: dict[str, tuple[int, ...]]) -> None:
    found = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    for key in sorted(found.keys() | needed.keys()):
        if found.get(key) != needed.get(key):
            raise RunStateError(
                f"{path} does not fit this run at {key!r}: found {found.get(key, 'nothing')}, "
                f"needed {needed.get(key, 'nothing')}"
            )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_hashes(recorded: Mapping[str, str | None], now: Mapping[str, str], purpose: str) -> None:
    """Refuse to use a run (``purpose``: "resumed", say) over sources or data that changed.

    Raises:
        RunStateError: naming the sources.
    """
    changed = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    if changed:
        details = "; ".join(f"{n}: {json.dumps(recorded.get(n))} then, {json.dumps(now.get(n))} now" for n in changed)
        raise RunStateError(
            f"sources changed since this run began, so it cannot be {purpose}: {details}; put them back, or train anew"
        )
