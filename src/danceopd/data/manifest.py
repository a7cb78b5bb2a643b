"""Manifests: training inputs from a table on disk, every row validated before training starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from danceopd.data.buckets import Buckets
from danceopd.data.examples import Example
from danceopd.data.images import ImageError, ImageFile, check_image
from danceopd.data.rows import ManifestError, Row, Table, list_images, read_table
from danceopd.errors import nearest
from danceopd.recipe.sources import COLUMNS

PACK_FOLDER = Path(__file__).parent / "packs"
FOLDER_COLUMNS = {"prompt": "text", "target": "file_name"}
"""How a folder of images is read when no mapping says otherwise: captions are prompts of the images."""
SAME_ASPECT = 0.02
"""Largest relative difference between the aspect ratios of an edit's source and target, which share a bucket."""


class ManifestRow(BaseModel):
    """``prompt`` alone for text to image; ``instruction`` (or ``prompt``) and ``source`` for an edit.

    Either may have a ``target`` image. An image is a path relative to the manifest's folder; in Parquet also its bytes,
    or a struct of ``bytes`` and ``path``.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | None = None
    instruction: str | None = None
    source: str | bytes | dict[str, Any] | None = None
    target: str | bytes | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> ManifestRow:
        if (self.prompt is None) == (self.instruction is None):
            raise ValueError("needs either 'prompt' or 'instruction'")
        if not self.text.strip():
            raise ValueError("the text is empty")
        if self.instruction is not None and self.source is None:
            raise ValueError("an 'instruction' needs a 'source' image")
        return self

    @property
    def text(self) -> str:
        return self.prompt or self.instruction or ""


@dataclass(frozen=True)
class Entry:
    """A validated row. place: the file and the row, as errors name it."""

    place: str
    text: str
    source: ImageFile | None
    target: ImageFile | None


class Manifest:
    """The examples of a table.

    name: what reports call it. columns: which of the table's columns holds what ('prompt', 'instruction', 'source',
    'target'); the others are then not used. Without it the table's columns must have these names.
    buckets: the sizes that images are brought to; None leaves them as they are.
    targets: whether examples carry their target images, or the targets' sizes alone.

    Raises:
        ManifestError: for a mapping that does not fit the columns, a row that is not valid, an image that cannot be
            used (each with its row), rows of both kinds, or none at all.
    """

    def __init__(
        self,
        table: Table,
        *,
        name: str,
        columns: Mapping[str, str] | None = None,
        buckets: Buckets | None = None,
        targets: bool = True,
    ) -> None:
        self.name, self.buckets, self.targets = name, buckets, targets
        _check_mapping(table, name, columns)
        self.entries = [_entry(row, table, columns) for row in table.rows]
        if not self.entries:
            raise ManifestError(f"{name} holds no example; a route needs at least one")
        for entry in self.entries:
            if (entry.source is None) == self.edits:
                raise ManifestError(
                    f"{name} mixes text-to-image and edit rows ({self.entries[0].place} and {entry.place}); give each "
                    "its own manifest and route"
                )
            if buckets is not None:
                _require_one_aspect(entry)
                try:
                    _fitted_size(entry, buckets)
                except ValueError as error:
                    raise ManifestError(f"{entry.place}: {error}") from error

    @property
    def edits(self) -> bool:
        return self.entries[0].source is not None

    def digest(self) -> str:
        """SHA-256 of all that is used of the table: texts, images, and the sizes that they are brought to."""
        rows = [
            [entry.text, *(None if image is None else image.digest for image in (entry.source, entry.target))]
            for entry in self.entries
        ]
        sizes = None if self.buckets is None else [self.buckets.size, self.buckets.step]
        return hashlib.sha256(json.dumps([sizes, rows]).encode()).hexdigest()

    def shape(self, index: int) -> tuple[object, ...]:
        """The sizes of an example's images; rows of one shape are alike but for words and pixels. No image is read."""
        entry = self.entries[index]
        fitted = None if self.buckets is None else _fitted_size(entry, self.buckets)
        images = (entry.source, entry.target)
        return fitted, *(None if image is None else fitted or (image.height, image.width) for image in images)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        entry = self.entries[index]
        fitted = None if self.buckets is None else _fitted_size(entry, self.buckets)
        own = None if entry.target is None else (entry.target.height, entry.target.width)
        return Example(
            prompt=entry.text,
            source=None if entry.source is None else entry.source.read(fitted),
            target=None if entry.target is None or not self.targets else entry.target.read(fitted),
            size=fitted or own,
        )


