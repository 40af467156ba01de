"""One cluster for all tests here that leave its nodes as they were, small corpora, and runs on them."""

from __future__ import annotations

import pytest

from dali_pipelines.tokenizer import train_tokenizer
from tests.dali_pipelines.make_samples import encode, textured_frames, write_shard
from tests.slurm.cluster import Slurm, can_build_pyxis, has_namespaces, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real Slurm of 16 nodes."""
    if missing():
        pytest.skip(f"no Slurm on this machine (missing: {', '.join(missing())})")
    disk = 64 if has_namespaces() else 0
    folder = tmp_path_factory.mktemp("slurm")
    with Slurm(folder, 16, small_disk_mb=disk, pyxis=can_build_pyxis()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Forty short videos with captions, and their tokenizer."""
    folder = tmp_path_factory.mktemp("clips")
    videos = [encode(textured_frames(1 + i % 5, 40 + 4 * (i % 5), 56)) for i in range(10)]
    samples = [(f"clip{i:02d}", {"json": {"caption": f"Clip {i}."}, "mp4": videos[i % 10]}) for i in range(40)]
    write_shard(folder / "videos-0.tar", samples)
    train_tokenizer(["Clip 0 1 2 3 4 5 6 7 8 9. Describe the video. word"] * 30, 300, folder / "tokenizer")
    return folder
