"""Families by name, and what each of them costs to import."""

import subprocess
import sys

import pytest

from danceopd.families.registry import FAMILIES, load_family
from danceopd.recipe import RecipeError


def test_an_unknown_family_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"unknown family 'zimage' \(did you mean 'z_image'\?\); known: shapes, sd3"):
        load_family("zimage", "base", {})


@pytest.mark.parametrize("name", [name for name, entry in FAMILIES.items() if entry.extra])
def test_without_its_extra_a_family_says_which_one_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for module in [module for module in sys.modules if module.startswith("danceopd.families.")]:
        if module.rsplit(".", 1)[1] not in ("registry", "family", "shapes"):
            monkeypatch.delitem(sys.modules, module)
    with pytest.raises(RecipeError, match=rf"family '{name}' needs .*pip install 'danceopd\[diffusers\]'"):
        load_family(name, "base", {})


@pytest.mark.parametrize("key", ["resolution", "base_dtype", "embedded_guidance"])
def test_shapes_takes_no_keys_of_the_other_families(key):
    with pytest.raises(RecipeError, match=f"{key}: family 'shapes' takes none"):
        load_family("shapes", "shapes:base", {key: 1})


def test_the_core_and_shapes_import_no_diffusers():
    code = """
import sys, torch
import danceopd, danceopd.cli, danceopd.runs, danceopd.exports
from pathlib import Path
from danceopd.recipe import load_recipe
from danceopd.training.assemble import assemble
assemble(load_recipe(Path(danceopd.__file__).parent / "quickstart.yaml"), device=torch.device("cpu"))
assert not [name for name in sys.modules if name.partition(".")[0] == "diffusers"]
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
