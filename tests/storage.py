"""What an object holds: the distinct tensor storages that can be reached from it."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch


def storages(*roots: Any) -> dict[int, int]:
    """Bytes of every storage reachable through attributes, containers, partials, bound methods and closures."""
    found: dict[int, int] = {}
    seen: dict[int, Any] = {}
    waiting = list(roots)
    while waiting:
        here = waiting.pop()
        if id(here) in seen or isinstance(here, type | types.ModuleType | str | bytes | int | float | None):
            continue
        seen[id(here)] = here  # held, so that no id is used again
        if isinstance(here, torch.Tensor):
            storage = here.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            waiting.append(here.grad if here.is_leaf else None)
        elif isinstance(here, Mapping):
            waiting += [*here.keys(), *here.values()]
        elif isinstance(here, list | tuple | set | frozenset):
            waiting += here
        elif isinstance(here, partial):
            waiting += [here.func, here.args, here.keywords]
        elif isinstance(here, types.MethodType):
            waiting += [here.__self__, here.__func__]
        elif isinstance(here, types.FunctionType):
            waiting += [cell.cell_contents for cell in here.__closure__ or ()] + list(here.__defaults__ or ())
        else:
            waiting.append(getattr(here, "__dict__", None))
    return found


def held(root: Any, *, besides: Any = ()) -> int:
    """Bytes reachable from ``root`` and not from ``besides``."""
    others = storages(besides)
    return sum(size for place, size in storages(root).items() if place not in others)
