"""Tables of training inputs on disk, one reader a format: every row as plain values under the file's own column names.

Nothing is validated here but that the file is a table; ``manifest`` does the rest, for all formats alike.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danceopd.data.images import SUFFIXES
from danceopd.errors import UserError


class ManifestError(UserError, ValueError):
    """A manifest cannot be used; the message names the file and the row."""


@dataclass(frozen=True)
class Row:
    """One row. place: the file and the row, as errors name it. values: by column; a missing one is absent or None."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """rows: in the file's order. folder: what image paths are relative to. columns: all there are."""

    rows: list[Row]
    folder: Path
    columns: tuple[str, ...]


def read_table(path: Path) -> Table:
    """The rows of a JSONL, CSV or Parquet file, or of a folder of images with metadata or captions.

    Raises:
        ManifestError: if the path is missing, of no known format, or not a table of that format.
    """
    if path.is_dir():
        return read_image_folder(path)
    if not path.is_file():
        raise ManifestError(f"manifest not found: {path}")
    if path.suffix not in READERS:
        raise ManifestError(f"{path} is no manifest: needed is a folder of images or a file in {', '.join(READERS)}")
    return READERS[path.suffix](path)


def read_jsonl(path: Path) -> Table:
    """An object a line."""
    rows, columns = [], {}
    content = _text(path)
    for number, line in enumerate(content.removesuffix("\n").split("\n") if content else [], start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            raise ManifestError(f"{place}: the line is empty")
        try:
            values = json.loads(line, object_pairs_hook=_unique)
        except ValueError as error:
            raise ManifestError(f"{place}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ManifestError(f"{place}: an object is needed, found {type(values).__name__}")
        rows.append(Row(place, values))
        columns |= values
    return Table(rows, path.parent, tuple(columns))


def read_csv(path: Path) -> Table:
    """Comma-separated, with a header; an empty cell is no value."""
    reader = csv.reader(io.StringIO(_text(path)), strict=True)
    rows = []
    try:
        columns = _unique_columns(path, next(reader, []))
        for cells in reader:
            place = f"{path}, line {reader.line_num}"
            if len(cells) != len(columns):
                raise ManifestError(f"{place}: {len(cells)} cells, the header has {len(columns)}")
            rows.append(Row(place, {name: cell or None for name, cell in zip(columns, cells, strict=True)}))
    except csv.Error as error:
        raise ManifestError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
    return Table(rows, path.parent, columns)


def read_parquet(path: Path) -> Table:
    """Parquet, through pyarrow. Images that stand inside it stay in memory, compressed as they are."""
    try:
        from pyarrow import ArrowException  # pyright: ignore[reportMissingImports]
        from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ManifestError(f"{path}: Parquet needs pyarrow: pip install 'danceopd[parquet]'") from error
    try:
        with ParquetFile(path) as file:
            columns = _unique_columns(path, file.schema_arrow.names)
            values = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (ArrowException, OSError) as error:
        raise ManifestError(f"{path} is not a readable Parquet file: {error}") from error
    return Table([Row(f"{path}, row {number}", row) for number, row in enumerate(values, 1)], path.parent, columns)


def read_image_folder(folder: Path) -> Table:
    """``metadata.jsonl``, ``.csv`` or ``.parquet`` beside the images, with their names under ``file_name``; or else a
    caption for each image in a .txt file of its name, here under ``text``.

    Raises:
        ManifestError: if there are several metadata files, or an image without a caption, or the reverse.
    """
    found = [folder / f"metadata{suffix}" for suffix in READERS if (folder / f"metadata{suffix}").is_file()]
    if len(found) > 1:
        raise ManifestError(f"{folder} holds {' and '.join(path.name for path in found)}; one of them is needed")
    if found:
        return read_table(found[0])
    images = list_images(folder)
    texts = sorted(folder.glob("*.txt"))
    if len({path.stem for path in images}) != len(images):
        raise ManifestError(f"{folder} holds images that differ in their suffix alone; a caption is of one image")
    for paths, others, missing in ((images, texts, "caption (.txt)"), (texts, images, "image")):
        for path in paths:
            if path.stem not in {other.stem for other in others}:
                raise ManifestError(f"{path} has no {missing} of its name, and {folder} has no metadata file")
    rows = [
        Row(str(path), {"file_name": path.name, "text": _text(path.with_suffix(".txt")).strip()}) for path in images
    ]
    return Table(rows, folder, ("file_name", "text"))


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, by name, subfolders left out.

    Raises:
        ManifestError: if the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise ManifestError(f"folder of images not found: {folder}")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not images:
        raise ManifestError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return images


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text: {error}") from error


def _unique_columns(path: Path, columns: Sequence[str]) -> tuple[str, ...]:
    for name in columns:
        if columns.count(name) > 1:
            raise ManifestError(f"{path} has two columns {name!r}; its columns are {', '.join(columns)}")
    return tuple(columns)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values


READERS: dict[str, Callable[[Path], Table]] = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
