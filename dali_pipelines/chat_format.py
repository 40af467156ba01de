"""A sample's JSON -> chat messages -> token ids with places for videos, and what each token should predict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dali_pipelines.tokenizer import IM_END, IM_START
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.layout import IGNORE, SampleSpec, VideoSpec
from megatron_elva.layout.spec import Segment

Message = dict[str, str]

PLACEHOLDERS = ("<video>", "<image>")
"""Stand in a user's turn where a video or an image goes."""

TASKS = ("caption", "conversation", "text")
MAX_TURNS = 4
"""Questions of one sample that become one conversation, at most."""

_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS))
# Stands for a placeholder while the chat template runs, so that the same words in an answer stay words.
_SLOT = "\ue0f7\ue0fd"
_ANSWER = re.compile(re.escape(f"{IM_START}assistant\n") + "(.*?" + re.escape(IM_END) + ")", re.DOTALL)


@dataclass(frozen=True)
class EncodedSample:
    """Text as token ids, with open places for videos.

    Attributes:
        segments: ``[n]`` int64 token ids of a piece of text, or None where a video goes.
        targets: for each segment ``[n]`` bool, True where the token is to be predicted; empty for a video.
    """

    segments: tuple[np.ndarray | None, ...]
    targets: tuple[np.ndarray, ...]

    @property
    def text_tokens(self) -> int:
        """Tokens of text."""
        return sum(len(s) for s in self.segments if s is not None)

    def assemble(self, videos: Sequence[VideoSpec]) -> tuple[SampleSpec, np.ndarray, np.ndarray]:
        """Put the videos in.

        Args:
            videos: as many as there are places.

        Returns:
            The sample, its token ids ``[S]`` int64 (0 at visual positions), and its labels ``[S]`` int64: at each
            position the next token if that is a target, else `IGNORE`.
        """
        left = iter(videos)
        segments: list[Segment] = []
        tokens, targets = [np.empty(0, np.int64)], [np.empty(0, bool)]
        for ids, wanted in zip(self.segments, self.targets, strict=True):
            if ids is None:
                video = next(left)
                segments.append(video)
                tokens.append(np.zeros(video.tokens, np.int64))
                targets.append(np.zeros(video.tokens, bool))
            else:
                segments.append(len(ids))
                tokens.append(ids)
                targets.append(wanted)
        if next(left, None) is not None:
            raise ValueError("more videos than places for them")
        all_tokens, all_targets = np.concatenate(tokens), np.concatenate(targets)
        labels = np.full(len(all_tokens), IGNORE, np.int64)
        labels[:-1] = np.where(all_targets[1:], all_tokens[1:], IGNORE)
        return SampleSpec(tuple(segments)), all_tokens, labels


def encode_sample(
    tokenizer: Any,
    meta: dict[str, Any],
    media: int,
    task: str,
    caption_prompt: str,
    max_text_tokens: int,
    turn_seed: Sequence[int] | None = None,
) -> EncodedSample:
    """Turn a sample's JSON into token ids and targets.

    Args:
        tokenizer: a Hugging Face tokenizer with a ChatML template (Qwen2's form).
        meta: the sample's JSON.
        media: videos and images that the sample has.
        task: one of `TASKS`. ``caption`` and ``conversation`` train on the assistant's turns, ``text`` on everything.
        caption_prompt: the user's turn that a caption answers.
        max_text_tokens: text tokens at most.
        turn_seed: draws the order and choice of up to `MAX_TURNS` questions of ``qa``. None: the first ones in order.

    Raises:
        InputError: the sample cannot be used; one line says why.
    """
    if task == "text":
        encoded = _plain_text(tokenizer, _text_in(meta, "text"), media)
    elif task in TASKS:
        messages = caption_messages(meta, caption_prompt) if task == "caption" else conversation(meta, turn_seed)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if not answers or not all(a.strip() for a in answers):
            raise InputError("an answer is empty" if answers else "no answers")
        if task == "caption" and not media:
            raise InputError("a caption without a video or image")
        encoded = _encode(tokenizer, messages, media, generate=False)
    else:
        raise ConfigError(f"task: {task!r}; allowed: {', '.join(TASKS)}")
    if encoded.text_tokens > max_text_tokens:
        raise InputError(f"{encoded.text_tokens} text tokens, data.max_text_tokens is {max_text_tokens}")
    return encoded


def prompt_tokens(tokenizer: Any, messages: list[Message], media: int | None = None) -> list[np.ndarray | None]:
    """Token ids of a conversation up to where the assistant's next turn begins, for inference.

    Args:
        tokenizer: as in `encode_sample`.
        messages: turns with ``role`` and ``content``.
        media: videos and images given; checked against the placeholders. None: as many as there are placeholders.

    Returns:
        Pieces of text as ``[n]`` int64, None where a video goes. Cut exactly as in training.
    """
    checked = [_message(m) for m in messages]
    if media is None:
        media = sum(len(_PLACEHOLDER.findall(m["content"])) for m in checked if m["role"] == "user")
    return list(_encode(tokenizer, checked, media, generate=True).segments)


