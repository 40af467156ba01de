"""Render the demo corpus: seeded WebDataset shards of videos and images of handwritten digits, with questions.

``python -m dali_pipelines.demo_corpus --out DIR --images N --videos N --heldout N --seed S --workers W`` writes

- ``images/train-*.tar``: images with captions (stage 1),
- ``videos/train-*.tar``: videos with captions (stage 2) and questions (stage 3),
- ``heldout/videos-*.tar``: videos of digit images, backgrounds and seeds that training never shows,
- ``corpus.json``: the arguments, counts and the renderer's version.

The same arguments always give the same bytes, whatever the number of workers. A corpus that is already there is left
alone; an interrupted one goes on after its last complete shard; one of other arguments is rendered anew.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import multiprocessing
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dali_pipelines.demo_render import draw_frames, encode_image, encode_video
from dali_pipelines.demo_scenes import Scene, image_scene, video_scene

SHARD_SAMPLES = 500
CHUNK_SAMPLES = 25
"""Samples that a worker renders at a time."""
PARTS = {"images": "images/train", "videos": "videos/train", "heldout": "heldout/videos"}
"""Where the shards of each part are, without number and suffix."""
SHARD_NAME = re.compile(rf"({'|'.join(PARTS.values())})-\d{{5,}}\.tar")

Member = tuple[str, bytes]


@dataclass(frozen=True)
class CorpusArgs:
    """What decides every byte of a corpus.

    Attributes:
        images: training images.
        videos: training videos.
        heldout: held-out videos.
        seed: seed of everything that is drawn.
        shard_samples: samples per shard.
    """

    images: int
    videos: int
    heldout: int
    seed: int
    shard_samples: int = SHARD_SAMPLES


@dataclass(frozen=True)
class _Chunk:
    """Samples ``start`` until before ``stop`` of a part."""

    part: str
    seed: int
    start: int
    stop: int


@cache
def renderer_digest() -> str:
    """A digest of the renderer's source and of the libraries that its pixels and bytes depend on."""
    digest = hashlib.sha256()
    for name in ("demo_balance", "demo_scenes", "demo_render", "demo_corpus"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    for package in ("av", "numpy", "pillow", "scikit-learn"):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()


def scene_of(part: str, seed: int, index: int) -> Scene:
    """The scene of a sample of one of the `PARTS`."""
    if part == "images":
        return image_scene(seed, index)
    return video_scene(seed, "train" if part == "videos" else "heldout", index)


def sample_members(key: str, scene: Scene) -> list[Member]:
    """The members of one sample: its pixels and its JSON, by name."""
    frames = draw_frames(scene)
    about = {
        "caption": scene.caption,
        "qa": [asdict(question) for question in scene.qa],
        "width": scene.width,
        "height": scene.height,
        "frames": scene.frames,
        "fps": scene.fps,
    }
    if scene.frames == 1:
        pixels = f"{key}.png", encode_image(frames)
    else:
        pixels = f"{key}.mp4", encode_video(frames, scene.fps)
    return [pixels, (f"{key}.json", json.dumps(about).encode())]


def _render_chunk(chunk: _Chunk) -> list[Member]:
    members = []
    for index in range(chunk.start, chunk.stop):
        key = f"{chunk.part}-{index:07d}"
        members += sample_members(key, scene_of(chunk.part, chunk.seed, index))
    return members


def shard_paths(args: CorpusArgs) -> dict[str, tuple[str, int, int]]:
    """The shards of a corpus: path below its folder -> part, first sample, end of samples."""
    shards = {}
    for part, prefix in PARTS.items():
        total = getattr(args, part)
        for number, start in enumerate(range(0, total, args.shard_samples)):
            shards[f"{prefix}-{number:05d}.tar"] = (part, start, min(start + args.shard_samples, total))
    return shards


def _write_shard(path: Path, members: Iterator[Member]) -> None:
    """Write a tar file that is under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    partial.replace(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _rendered(chunks: Sequence[_Chunk], workers: int) -> Iterator[Iterator[list[Member]]]:
    """The members of each chunk in order, rendered by this process or by several."""
    if workers <= 1:
        yield map(_render_chunk, chunks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool.map(_render_chunk, chunks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(out: Path, marker: dict[str, Any]) -> list[str]:
    """Mark a folder as being rendered.

    Shards of other arguments are removed, but nothing else: only what a corpus there has listed and is named like one.

    Returns:
        The shards that are complete already.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = [_read_json(out / name) for name in ("corpus.json", "corpus.partial.json")]
    for other in found:
        if not other.items() >= marker.items():
            for shard in filter(SHARD_NAME.fullmatch, other.get("shards", [])):
                (out / shard).unlink(missing_ok=True)
    same = any(about.items() >= marker.items() for about in found)
    kept = [shard for shard in marker["shards"] if same and (out / shard).is_file()]
    _write_json(out / "corpus.partial.json", marker)
    (out / "corpus.json").unlink(missing_ok=True)
    return kept


def render_corpus(out: Path, args: CorpusArgs, workers: int = 1) -> dict[str, Any]:
    """Render a corpus, or what is missing of it.

    Args:
        out: its folder.
        args: what to render.
        workers: processes.

    Returns:
        The content of ``corpus.json``.
    """
    shards = shard_paths(args)
    marker = {"arguments": asdict(args), "renderer": renderer_digest(), "shards": list(shards)}
    done = _read_json(out / "corpus.json")
    if done.items() >= marker.items() and all((out / shard).is_file() for shard in shards):
        return done
    kept = _start(out, marker)
    missing = {shard: about for shard, about in shards.items() if shard not in kept}
    chunks = {
        shard: [_Chunk(part, args.seed, at, min(at + CHUNK_SAMPLES, stop)) for at in range(start, stop, CHUNK_SAMPLES)]
        for shard, (part, start, stop) in missing.items()
    }
    total = sum(stop - start for _, start, stop in missing.values())
    flat = list(itertools.chain.from_iterable(chunks.values()))
    with _rendered(flat, workers) as rendered, tqdm(total=total, desc="demo corpus", unit="sample") as bar:
        for shard, parts in chunks.items():
            _write_shard(out / shard, _counted(itertools.islice(rendered, len(parts)), bar))
    size = sum((out / shard).stat().st_size for shard in shards)
    done = marker | {"bytes": size}
    _write_json(out / "corpus.json", done)
    (out / "corpus.partial.json").unlink()
    return done


def _counted(rendered: Iterator[list[Member]], bar: tqdm[Any]) -> Iterator[Member]:
    for members in rendered:
        yield from members
        bar.update(len(members) // 2)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo_corpus", description="Render the demo corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--images", type=int, default=3000, help="training images")
    parser.add_argument("--videos", type=int, default=6000, help="training videos")
    parser.add_argument("--heldout", type=int, default=560, help="held-out videos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    given = parser.parse_args(argv)
    for name in ("images", "videos", "heldout", "seed"):
        if getattr(given, name) < 0:
            parser.error(f"--{name} has to be at least 0, got {getattr(given, name)}")
    if given.workers < 1:
        parser.error(f"--workers has to be at least 1, got {given.workers}")
    args = CorpusArgs(given.images, given.videos, given.heldout, given.seed)
    about = render_corpus(given.out, args, given.workers)
    counts = ", ".join(f"{getattr(args, part)} {part}" for part in PARTS)
    print(f"{given.out}: {counts}, {about['bytes'] / 1e6:.1f} MB in {len(about['shards'])} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
