"""What is prepared and how, and where a preparation keeps its state."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dali_pipelines.options import Limits
from megatron_elva.config.errors import ConfigError, InputError

TRAIN = "train"
"""The split of all samples that no other split has."""


@dataclass(frozen=True)
class Reencode:
    """How videos are encoded again: H.264 in closed groups of pictures, without sound.

    Attributes:
        gop: frames from one keyframe to the next.
        crf: x264's quality; lower is better.
        max_side: the longer side at most, in pixels; None: as it is. Nothing is made larger.
        preset: x264's preset.
    """

    gop: int = 30
    crf: int = 20
    max_side: int | None = None
    preset: str = "medium"

    def __post_init__(self) -> None:
        if self.gop < 1 or not 0 <= self.crf <= 51 or (self.max_side is not None and self.max_side < 16):
            raise ConfigError(
                f"--reencode: gop={self.gop},crf={self.crf},max-side={self.max_side}; allowed: gop at least 1, "
                "crf 0 to 51, max-side at least 16"
            )

    @property
    def tag(self) -> str:
        """A short name of these values, for file names."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]


_LIMITS = Limits(pixels=3840 * 2160, frames=108_000, bytes=2048 * 10**6, seconds=14_400.0)


@dataclass(frozen=True)
class Settings:
    """What decides the content of the shards. The number of workers and of tasks is not among it.

    Attributes:
        inputs: folders and annotation files.
        media: folders that relative paths of files start from, tried in order before the annotation's own.
        columns: ``(ours, theirs)`` names of keys or columns that are renamed.
        shard_mb: MB of a shard at most, unless one sample is larger.
        shard_samples: samples of a shard; None: by size.
        splits: ``(name, share)`` of what is held back from training.
        shuffle: seed of the order; None: the order of the annotations.
        dedup: leave out samples whose files and text are those of an earlier one.
        reencode: None: files are stored as they are.
        limits: files beyond these are left out.
        timeout_s: a file that takes longer is left out.
    """

    inputs: tuple[str, ...]
    media: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    shard_mb: int = 512
    shard_samples: int | None = None
    splits: tuple[tuple[str, float], ...] = ()
    shuffle: int | None = 0
    dedup: bool = True
    reencode: Reencode | None = None
    limits: Limits = _LIMITS
    timeout_s: float = 600.0

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Settings:
        """Read what `asdict` and JSON made of them."""
        pairs = {key: tuple(map(tuple, content[key])) for key in ("columns", "splits")}
        reencode = None if content["reencode"] is None else Reencode(**content["reencode"])
        lists = {key: tuple(content[key]) for key in ("inputs", "media")}
        return cls(**{**content, **pairs, **lists, "reencode": reencode, "limits": Limits(**content["limits"])})


@dataclass(frozen=True)
class Room:
    """The folder of a preparation.

    Attributes:
        out: where the shards go.
    """

    out: Path

    @property
    def state(self) -> Path:
        """What a preparation that was interrupted goes on from."""
        return self.out / ".prepare"

    @property
    def work(self) -> Path:
        """Samples, one a line."""
        return self.state / "work.jsonl"

    @property
    def files(self) -> Path:
        """Distinct files of the samples, one a line."""
        return self.state / "files.jsonl"

    @property
    def plan(self) -> Path:
        """Which samples each shard has."""
        return self.state / "plan.json"

    @property
    def encoded(self) -> Path:
        """Files that were encoded again, until their shards are written."""
        return self.state / "encoded"

    def shard(self, name: str) -> Path:
        """A shard, from its name below `out`."""
        return self.out / name

    def shard_state(self, name: str) -> Path:
        """What is in a shard; it is there once the shard is complete."""
        return self.state / "shards" / f"{Path(name).stem}.json"

    def settings(self) -> Settings:
        """The settings that the preparation was begun with."""
        return Settings.from_dict(json.loads((self.state / "settings.json").read_text())["settings"])


def one_line(words: object) -> str:
    """A message as one line that can be written anywhere: names of files need not be UTF-8."""
    return " ".join(str(words).split()).encode(errors="backslashreplace").decode()


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file that is under its name only when complete."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that is under its name only when complete, also where several tasks write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def begin(room: Room, settings: Settings, digest: str) -> None:
    """Mark a folder as being prepared with these settings and this work list.

    Raises:
        InputError: it was begun with others.
    """
    mark = {"settings": json.loads(json.dumps(asdict(settings))), "work": digest}
    found = read_json(room.state / "settings.json")
    if found is None:
        write_json(room.state / "settings.json", mark, indent=1)
        return
    changed = [key for key, value in mark["settings"].items() if found.get("settings", {}).get(key) != value]
    if found.get("work") != digest and not changed:
        changed = ["the annotations"]
    if changed:
        raise InputError(
            f"--out {room.out}: was begun with other values of {', '.join(changed)}; give the same again, another "
            "--out, or --restart, which removes what was prepared there"
        )
