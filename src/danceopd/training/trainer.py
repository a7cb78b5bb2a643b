"""The training loop: it owns the optimiser, saving and stopping, and knows nothing of the method's inside."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from danceopd.distill.step import route_gradient_cosines
from danceopd.errors import Interrupted, NonFiniteValue
from danceopd.recipe import Recipe
from danceopd.states import ExpectedCalls, NetworkCalls, StepResult
from danceopd.training.assemble import Assembly, LoadedModels, assemble, autocast, load_models
from danceopd.training.checkpoint import (
    ProcessState,
    RunStateError,
    TrainingState,
    check_hashes,
    latest_checkpoint,
    load_checkpoint_state,
    load_method_state,
    load_process_state,
    load_tensors,
    pack_generator,
    restore_optimizer,
    save_checkpoint,
    unpack_generator,
)
from danceopd.training.ema import EMA
from danceopd.training.hardware import keep_freed_memory, resolve_precision
from danceopd.training.optimizer import learning_rate_factor, make_optimizer
from danceopd.training.processes import ALONE, Processes, SeveralProcesses
from danceopd.training.run_folder import RunFolder, Tracker


@dataclass
class Trainer:
    """A run in progress, in this one of its processes; the first writes all files.

    on_samples: ``on_samples(assembly, step)`` writes a sample grid; None writes none.
    """

    assembly: Assembly
    folder: RunFolder
    on_samples: Callable[[Assembly, int], None] | None = None
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        recipe, student = self.assembly.recipe, self.assembly.student
        keep_freed_memory()
        self.accelerator = Accelerator(
            cpu=self.assembly.method.device == torch.device("cpu"),
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever the environment says
        )
        if self.accelerator.num_processes != self.processes.count:
            raise SeveralProcesses(
                f"only `danceopd train` runs as several processes, found {self.accelerator.num_processes}; start this "
                "without a launcher"
            )
        parameters = list(student.parameters.values())
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(parameters, recipe.train))
        self.ema = EMA(parameters, recipe.train.ema_decay)
        self.generator = self.processes.generator(recipe.train.seed)
        self.step = 0
        self.calls = NetworkCalls()
        self.seconds = 0.0

    def resume(self) -> None:
        """Continue from the newest checkpoint of the run folder; from the start if there is none.

        Raises:
            RunStateError: if a source, the data or the number of processes changed since, or the processes do not
                find the same files.
        """
        path = self.processes.first(latest_checkpoint(self.folder.checkpoints))
        found = self.processes.together(lambda: self._resume(path))
        if any(other != found[0] for other in found):
            message = "the processes do not find the same files: found other sources, data or checkpoints on one"
            raise self.processes.alike(RunStateError(message))

    def _resume(self, path: Path | None) -> tuple[int, dict[str, str]]:
        """The update gone on from, and the hashes of everything read."""
        if path is not None:
            self._load(path)
        if self.processes.main:
            self.folder.forget_metrics_after(self.step)
        return self.step, self.assembly.hashes

    def _load(self, path: Path) -> None:
        state = load_checkpoint_state(path)
        own = load_process_state(path, state, rank=self.processes.rank, count=self.processes.count)
        check_hashes(state.hashes, self.assembly.hashes, "resumed")
        load_tensors(path, "student", self._live())
        load_tensors(path, "ema", self._averaged())
        if state.step:  # before the first update an optimiser has no state
            restore_optimizer(self.optimizer, path)
        try:
            self.assembly.method.load_state(load_method_state(path, self.processes.rank))
        except (KeyError, TypeError, ValueError) as error:
            raise RunStateError(f"{path / 'method.safetensors'} does not fit this run: {error}") from error
        self.step, self.ema.updates, self.seconds = state.step, state.ema_updates, state.seconds
        self.calls = NetworkCalls(**state.calls)
        self.generator.set_state(unpack_generator(own.generator))
        for name, bucket in self.assembly.buckets.items():
            try:
                bucket.load_state(own.buckets[name])
            except (KeyError, ValueError) as error:
                raise RunStateError(f"cannot resume route {name!r}: {error}") from error

    def run(self) -> None:
        """Train to the recipe's last update; a checkpoint stands at the end.

        Raises:
            NonFiniteValue, Interrupted, RunStateError.
        """
        part, on_main = self.assembly.recipe.train, self.processes.on_main
        with ExitStack() as opened, _stop_requests() as stop, _progress(shown=self.processes.main) as progress:
            on_main(lambda: opened.enter_context(self._open_tracker()))
            task = progress.add_task("training", total=part.steps, completed=self.step, loss="")
            if part.steps == 0:
                self.save()
            while self.step < part.steps:
                started = time.monotonic()
                metrics = self.update()
                self.seconds += time.monotonic() - started
                on_main(partial(self._log, metrics))
                progress.update(task, completed=self.step, loss=f"loss {metrics['loss']:.4f}")
                saved = self.step % part.checkpointing_steps == 0 or self.step == part.steps
                if saved:
                    self.save()
                if part.sample_steps and self.step % part.sample_steps == 0:
                    on_main(self._draw_samples)
                stopped = next((number for found in self.processes.gather(stop[:1]) for number in found), None)
                if stopped is not None:
                    if not saved:
                        self.save()
                    message = (
                        f"{signal.Signals(stopped).name}: stopped after update {self.step}, which is saved; the same "
                        "command goes on from there (train and compare with --resume)"
                    )
                    raise self.processes.alike(Interrupted(message, 128 + stopped))

    def update(self) -> dict[str, float | int]:
        """One optimiser update; its metrics."""
        part, method = self.assembly.recipe.train, self.assembly.method
        parameters = list(self.assembly.student.parameters.values())
        rate = part.learning_rate * learning_rate_factor(self.step, part)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        shares = zip(method.routes, method.shares.tolist(), strict=True) if method.router.adaptive else ()
        routes = self._common_routes()
        try:
            parts = self.processes.together(lambda: self._backward(routes))
        except NonFiniteValue as error:
            raise self._stopped_by(str(error)) from error
        results = [result for own, _ in parts for result in own]
        metrics = _metrics(results)
        self._refuse_non_finite(results)
        method.observe(results)
        self.processes.average_gradients(parameters)
        norm = float(torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, part.max_grad_norm)))
        if not math.isfinite(norm):
            raise self.processes.alike(self._stopped_by(f"the gradient is {norm} although the loss is finite"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(parameters)
        self.step += 1
        for result in results:
            self.calls += result.calls
        metrics |= {f"share/{route.name}": share for route, share in shares}
        metrics |= {f"gradient_cosine/{a}/{b}": value for (a, b), value in parts[0][1].items()}
        metrics |= {"learning_rate": rate, "gradient_norm": norm}
        metrics |= {f"calls/{name}": count for name, count in asdict(self.calls).items()}
        metrics["forward_equivalents"] = self.calls.forward_equivalents
        metrics["forward_equivalents/expected"] = self._expected_compute()
        return metrics

    def _expected_compute(self) -> float:
        """What ``check`` and ``compare`` reckon the updates so far to cost, in forward-equivalents."""
        own = self._expected_calls.after(self.assembly.recipe.train.batch_size * self.step)
        return round(own * self.processes.count, 1)

    @cached_property
    def _expected_calls(self) -> ExpectedCalls:
        return self.assembly.method.expected_calls()

    def _common_routes(self) -> Tensor | None:
        """This process's part of the routes of a whole update; None where it draws its own."""
        method, processes = self.assembly.method, self.processes
        if processes.count == 1 or (method.draws_apart and method.per == "sample"):
            return None
        count = self.assembly.recipe.train.batch_size * processes.count
        drawn = processes.first(method.draw_routes(count, self.generator) if processes.main else None)
        return None if drawn is None else drawn.chunk(processes.count)[processes.rank]

    def _backward(self, routes: Tensor | None) -> tuple[list[StepResult], dict[tuple[str, str], float]]:
        """This process's part of an update up to its gradients; the cosines of the routes' gradients where due."""
        part, method = self.assembly.recipe.train, self.assembly.method
        cosine_due = part.gradient_cosine_steps and (self.step + 1) % part.gradient_cosine_steps == 0
        with self._autocast():
            results = method.update(
                self.assembly.student.model,
                batch_size=part.batch_size,
                micro_batches=part.gradient_accumulation_steps,
                generator=self.generator,
                routes=routes,
                backward=None if cosine_due else self.accelerator.backward,
            )
        cosines: dict[tuple[str, str], float] = {}
        if cosine_due:
            (result,) = results
            cosines = route_gradient_cosines(result, list(self.assembly.student.parameters.values()))
            self.accelerator.backward(result.loss)
        return [result.detached() for result in results], cosines

    def diagnostics(self) -> dict[str, float | int]:
        """Figures on what the method carries from one update to the next."""
        with self._autocast():
            return self.assembly.method.diagnostics(self.assembly.student.model)

    @contextmanager
    def _open_tracker(self) -> Iterator[None]:
        self._tracker = Tracker(self.folder, self.step)
        try:
            yield
        finally:
            self._tracker.close()

    def _log(self, metrics: dict[str, float | int]) -> None:
        """Write an update's metrics. Neither the seconds of diagnostics nor their network calls are training's."""
        figures = {**metrics, **self.diagnostics(), "seconds": round(self.seconds, 3)}
        self._tracker.log(self.step, figures)

    def _draw_samples(self) -> None:
        if self.on_samples is not None:
            with self.assembly.student.using(self.ema.average):
                self.on_samples(self.assembly, self.step)

    def save(self) -> None:
        """Write a checkpoint, on the first process, to which every other one hands what it has of its own."""
        own = ProcessState(
            generator=pack_generator(self.generator),
            buckets={name: bucket.state() for name, bucket in self.assembly.buckets.items()},
        )
        states = self.processes.gather_on_main((own, self.assembly.method.state()))
        self.processes.on_main(lambda: self._write_checkpoint(states))

    def _write_checkpoint(self, states: list[tuple[ProcessState, dict[str, Tensor]]]) -> None:
        """states: what each process has of its own, and what its method carries."""
        (own, _), *others = states
        state = TrainingState(
            **vars(own),
            others=[other for other, _ in others],
            step=self.step,
            ema_updates=self.ema.updates,
            hashes=self.assembly.hashes,
            calls=asdict(self.calls),
            seconds=self.seconds,
        )
        save_checkpoint(
            self.folder.checkpoints,
            state=state,
            student=self._live(),
            ema=self._averaged(),
            optimizer=self.optimizer,
            methods=[method for _, method in states],
            keep=self.assembly.recipe.train.checkpoints_total_limit,
        )

    def _autocast(self):
        return autocast(self.accelerator.device, self.assembly.recipe.train.precision)

    def _live(self) -> dict[str, Tensor]:
        return dict(self.assembly.student.parameters)

    def _averaged(self) -> dict[str, Tensor]:
        return dict(zip(self.assembly.student.parameters, self.ema.average, strict=True))

    def _refuse_non_finite(self, results: list[StepResult]) -> None:
        broken = {
            name: float(route.loss)
            for result in results
            for name, route in result.routes.items()
            if not math.isfinite(float(route.loss))
        }
        if broken:
            listed = ", ".join(f"{name} ({value})" for name, value in broken.items())
            raise self.processes.alike(self._stopped_by(f"non-finite loss on route {listed}"))

    def _stopped_by(self, found: str) -> NonFiniteValue:
        """The error that stops a run: what was found, what is saved, and what usually helps."""
        saved = latest_checkpoint(self.folder.checkpoints)
        return NonFiniteValue(
            f"update {self.step + 1}: {found}; stopped, the newest checkpoint is "
            f"{'none' if saved is None else saved.name}. A lower learning_rate or precision fp32 usually helps"
        )


