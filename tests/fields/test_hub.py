"""References to the hub, with its client's two functions replaced: no network is needed or used."""

import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from danceopd.fields import hub
from danceopd.fields.hub import HubReference, Located, locate, parse_hub_reference
from danceopd.fields.weights import WeightsError

COMMIT = "c0ffee" * 6 + "c0ff"
PIPELINE = [
    "model_index.json",
    "sd3_medium.safetensors",
    "text_encoders/t5xxl.safetensors",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
    "run.py",
    "README.md",
]
LORA = ["adapter_model.safetensors", "adapter_config.json", "optimizer.bin", "checkpoint-500/adapter_model.safetensors"]


class Hub:
    """Repositories in a folder laid out as the hub's cache; ``asked`` holds every request."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.asked, self.error = folder, {}, [], None

    def snapshot_download(self, repository, *, revision, allow_patterns, ignore_patterns=()):
        self.asked.append((repository, revision))
        if self.error is not None:
            raise self.error
        snapshot = self.folder / repository.replace("/", "--") / "snapshots" / COMMIT
        for name in self.files[repository]:
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                parts = {"transformer": ["diffusers", "x"], "text_encoder": ["transformers", "x"]}
                parts |= {"tokenizer": ["transformers", "x"], "scheduler": ["diffusers", "x"], "_class_name": "x"}
                (snapshot / name).write_text(json.dumps(parts) if name == "model_index.json" else "{}")
        return str(snapshot)

    def hf_hub_download(self, repository, name, *, revision):
        if name not in self.files[repository] and self.error is None:
            raise EntryNotFoundError(f"no {name}")
        folder = self.snapshot_download(repository, revision=revision, allow_patterns=[name])
        return str(Path(folder) / name)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = Hub(tmp_path / "cache")
    fake.files = {"org/pipe": PIPELINE, "org/lora": LORA}
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize(
    ("reference", "parsed"),
    [
        ("org/name", HubReference("org/name")),
        ("org/na.me-1@v1.0", HubReference("org/na.me-1", "v1.0")),
        ("org/name@refs/pr/3", HubReference("org/name", "refs/pr/3")),
        ("org/name@main/a/b.safetensors", HubReference("org/name", "main", "a/b.safetensors")),
        ("shapes:edit", None),
        ("loras/edit.safetensors", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("../b", None),
        ("/a/b", None),
        ("org/name@main/b.bin", None),
        ("org/name@", None),
    ],
)
def test_what_is_a_reference_to_the_hub(reference, parsed):
    assert parse_hub_reference(reference) == parsed


def files_of(located):
    folder = Path(located.reference)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_base_is_its_pipelines_parts_without_pickles_code_or_other_copies(fake):
    located = locate("org/pipe@v1", "base")
    assert located.commit == COMMIT
    assert files_of(located) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert fake.asked == [("org/pipe", "v1"), ("org/pipe", COMMIT)]


def test_a_checkpoint_is_the_transformer_and_a_lora_the_files_at_the_top(fake):
    assert files_of(locate("org/pipe", "checkpoint")) == [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert files_of(locate("org/lora", "lora")) == ["adapter_config.json", "adapter_model.safetensors"]
    one = locate("org/lora@main/checkpoint-500/adapter_model.safetensors", "lora")
    assert Path(one.reference).is_file()
    assert one.reference.endswith(f"snapshots/{COMMIT}/checkpoint-500/adapter_model.safetensors")
    assert one.commit == COMMIT
    with pytest.raises(WeightsError, match=r"'org/lora' on the hub has no file 'other\.safetensors'"):
        locate("org/lora@main/other.safetensors", "lora")
    with pytest.raises(WeightsError, match="lacks what a base needs: no model_index"):
        locate("org/lora", "base")


def test_what_is_there_locally_comes_first(fake, tmp_path):
    (tmp_path / "org" / "lora").mkdir(parents=True)
    assert locate("org/lora", "lora") == Located("org/lora", None)
    assert locate("shapes:base", "base") == Located("shapes:base", None)
    assert not fake.asked


def answered(error: type[Exception]) -> Exception:
    """An error that its class makes from a server's answer, without one."""
    return error.__new__(error)


@pytest.mark.parametrize("kind", ["base", "checkpoint", "lora"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("x"), r"is no local path, is not whole in the hub's cache, and the hub cannot be"),
        (OfflineModeIsEnabled("x"), r"is no local path, is not whole in the hub's cache, and the hub cannot be"),
        (answered(GatedRepoError), r"accept its licence at https://huggingface\.co/org/pipe and log"),
        (answered(RepositoryNotFoundError), r"no local path and no repository on the hub"),
        (answered(RevisionNotFoundError), r"'org/pipe' has no revision 'v9' on the hub"),
        (RuntimeError("slow"), r"could not be fetched from the hub: slow"),
    ],
)
def test_what_goes_wrong_is_said_once_and_clearly(fake, kind, error, message):
    fake.error = error
    with pytest.raises(WeightsError, match=message):
        locate("org/pipe@v9", kind)


def test_offline_without_a_copy_the_real_client_ends_in_the_same_error(tmp_path):
    script = "from danceopd.fields.hub import locate; locate('org/name', 'lora')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert "WeightsError: 'org/name' is no local path, is not whole in the hub's cache" in done.stderr
