"""Ask a trained run about a video.

python -m megatron_elva.inference.chat --run runs/demo --video clip.mp4 "Which digit is shown?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.inference.model import Assistant, Video


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question, or one after another. Returns the exit code: 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="chat", description="Ask a trained run about a video.")
    parser.add_argument("--run", required=True, help="run directory, stage=all directory or checkpoint folder")
    parser.add_argument("--video", action="append", default=[], help="video or image file; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer at most")
    parser.add_argument("question", nargs="?", help="without it: ask at the prompt, an empty line ends")
    given = parser.parse_args(argv)
    if given.max_new_tokens < 1:
        parser.error(f"--max-new-tokens has to be at least 1, got {given.max_new_tokens}")
    try:
        videos = [(name, read(name)) for name in given.video]
        assistant = Assistant(given.run)
        watched = [watch(assistant, name, data) for name, data in videos]
        if given.question is None:
            converse(assistant, watched, given.max_new_tokens)
        else:
            print(assistant.answer([turn(given.question)], watched, given.max_new_tokens))
    except (InputError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read(name: str) -> bytes:
    """The bytes of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from error


def watch(assistant: Assistant, name: str, data: bytes) -> Video:
    """Decode a file, naming it in the error."""
    try:
        return assistant.watch(data)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def turn(text: str) -> dict[str, str]:
    """A user's turn.

    Raises:
        InputError: it is empty.
    """
    if not text.strip():
        raise InputError("the question is empty")
    return {"role": "user", "content": text}


def converse(assistant: Assistant, videos: Sequence[Video], max_new_tokens: int) -> None:
    """Question and answer until an empty line or the end of the input; the conversation so far stays in view."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        messages.append(turn(question))
        answer = assistant.answer(messages, videos, max_new_tokens)
        print(answer, flush=True)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    sys.exit(main())
