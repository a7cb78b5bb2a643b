import csv
import io
import json
import sys

import pytest
import torch
from PIL import Image

from danceopd.data.buckets import Buckets
from danceopd.data.images import check_image
from danceopd.data.manifest import read_manifest
from danceopd.data.rows import ManifestError


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "red.png")
    return "red.png"


RED = torch.tensor([1.0, -1.0, -1.0])


def test_manifests_of_both_kinds(tmp_path, picture):
    t2i = read_manifest(write(tmp_path / "a.jsonl", {"prompt": "a circle"}, {"prompt": "a square"}))
    assert (len(t2i), t2i.edits, t2i[1].prompt) == (2, False, "a square")
    edits = read_manifest(
        write(tmp_path / "b.jsonl", {"instruction": "remove it", "source": picture, "target": picture})
    )
    assert edits.edits
    torch.testing.assert_close(edits[0].source[:, 0, 0], RED)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no example"),
        ([{"prompt": "a"}, "", {"prompt": "b"}], "line 2: the line is empty"),
        ([{"prompt": "a"}, "{not json"], "line 2: not JSON"),
        ([{"prompt": "a"}, "[1]"], "line 2: an object is needed, found list"),
        ([{"prompt": "a"}, '{"prompt": "a", "prompt": "b"}'], "line 2: not JSON: key 'prompt' stands twice"),
        ([{"prompt": "a"}, {"prompt": 3}], "line 2: prompt: .*valid string"),
        (
            [{"prompt": "a"}, {"prompt": "b", "tarket": "x"}],
            r"line 2: unknown column 'tarket' \(did you mean 'target'\?\); the columns are prompt, tarket, and",
        ),
        ([{"prompt": "a", "instruction": "b"}], "line 1: .*either 'prompt' or 'instruction'"),
        ([{"prompt": "  "}], "line 1: .*text is empty"),
        ([{"instruction": "b"}], "line 1: an 'instruction' needs a 'source' image"),
        ([{"instruction": "b", "source": "none.png"}], "line 1, source: image not found"),
        ([{"instruction": "b", "source": "broken.png"}], "line 1, source: image cannot be read"),
        ([{"prompt": "b", "source": {"url": "x"}}], r"line 1, source: .*found a struct of \['url'\]"),
        ([{"prompt": "a"}, {"instruction": "b", "source": "red.png"}], r"mixes .*line 1 and .*line 2"),
    ],
)
def test_bad_manifests_name_the_line(tmp_path, picture, lines, message):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(tmp_path / "m.jsonl", *lines))


def test_a_csv_is_read_by_its_header_with_commas_quotes_and_lines_inside(tmp_path, picture):
    path = write_csv(tmp_path / "m.csv", ["prompt", "target"], ['a "cat",\nasleep', picture], ["a dog", ""])
    manifest = read_manifest(path)
    assert [manifest[k].prompt for k in range(2)] == ['a "cat",\nasleep', "a dog"]
    assert manifest[1].target is None
    torch.testing.assert_close(manifest[0].target[:, 0, 0], RED)
    assert manifest.entries[1].place == f"{path}, line 4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no example"),
        ("prompt,prompt\na,b\n", "two columns 'prompt'; its columns are prompt, prompt"),
        ("prompt,target\na\n", "line 2: 1 cells, the header has 2"),
        ("prompt\na\n,\n", "line 3: 2 cells"),
        ('prompt\n"a\n', "not CSV"),
        ("prompt,target\na,none.png\n", "line 2, target: image not found"),
        ("caption\na\n", "line 2: unknown column 'caption'"),
    ],
)
def test_bad_csv_files_name_the_line(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / "m.csv")


def test_a_mapping_names_the_columns_and_leaves_the_others(tmp_path, picture):
    path = write(tmp_path / "m.jsonl", {"caption": "make it blue", "input_image": picture, "width": 7})
    manifest = read_manifest(path, {"prompt": "caption", "source": "input_image"})
    assert manifest.edits
    assert manifest[0].prompt == "make it blue"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "captoin"}, r"no column 'captoin' \(did you mean 'caption'\?\); its columns are caption, image"),
        ({"prompt": "caption", "target": "caption"}, "names 'caption' twice; its columns are caption, image"),
        ({"promt": "caption"}, r"columns has 'promt' \(did you mean 'prompt'\?\); known: prompt"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(tmp_path, columns, message):
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(tmp_path / "m.jsonl", {"caption": "a", "image": "x.png"}), columns)


def test_folders_of_images_have_metadata_or_captions(tmp_path, picture):
    (tmp_path / "red.txt").write_text("a red wall\n")
    captioned = read_manifest(tmp_path)
    assert captioned[0].prompt == "a red wall"
    torch.testing.assert_close(captioned[0].target[:, 0, 0], RED)
    write_csv(tmp_path / "metadata.csv", ["file_name", "text"], [picture, "a wall"])
    assert read_manifest(tmp_path)[0].prompt == "a wall"
    edits = read_manifest(tmp_path, {"instruction": "text", "source": "file_name"})
    assert edits.edits
    write(tmp_path / "metadata.jsonl", {"file_name": picture, "text": "a", "score": 1})
    with pytest.raises(ManifestError, match=r"metadata.jsonl and metadata.csv; one of them"):
        read_manifest(tmp_path)


