"""Annotation files and folders -> rows. A row that cannot be read is a fault and stops nothing."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_pipelines.prepare.layouts import FILE_KEYS, IMAGE_KEYS, VIDEO_KEYS
from dali_pipelines.prepare.settings import one_line
from dali_pipelines.shards import MEDIA
from megatron_elva.config.errors import InputError

TABLES = (".csv", ".tsv")
ANNOTATIONS = (".json", ".jsonl", ".ndjson", *TABLES, ".parquet")
"""Last extensions of annotation files."""

_NAMED = ("annotations", "metadata")  # files of these names describe the whole folder
_STRUCTURED = ("conversations", "messages", "qa", "images", "videos", "captions")  # JSON inside a table's cell
_CELL_BYTES = 1 << 27


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: the file and line or number, for reports.
        base: the folder that its paths start from.
        content: what it says; None: it cannot be read.
        fault: why.
    """

    where: str
    base: str
    content: dict[str, Any] | None
    fault: str = ""


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of an annotation file, or of a folder of videos and images, in a fixed order.

    Raises:
        InputError: the whole cannot be used.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    if not path.is_file():
        raise InputError(f"--input {path}: no such file or folder")
    kind = path.suffix.lower()
    if kind not in ANNOTATIONS:
        raise InputError(f"--input {path}: allowed are folders and {', '.join(ANNOTATIONS)}")
    read = {".parquet": _parquet, **dict.fromkeys(TABLES, _table)}.get(kind, _json)
    base = str(path.parent)
    try:
        with path.open("rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError(f"--input {path}: cannot be read: it is UTF-16; save it as UTF-8")
        for number, content, fault in read(path):
            yield Row(f"{path}:{number}", base, content, fault)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--input {path}: cannot be read: {one_line(error)}") from error


_Found = Iterator[tuple[int, dict[str, Any] | None, str]]
"""Number of a row, its content or None, and what is wrong with it."""


def _folder(folder: Path) -> Iterator[Row]:
    """Its annotation files where it has some by the usual names, else its media files with the text beside each."""
    named = [folder / f"{name}{kind}" for name in _NAMED for kind in ANNOTATIONS]
    found = [path for path in named if path.is_file()]
    if found:
        for path in found:
            yield from rows_of(path)
        return
    files = sorted(_below(folder))
    media = [path for path in files if path.suffix.lower().lstrip(".") in MEDIA]
    for path in files:
        if path not in media and path.suffix not in (".txt", ".json") and path.with_suffix(".txt").is_file():
            yield Row(str(path), str(folder), None, f"of no known kind: allowed are {', '.join(sorted(MEDIA))}")
    if not media:
        raise InputError(
            f"--input {folder}: holds no {_NAMED[0]}.jsonl (.json, .csv, .tsv, .parquet) and no video or image"
        )
    for path in media:
        try:
            content = {**_beside(path), "path": str(path.relative_to(folder))}
            content.setdefault("id", str(path.relative_to(folder).with_suffix("")))
            yield Row(str(path), str(folder), content)
        except (InputError, OSError, UnicodeDecodeError) as error:
            yield Row(str(path), str(folder), None, one_line(error))


def _below(folder: Path) -> Iterator[Path]:
    """The files below a folder, through links to other folders too, each folder once."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        about = Path(place).stat()
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders.sort()
        yield from (path for name in names if (path := Path(place, name)).is_file())


def _beside(media: Path) -> dict[str, Any]:
    """The text of one file: of the same name, ``.json`` with an object or ``.txt`` with a caption."""
    described, caption = media.with_suffix(".json"), media.with_suffix(".txt")
    if described.is_file():
        try:
            content = json.loads(described.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{described.name}: not JSON: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{described.name}: holds no object")
        return {k: v for k, v in content.items() if k not in (*VIDEO_KEYS, *IMAGE_KEYS, *FILE_KEYS)}
    if caption.is_file():
        return {"caption": caption.read_text(encoding="utf-8-sig").strip()}
    raise InputError(f"no text: neither {caption.name} nor {described.name} is beside it")


def _json(path: Path) -> _Found:
    """A list of objects, or an object a line, whatever the extension says."""
    # bytes that are not UTF-8 become lone surrogates, which the check of a row's texts refuses: that row alone is bad
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        first = file.read(1)
        while first and first.isspace():
            first = file.read(1)
        file.seek(0)
        if first == "[":
            yield from _json_list(file.read())
        else:
            yield from _json_lines(path, file)


def _json_list(text: str) -> _Found:
    """The objects of a list one by one: the whole of a large list as Python objects would take ten times its size."""
    decode = json.JSONDecoder().raw_decode
    at, number = text.index("[") + 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            return
        number += 1
        try:
            content, at = decode(text, at)
        except (ValueError, RecursionError) as error:
            # nothing tells where the next object begins
            yield number, None, f"not JSON, and so is all that follows: {error}"
            return
        yield (number, content, "") if isinstance(content, dict) else (number, None, "not an object")


def _json_lines(path: Path, lines: Iterator[str]) -> _Found:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line.lstrip().startswith("{") and (whole := _json_object(path)) is not None:
                yield from whole
                return
            yield number, None, f"not JSON: {error}"
            continue
        if number == 1 and isinstance(content, dict) and (rows := _rows_in(content)) is not None:
            yield from rows
            continue
        yield (number, content, "") if isinstance(content, dict) else (number, None, "not an object")


def _json_object(path: Path) -> _Found | None:
    """One object over many lines: a row, or what holds the list of rows. None: the file is not one object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return _rows_in(content) or iter([(1, content, "")])


def _rows_in(content: dict[str, Any]) -> _Found | None:
    """The rows in an object that holds the list of them under one of its keys; None: it is none of these."""
    for key in ("data", "annotations", "samples", "instances"):
        rows = content.get(key)
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows[:1]):
            return iter(
                [(n, row, "") if isinstance(row, dict) else (n, None, "not an object") for n, row in enumerate(rows, 1)]
            )
    return None


