"""Weights by their name on the Hugging Face hub, through its own cache; a local path always comes first.

``org/name``, ``org/name@REVISION`` (a branch, a tag or a commit), ``org/name@REVISION/FILE.safetensors``. Fetched are
safetensors, JSON and, of a pipeline's tokenizers, their plain vocabularies; never a pickle or code. HF_HUB_OFFLINE,
HF_TOKEN, HF_HOME and HF_ENDPOINT mean what they mean to ``huggingface_hub``.
"""

from __future__ import annotations

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from danceopd.fields.weights import WeightsError

Kind = Literal["base", "checkpoint", "lora"]

_NAME = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})(@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+)(/(?P<file>.+\.safetensors))?)?"
)
_VOCABULARIES = ("tokenizer*/*.txt", "tokenizer*/*.model", "tokenizer*/*.jinja")


@dataclass(frozen=True)
class HubReference:
    """A parsed reference. file: one file of the repository; None leaves the choice to what is looked for."""

    repository: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class Located:
    """Where a reference leads. commit: of the hub's repository; None for what is local."""

    reference: str
    commit: str | None = None


def parse_hub_reference(reference: str) -> HubReference | None:
    """The parts of a hub reference, or None: a file's name without ``@`` is a local file's, there or not."""
    found = _REFERENCE.fullmatch(reference)
    if found is None or (found["revision"] is None and reference.endswith(".safetensors")):
        return None
    return HubReference(found["repository"], found["revision"], found["file"])


def locate(reference: str, kind: Kind) -> Located:
    """The reference itself if it is local or a family's own; else the path of its files in the hub's cache.

    Raises:
        WeightsError: if the repository, the revision or the files cannot be had, saying why and what to do.
    """
    wanted = parse_hub_reference(reference)
    if wanted is None or Path(reference).exists():
        return Located(reference)
    there = f"https://huggingface.co/{wanted.repository}"
    try:
        folder = Path(_download(wanted, kind))
    except GatedRepoError as error:
        raise WeightsError(
            f"{reference!r} is gated: accept its licence at {there} and log in (hf auth login, or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"{wanted.repository!r} has no revision {wanted.revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"{reference!r} is no local path and no repository on the hub; if it is a private one, log in "
            "(hf auth login, or set HF_TOKEN)"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise WeightsError(
            f"{reference!r} is no local path, is not whole in the hub's cache, and the hub cannot be reached (no "
            "network, or HF_HUB_OFFLINE is set); fetch it where there is a network, or name a local copy"
        ) from error
    except EntryNotFoundError as error:
        raise WeightsError(f"{reference!r} on the hub lacks what a {kind} needs: {error}") from error
    except Exception as error:  # whatever a network and its libraries raise
        raise WeightsError(f"{reference!r} could not be fetched from the hub: {error}") from error
    path = folder if wanted.file is None else folder / wanted.file
    if not path.exists():
        raise WeightsError(f"{wanted.repository!r} on the hub has no file {wanted.file!r}")
    return Located(str(path), folder.name)


def _download(wanted: HubReference, kind: Kind) -> str:
    """Fetch what a kind of source consists of; the folder of the repository's commit in the cache."""
    repository, revision = wanted.repository, wanted.revision
    if wanted.file is not None:
        beside = wanted.file.rpartition("/")[0]
        patterns = [glob.escape(wanted.file), f"{glob.escape(beside)}/*.json" if beside else "*.json"]
        return snapshot_download(repository, revision=revision, allow_patterns=patterns)
    if kind == "lora":
        return snapshot_download(
            repository, revision=revision, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"]
        )
    if kind == "checkpoint":
        patterns = ["transformer/*.json", "transformer/*.safetensors", "model_index.json", "config.json"]
        patterns += ["diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json"]
        return snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*.fp16*"])
    index = Path(hf_hub_download(repository, "model_index.json", revision=revision))
    parts = [name for name in json.loads(index.read_text(encoding="utf-8")) if not name.startswith("_")]
    patterns = ["model_index.json", *(f"{part}/*.{ending}" for part in parts for ending in ("json", "safetensors"))]
    return snapshot_download(
        repository,
        revision=index.parent.name,  # the same commit, though the branch may move meanwhile
        allow_patterns=[*patterns, *_VOCABULARIES],
        ignore_patterns=["*.fp16*"],
    )
