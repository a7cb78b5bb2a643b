import json
import os
import time

import pytest
import torch
from closed_forms import TinyNet
from safetensors import SafetensorError
from safetensors.torch import save_file

from danceopd.fields.lora import Lora
from danceopd.fields.weights import (
    WeightsError,
    file_hash,
    load_checkpoint,
    load_lora,
    read_safetensors,
    save_lora,
    source_hash,
    write_safetensors,
)


def test_a_whole_checkpoint_loads_exactly(tmp_path):
    source, net = TinyNet(seed=3), TinyNet()
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    load_checkpoint(net, tmp_path / "net.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), net.parameters(), strict=True))


def write_shards(folder, places):
    state = TinyNet(seed=3).state_dict()
    for shard in ("one.safetensors", "two.safetensors"):
        save_file(
            {name: state[name] for name in state if name.startswith("fc_in") == (shard[0] == "o")}, folder / shard
        )
    (folder / "net.safetensors.index.json").write_text(json.dumps(places))
    return folder / "net.safetensors.index.json"


def test_a_checkpoint_in_shards_loads_exactly_and_only_whole(tmp_path):
    source, net = TinyNet(seed=3), TinyNet()
    places = {
        name: "one.safetensors" if name.startswith("fc_in") else "two.safetensors" for name in source.state_dict()
    }
    load_checkpoint(net, write_shards(tmp_path, {"weight_map": places}))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), net.parameters(), strict=True))
    for wrong, message in (
        ({"weight_map": places | {"fc_extra.bias": "one.safetensors"}}, "disagree about 1 tensors, first 'fc_extra"),
        ({"weight_map": places | {"fc_in.bias": "../one.safetensors"}}, "outside its own folder"),
        ({"weights": places}, "is not an index of safetensors files"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_checkpoint(net, write_shards(tmp_path, wrong))


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_one_wrong_tensor_refuses_the_checkpoint_and_loads_nothing(tmp_path, damage):
    state = TinyNet(seed=3).state_dict()
    if damage == "missing":
        del state["fc_out.bias"]
    elif damage == "unknown":
        state["fc_extra.bias"] = torch.zeros(2)
    else:
        state["fc_out.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "net.safetensors")
    net = TinyNet()
    expected = {
        "missing": r"missing fc_out.bias \(4,\)",
        "unknown": "unknown fc_extra.bias",
        "shape": r"found shape \(5,\), needed \(4,\)",
    }
    with pytest.raises(WeightsError, match=expected[damage]):
        load_checkpoint(net, tmp_path / "net.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), TinyNet().parameters(), strict=True))


def test_pickles_are_never_read(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(TinyNet().state_dict(), path)
    with pytest.raises(WeightsError, match="pickle"):
        read_safetensors(path)
    path.rename(tmp_path / "net.safetensors")  # and not under another name either
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        read_safetensors(tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match="not found"):
        read_safetensors(tmp_path / "nothing.safetensors")


def test_a_lora_must_be_whole_and_record_its_alpha(tmp_path):
    good = {"fc.lora_A.weight": torch.zeros(2, 3), "fc.lora_B.weight": torch.zeros(4, 2)}
    path = tmp_path / "lora.safetensors"
    save_file(good, path, {"alpha": "8"})
    loaded = load_lora(path)
    assert (loaded.rank, loaded.alpha, loaded.targets) == (2, 8.0, ("fc",))
    for content, metadata, message in [
        (good, None, "alpha"),
        ({"fc.lora_A.weight": torch.zeros(2, 3)}, {"alpha": "8"}, "but not fc.lora_B.weight"),
        ({"fc.weight": torch.zeros(2, 3)}, {"alpha": "8"}, "not a LoRA"),
        (good | {"g.lora_A.weight": torch.zeros(5, 3), "g.lora_B.weight": torch.zeros(4, 5)}, {"alpha": "8"}, "ranks"),
    ]:
        save_file(content, path, metadata)
        with pytest.raises(WeightsError, match=message):
            load_lora(path)


def test_a_module_that_went_missing_from_a_lora_is_noticed(tmp_path):
    path = tmp_path / "lora.safetensors"
    shapes = {"lora_A.weight": (2, 3), "lora_B.weight": (4, 2)}
    whole = {f"{name}.{side}": torch.ones(shape) for name in ("fc", "out") for side, shape in shapes.items()}
    save_lora(Lora(rank=2, alpha=4.0, weights=whole), path)
    assert load_lora(path).targets == ("fc", "out")
    _, metadata = read_safetensors(path)
    save_file({name: tensor for name, tensor in whole.items() if name.startswith("fc.")}, path, metadata)
    with pytest.raises(WeightsError, match="differ in 1, first 'out'"):
        load_lora(path)


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("danceopd.fields.weights.save_file", full)
    (tmp_path / "x.safetensors").write_bytes(b"before")
    with pytest.raises(WeightsError, match=r"x\.safetensors could not be written: No space left on device"):
        write_safetensors({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == b"before"


def test_hash_is_of_the_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_large_file_is_read_once_for_its_hash_until_it_changes(tmp_path, monkeypatch):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    link.symlink_to(path)
    first, reads, original = file_hash(path), [], type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, *a, **k: reads.append(self) or original(self, *a, **k))
    assert file_hash(path) == file_hash(link) == first
    assert reads == []
    path.write_bytes(b"abd")
    os.utime(path, (2, 2))
    assert file_hash(path) != first


def test_a_file_written_twice_within_a_tick_of_its_clock_has_two_hashes(tmp_path):
    path, now, found = tmp_path / "a", time.time_ns(), set()
    for content in (b"abc", b"abd"):
        path.write_bytes(content)
        os.utime(path, ns=(now, now))
        found.add(file_hash(path))
    assert len(found) == 2


def test_the_hash_of_a_lora_in_pefts_keys_covers_its_configuration_whatever_its_name(tmp_path):
    weights = {"fc.lora_A.weight": torch.zeros(2, 3), "fc.lora_B.weight": torch.zeros(4, 2)}
    path, config = tmp_path / "style.safetensors", tmp_path / "adapter_config.json"
    for prefix, count in (("base_model.model.", 3), ("", 1)):
        save_file({prefix + name: weight for name, weight in weights.items()}, path)
        config.unlink(missing_ok=True)
        found = {source_hash(path)}
        for alpha in (8, 16):
            config.write_text(json.dumps({"lora_alpha": alpha}))
            found.add(source_hash(path))
        assert len(found) == count
