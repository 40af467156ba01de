"""The options of the command line, and what they say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dali_pipelines.options import FITS, Limits
from dali_pipelines.prepare.settings import TRAIN, Reencode, Settings
from dali_pipelines.prepare.stats import View
from dali_pipelines.shards import split_name
from dali_pipelines.tokenizer import load_tokenizer
from megatron_elva.config.errors import ConfigError, did_you_mean

_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """As `argparse` wants it."""
        raise ConfigError(f"{message} (--help lists all options)")


def parser(description: str) -> argparse.ArgumentParser:
    """All options.

    Args:
        description: what ``--help`` says first.
    """
    options = _Parser(
        prog="python -m dali_pipelines.prepare",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = options.add_argument_group("what").add_argument
    add(
        "--input",
        action="append",
        required=True,
        metavar="PATH",
        help="annotation file, or folder of media; again for more",
    )
    add(
        "--media",
        action="append",
        default=[],
        metavar="DIR",
        help="where paths of media start; else the annotation's folder",
    )
    add(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="another name of a key or column, as caption=title",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    add = options.add_argument_group("shards").add_argument
    add("--shard-mb", type=int, default=512, metavar="MB", help="size of a shard at most (512)")
    add("--shard-samples", type=int, metavar="N", help="samples of a shard, in place of a size")
    add(
        "--split",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="hold back a share, as val=0.01; again for more",
    )
    add("--shuffle", type=int, default=0, metavar="SEED", help="seed of the order (0)")
    add("--no-shuffle", action="store_true", help="keep the order of the annotations")
    add("--dedup", choices=("exact", "off"), default="exact", help="leave out samples with the same files and text")
    add(
        "--reencode",
        nargs="?",
        const="",
        metavar="gop=30,crf=20,max-side=N,preset=medium",
        help="videos as H.264 in short closed GOPs, without sound",
    )
    add = options.add_argument_group("files beyond these are left out").add_argument
    add("--max-source-pixels", type=int, default=3840 * 2160, metavar="N", help="area of a frame (3840 x 2160)")
    add("--max-source-frames", type=int, default=108_000, metavar="N", help="frames (108000)")
    add("--max-source-mb", type=int, default=2048, metavar="MB", help="size (2048)")
    add("--max-source-seconds", type=float, default=14_400.0, metavar="S", help="length (14400)")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds without progress on one file (600)")
    add = options.add_argument_group("token counts of the statistics").add_argument
    view = View()
    add("--frames", type=int, default=view.frames, metavar="N", help=f"frames of a video ({view.frames})")
    add(
        "--max-pixels",
        type=int,
        default=view.max_pixels,
        metavar="N",
        help=f"area of a frame ({view.max_pixels}); 0: no bound",
    )
    add("--patch", type=int, default=view.patch, metavar="P", help=f"side of a patch ({view.patch})")
    add(
        "--cell-reduction",
        type=int,
        default=view.cell_reduction,
        metavar="R",
        help=f"patches per side of a cell ({view.cell_reduction})",
    )
    add("--fit", choices=FITS, default=view.fit, help=f"how sizes become whole cells ({view.fit})")
    add("--hybrid", metavar="hi=336,lo=168,k=3", help="two resolution classes")
    add("--tokenizer", metavar="DIR", help="Hugging Face tokenizer; without one text is counted in characters")
    add = options.add_argument_group("how").add_argument
    add("--workers", type=int, metavar="N", help="processes (one for each core)")
    add(
        "--slurm",
        nargs="+",
        metavar="KEY=VALUE",
        help="as a job: nodes=4 partition=cpu tasks_per_node=1 dry_run=true ...",
    )
    add("--retry-bad", action="store_true", help="look at bad files again, and write the shards anew")
    add("--restart", action="store_true", help="remove what was prepared in --out before")
    return options


def settings_of(given: argparse.Namespace) -> Settings:
    """What the command line says of the shards.

    Raises:
        ConfigError: an option cannot be used.
    """
    for name in (
        "shard_mb",
        "shard_samples",
        "max_source_pixels",
        "max_source_frames",
        "max_source_mb",
        "max_source_seconds",
        "timeout",
        "workers",
    ):
        value = getattr(given, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: allowed: a number above 0")
    if given.shuffle < 0:
        raise ConfigError(f"--shuffle {given.shuffle}: allowed: at least 0")
    if given.max_source_mb > 8000:
        raise ConfigError(f"--max-source-mb {given.max_source_mb}: allowed: at most 8000, what a shard can hold")
    if given.max_source_pixels > 1 << 29:
        raise ConfigError(f"--max-source-pixels {given.max_source_pixels}: allowed: at most {1 << 29}")
    columns = []
    for pair in given.column:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError(f"--column {pair}: give OURS=THEIRS, such as caption=title")
        columns.append((ours, theirs))
    return Settings(
        inputs=tuple(str(Path(path).absolute()) for path in given.input),
        media=tuple(str(Path(path).absolute()) for path in given.media),
        columns=tuple(columns),
        shard_mb=given.shard_mb,
        shard_samples=given.shard_samples,
        splits=_splits(given.split),
        shuffle=None if given.no_shuffle else given.shuffle,
        dedup=given.dedup == "exact",
        reencode=None if given.reencode is None else _reencode(given.reencode),
        limits=Limits(
            given.max_source_pixels, given.max_source_frames, given.max_source_mb * 10**6, given.max_source_seconds
        ),
        timeout_s=given.timeout,
    )


def _splits(words: Sequence[str]) -> tuple[tuple[str, float], ...]:
    splits: dict[str, float] = {}
    for word in ",".join(words).split(",") if words else []:
        name, _, share = word.partition("=")
        try:
            splits[name] = float(share)
        except ValueError:
            splits[name] = 0.0
        if split_name(name) != (name, "") or "/" in name or name == TRAIN or not 0 < splits[name] < 1:
            raise ConfigError(f"--split {word}: give NAME=SHARE, such as val=0.01; the rest is {TRAIN}")
    if sum(splits.values()) >= 1:
        raise ConfigError(f"--split {','.join(words)}: the shares leave nothing for {TRAIN}")
    return tuple(splits.items())


def _reencode(words: str) -> Reencode:
    values: dict[str, Any] = {}
    known = ("gop", "crf", "max-side", "preset")
    for word in filter(None, words.split(",")):
        key, _, value = word.partition("=")
        if key not in known:
            raise ConfigError(f"--reencode {word}: unknown{did_you_mean(key, known)}; allowed: {', '.join(known)}")
        if value not in _PRESETS if key == "preset" else not value.isdigit():
            allowed = ", ".join(_PRESETS) if key == "preset" else "a whole number"
            raise ConfigError(f"--reencode {word}: allowed: {allowed}")
        values[key.replace("-", "_")] = value if key == "preset" else int(value)
    return Reencode(**values)


def view_of(given: argparse.Namespace) -> View:
    """What the command line says of the token counts.

    Raises:
        ConfigError: a value cannot be used.
        InputError: the tokenizer cannot be loaded.
    """
    view = View(
        frames=given.frames,
        max_pixels=given.max_pixels or None,
        patch=given.patch,
        cell_reduction=given.cell_reduction,
        fit=given.fit,
        hybrid=given.hybrid,
        tokenizer=None if given.tokenizer is None else str(Path(given.tokenizer).absolute()),
    )
    view.options()
    if view.tokenizer is not None:
        load_tokenizer(view.tokenizer)
    return view
