import json

import pytest
import torch
from PIL import Image

from danceopd.data.examples import Bucket, Example
from danceopd.data.manifest import Manifest, ManifestError, read_image_file, write_image_file


class Numbers:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Example(prompt=str(index))


def prompts(bucket, count):
    return [example.prompt for example in bucket.draw(count)]


def test_each_epoch_is_a_new_permutation_of_everything():
    bucket = Bucket(Numbers(10), seed=0)
    first, second = prompts(bucket, 10), prompts(bucket, 10)
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(10))
    assert first != second


def test_a_resumed_bucket_goes_on_exactly():
    bucket = Bucket(Numbers(7), seed=3)
    prompts(bucket, 9)
    state = bucket.state()
    expected = prompts(bucket, 20)
    again = Bucket(Numbers(7), seed=3)
    again.load_state(state)
    assert prompts(again, 20) == expected
    with pytest.raises(ValueError, match="the data changed"):
        Bucket(Numbers(8), seed=3).load_state(state)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Bucket(Numbers(0), seed=0)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "red.png")
    return "red.png"


def test_manifests_of_both_kinds(tmp_path, picture):
    t2i = Manifest(write(tmp_path / "a.jsonl", {"prompt": "a circle"}, {"prompt": "a square"}))
    assert (len(t2i), t2i.edits, t2i[1].prompt) == (2, False, "a square")
    edits = Manifest(write(tmp_path / "b.jsonl", {"instruction": "remove it", "source": picture, "target": picture}))
    assert edits.edits
    torch.testing.assert_close(edits[0].source[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no example"),
        ([{"prompt": "a"}, "", {"prompt": "b"}], "line 2: the line is empty"),
        ([{"prompt": "a"}, "{not json"], "line 2"),
        ([{"prompt": "a"}, {"prompt": "b", "tarket": "x"}], "line 2: tarket"),
        ([{"prompt": "a", "instruction": "b"}], "line 1: .*either 'prompt' or 'instruction'"),
        ([{"prompt": "  "}], "line 1: .*text is empty"),
        ([{"instruction": "b"}], "line 1: .*both 'instruction' and 'source'"),
        ([{"instruction": "b", "source": "none.png"}], "line 1, source: image not found"),
        ([{"instruction": "b", "source": "broken.png"}], "line 1, source: image cannot be read"),
        ([{"prompt": "a"}, {"instruction": "b", "source": "red.png"}], "mixes"),
    ],
)
def test_bad_manifests_name_the_line(tmp_path, picture, lines, message):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ManifestError, match=message):
        Manifest(write(tmp_path / "m.jsonl", *lines))


def test_a_digest_covers_the_text_and_the_images(tmp_path, picture):
    line = {"instruction": "remove it", "source": picture}
    first = Manifest(write(tmp_path / "a.jsonl", line)).digest()
    assert Manifest(write(tmp_path / "a.jsonl", line)).digest() == first
    Image.new("RGB", (32, 32), (0, 255, 0)).save(tmp_path / picture)
    assert Manifest(tmp_path / "a.jsonl").digest() != first
    line["instruction"] = "keep it"
    assert Manifest(write(tmp_path / "b.jsonl", line)).digest() != Manifest(tmp_path / "a.jsonl").digest()


def test_a_truncated_image_is_refused(tmp_path, picture):
    whole = (tmp_path / picture).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ManifestError, match="cannot be read"):
        read_image_file(tmp_path / "cut.png")


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="manifest not found"):
        Manifest(tmp_path / "none.jsonl")


def test_images_survive_a_round_trip(tmp_path):
    image = torch.rand(3, 8, 8) * 2 - 1
    write_image_file(tmp_path / "i.png", image)
    assert float((read_image_file(tmp_path / "i.png") - image).abs().max()) <= 1 / 255 + 1e-6
