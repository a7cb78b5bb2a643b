"""The command line: parsing only; the work is in ``runs``, what is printed in ``printing``."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from danceopd.errors import FailedElsewhere, Interrupted, UserError
from danceopd.printing import console, print_plan, print_scores, print_stand_ins, print_tiny_run
from danceopd.recipe import MAX_SEED, Recipe, RecipeError, evaluate_part, load_recipe, with_evaluate


class ExportFormat(StrEnum):
    """Forms of an export."""

    lora = "lora"
    peft = "peft"
    merged = "merged"


class ExportType(StrEnum):
    """Types of merged weights."""

    fp32 = "fp32"
    bf16 = "bf16"


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""One student from several frozen flow-matching image experts.

    Start with `danceopd quickstart`: three minutes on a laptop, no GPU. Then write a recipe, `check` it, `train` it,
    `evaluate` and `report`.""",
)
world_app = typer.Typer(no_args_is_help=True, help="The embedded Shapes world.")
app.add_typer(world_app, name="world")

RecipeFile = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
Tiny = Annotated[
    bool,
    typer.Option("--tiny", help="On a tiny random pipeline in the place of the real files: no download, no GPU."),
]
RunPath = Annotated[Path, typer.Argument(help="Run folder, as named by the recipe's output.", show_default=False)]
Jobs = Annotated[
    int, typer.Option(min=1, help="Runs at a time, each with its share of the cores; on a CPU, as many as cores.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a recipe key: --set train.steps=400. Repeatable.")
]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of training and of the evaluation scenes.")] = 0,
) -> None:
    """Train one student on text-to-image AND editing in the Shapes world, score it, and write a report."""
    from danceopd.runs import quickstart as run

    overrides = [f"output={json.dumps(str(out))}", f"train.seed={seed}", f"evaluate.seed={seed}"]
    recipe = load_recipe(Path(__file__).parent / "quickstart.yaml", overrides)
    folder, report = run(recipe)
    print_scores(report)
    console.print(f"total {report['seconds']['total']:.0f} s; open {folder.report_file} in a browser")


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None, tiny: Tiny = False) -> None:
    """Validate a recipe completely, without training, and say what it will do."""
    from danceopd.plan import check as run
    from danceopd.training.run_folder import RunFolder

    loaded = load_recipe(recipe, overrides)
    if tiny:
        from danceopd.tiny.runs import check as run_tiny

        plan, stand_ins = run_tiny(loaded)
        print_stand_ins(stand_ins)
    else:
        plan = run(loaded)
    print_plan(plan, loaded.train.steps, tiny=tiny)
    if tiny:
        console.print(f"{recipe} works on tiny stand-ins; its own files were not looked at", style="green")
        return
    console.print(f"{recipe} is ready to train", style="green")
    if RunFolder(Path(loaded.output)).trained():
        console.print(f"{loaded.output} already holds a run: train it with --resume, or choose another output")


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the recipe's output folder, or begin one.")
    ] = False,
    tiny: Tiny = False,
) -> None:
    """Train a recipe. Ctrl-C finishes the update, saves, and leaves a run that --resume continues exactly.

    On several devices: `accelerate launch -m danceopd train RECIPE`, or torchrun; batch_size stays that of the update.

    With --tiny: two updates in OUTPUT-tiny, an export of the student, and its reload.
    """
    from danceopd.runs import train as run
    from danceopd.training.processes import Processes
    from danceopd.training.run_folder import RunFolder

    if tiny:
        if resume:
            raise RecipeError("--tiny and --resume: a tiny run is over in two updates; leave one of them out")
        from danceopd.tiny.runs import train as run_tiny

        print_tiny_run(run_tiny(load_recipe(recipe, overrides)))
        return
    with Processes.launched() as processes:
        (loaded, *_) = processes.together(lambda: load_recipe(recipe, overrides))
        if resume and processes.main and not RunFolder(Path(loaded.output)).trained():
            console.print(f"no run in {Path(loaded.output).absolute()} to continue; this one begins at update 0")
        folder = run(loaded, resume=resume, processes=processes)
        if processes.main:
            console.print(f"trained; next: danceopd evaluate {folder.path}")


