"""Annotations -> the work list: samples in a fixed order with fixed keys, and their distinct files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dali_pipelines.chat_format import caption_messages, conversation, place_media
from dali_pipelines.prepare.layouts import TEXT_KEYS, Reference, drafts_of
from dali_pipelines.prepare.settings import Room, Settings, one_line
from dali_pipelines.prepare.sources import Row, rows_of
from dali_pipelines.tokenizer import SPECIAL_TOKENS, texts_of
from megatron_elva.config.errors import InputError

_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]+")
_KEY_CHARACTERS = 48  # with the number before it and the extension behind it a name stays below tar's 100


@dataclass(frozen=True)
class Sample:
    """One line of the work list.

    Attributes:
        key: its name in the shard, unique.
        where: the annotation that it comes from.
        meta: its JSON, yet without what its files are.
        files: numbers of its files in the list of files, in order.
        text: digest of what it trains on.
    """

    key: str
    where: str
    meta: dict[str, Any]
    files: list[int]
    text: str


@dataclass(frozen=True)
class File:
    """One line of the list of files.

    Attributes:
        reference: as the annotation names it.
        bases: folders that it may be in, in order.
    """

    reference: Reference
    bases: list[str]

    @property
    def name(self) -> str:
        """What to call it in reports and in the sample's JSON."""
        if isinstance(self.reference, str):
            return self.reference
        return str(self.reference["name"]) or f"{Path(self.reference['parquet']).name}:{self.reference['key']}"


def samples(room: Room) -> Iterator[Sample]:
    """The work list in order."""
    with room.work.open() as lines:
        for line in lines:
            yield Sample(**json.loads(line))


def files(room: Room) -> Iterator[File]:
    """The distinct files in order."""
    with room.files.open() as lines:
        for line in lines:
            yield File(**json.loads(line))


def scan(settings: Settings, room: Room, show: bool = True) -> str:
    """Read all annotations and write the work list; ``faults.jsonl`` has the rows that cannot be used.

    Returns:
        A digest of the work list.

    Raises:
        InputError: an input cannot be read, or no row can be used.
    """
    room.state.mkdir(parents=True, exist_ok=True)
    faults = room.state / "faults.jsonl"
    drafts = [path.with_name(f"{path.name}.new") for path in (room.work, room.files, faults)]
    seen: dict[str, int] = {}
    digest, count = hashlib.sha256(), 0
    with ExitStack() as stack:
        work, listed, bad = (stack.enter_context(path.open("w")) for path in drafts)
        rows = (row for path in settings.inputs for row in rows_of(Path(path)))
        for number, row in enumerate(tqdm(rows, desc="scan", unit="row", disable=None if show else True)):
            for sample in _samples_of(number, row, settings, seen, listed):
                file = work if isinstance(sample, Sample) else bad
                line = json.dumps(vars(sample) if isinstance(sample, Sample) else sample, default=_plain)
                file.write(line + "\n")
                digest.update(line.encode())
                count += isinstance(sample, Sample)
    for path, draft in zip((room.work, room.files, faults), drafts, strict=True):
        draft.replace(path)
    if not count:
        first = next(iter(faults.read_text().splitlines()), None)
        why = f"; the first: {json.loads(first)['path']}: {json.loads(first)['reason']}" if first else ""
        raise InputError(f"--input {' '.join(settings.inputs)}: no usable sample{why}")
    return digest.hexdigest()


def _samples_of(
    number: int, row: Row, settings: Settings, seen: dict[str, int], listed: Any
) -> Iterator[Sample | dict[str, str]]:
    """The samples of a row, or what is wrong with it as a line of the report."""
    key = f"{number:08d}"
    try:
        if row.content is None:
            raise InputError(row.fault)
        content = dict(row.content)
        for ours, theirs in settings.columns:
            if theirs in content:
                content[ours] = content.pop(theirs)
        drafts = drafts_of(content)
        for draft in drafts:
            check_text(draft.meta, len(draft.media))
    except InputError as error:
        yield {"key": key, "path": row.where, "stage": "scan", "reason": one_line(error)}
        return
    for i, draft in enumerate(drafts):
        named = [r if isinstance(r, str) else r["name"] for r in draft.media]
        name = _NOT_IN_KEYS.sub("-", draft.name or Path(next(iter(named), "")).stem).strip("-")[-_KEY_CHARACTERS:]
        parts = [key, *([str(i)] if len(drafts) > 1 else []), *([name] if name else [])]
        numbers = [_number(File(r, [*settings.media, row.base]), seen, listed) for r in draft.media]
        text = json.dumps({k: draft.meta[k] for k in TEXT_KEYS if k in draft.meta}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        yield Sample("_".join(parts), row.where, draft.meta, numbers, digest)


def _number(file: File, seen: dict[str, int], listed: Any) -> int:
    """The number of a file, which is added to the list when it is new."""
    line = json.dumps(vars(file))
    name = hashlib.sha256(line.encode()).hexdigest()[:32]
    if name not in seen:
        seen[name] = len(seen)
        listed.write(line + "\n")
    return seen[name]


def _plain(value: Any) -> str | None:
    """What JSON cannot say, such as a date of a Parquet file, as text; bytes are of no use there."""
    return None if isinstance(value, bytes) else str(value)


def check_text(meta: dict[str, Any], media: int) -> None:
    """Refuse what `chat_format` would refuse in training, for each task that the sample has text for.

    Raises:
        InputError: names the key and what is wrong with it.
    """
    try:
        texts = list(texts_of(meta))
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise InputError("its text holds half a character, which is no Unicode") from error
    control = [token for text in texts for token in SPECIAL_TOKENS if token in text]
    if control:
        raise InputError(f"its text holds the control token {control[0]!r}")
    if "messages" in meta:
        _check_turns(conversation({"messages": meta["messages"]}, None), media)
    if "qa" in meta:
        for pair in meta["qa"]:
            _check_turns(conversation({"qa": [pair]}, None), media)
    if "caption" in meta:
        _check_turns(caption_messages(meta, "?"), media)
        if not media:
            raise InputError("a caption without a video or image")
    if set(meta) & set(TEXT_KEYS) == {"text"}:
        if not isinstance(meta["text"], str) or not meta["text"].strip():
            raise InputError("text: empty or not a text")
        if media:
            raise InputError(f"text: 0 placeholders for {media} videos or images")


def _check_turns(messages: list[dict[str, str]], media: int) -> None:
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise InputError("an answer is empty" if answers else "no answers")
    place_media(messages, media)
