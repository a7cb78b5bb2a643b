"""Files in the place of those that a recipe names, random and tiny, always the same for the same name."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from danceopd.data.images import write_image_file
from danceopd.data.manifest import PACK_FOLDER
from danceopd.data.rows import read_table
from danceopd.fields.adapters import AdapterBackbone
from danceopd.fields.lora import Lora
from danceopd.fields.weights import save_lora
from danceopd.files import write_text
from danceopd.recipe import DataPart
from danceopd.tiny.pipelines import PIPELINES, vae

ROWS = 2
"""Of each route's data."""
PICTURES = ((32, 32), (24, 40), (40, 24))
"""Heights and widths of stand-in pictures, in turn."""
STRENGTH = 0.3
"""Of a stand-in LoRA, about its delta's output over its layer's input."""


class StandIns:
    """Makes stand-ins in a folder; ``said`` has a sentence on each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []

    def base(self, reference: str, pipeline: str) -> str:
        """The folder of a tiny pipeline of the named class. All of them have one VAE."""
        path = self._path("base", reference, pipeline)
        if not path.exists():
            _pipeline(pipeline, reference).save_pretrained(path)
            self._say("base", reference, f"a random {pipeline}")
        return str(path)

    def checkpoint(self, reference: str, pipeline: str) -> str:
        """The weights of another such pipeline's transformer."""
        path = self._path("checkpoint", reference, pipeline).with_suffix(".safetensors")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            weights = _pipeline(pipeline, reference).transformer.state_dict()
            save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
            self._say("checkpoint", reference, f"another {pipeline}'s transformer")
        return str(path)

    def lora(self, reference: str, pipeline: str, *, rank: int, alpha: float, targets: Sequence[str]) -> str:
        """A LoRA on the named modules of such a pipeline's transformer, whose delta is not zero.

        Raises:
            AdapterMismatch: for a target that the transformer does not have.
        """
        path = self._path("lora", reference, pipeline).with_suffix(".safetensors")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(_seed(reference))
            backbone = AdapterBackbone(copy.deepcopy(_pipeline(pipeline, "").transformer))
            backbone.create("student", rank=rank, alpha=alpha, targets=targets, generator=generator)
            weights = {
                name: torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5 * STRENGTH**0.5
                for name, weight in backbone.state("student").items()
            }
            save_lora(Lora(rank=rank, alpha=alpha, weights=weights), path)
            self._say("lora", reference, f"random, of rank {rank} on {', '.join(targets)}")
        return str(path)

    def data(self, index: int, part: DataPart, *, edits: bool, targets: bool) -> DataPart:
        """A few of the packs' texts, with random pictures where there are edits, in the place of a pack or of a
        manifest that is not there; a manifest that is there stays.

        targets: whether every row needs an image wanted.
        """
        if part.generator is not None or (part.manifest is not None and Path(part.manifest).exists()):
            return part
        own = [*(("instruction", "source") if edits else ("prompt",)), *(("target",) if targets else ())]
        columns = part.columns or {name: name for name in own}
        texts = read_table(PACK_FOLDER / f"{'edit' if edits else 't2i'}.jsonl").rows[:ROWS]
        lines = []
        for number, row in enumerate(texts):
            (text,) = row.values.values()
            values = {"prompt": text, "instruction": text}
            values |= {kind: self._picture(f"{index}-{number}-{kind}", number) for kind in ("source", "target")}
            lines.append(json.dumps({theirs: values[ours] for ours, theirs in columns.items() if ours in values}))
        path = self.folder / f"data-{index}.jsonl"
        write_text(path, "\n".join(lines) + "\n")
        name = part.manifest or f"pack {part.pack}" + (f" on {part.images}" if part.images else "")
        self._say("data", name, f"{ROWS} {'edits of random pictures' if edits else 'prompts'}")
        return DataPart(manifest=str(path), columns=part.columns)

    def _picture(self, name: str, number: int) -> str:
        path = self.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = PICTURES[number % len(PICTURES)]
        write_image_file(path, torch.rand(3, *size, generator=torch.Generator().manual_seed(_seed(name))) * 2 - 1)
        return path.name

    def _path(self, kind: str, reference: str, pipeline: str) -> Path:
        """A name that tells references, and what they are wanted for, apart."""
        plain = re.sub(r"[^A-Za-z0-9]+", "-", Path(reference).name.removesuffix(".safetensors"))
        return self.folder / f"{kind}-{plain}-{_seed(f'{kind} {reference} {pipeline}'):08x}"

    def _say(self, kind: str, reference: str, what: str) -> None:
        self.said.append(f"{kind} {reference}: {what}")


def _pipeline(name: str, reference: str) -> Any:
    made = PIPELINES[name](_seed(reference))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made.register_modules(vae=vae().eval())
    return made


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