@app.command()
def evaluate(
    run_folder: RunPath,
    scenes_per_task: Annotated[
        int | None, typer.Option(min=2, help="Scenes per task; the recipe's by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of the evaluation scenes.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="External guidance of all models.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
) -> None:
    """Score the base, the experts and the student on fresh scenes, with 95 % intervals.

    For a family without scores, draw them all side by side on the routes' first prompts instead.
    """
    from danceopd.evaluation.scorers import SCORERS
    from danceopd.pictures import compare_pictures
    from danceopd.runs import evaluate as run
    from danceopd.training.run_folder import RunFolder

    folder = RunFolder(run_folder)
    given = {
        "scenes_per_task": scenes_per_task,
        "seed": seed,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
    }
    asked = {key: value for key, value in given.items() if value is not None}
    recipe = with_evaluate(folder.read_recipe(), asked, where=str(run_folder))
    part = recipe.evaluate
    if recipe.family in SCORERS:
        print_scores(run(folder, part))
        return
    if scenes_per_task is not None:
        raise RecipeError(f"--scenes-per-task: family {recipe.family!r} has no scores, and no scenes of its own")
    path, columns, prompts = compare_pictures(folder, part)
    for number, prompt in enumerate(prompts, start=1):
        console.print(f"row {number}: {prompt}")
    console.print(f"columns: {' | '.join(columns)}; wrote {path}")
    console.print(
        f"no scores: they exist for {', '.join(SCORERS)} only; for {recipe.family}, draw a benchmark's prompts with "
        f"danceopd sample {folder.path} and hand the images to its own scorer",
    )


@app.command()
def report(run_folder: RunPath) -> None:
    """Write report.html, one self-contained page, and overview.png, from the run folder's files."""
    from danceopd.evaluation.scorers import scorer
    from danceopd.report.overview import write_overview
    from danceopd.report.page import write_report
    from danceopd.training.run_folder import RunFolder

    folder = RunFolder(run_folder)
    scorer(folder.read_recipe().family)
    console.print(f"wrote {write_report(folder)} and {write_overview(folder)}")


@app.command()
def sample(
    run_folder: RunPath,
    prompt: Annotated[list[str], typer.Option(help="What to draw, or the edit to make. Repeatable.")],
    image: Annotated[Path | None, typer.Option(help="Source image of an edit, resized as for training.")] = None,
    field: Annotated[str, typer.Option(help="student, base, or a field of the recipe.")] = "student",
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="External guidance, 1 is none; as the run is evaluated by default.")
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps; as the run is evaluated by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise.")] = 0,
    height: Annotated[
        int | None, typer.Option(min=1, help="In pixels; the resized image's or family's by default.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels; with --height.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("samples"),
) -> None:
    """Draw images with a run's student or one of its fields."""
    from danceopd.pictures import sample_images
    from danceopd.training.run_folder import RunFolder

    if (height is None) != (width is None):
        raise RecipeError("--height and --width belong together")

    for path in sample_images(
        RunFolder(run_folder),
        prompts=prompt,
        image=image,
        field=field,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        seed=seed,
        out=out,
        size=None if height is None or width is None else (height, width),
    ):
        console.print(f"wrote {path}")


@app.command()
def export(
    run_folder: RunPath,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, or for shapes a .safetensors file; 'student' by default.")
    ] = None,
    form: Annotated[
        ExportFormat | None,
        typer.Option("--format", help="lora: for load_lora_weights; peft: for PeftModel; merged: whole weights."),
    ] = None,
    base_id: Annotated[str | None, typer.Option(help="The base's hub id (ORG/NAME), for the model card.")] = None,
    dtype: Annotated[
        ExportType | None,
        typer.Option(help="Of merged weights; the base's own by default, fp32 for a full student."),
    ] = None,
) -> None:
    """Write the student so that it fits the original base; it is reloaded and compared before this succeeds."""
    from danceopd.exports import export as run
    from danceopd.families.registry import is_over_a_pipeline
    from danceopd.training.run_folder import RunFolder

    folder = RunFolder(run_folder)
    if out is None:
        out = Path("student" if is_over_a_pipeline(folder.read_recipe().family) else "student.safetensors")
    difference = run(
        folder,
        out,
        form=None if form is None else form.value,
        base_id=base_id,
        dtype=None if dtype is None else dtype.value,
    )
    console.print(f"wrote {out}; reloaded, it differs from the student by at most {difference:.1e}")


@app.command()
def compare(
    suite: Annotated[Path, typer.Argument(help="Suite file (YAML).", show_default=False)],
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds; the suite's by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Methods to run; all by default. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results; runs/compare by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in that folder.")] = False,
    jobs: Jobs = 1,
) -> None:
    """Run a suite of methods on equal terms and write comparison.json, .md and .html; of a part of it, part.json."""
    from danceopd.comparison.compare import compare as run

    made = run(suite, seeds=seeds, only=only, out=out, resume=resume, jobs=jobs)
    console.print(made.with_suffix(".md").read_text(encoding="utf-8"), soft_wrap=True)
    console.print(f"open {made.with_suffix('.html')} in a browser")


@app.command()
def search(
    suite: Annotated[Path, typer.Argument(help="Suite file (YAML) with a search.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder of the trials; runs/search/SUITE by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in that folder.")] = False,
    jobs: Jobs = 1,
) -> None:
    """Choose every method's settings in a suite by the same number of trials, and write SUITE.search.json beside it."""
    from danceopd.comparison.compare import search as run

    console.print(f"wrote {run(suite, out=out, resume=resume, jobs=jobs)}")


@app.command()
def pages(
    comparison: Annotated[list[Path], typer.Argument(help="comparison.json of a comparison.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the pages.")] = Path("docs/results"),
) -> None:
    """Write a comparison's JSON, and made of it alone its page and that page's picture, as NAME.json, .md and .png."""
    from danceopd.comparison.compare import write_pages

    for file in comparison:
        console.print(f"wrote {write_pages(file, out)}")


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))


