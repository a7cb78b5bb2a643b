import itertools
import json
import re

import pytest
from PIL import Image

from danceopd.data.manifest import PACK_FOLDER, read_pack
from danceopd.data.rows import ManifestError


def texts(pack):
    lines = (PACK_FOLDER / f"{pack}.jsonl").read_text(encoding="utf-8").splitlines()
    return [next(iter(json.loads(line).values())) for line in lines]


@pytest.mark.parametrize("pack", ["t2i", "edit"])
def test_packs_hold_a_few_hundred_texts_and_no_near_duplicates(pack):
    found = texts(pack)
    assert 200 <= len(found) <= 400
    words = [set(re.findall(r"[a-z0-9]+", text.lower())) for text in found]
    for (first, a), (second, b) in itertools.combinations(zip(found, words, strict=True), 2):
        assert len(a & b) <= 0.5 * len(a | b), (first, second)


def test_prompts_stand_alone():
    manifest = read_pack("t2i", None)
    assert not manifest.edits
    assert [manifest[k].prompt for k in range(len(manifest))] == texts("t2i")


@pytest.mark.parametrize("count", [3, 250])
def test_instructions_and_images_are_all_used(tmp_path, count):
    for k in range(count):
        Image.new("RGB", (2, 2), (k, 0, 0)).save(tmp_path / f"{k:03}.png")
    (tmp_path / "notes.txt").write_text("no image")
    manifest = read_pack("edit", tmp_path)
    assert len(manifest) == max(count, len(texts("edit")))
    assert {entry.text for entry in manifest.entries} == set(texts("edit"))
    assert len({entry.source.digest for entry in manifest.entries}) == count
    again = [(entry.text, entry.source.name) for entry in read_pack("edit", tmp_path).entries]
    assert again == [(entry.text, entry.source.name) for entry in manifest.entries]


def test_a_pack_names_the_image_that_cannot_be_used(tmp_path):
    with pytest.raises(ManifestError, match="folder of images not found"):
        read_pack("edit", tmp_path / "none")
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(ManifestError, match=r"pack edit on .*broken\.png, source: image cannot be read"):
        read_pack("edit", tmp_path)
