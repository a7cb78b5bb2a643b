"""From a recipe's data to a route's draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from danceopd.data.buckets import Buckets
from danceopd.data.examples import Bucket, Example, ExampleSource
from danceopd.data.manifest import Manifest, read_manifest, read_pack
from danceopd.families.family import Family
from danceopd.recipe import DataPart, Recipe, RecipeError, RoutePart
from danceopd.states import Samples
from danceopd.training.fields import FieldInput


class RouteSamples:
    """A bucket behind a route: draws examples in the bucket's own order and encodes those of one shape together.

    field_input: of a field that is told something else than the student.
    size: height and width of examples that bring no picture; the family's by default.
    """

    def __init__(
        self,
        bucket: Bucket,
        family: Family,
        field_input: FieldInput | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.bucket, self.family, self.field_input, self.size = bucket, family, field_input, size

    def __call__(self, count: int, generator: torch.Generator) -> list[Samples]:
        groups: dict[Any, list[Example]] = {}
        for example in self.bucket.draw(count):
            groups.setdefault(example.signature, []).append(example)
        return [encoded(group, self.family, self.field_input, self.size) for group in groups.values()]


def encoded(
    examples: Sequence[Example],
    family: Family,
    field_input: FieldInput | None,
    size: tuple[int, int] | None = None,
) -> Samples:
    """Examples of one shape signature for the student and, where it is told something else, for its field."""
    samples = family.samples(examples, size)
    if field_input is None:
        return samples
    sources = [example.source for example in examples if example.source is not None]
    condition = field_input.encode([example.prompt for example in examples], sources or None)
    return replace(samples, field_condition=condition)


def use_cache(recipe: Recipe, families: Sequence[Family]) -> None:
    """Let families, the recipe's own first, keep their encodings where the recipe says, or else beside the run folder.

    Raises:
        RecipeError: if the recipe names a folder and its family has no use for one.
    """
    if recipe.data_cache is False:
        return
    used = [family.use_cache(Path(recipe.data_cache or Path(recipe.output).parent / "cache")) for family in families]
    if not used[0] and recipe.data_cache is not None:
        raise RecipeError(
            f"data_cache: family {recipe.family!r} keeps no encodings: they cost it next to nothing, or its base is no "
            "folder"
        )


def route_examples(
    index: int,
    part: RoutePart,
    family: Family,
    field_input: FieldInput | None,
    negative_prompt: str,
    *,
    needs_targets: bool,
    cached: bool,
) -> ExampleSource:
    """A route's training inputs. What of a manifest may not fit is encoded, and so is the negative prompt.

    That is every row where a prompt can be refused, and one of each shape elsewhere. cached: every row in any case,
    which fills the cache.

    Raises:
        RecipeError, ManifestError: for whatever the family cannot take, with its row.
    """
    if part.data.generator is not None:
        if part.resolution is not None:
            raise RecipeError(f"routes.{index}.resolution: generated data have a size of their own")
        try:
            generated = family.generator(part.data.generator, size=part.data.size, seed=part.data.seed)
        except ValueError as error:
            raise RecipeError(f"routes.{index}.data.generator: {error}") from error
        _require_task(index, part, edits=generated[0].source is not None, found=part.data.generator)
        try:
            family.empty(family.samples([generated[0]]).condition, negative_prompt)
        except ValueError as error:
            raise RecipeError(f"routes.{index}: {error}") from error
        return generated
    size = part.resolution or family.size
    try:
        family.latent_shape(*size)
    except ValueError as error:
        raise RecipeError(f"routes.{index}.resolution: {error}") from error
    manifest = _manifest(part.data, family.buckets(size), needs_targets)
    _require_task(index, part, edits=manifest.edits, found=f"{manifest.name} (first row: {manifest.entries[0].place})")
    if manifest.edits and not family.can_edit:
        raise RecipeError(f"routes.{index}: family {family.name!r} cannot edit, but {manifest.name} holds edits")
    if manifest.edits and field_input is not None and not field_input.family.can_edit:
        raise RecipeError(
            f"routes.{index}: {manifest.name} holds edits, and the family of field {part.field!r}, "
            f"{field_input.family.name!r}, cannot edit"
        )
    families = [family] if field_input is None else [family, field_input.family]
    every = cached or not all(each.takes_any_prompt for each in families)
    tried = set()
    for position, entry in enumerate(manifest.entries):
        if needs_targets and entry.target is None:
            raise RecipeError(f"{entry.place}: noising data needs a 'target' on every row")
        shape = manifest.shape(position)
        if shape in tried and not every:
            continue
        tried.add(shape)
        try:
            samples = encoded([manifest[position]], family, field_input, size)
        except ValueError as error:
            raise RecipeError(f"{entry.place}: {error}") from error
        if position == 0:
            family.empty(samples.condition, negative_prompt)
            if field_input is not None:
                field_input.family.empty(samples.field_condition, negative_prompt)
    return manifest


def _require_task(index: int, part: RoutePart, *, edits: bool, found: str) -> None:
    """Refuse data of another kind than the route says. found: what errors call the data."""
    if part.task is not None and edits != (part.task == "edit"):
        kind = "edits, with source images" if edits else "text to image, without source images"
        raise RecipeError(
            f"routes.{index}.task: route {part.name or part.field!r} is {part.task!r}, but {found} holds {kind}"
        )


def _manifest(part: DataPart, buckets: Buckets | None, targets: bool) -> Manifest:
    if part.pack is not None:
        images = None if part.images is None else Path(part.images)
        return read_pack(part.pack, images, buckets=buckets, targets=targets)
    return read_manifest(Path(part.manifest or ""), part.columns, buckets=buckets, targets=targets)