@world_app.command("build")
def world_build(
    out: Annotated[Path | None, typer.Option(help="Folder; build/world, or build/world-quick with --quick.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of everything.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps per source: tries the path, teaches nothing.")
    ] = False,
) -> None:
    """Train the world's sources from scratch. Resumable: run it again to go on."""
    from danceopd.training.hardware import keep_freed_memory
    from danceopd.world.build import STAGES, build
    from danceopd.world.build import quick as cut

    keep_freed_memory()
    out = out or Path("build/world-quick" if quick else "build/world")
    build(out, seed=seed, stages=cut() if quick else STAGES, report=console.print)
    console.print(f"all sources are in {out}")


@world_app.command("evaluate")
def world_evaluate(
    scenes_per_task: Annotated[int, typer.Option(min=2, help="Fresh scenes per task.")] = 200,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Guidance of all sources; 1 is none.")] = 1.0,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the scenes.")] = 0,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of sources, as world build leaves it; the shipped ones by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/world.json"),
) -> None:
    """Score the world's sources on all tasks and edit types: what each can do, and what its training cost."""
    from danceopd.runs import evaluate_world

    asked = {"scenes_per_task": scenes_per_task, "guidance_scale": guidance_scale, "seed": seed}
    report = evaluate_world(evaluate_part({**asked, "num_inference_steps": num_inference_steps}), out, weights)
    print_scores(report)
    console.print("on its own tasks: " + ", ".join(f"{name} {score:.3f}" for name, score in report["own"].items()))


def main() -> None:
    """Run the command line; user errors print one line and exit 2, a stopped run exits 128 + the signal.

    Of several processes that fail together, one prints.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes are about parts that no recipe here uses
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        app()
    except FailedElsewhere:
        sys.exit(2)
    except (UserError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {type(error).__name__}: ", end="")
        print(" ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