def _table(path: Path) -> _Found:
    csv.field_size_limit(_CELL_BYTES)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        head = file.readline()
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
        reader = csv.DictReader(file, delimiter=delimiter)
        for content in reader:
            number = reader.line_num
            if None in content:
                yield number, None, f"more cells than the header's {len(reader.fieldnames or ())}"
                continue
            try:
                yield number, {k: _cell(k, v) for k, v in content.items()}, ""
            except ValueError as error:
                yield number, None, f"not JSON in a cell: {error}"


def _cell(key: str, value: Any) -> Any:
    structured = key in _STRUCTURED and isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
    return json.loads(value) if structured else value


def _parquet(path: Path) -> _Found:
    """Rows of a Parquet file; of bytes inside it only the place is taken."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise InputError(f"--input {path}: Parquet needs pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for group in range(file.num_row_groups):
            for at, content in enumerate(file.read_row_group(group).to_pylist()):
                number += 1
                place = {"parquet": str(path), "group": group, "row": at}
                yield number, {k: _without_bytes(v, {**place, "key": k}) for k, v in content.items()}, ""
    except Exception as error:  # pyarrow has a tree of its own
        raise InputError(f"--input {path}: cannot be read: {one_line(error)}") from error


def _without_bytes(value: Any, place: dict[str, Any]) -> Any:
    if isinstance(value, list) and value and all(isinstance(v, dict) and v.get("bytes") for v in value):
        return [{**place, "item": i, "name": v.get("path") or ""} for i, v in enumerate(value)]
    if isinstance(value, dict) and value.get("bytes"):
        return {**place, "item": None, "name": value.get("path") or ""}
    return value


def parquet_bytes(place: dict[str, Any]) -> bytes:
    """The bytes that `rows_of` left where they are."""
    import pyarrow.parquet as parquet

    column = parquet.ParquetFile(place["parquet"]).read_row_group(place["group"], columns=[place["key"]])
    value = column.column(place["key"])[place["row"]].as_py()
    return bytes((value if place["item"] is None else value[place["item"]])["bytes"])
