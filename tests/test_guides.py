"""The recipes in the guides are recipes."""

import re
from pathlib import Path

import pytest
import yaml

import danceopd
from danceopd.recipe import load_recipe

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["families.md", "sd3.md", "z_image.md"])
def test_a_guides_recipe_parses(page, tmp_path):
    blocks = re.findall(r"```yaml\n(version: 1\n.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "recipe.yaml").write_text(blocks[0])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert len(recipe.routes) == len(yaml.safe_load(blocks[0])["routes"])


def test_the_readmes_recipe_is_the_quickstarts():
    (block,) = re.findall(r"```yaml\n(version: 1\n.*?)```", (DOCS.parent / "README.md").read_text(), flags=re.DOTALL)
    shipped = Path(danceopd.__file__).parent / "quickstart.yaml"
    assert yaml.safe_load(block) == yaml.safe_load(shipped.read_text())
