"""The command line's surface, and that user errors are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from danceopd.cli import app
from danceopd.data.images import read_image_file
from danceopd.errors import UserError
from danceopd.families.shapes import WEIGHTS
from danceopd.fields.weights import file_hash, load_lora, read_metadata, read_safetensors
from danceopd.plan import Plan
from danceopd.printing import print_plan
from danceopd.recipe import load_recipe
from danceopd.report.overview import write_overview
from danceopd.report.page import write_report
from danceopd.runs import evaluate, train

TWO_EXPERTS = Path(__file__).parent / "two_experts.yaml"


def run(*arguments):
    command = [sys.executable, "-W", "ignore", "-c", "from danceopd.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_commands_are_these():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names == {
        *("quickstart", "check", "train", "evaluate", "report", "sample", "schema", "export"),
        *("compare", "search", "pages"),
    }
    for name in sorted(names):
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_the_command_line_begins_without_the_heavy_stacks():
    code = "import sys, danceopd.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"diffusers", "transformers", "peft", "accelerate", "matplotlib", "tensorboard"} & set(loaded)


def test_check_says_the_plan():
    result = run("check", TWO_EXPERTS, "--set", "train.batch_size=4")
    assert result.returncode == 0, result.stderr
    assert "t2i: 75% of samples, taught by base" in result.stdout
    assert "forward-equivalents" in result.stdout
    assert "already holds a run" not in result.stdout


def test_check_says_what_guidance_is_absorbed_and_what_comes_on_top():
    settings = ["train.batch_size=4", "fields.t2i.guidance_scale=2", "evaluate.guidance_scale=3"]
    result = run("check", TWO_EXPERTS, *(word for setting in settings for word in ("--set", setting)))
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert (
        "guidance absorbed by route: t2i 2, edit none; pictures are drawn under 3, on top of what was absorbed" in said
    )


def unspaced(text):
    """Where a line of output ends depends on the paths in it."""
    return "".join(text.split())


def test_a_resume_of_nothing_says_so(tmp_path):
    settings = ["train.steps=1", "train.batch_size=4", f"output={tmp_path / 'run'}"]
    words = [word for setting in settings for word in ("--set", setting)]
    first, second = (run("train", TWO_EXPERTS, "--resume", *words) for _ in range(2))
    said = unspaced(f"no run in {tmp_path / 'run'} to continue; this one begins at update 0")
    assert said in unspaced(first.stdout)
    assert said not in unspaced(second.stdout)


def test_check_names_an_output_that_holds_a_run(tmp_path):
    settings = ["train.steps=1", "train.batch_size=4", f"output={tmp_path / 'run'}"]
    train(load_recipe(TWO_EXPERTS, settings))
    result = run("check", TWO_EXPERTS, *(word for setting in settings for word in ("--set", setting)))
    assert result.returncode == 0, result.stderr
    assert unspaced(f"{tmp_path / 'run'} already holds a run") in unspaced(result.stdout)


@pytest.mark.parametrize("weights", [(4, 1), (9, 1)])
def test_check_knows_streaming_rollouts_and_small_shares(weights):
    settings = ["query.per_rollout=1", "rollout={num_inference_steps: 8, mode: streaming, pool: 32}"]
    settings += [f"routes.{index}.weight={weight}" for index, weight in enumerate(weights)]
    said = run("check", TWO_EXPERTS, *(w for s in [*settings, "train.batch_size=8"] for w in ("--set", s)))
    assert said.returncode == 0, said.stderr
    assert "rollouts streaming: 32 trajectories of 8 steps; the steps that are trained are" in said.stdout
    assert "trajectories 0." in said.stdout.replace("\n", " ")


def test_words_of_a_recipe_are_printed_as_written(capsys):
    route, student = "photo [bold]of[/bold] [/a] cat", "LoRA [1]"
    print_plan(Plan((route,), student, 1, 1, 1, 0, 1, 1.0), 1, tiny=False)
    assert capsys.readouterr().out.splitlines()[:2] == [f"route {route}", f"student {student}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", TWO_EXPERTS, "--set", "train.stepz=4"], "did you mean 'steps'"),
        (["check", "nothing.yaml"], "recipe not found"),
        (["check", TWO_EXPERTS, "--set", "fields.edit.lora=missing.safetensors"], "weight file not found"),
        (["check", TWO_EXPERTS, "--set", "routes.0.data={manifest: none.jsonl}"], "manifest not found"),
        (["check", TWO_EXPERTS, "--set", "train=[1,"], "not valid YAML"),
        (["report", "not-a-run"], "not a run folder"),
        (["world", "evaluate", "--guidance-scale", "inf"], "guidance_scale"),
        (["evaluate", "not-a-run"], "not a run folder"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_schema_documents_every_key():
    schema = json.loads(run("schema").stdout)
    undocumented = [
        f"{part}.{key}"
        for part, content in {"Recipe": schema, **schema["$defs"]}.items()
        for key, value in content["properties"].items()
        if "description" not in value and "$ref" not in json.dumps(value)
    ]
    assert undocumented == []


def test_a_report_is_one_self_contained_page(tmp_path):
    settings = ["train.steps=2", "train.batch_size=4", "evaluate.scenes_per_task=2", "evaluate.num_inference_steps=2"]
    folder = train(load_recipe(TWO_EXPERTS, [*settings, f"output={tmp_path / 'run'}"]))
    evaluate(folder)
    page = write_report(folder).read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") >= 12 * 3 + 6 + 2
    assert "subject-replace" in page
    assert "which steps were trained" not in page
    assert read_image_file(write_overview(folder)).shape[0] == 3
    for damaged in ('{"models": ', "[]"):
        folder.evaluation_file.write_text(damaged)
        refused = CliRunner().invoke(app, ["report", str(folder.path)])
        assert isinstance(refused.exception, UserError)
        assert "run: danceopd evaluate" in str(refused.exception)


def test_a_few_step_student_is_neither_scored_nor_sampled_in_other_steps(tmp_path):
    few = ["rollout={num_inference_steps: 2, substeps: 2}", "evaluate.num_inference_steps=2", "query.per_rollout=1"]
    folder = train(
        load_recipe(TWO_EXPERTS, [*few, "train.steps=1", "train.batch_size=4", f"output={tmp_path / 'run'}"])
    )
    other = [str(folder.path), "--num-inference-steps", "4"]
    for command in (["evaluate", *other], ["sample", *other, "--prompt", "a red circle"]):
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, UserError)
        assert "evaluate.num_inference_steps: rollout.substeps teaches" in str(refused.exception)
    drawn = [*other, "--prompt", "a red circle", "--field", "base", "--out", str(tmp_path / "drawn")]
    assert CliRunner().invoke(app, ["sample", *drawn]).exit_code == 0


def test_world_build_runs_and_resumes(tmp_path):
    assert run("world", "build", "--quick", "--out", tmp_path).returncode == 0
    names = {path.name for path in tmp_path.iterdir()}
    stages = ("text", "first", "base", "edit", "local", "global", "realism")
    assert names == {f"{name}.safetensors" for name in stages}
    (tmp_path / "local.safetensors").unlink()
    again = run("world", "build", "--quick", "--out", tmp_path)
    assert again.returncode == 0
    assert "base: already built" in again.stdout
    tensors, metadata = read_safetensors(tmp_path / "base.safetensors")
    text, start = file_hash(tmp_path / "text.safetensors"), file_hash(tmp_path / "base.safetensors")
    assert metadata["text"] == text
    assert read_metadata(tmp_path / "edit.safetensors").items() >= {"text": text, "start": start}.items()
    assert load_lora(tmp_path / "edit.safetensors").targets == load_lora(WEIGHTS / "edit.safetensors").targets
    assert read_metadata(tmp_path / "edit.safetensors")["targets"]
    few = ["--scenes-per-task", 2, "--num-inference-steps", 1, "--out", tmp_path / "world.json"]
    scored = run("world", "evaluate", "--weights", tmp_path, *few)
    assert scored.returncode == 0, scored.stderr
    report = json.loads((tmp_path / "world.json").read_text())
    assert report["precision"] in ("fp32", "bf16")
    hashes = report["hashes"]
    assert hashes["text encoder"] == text
    assert hashes[str(tmp_path / "base.safetensors")] == start
    other = run("world", "build", "--quick", "--out", tmp_path, "--seed", 1)
    assert other.returncode == 2
    assert "text.safetensors was made in another way" in other.stderr
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "base.safetensors", metadata)
    over_another = run("world", "build", "--quick", "--out", tmp_path)
    assert "edit.safetensors was made in another way" in over_another.stderr
