"""A small corpus that the tests encode themselves."""

from types import SimpleNamespace

import pytest

from dali_pipelines.tokenizer import train_tokenizer
from tests.dali_pipelines.make_samples import encode, gray_frames, image, textured_frames, write_shard


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Shards of videos, images and texts, with a few bad samples, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    clip = encode(gray_frames(4))
    videos = []
    for i in range(24):
        key = f"v{i:03d}"
        caption = "" if key == "v013" else f"Clip number {i}."
        media = (
            b"this is no video" if key == "v007" else encode(textured_frames(2 + i % 4, 28 + i, 40)) if i % 5 else clip
        )
        videos.append((key, {"json": {"caption": caption}, "mp4": media}))
    write_shard(folder / "video-0.tar", videos[:10])
    write_shard(folder / "video-1.tar", videos[10:])
    qa = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(6)]
    images = [(f"i{i:02d}", {"json": {"qa": qa}, "png": image(textured_frames(1, 20 + i, 30)[0])}) for i in range(9)]
    write_shard(folder / "image-0.tar", images)
    texts = [(f"t{i:02d}", {"json": {"text": "" if i == 2 else f"Plain text {i}."}}) for i in range(5)]
    write_shard(folder / "text-0.tar", texts)
    train_tokenizer(["Clip number 1. What is 2? It is 3. Plain text"] * 20, 300, folder / "tokenizer")
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    """What `open_stream` reads of a config."""

    def source(name, task):
        return SimpleNamespace(shards=[str(corpus / f"{name}-*.tar")], task=task)

    return SimpleNamespace(
        data=SimpleNamespace(
            sources={
                "videos": source("video", "caption"),
                "images": source("image", "conversation"),
                "texts": source("text", "text"),
            },
            tokenizer=str(corpus / "tokenizer"),
            frames=3,
            fit="pad",
            max_pixels=None,
            sampling="uniform",
            rate=None,
            clip_seconds=None,
            hybrid=None,
            decoder="pyav",
            pack_tokens=None,
            pack_text_tokens=None,
            pack_buffer=8,
            quarantine=None,
            cache_dir=None,
            max_source_mb=64,
            max_source_seconds=600.0,
            max_text_tokens=500,
            caption_prompt="Describe it.",
            max_source_pixels=1 << 20,
            max_source_frames=1000,
            cache_mb=0,
        ),
        stage=SimpleNamespace(blend={"videos": 6.0, "images": 2.0, "texts": 1.0}),
        model=SimpleNamespace(patch_size=7, cell_reduction=2, max_position=4096),
        train=SimpleNamespace(global_batch=16, accumulate=2),
        pad_multiple=8,
        seed=3,
        run_dir=str(tmp_path / "run"),
        init_from=None,
    )
