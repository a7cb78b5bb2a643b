"""The command line's surface, and that user errors are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import danceopd
from danceopd.cli import app
from danceopd.data.manifest import read_image_file
from danceopd.recipe import load_recipe
from danceopd.report.overview import write_overview
from danceopd.report.page import write_report
from danceopd.runs import evaluate, train

QUICKSTART = Path(danceopd.__file__).parent / "quickstart.yaml"


def run(*arguments):
    command = [sys.executable, "-W", "ignore", "-c", "from danceopd.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_commands_are_these():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names == {"quickstart", "check", "train", "evaluate", "report", "sample", "schema", "export", "compare"}
    for name in sorted(names):
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_check_says_the_plan():
    result = run("check", QUICKSTART, "--set", "train.batch_size=4")
    assert result.returncode == 0, result.stderr
    assert "t2i: 75% of samples, taught by base" in result.stdout
    assert "forward-equivalents" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", QUICKSTART, "--set", "train.stepz=4"], "did you mean 'steps'"),
        (["check", "nothing.yaml"], "recipe not found"),
        (["check", QUICKSTART, "--set", "fields.edit.lora=missing.safetensors"], "weight file not found"),
        (["check", QUICKSTART, "--set", "routes.0.data={manifest: none.jsonl}"], "manifest not found"),
        (["check", QUICKSTART, "--set", "train=[1,"], "not valid YAML"),
        (["report", "not-a-run"], "not a run folder"),
        (["world", "evaluate", "--guidance-scale", "inf"], "guidance_scale"),
        (["evaluate", "not-a-run"], "not a run folder"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_schema_documents_every_key():
    schema = json.loads(run("schema").stdout)
    undocumented = [
        f"{part}.{key}"
        for part, content in schema["$defs"].items()
        for key, value in content["properties"].items()
        if "description" not in value and "$ref" not in json.dumps(value)
    ]
    assert undocumented == []


def test_a_report_is_one_self_contained_page(tmp_path):
    settings = ["train.steps=2", "train.batch_size=4", "evaluate.scenes_per_task=2", "evaluate.num_inference_steps=2"]
    folder = train(load_recipe(QUICKSTART, [*settings, f"output={tmp_path / 'run'}"]))
    evaluate(folder)
    page = write_report(folder).read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") >= 12 * 3 + 6 + 2
    assert "subject-replace" in page
    assert read_image_file(write_overview(folder)).shape[0] == 3


def test_world_build_runs_and_resumes(tmp_path):
    assert run("world", "build", "--quick", "--out", tmp_path).returncode == 0
    names = {path.name for path in tmp_path.iterdir()}
    stages = ("text", "first", "base", "edit", "local", "global", "realism")
    assert names == {f"{name}.safetensors" for name in stages}
    (tmp_path / "local.safetensors").unlink()
    again = run("world", "build", "--quick", "--out", tmp_path)
    assert again.returncode == 0
    assert "base: already built" in again.stdout
    other = run("world", "build", "--quick", "--out", tmp_path, "--seed", 1)
    assert other.returncode == 2
    assert "text.safetensors was made in another way" in other.stderr
