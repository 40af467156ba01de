"""A folder of videos or images with a JSON-lines file of annotations -> shards.

python -m dali_pipelines.make_shards --annotations clips/annotations.jsonl --out shards --shard-samples 500

Each line is an object with ``video`` or ``image`` (a path beside the annotations; left out for text alone) and what a
sample's JSON holds: ``caption``, ``qa``, ``messages`` or ``text``. Files are stored as they are. A line that cannot be
used is reported and left out.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_pipelines.shards import MEDIA
from megatron_elva.config.errors import InputError

PATH_KEYS = ("video", "image")


@dataclass(frozen=True)
class Entry:
    """One sample before it is stored.

    Attributes:
        key: its name in the shard.
        meta: its JSON.
        media: its file, or None.
    """

    key: str
    meta: dict[str, Any]
    media: Path | None


def read_annotations(path: Path) -> Iterator[Entry | str]:
    """The entries of an annotation file in order; a string says why a line is left out.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _entry(path, number, line)


def _entry(path: Path, number: int, line: str) -> Entry | str:
    where = f"{path}:{number}"
    try:
        meta = json.loads(line)
    except ValueError as error:
        return f"{where}: not JSON: {error}"
    if not isinstance(meta, dict):
        return f"{where}: not an object"
    named = [meta.pop(k) for k in PATH_KEYS if k in meta]
    if len(named) > 1:
        return f"{where}: names a video and an image; one of them is allowed"
    if not named:
        return Entry(f"{number - 1:07d}", meta, None)
    media = path.parent / str(named[0])
    if media.suffix.lower().lstrip(".") not in MEDIA:
        return f"{where}: {media.name}: allowed are {', '.join(sorted(MEDIA))}"
    if not media.is_file():
        return f"{where}: {media}: no such file"
    stem = media.stem.replace(".", "_")
    return Entry(f"{number - 1:07d}_{stem}", meta, media)


def write_shards(entries: Iterable[Entry], out: Path, shard_samples: int) -> list[Path]:
    """Write shards of `shard_samples` samples; each appears under its name once it is whole."""
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    batch: list[Entry] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) == shard_samples:
            paths.append(_write(batch, out / f"shard-{len(paths):05d}.tar"))
            batch = []
    if batch:
        paths.append(_write(batch, out / f"shard-{len(paths):05d}.tar"))
    return paths


def _write(entries: Sequence[Entry], path: Path) -> Path:
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for entry in entries:
            if entry.media is not None:
                _add(tar, f"{entry.key}{entry.media.suffix.lower()}", entry.media.read_bytes())
            _add(tar, f"{entry.key}.json", json.dumps(entry.meta, ensure_ascii=False).encode())
    part.replace(path)
    return path


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 where no line can be used."""
    parser = argparse.ArgumentParser(prog="make_shards", description="Annotations and files -> shards.")
    parser.add_argument("--annotations", type=Path, required=True, help="JSON-lines file beside the media files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shard-samples", type=int, default=500)
    given = parser.parse_args(argv)
    try:
        read = list(read_annotations(given.annotations))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    entries = [e for e in read if isinstance(e, Entry)]
    for problem in (e for e in read if isinstance(e, str)):
        print(f"left out: {problem}", file=sys.stderr)
    if not entries:
        print(f"{given.annotations}: no line can be used", file=sys.stderr)
        return 2
    paths = write_shards(entries, given.out, max(1, given.shard_samples))
    print(f"{len(entries)} samples in {len(paths)} shards: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