def read_manifest(path: Path, columns: Mapping[str, str] | None = None, **options: Any) -> Manifest:
    """The examples of a file or folder; options as for ``Manifest``."""
    if columns is None and path.is_dir():
        columns = FOLDER_COLUMNS
    return Manifest(read_table(path), name=str(path), columns=columns, **options)


def read_pack(pack: str, images: Path | None, **options: Any) -> Manifest:
    """A pack of our own texts: prompts as they are, or edit instructions, each for any photo, over a folder of images.

    The k-th example is instruction k and image k, whichever there are fewer of starting again.

    Raises:
        ManifestError: as ``Manifest``.
    """
    table = read_table(PACK_FOLDER / f"{pack}.jsonl")
    if images is None:
        return Manifest(table, name=f"pack {pack}", **options)
    files = list_images(images)
    rows = []
    for k in range(max(len(table.rows), len(files))):
        row, file = table.rows[k % len(table.rows)], files[k % len(files)]
        rows.append(Row(f"pack {pack} on {file}", row.values | {"source": file.name}))
    return Manifest(Table(rows, images, (*table.columns, "source")), name=f"pack {pack} on {images}", **options)


def _check_mapping(table: Table, name: str, columns: Mapping[str, str] | None) -> None:
    listed = f"its columns are {', '.join(table.columns) or 'none'}"
    for ours, theirs in (columns or {}).items():
        if ours not in COLUMNS:
            raise ManifestError(f"{name}: columns has {ours!r}{nearest(ours, COLUMNS)}; known: {', '.join(COLUMNS)}")
        if theirs not in table.columns:
            raise ManifestError(f"{name} has no column {theirs!r}{nearest(theirs, table.columns)}; {listed}")
        if list((columns or {}).values()).count(theirs) > 1:
            raise ManifestError(f"{name}: columns names {theirs!r} twice; {listed}")


def _entry(row: Row, table: Table, columns: Mapping[str, str] | None) -> Entry:
    values = row.values
    if columns is not None:
        values = {ours: row.values.get(theirs) for ours, theirs in columns.items()}
    for column in values:
        if column not in COLUMNS:
            raise ManifestError(
                f"{row.place}: unknown column {column!r}{nearest(column, COLUMNS)}; the columns are "
                f"{', '.join(table.columns)}, and data.columns may say which of them to use as {', '.join(COLUMNS)}, "
                f"as in columns: {{prompt: {column}}}"
            )
    try:
        valid = ManifestRow.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        raise ManifestError(f"{row.place}: {where}{first['msg'].removeprefix('Value error, ')}") from error
    images: dict[str, ImageFile | None] = {}
    for kind in ("source", "target"):
        try:
            images[kind] = _image(getattr(valid, kind), table.folder, f"{row.place}, {kind}")
        except ImageError as error:
            raise ManifestError(f"{row.place}, {kind}: {error}") from error
    return Entry(row.place, valid.text, images["source"], images["target"])


def _image(value: str | bytes | dict[str, Any] | None, folder: Path, name: str) -> ImageFile | None:
    """The image of a cell: a path, bytes, or the struct of both that the ``datasets`` library writes."""
    if value is None:
        return None
    place: Any = value
    if isinstance(value, dict):
        place = value.get("bytes") or value.get("path")
        if not set(value) <= {"bytes", "path"} or not isinstance(place, str | bytes):
            raise ImageError(f"an image is a path, or a struct of bytes and path; found a struct of {sorted(value)}")
    return check_image(place, name) if isinstance(place, bytes) else check_image(folder / place, str(folder / place))


def _fitted_size(entry: Entry, buckets: Buckets) -> tuple[int, int]:
    picture = entry.source or entry.target
    return buckets.size if picture is None else buckets.size_for(picture.height, picture.width)


def _require_one_aspect(entry: Entry) -> None:
    source, target = entry.source, entry.target
    if source is None or target is None:
        return
    if abs(source.width * target.height / (source.height * target.width) - 1) > SAME_ASPECT:
        raise ManifestError(
            f"{entry.place}: source and target are cut alike and need one aspect ratio, found {source.width} x "
            f"{source.height} and {target.width} x {target.height}"
        )
