"""Byte-level BPE tokenizers in Hugging Face form: training a small one, and loading any.

Run ``python -m dali_pipelines.tokenizer --shards 'data/*.tar' --vocab 2048 --out data/tokenizer``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dali_pipelines.shards import find_shards, iterate_meta
from megatron_elva.config.errors import ConfigError, InputError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
"""Qwen2's special tokens."""

# How Qwen2 cuts text before the merges: contractions, words, single digits, punctuation, line ends, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2's form without its default system prompt, which would cost a tiny model most of its context.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: str | Path) -> None:
    """Train a byte-level BPE of Qwen2's kind and save it.

    Args:
        texts: what it should be good at.
        vocab_size: entries at most, special tokens included; at least the 256 bytes and the special tokens.
        out_dir: folder to write, loadable by ``AutoTokenizer.from_pretrained``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ConfigError(f"vocab: {vocab_size}; allowed: at least {least}, the bytes and the special tokens")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(out_dir))
    # The name that every version of transformers knows for a tokenizer of this kind.
    saved = Path(out_dir) / "tokenizer_config.json"
    config = {**json.loads(saved.read_text()), "tokenizer_class": "Qwen2Tokenizer"}
    saved.write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(path: str | Path) -> Any:
    """Load a Hugging Face tokenizer from a folder.

    Raises:
        InputError: there is none, or it has no chat template.
    """
    folder = Path(path)
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise InputError(f"tokenizer {folder}: the folder holds neither tokenizer.json nor tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise InputError(f"tokenizer {folder}: cannot be loaded: {' '.join(str(error).split())}") from error
    if not tokenizer.chat_template:
        raise InputError(f"tokenizer {folder}: has no chat template")
    return tokenizer


def texts_of(meta: dict[str, Any]) -> Iterator[str]:
    """Every text of a sample's JSON: caption, questions and answers, messages, plain text."""
    turns = [t for key in ("qa", "messages") if isinstance(meta.get(key), list) for t in meta[key]]
    for holder in [meta, *(t for t in turns if isinstance(t, dict))]:
        for key in ("caption", "text", "question", "answer", "content"):
            if isinstance(holder.get(key), str):
                yield holder[key]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a tokenizer on the texts of shards."""
    parser = argparse.ArgumentParser(prog="python -m dali_pipelines.tokenizer", description=main.__doc__)
    parser.add_argument("--shards", nargs="+", required=True, metavar="GLOB", help="paths or globs of tar files")
    parser.add_argument("--vocab", type=int, required=True, metavar="N", help="entries at most")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    options = parser.parse_args(arguments)
    try:
        paths = find_shards(options.shards, "--shards")
        texts = (text for path in paths for meta in iterate_meta(path) for text in texts_of(meta))
        train_tokenizer(texts, options.vocab, options.out)
    except (ConfigError, InputError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
