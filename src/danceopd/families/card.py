"""The model card beside an export: what it is for, what it was made from and how, and what it cannot do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

HUB_ID = r"[\w.-]+/[\w.-]+"
GUIDANCE = (
    "In the recipe, guidance_scale is alpha in v = v_empty + alpha (v_cond - v_empty), so that 1 is no guidance. "
    "Z-Image's pipelines in diffusers take alpha - 1 under that name."
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What the card says of the files beside it.

    what: how the card's first sentence begins, up to the base's name. use: the lines that load it into ``pipe``, BASE
    being the base. call: what the pipeline's call is told so that it draws as the card says.
    checked: what was compared, as the beginning of a sentence that ends in the velocities. difference: the largest
    between the student's velocities and those of the files loaded again. change: the largest between the student's and
    its base's. digests: SHA-256 by the files' names. edits: whether the pipeline that loads it edits images.
    """

    what: str
    use: str
    call: Mapping[str, Any]
    checked: str
    difference: float
    change: float
    digests: Mapping[str, str]
    is_lora: bool
    edits: bool


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the author of a run knows of it.

    base: the base model as its users name it, best its hub id (``org/name``).
    fields: by name, what each field is (its weights, scale, guidance).
    hashes: SHA-256 in hexadecimal by source: weights, data.
    recipe: the recipe's text, whole.
    trained: how the student was made, as the end of the card's first sentence.
    guidance_scale, num_inference_steps, size: of the sampler that it is meant for; size is height and width.
    advice: on its use, a sentence each.
    scores: by name; none where none were measured, and the card then says so.
    limits: what a user should not expect, a sentence each.
    title: of the page.
    """

    base: str
    fields: Mapping[str, str]
    hashes: Mapping[str, str]
    recipe: str
    trained: str
    guidance_scale: float
    num_inference_steps: int
    size: tuple[int, int]
    advice: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    limits: Sequence[str] = ()
    title: str = "A student distilled from several fields"

    def render(self, export: Exported) -> str:
        """The card as Markdown with the hub's front matter."""
        task = "image-to-image" if export.edits else "text-to-image"
        front: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": task}
        front["tags"] = ["lora", "danceopd"] if export.is_lora else ["danceopd"]
        if re.fullmatch(HUB_ID, self.base):
            front["base_model"] = self.base
        scores = {name: f"{score:g}" for name, score in self.scores.items()}
        limits = [*self.limits, "The licences of the base and of every field above apply."]
        return "\n\n".join(
            [
                f"---\n{yaml.safe_dump(front, allow_unicode=True)}---",
                f"# {_line(self.title)}",
                f"{export.what} {_line(self.base)}, {_line(self.trained)}.",
                "## Use",
                _fenced(f"{export.use.replace('BASE', repr(self.base))}\n{self._call(export)}", "python"),
                " ".join(["So was it drawn in its run.", *map(_line, self.advice)]),
                f"Checked when it was written: loaded again over the base, {export.checked} differed from the "
                f"student's by at most {export.difference:.2g}. The student's differ from the base's by up to "
                f"{export.change:.2g}.",
                "## Fields",
                _table(("field", "what it is"), self.fields),
                "## Sources",
                _table(("source", "SHA-256"), {**self.hashes, **export.digests}),
                "## Recipe",
                _fenced(self.recipe.rstrip("\n"), "yaml"),
                GUIDANCE,
                "## Scores",
                _table(("score", "value"), scores) if scores else "None were given.",
                "## Limits",
                "\n".join(f"- {_line(limit)}" for limit in limits),
            ]
        ) + "\n"  # fmt: skip

    def _call(self, export: Exported) -> str:
        height, width = self.size
        options = {"height": height, "width": width, "num_inference_steps": self.num_inference_steps, **export.call}
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        image = "  # an edit: image=PICTURE besides" if export.edits else ""
        return f'image = pipe(prompt="...", {told}).images[0]{image}'


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    cells = [head, ("---", "---"), *rows.items()]
    return "\n".join("| " + " | ".join(_line(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