def prepare_recipe(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with everything measured written down, so that a resumed run is the same run."""
    precision = resolve_precision(recipe.train.precision, device)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def load_run(
    folder: RunFolder, *, device: torch.device, purpose: str = "loaded", checkpoint: Path | None = None
) -> tuple[Assembly, TrainingState]:
    """A trained run, its student under its averaged weights, with the data it was trained on.

    purpose: what it is loaded to be, in errors ("scored"). checkpoint: whose weights; the newest by default.

    Raises:
        RunStateError: if there is no checkpoint, or a source or the data changed since.
    """
    assembly = assemble(folder.read_recipe(), device=device)
    return assembly, _load_averaged(folder, assembly, purpose, checkpoint)


def load_run_models(
    folder: RunFolder, *, device: torch.device, purpose: str = "loaded"
) -> tuple[LoadedModels, TrainingState]:
    """``load_run`` without the data, which may have changed or gone."""
    loaded = load_models(folder.read_recipe(), device=device)
    return loaded, _load_averaged(folder, loaded, purpose)


def _load_averaged(
    folder: RunFolder, loaded: LoadedModels, purpose: str, checkpoint: Path | None = None
) -> TrainingState:
    path = checkpoint or latest_checkpoint(folder.checkpoints)
    if path is None:
        raise RunStateError(f"{folder.path} holds no checkpoint yet")
    state = load_checkpoint_state(path)
    check_hashes({name: state.hashes.get(name) for name in loaded.hashes}, loaded.hashes, purpose)
    load_tensors(path, "ema", dict(loaded.student.parameters))
    return state


def _metrics(results: list[StepResult]) -> dict[str, float | int]:
    metrics: dict[str, float | int] = {
        "loss": sum(float(result.loss) for result in results) / len(results),
    }
    names = sorted({name for result in results for name in result.routes})
    for name in names:
        parts = [result.routes[name] for result in results if name in result.routes]
        count = sum(part.samples for part in parts)
        metrics[f"loss/{name}"] = sum(float(part.loss) * part.samples for part in parts) / count
        metrics[f"samples/{name}"] = count
        metrics[f"sigma/{name}"] = sum(part.mean_sigma * part.samples for part in parts) / count
    return metrics


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; the list holds the signals that came."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda n, frame: came.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(*, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        refresh_per_second=2,
        disable=not shown,
    )
