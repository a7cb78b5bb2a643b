"""The run folder and all that it holds; one process owns it at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from danceopd.errors import UserError
from danceopd.files import write_text
from danceopd.recipe import Recipe, RecipeError, dump_recipe, load_recipe
from danceopd.training.checkpoint import RunStateError, checkpoints, latest_checkpoint, load_checkpoint_state


class RunFolderBusy(UserError, RuntimeError):
    """Another process works in the run folder."""


class RunFolder:
    """Paths of one run, and its metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.evaluation_file = path / "evaluation.json"
        self.report_file = path / "report.html"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder; the lock goes with the process, however it ends.

        Raises:
            RunFolderBusy: if another process holds it, with its process id.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise RunFolderBusy(
                    f"{self.path} is in use by process {file.read().strip() or '?'}; wait, or choose another output"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def trained(self) -> bool:
        """Whether a run was begun here and saved."""
        return bool(checkpoints(self.checkpoints))

    def write_recipe(self, recipe: Recipe) -> None:
        write_text(self.recipe_file, dump_recipe(recipe))

    def read_recipe(self) -> Recipe:
        """The resolved recipe of this run; its ``output`` is the folder where it is now.

        Raises:
            RecipeError: if this is not a run folder.
        """
        if not self.recipe_file.exists():
            raise RecipeError(f"{self.path} is not a run folder: it has no recipe.yaml")
        return load_recipe(self.recipe_file).model_copy(update={"output": str(self.path)})

    def evaluation(self) -> dict[str, Any]:
        """The content of ``evaluation.json``.

        Raises:
            RunStateError: if the run was not evaluated, or was trained on since, or the file is damaged.
        """
        again = f"run: danceopd evaluate {self.path}"
        if not self.evaluation_file.exists():
            raise RunStateError(f"{self.path} has no evaluation.json; {again}")
        try:
            found = json.loads(self.evaluation_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunStateError(f"{self.evaluation_file} cannot be read: {error}; {again}") from error
        needed = {"models", "intervals", "student_over", "shown", "trained_steps"}
        missing = needed - set(found if isinstance(found, dict) else ())
        if missing:
            raise RunStateError(f"{self.evaluation_file} is no evaluation: it lacks {min(missing)!r}; {again}")
        newest = latest_checkpoint(self.checkpoints)
        if newest is not None and load_checkpoint_state(newest).step != found["trained_steps"]:
            raise RunStateError(
                f"{self.evaluation_file} is of update {found['trained_steps']}, the run at {newest.name}; {again}"
            )
        return found

    def metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_file.exists():
            return []
        lines = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # cut off by a kill; a resumed run writes it again
                continue
        return lines

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines of updates that a resumed run will make again (and a line cut off by a kill)."""
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        write_text(self.metrics_file, "".join(line + "\n" for line in kept))


class Tracker:
    """metrics.jsonl and TensorBoard, the same numbers in both; ``step`` is the last update that stands in them."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._file = folder.metrics_file.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float | int]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._writer.close()
