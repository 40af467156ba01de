"""One row of an annotation file -> samples in our JSON form. The layout is recognised by the row's own keys.

``conversations`` (LLaVA, LLaVA-Video, ShareGPT), ``messages`` (ShareGPT in OpenAI's words, ours), ``captions`` by key
frame (ShareGPT4Video), ``question`` and ``answer``, ``caption`` or ``text`` beside a file, and our own keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dali_pipelines.chat_format import PLACEHOLDERS, Message
from megatron_elva.config.errors import InputError

VIDEO_KEYS = ("video", "videos", "video_path")
IMAGE_KEYS = ("image", "images", "image_path")
FILE_KEYS = ("path", "file", "file_name", "media")
"""Keys that name files: of a known kind, or of whichever kind."""

TEXT_KEYS = ("messages", "qa", "caption", "text")
"""What a sample trains on, in our form."""

NAME_KEYS = ("id", "uid", "video_id", "image_id", "question_id", "key")

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
}  # fmt: skip
_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS))
_PLACES = re.compile(rf"\s*(?:{'|'.join(PLACEHOLDERS)})\s*")
_WHOLE_VIDEO = "-1"  # the entry of ShareGPT4Video's ``captions`` that describes the whole video

Reference = str | dict[str, Any]
"""A file as an annotation names it: a path, or where its bytes stand in a Parquet file."""


@dataclass(frozen=True)
class Draft:
    """One sample as its row gives it.

    Attributes:
        name: its own name, or an empty string.
        meta: its JSON in our form.
        media: its files in the order of their placeholders.
    """

    name: str
    meta: dict[str, Any]
    media: tuple[Reference, ...]


def drafts_of(row: dict[str, Any]) -> list[Draft]:
    """Read a row; several captions of one file become several samples.

    Raises:
        InputError: it is of no known layout; the message says what is missing.
    """
    row = {str(key): value for key, value in row.items() if value is not None and value != ""}
    name = next((str(row[key]) for key in NAME_KEYS if isinstance(row.get(key), str | int)), "")
    files = list(_files_in(row))
    texts, used = _texts_in(row, bool(files))
    rest = {key: value for key, value in row.items() if key not in used}
    drafts = []
    for text, inside in texts:
        media = _in_order([*files, *inside], text.get("messages", []))
        drafts.append(Draft(name, {**rest, **text}, tuple(media)))
    return drafts


def _files_in(row: dict[str, Any]) -> Iterator[tuple[str, Reference]]:
    """``(kind, reference)`` of each file that the row names, in the order of its keys; the keys are taken out."""
    kinds = {**dict.fromkeys(VIDEO_KEYS, "<video>"), **dict.fromkeys(IMAGE_KEYS, "<image>")}
    for key in [k for k in row if k in kinds or k in FILE_KEYS]:
        value = row.pop(key)
        for item in value if isinstance(value, list) else [value]:
            yield kinds.get(key, ""), _reference(key, item)


def _reference(key: str, item: Any) -> Reference:
    """Where one file is. Data sets of Hugging Face give an object with a path, or with the bytes themselves."""
    if isinstance(item, dict):
        if "parquet" in item:
            return item
        item = next((item[k] for k in ("path", "url", *VIDEO_KEYS, *IMAGE_KEYS) if isinstance(item.get(k), str)), None)
    if not isinstance(item, str) or not item.strip():
        raise InputError(f"{key}: names no file")
    path = item.strip().removeprefix("file://")
    if re.match(r"[a-z][a-z0-9+.-]+://", path):
        raise InputError(f"{key}: {path} is a URL; download it and name the file")
    return path


def _in_order(files: list[tuple[str, Reference]], messages: list[Message]) -> list[Reference]:
    """Bring videos and images into the order of their placeholders, where these tell the two apart."""
    wanted = [p for m in messages if m["role"] == "user" for p in _PLACEHOLDER.findall(m["content"])]
    if sorted(wanted) == sorted(kind for kind, _ in files):
        left = {kind: iter([ref for k, ref in files if k == kind]) for kind in set(wanted)}
        return [next(left[kind]) for kind in wanted]
    return [ref for _, ref in files]


_Text = tuple[dict[str, Any], list[tuple[str, Reference]]]
"""Text of one sample in our form, and the files that stand inside it."""


def _texts_in(row: dict[str, Any], has_files: bool) -> tuple[list[_Text], set[str]]:
    """The texts of a row, one for each sample, and the keys that they were made from."""
    turns = next((key for key in ("conversations", "conversation", "messages") if row.get(key)), None)
    system = next((key for key in ("system", "system_prompt") if isinstance(row.get(key), str)), None)
    common: dict[str, Any] = {}
    inside: list[tuple[str, Reference]] = []
    used = {key for key in (turns, "qa", "question", "answer", "caption", "captions") if key in row}
    if turns:
        common["messages"], inside = _messages(turns, row[turns])
        if system:
            used.add(system)
            common["messages"].insert(0, {"role": "system", "content": row[system]})
    if "qa" in row or ("question" in row and "answer" in row):
        common["qa"] = _pairs(row.get("qa", [{"question": row.get("question"), "answer": row.get("answer")}]))
    if "text" in row and has_files and not common and not {"caption", "captions"} & set(row):
        captions, used = [row["text"]], used | {"text"}
    else:
        captions = _captions(row)
    if captions:
        return [({**common, "caption": caption}, inside) for caption in captions], used
    if not common and "text" not in row:
        raise InputError("no text: it needs one of messages, conversations, qa, caption, text")
    return [(common, inside)], used


def _captions(row: dict[str, Any]) -> list[str]:
    """``caption``, a list of them, or that of the whole video in ShareGPT4Video's list by key frame."""
    value = row.get("caption", row.get("captions"))
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, dict) for item in items):
        whole = [item.get("content") for item in items if str(item.get("idx")) == _WHOLE_VIDEO]
        if not whole:
            raise InputError(f"captions: none has the idx {_WHOLE_VIDEO}, that of the whole video")
        items = whole[:1]
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise InputError("caption: empty or not a text")
    return [item.strip() for item in items]