def test_folders_that_are_not_whole_are_refused(tmp_path, picture):
    with pytest.raises(ManifestError, match=r"red.png has no caption \(.txt\) of its name"):
        read_manifest(tmp_path)
    (tmp_path / "red.txt").write_text("a red wall")
    (tmp_path / "blue.txt").write_text("a blue wall")
    with pytest.raises(ManifestError, match=r"blue.txt has no image of its name"):
        read_manifest(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=r"holds no image \(.png"):
        read_manifest(tmp_path / "empty")


def test_other_files_and_missing_ones_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="manifest not found"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "m.xlsx").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"needed is a folder of images or a file in .jsonl, .csv, .parquet"):
        read_manifest(tmp_path / "m.xlsx")


def test_parquet_without_its_extra_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "m.parquet").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"needs pyarrow: pip install 'danceopd\[parquet\]'"):
        read_manifest(tmp_path / "m.parquet")


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(file, "PNG")
    return file.getvalue()


def test_parquet_holds_paths_or_the_images_themselves(tmp_path, picture):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    blue = png((0, 0, 255))
    rows = [
        {"text": "paths", "image": {"bytes": None, "path": picture}},
        {"text": "bytes", "image": {"bytes": blue, "path": "blue.png"}},
    ]
    path = tmp_path / "m.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    manifest = read_manifest(path, {"prompt": "text", "target": "image"})
    torch.testing.assert_close(manifest[0].target[:, 0, 0], RED)
    torch.testing.assert_close(manifest[1].target[:, 0, 0], RED.flip(0))
    rows[1]["image"]["bytes"] = blue[:40]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ManifestError, match=r"m.parquet, row 2, target: image cannot be read"):
        read_manifest(path, {"prompt": "text", "target": "image"})
    with pytest.raises(ManifestError, match=r"row 1: unknown column 'text' .*; the columns are text, image, and"):
        read_manifest(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ManifestError, match="not a readable Parquet file"):
        read_manifest(path)


def test_a_digest_covers_all_that_is_used_and_nothing_else(tmp_path, picture):
    line = {"text": "remove it", "image": picture, "unused": 1}
    columns = {"instruction": "text", "source": "image"}

    def digest(**options):
        return read_manifest(write(tmp_path / "a.jsonl", line), columns, **options).digest()

    first = digest()
    line["unused"] = 2
    assert digest() == first
    sizes = {digest(buckets=Buckets(size, step)) for size, step in (((64, 64), 4), ((64, 64), 8), ((64, 96), 8))}
    assert len(sizes | {first}) == 4
    Image.new("RGB", (32, 32), (0, 255, 0)).save(tmp_path / picture)
    assert digest() != first
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / picture)
    assert digest() == first
    line["text"] = "keep it"
    assert digest() != first


def test_embedded_images_are_read_from_their_bytes():
    image = check_image(png((255, 0, 0)), "row 3")
    torch.testing.assert_close(image.read()[:, 0, 0], RED)
    assert image.read((8, 16)).shape == (3, 8, 16)


def test_an_edits_images_share_a_bucket_and_a_crop(tmp_path):
    """A target of twice the size is the same picture: scaled and cut alike, the two agree."""
    wide = torch.linspace(0, 255, 96).round().to(torch.uint8).expand(32, 96)
    source = Image.fromarray(wide.numpy())
    source.save(tmp_path / "s.png")
    source.resize((192, 64), Image.Resampling.BICUBIC).save(tmp_path / "t.png")
    line = {"instruction": "x", "source": "s.png", "target": "t.png"}
    buckets = Buckets((32, 32), 8)
    example = read_manifest(write(tmp_path / "m.jsonl", line), buckets=buckets)[0]
    assert example.source.shape == example.target.shape == (3, *buckets.size_for(32, 96))
    assert float((example.source - example.target).abs().max()) < 0.03
    source.resize((64, 64)).save(tmp_path / "t.png")
    with pytest.raises(ManifestError, match=r"line 1: .*one aspect ratio, found 96 x 32 and 64 x 64"):
        read_manifest(tmp_path / "m.jsonl", buckets=buckets)


def test_a_picture_too_long_for_its_bucket_is_refused_with_its_row(tmp_path, picture):
    Image.new("RGB", (130, 32)).save(tmp_path / "long.png")
    path = write(tmp_path / "m.jsonl", *({"instruction": "x", "source": name} for name in (picture, "long.png")))
    with pytest.raises(ManifestError, match=r"m.jsonl, line 2: found a picture of 130 x 32, at most 1:4"):
        read_manifest(path, buckets=Buckets((32, 32), 8))
    assert read_manifest(path)[1].source.shape == (3, 32, 130)


def test_targets_that_nothing_needs_give_their_size_alone(tmp_path, picture):
    path = write(tmp_path / "m.jsonl", {"prompt": "a wall", "target": picture})
    example = read_manifest(path, targets=False)[0]
    assert example.target is None
    assert example.wanted_size == read_manifest(path)[0].wanted_size == (32, 32)
    assert read_manifest(path, targets=False, buckets=Buckets((64, 64), 8))[0].wanted_size == (64, 64)


def test_prompts_alone_get_the_size_that_buckets_are_about(tmp_path):
    manifest = read_manifest(write(tmp_path / "m.jsonl", {"prompt": "a wall"}), buckets=Buckets((64, 96), 8))
    assert manifest[0].wanted_size == (64, 96)