def caption_messages(meta: dict[str, Any], prompt: str) -> list[Message]:
    """A caption as the answer to the prompt."""
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": _text_in(meta, "caption")},
    ]


def conversation(meta: dict[str, Any], turn_seed: Sequence[int] | None) -> list[Message]:
    """``messages`` if the sample has them, else its ``qa`` as the turns of one conversation."""
    if meta.get("messages"):
        if not isinstance(meta["messages"], list):
            raise InputError("messages: not a list")
        return [_message(m) for m in meta["messages"]]
    pairs = meta.get("qa")
    if not isinstance(pairs, list) or not pairs:
        raise InputError("no messages and no qa")
    order: Sequence[int] = range(len(pairs))
    if turn_seed is not None:
        order = np.random.default_rng(np.random.SeedSequence(list(turn_seed))).permutation(len(pairs)).tolist()
    turns = []
    for i in order[:MAX_TURNS]:
        pair = pairs[i] if isinstance(pairs[i], dict) else {}
        turns.append({"role": "user", "content": _text_in(pair, "question")})
        turns.append({"role": "assistant", "content": _text_in(pair, "answer")})
    return turns


def place_media(messages: list[Message], media: int) -> list[Message]:
    """Mark where the videos go: at the placeholders, or one by one at the start of the first user turn."""
    marked = [dict(m) for m in messages]
    users = [m for m in marked if m["role"] == "user"]
    for message in users:
        message["content"] = _PLACEHOLDER.sub(_SLOT, message["content"])
    places = sum(m["content"].count(_SLOT) for m in users)
    if not places and media and users:
        users[0]["content"] = f"{_SLOT}\n" * media + users[0]["content"]
        places = media
    if places != media:
        raise InputError(f"{places} placeholders for {media} videos or images")
    return marked


def _message(message: Any) -> Message:
    """Check one turn."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise InputError("messages: each needs a role of system, user or assistant")
    if not isinstance(message.get("content"), str):
        raise InputError("messages: each needs a text as its content")
    return {"role": message["role"], "content": message["content"]}


def _text_in(holder: dict[str, Any], key: str) -> str:
    """A text that must be there."""
    text = holder.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{key}: {'empty' if text is None or isinstance(text, str) else 'not a text'}")
    return text


def _refuse_control(tokenizer: Any, text: str) -> None:
    """A token such as the end of a turn inside a turn would move the borders between the turns."""
    for token in {*tokenizer.all_special_tokens, IM_START, IM_END, _SLOT}:
        if token in text:
            raise InputError(f"its text holds the control token {token!r}")


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int64)


def _plain_text(tokenizer: Any, text: str, media: int) -> EncodedSample:
    """Next-token prediction on everything."""
    _refuse_control(tokenizer, text)
    ids = _ids(tokenizer, text)
    if media:
        raise InputError(f"0 placeholders for {media} videos or images")
    if len(ids) < 2:
        raise InputError("text: too short")
    return EncodedSample((ids,), (np.ones(len(ids), bool),))


def _encode(tokenizer: Any, messages: list[Message], media: int, generate: bool) -> EncodedSample:
    """Apply the chat template, cut at videos and at the beginning of answers, and tokenise the parts.

    An answer is tokenised apart from the header before it, as it will be when the model writes it; it ends with its
    end-of-turn token, which no text can be joined to.
    """
    for message in messages:
        _refuse_control(tokenizer, message["content"])
    messages = place_media(messages, media)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    answers = [match.span(1) for match in _ANSWER.finditer(text)]
    if len(answers) != sum(m["role"] == "assistant" for m in messages):
        raise ConfigError(
            f"data.tokenizer: its chat template is not of Qwen2's form ({IM_START}assistant, a line end, ..., {IM_END})"
        )
    segments: list[np.ndarray | None] = []
    targets: list[np.ndarray] = []
    at = 0
    for first, last in [*answers, (len(text), len(text))]:
        _append_text(tokenizer, text[at:first], False, segments, targets)
        _append_text(tokenizer, text[first:last], True, segments, targets)
        at = last
    return EncodedSample(tuple(segments), tuple(targets))


def _append_text(
    tokenizer: Any, text: str, is_answer: bool, segments: list[np.ndarray | None], targets: list[np.ndarray]
) -> None:
    """Add a stretch of text, and a None for each video in it. Text that follows text joins its segment."""
    for i, part in enumerate(text.split(_SLOT)):
        if i:
            segments.append(None)
            targets.append(np.empty(0, bool))
        ids = _ids(tokenizer, part) if part else np.empty(0, np.int64)
        if not len(ids):
            continue
        wanted = np.full(len(ids), is_answer)
        if segments and segments[-1] is not None:
            segments[-1] = np.concatenate([segments[-1], ids])
            targets[-1] = np.concatenate([targets[-1], wanted])
        else:
            segments.append(ids)
            targets.append(wanted)
