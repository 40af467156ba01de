"""Small configs and random packs for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_elva.config import schema as s
from megatron_elva.layout import IGNORE, Pack, PackSpec, SampleSpec, VideoSpec


def small_model(**changes: Any) -> s.ModelConfig:
    """A 4-layer model of width 32."""
    model = s.ModelConfig(
        name="test", layers=4, hidden=32, ffn_hidden=48, heads=4, kv_heads=2, vocab_size=96, rope_theta=10000.0,
        norm_eps=1e-6, tied_head=True, max_position=4096, init_std=0.05, patch_size=4, patch_width=16, patch_heads=2,
        cell_reduction=1, patch_embedding="cross_attention", attention_mask="causal", positions="1d",
    )  # fmt: skip
    return replace(model, **changes)


def small_config(model: s.ModelConfig | None = None, **changes: Any) -> s.Config:
    """A whole config around a small model; `changes` replace top-level fields."""
    config = s.Config(
        stage=s.StageConfig(id=2, name="test", blend={"videos": 1.0}, losses=["gen"], frozen=[], frozen_share=0.0),
        model=model or small_model(),
        data=s.DataConfig(
            name="test", sources={}, tokenizer=None, frames=4, fit="crop", max_pixels=None, pack_tokens=None,
            max_text_tokens=64, caption_prompt="Describe the video.", workers=0, prefetch=2, cache_mb=0,
            max_source_pixels=10**8, max_source_frames=10**5,
            **({"root": ""} if "root" in s.DataConfig.__dataclass_fields__ else {}),
        ),
        parallel=s.ParallelConfig(tensor=1, pipeline=1, sequence=False),
        merging=s.MergingConfig(kind="none"),
        precision=s.PrecisionConfig(name="fp32", dtype="fp32", fp8=None),
        train=s.TrainConfig(
            steps=4, global_batch=4, accumulate=2, lr=1e-2, lr_patch_embedding=1e-2, lr_min_share=0.0, warmup_steps=0,
            hold_share=0.0, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_grad=1.0, recompute=False,
            checkpoint_every=10, keep_checkpoints=2, log_every=1,
        ),
        cluster=s.ClusterConfig(
            kind="debug", partition=None, account=None, qos=None, time_min=10, cpus_per_task=None, exclusive=False,
            container_image=None, container_mounts=None, setup=[], srun_args=[], sbatch_args={},
        ),
        tracking=s.TrackingConfig(mlflow=False), debug=s.DebugConfig(),
        nodes=1, tasks_per_node=1, device="cpu", layers="local", seed=7, run_dir="",
        init_from=None, dry_run=False, follow=False,
    )  # fmt: skip
    return replace(config, **changes)


def random_sample(generator: torch.Generator, videos: int, text: int = 6) -> SampleSpec:
    """Text, then videos of random grids with text behind each."""
    segments: list[int | VideoSpec] = [text]
    for _ in range(videos):
        t, h, w = (int(torch.randint(1, 4, (), generator=generator)) for _ in range(3))
        segments += [VideoSpec.uniform(t, h, w), text]
    return SampleSpec(tuple(segments))


def fill(spec: PackSpec, model: s.ModelConfig, seed: int) -> Pack:
    """A pack of the given specification with random text, pixels, and a loss on half of the text tokens."""
    from megatron_elva.layout import Kind, build_layout

    g = torch.Generator().manual_seed(seed)
    kind = build_layout(spec).kind
    tokens = torch.where(kind == Kind.TEXT, torch.randint(0, 96, kind.shape, generator=g), 0)
    chosen = (kind == Kind.TEXT) & (torch.rand(kind.shape, generator=g) < 0.5)
    labels = torch.where(chosen, torch.randint(0, 96, kind.shape, generator=g), IGNORE)
    cells = sum(v.cells for v in spec.videos)
    patches = torch.randint(
        0, 256, (cells * model.cell_reduction**2, model.patch_values), generator=g, dtype=torch.uint8
    )
    return Pack(
        spec, tokens, labels, patches, keys=[f"k{i}" for i in range(len(spec.samples))], samples=len(spec.samples)
    )


def random_pack(model: s.ModelConfig, seed: int, videos: tuple[int, ...] = (1, 0, 2), multiple: int = 4) -> Pack:
    """A pack with one sample for each entry of `videos`."""
    g = torch.Generator().manual_seed(seed)
    return fill(PackSpec(tuple(random_sample(g, n) for n in videos)).padded_to(multiple), model, seed)
