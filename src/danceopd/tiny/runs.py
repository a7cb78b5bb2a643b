"""``--tiny``: check and train on stand-ins."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from danceopd import plan, runs
from danceopd.exports import export
from danceopd.recipe import Recipe, RecipeError
from danceopd.tiny.recipe import require_pipeline, tiny_recipe
from danceopd.training.run_folder import RunFolder

STAND_INS = "stand-ins"
"""Folder in a tiny run's, by which it is known as one."""


@dataclass(frozen=True)
class TinyRun:
    """A finished tiny run. losses: of each update, by route. difference: the largest between the student's velocity
    and its reloaded export's."""

    folder: RunFolder
    losses: list[dict[str, float]]
    stand_ins: list[str]
    export: Path
    difference: float


def check(recipe: Recipe) -> tuple[plan.Plan, list[str]]:
    """``plan.check`` on stand-ins, which are gone afterwards; the plan, in the recipe's own names, and a sentence on
    each stand-in.

    Raises:
        RecipeError, AdapterMismatch, ManifestError: for whatever does not fit.
    """
    require_pipeline(recipe)
    with _quiet_libraries(), tempfile.TemporaryDirectory(prefix="danceopd-tiny-") as folder:
        tiny, said = tiny_recipe(recipe, Path(folder))
        tiny = tiny.model_copy(update={"output": str(Path(folder) / "run")})
        return plan.check(tiny, asked=recipe), said


def train(recipe: Recipe) -> TinyRun:
    """Two updates on stand-ins in ``OUTPUT-tiny``, in the place of an earlier tiny run, and an export of the student.

    Raises:
        RecipeError, AdapterMismatch, ManifestError: for whatever does not fit, or if that folder holds anything else.
        WeightsError: if the export, loaded again, is not the student.
    """
    require_pipeline(recipe)
    folder = RunFolder(Path(f"{recipe.output}-tiny"))
    out = folder.path / "student"
    with _quiet_libraries():
        with folder.owned():
            _clear(folder.path)
            tiny, said = tiny_recipe(recipe, folder.path.resolve() / STAND_INS)
        runs.train(tiny.model_copy(update={"output": str(folder.path)}))
        return TinyRun(folder, _losses(folder), said, out, export(folder, out))


def _losses(folder: RunFolder) -> list[dict[str, float]]:
    return [
        {key.removeprefix("loss/"): value for key, value in metrics.items() if key.startswith("loss/")}
        for metrics in folder.metrics()
    ]


def _clear(path: Path) -> None:
    found = [each for each in path.iterdir() if each.name != ".lock"]
    if found and path / STAND_INS not in found:
        raise RecipeError(f"{path} holds something else than a tiny run; choose another output (--set output=DIR)")
    for each in found:
        shutil.rmtree(each) if each.is_dir() else each.unlink()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without progress bars, and without warnings that a tiny tokenizer cuts prompts: these are not the recipe's."""
    from diffusers.utils import logging as diffusers_logging  # needs the extra
    from transformers.utils import logging as transformers_logging

    libraries = diffusers_logging, transformers_logging
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
