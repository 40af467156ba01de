"""A run saved by four ranks, with and without merging, and a video."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from megatron_elva.config.build import load, save
from megatron_elva.config.schema import MergePoint, MergingConfig
from tests.builders import small_config, small_model
from tests.dali_pipelines.make_samples import encode, textured_frames
from tests.distributed import run_distributed
from tests.inference.drawn import TP2PP2, write_run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A run saved by four ranks at tensor 2 x pipeline 2."""
    from dali_pipelines.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("run")
    config = small_config(small_model(patch_size=14, vocab_size=None), parallel=TP2PP2, run_dir=str(folder))
    train_tokenizer(["What is this? A small test of words."] * 50, 300, folder / "tokenizer")
    save(config, folder / "config.yaml")
    run_distributed(write_run, 4, config, timeout=180)
    return folder


@pytest.fixture(scope="session")
def merging_run(run_dir, tmp_path_factory):
    """The same run, had it merged tokens."""
    folder = shutil.copytree(run_dir, tmp_path_factory.mktemp("merging") / "run")
    points = [
        MergePoint(after=1.0, rule="threshold", tau=0.6),
        MergePoint(after=0.5, rule="budget", keep=0.5),
    ]
    merging = MergingConfig(kind="hierarchical", points=points)
    save(replace(load(folder / "config.yaml"), merging=merging), folder / "config.yaml")
    return folder


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    path.write_bytes(encode(textured_frames(5, 56, 70)))
    return path
