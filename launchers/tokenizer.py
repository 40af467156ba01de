"""The size of a tokenizer, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_elva.training import runs


def tokenizer_size(folder: str | None) -> int | None:
    """Number of ids of a Hugging Face tokenizer; None where there is no tokenizer.json."""
    path = (runs.tokenizer_folder(folder or "") or Path()) / "tokenizer.json"
    if folder is None or not path.is_file():
        return None
    tree = json.loads(path.read_text(encoding="utf-8"))
    vocab = tree["model"]["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    return 1 + max([*ids, *(token["id"] for token in tree.get("added_tokens", []))])