def _pairs(value: Any) -> list[dict[str, Any]]:
    """Questions and answers. Placeholders are taken out: several pairs become one conversation about the same files."""
    pairs = value if isinstance(value, list) else [value]
    if not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise InputError("qa: not a list of objects with question and answer")
    return [
        {**p, "question": _PLACES.sub("", p["question"]) if isinstance(p.get("question"), str) else ""} for p in pairs
    ]


def _messages(key: str, turns: Any) -> tuple[list[Message], list[tuple[str, Reference]]]:
    """Turns in our form, and the files that their contents name. An answer before the first question is left out."""
    if not isinstance(turns, list):
        raise InputError(f"{key}: not a list")
    messages: list[Message] = []
    inside: list[tuple[str, Reference]] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise InputError(f"{key}: a turn is not an object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in _ROLES:
            raise InputError(f"{key}: a turn is from {role!r}; allowed: {', '.join(_ROLES)}")
        content = turn.get("value", turn.get("content", turn.get("text")))
        if isinstance(content, list):
            content, named = _parts(key, content)
            inside += named
        if not isinstance(content, str):
            raise InputError(f"{key}: a turn has no text")
        if _ROLES[role] != "assistant" or any(m["role"] == "user" for m in messages):
            messages.append({"role": _ROLES[role], "content": content})
    return messages, inside


def _parts(key: str, parts: list[Any]) -> tuple[str, list[tuple[str, Reference]]]:
    """A content in parts, ``{"type": "video", "video": PATH}`` and ``{"type": "text", "text": ...}``, as one text."""
    content, named = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            content += part["text"]
        elif kind in ("image", "video", "image_url", "video_url"):
            placeholder = f"<{kind.removesuffix('_url')}>"
            content += f"{placeholder}\n"
            if kind in part:  # without it the file is named beside the messages
                named.append((placeholder, _reference(key, part[kind])))
        else:
            raise InputError(f"{key}: a part of a content is neither text nor image nor video")
    return content, named
