"""Packs for benchmarks: made-up videos that change slowly, so that a threshold has something to find.

Shape letters: T frames, Hp and Wp rows and columns of cells, P side of a patch, r patches per side of a cell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_elva.config.schema import ModelConfig
from megatron_elva.layout import IGNORE, Kind, Pack, PackSpec, SampleSpec, VideoSpec, build_layout

FASTEST = 0.5
"""Cells that the bottom row of a picture moves from one frame to the next; the top row stands still."""
NOISE = 6.0
"""Standard deviation of the noise on each pixel, of 255."""


def video_pack(model: ModelConfig, samples: int, frames: int, grid: int, text: int, vocab: int, seed: int) -> Pack:
    """A pack of samples alike in shape: a video of ``grid x grid`` cells, then text with a loss on all of it.

    Args:
        model: sizes.
        samples: samples in the pack.
        frames: frames of each video.
        grid: rows and columns of cells.
        text: text tokens of each sample.
        vocab: ids are drawn below it.
        seed: of text and pixels.
    """
    spec = PackSpec((SampleSpec((VideoSpec.uniform(frames, grid, grid), text)),) * samples)
    generator = torch.Generator().manual_seed(seed)
    layout = build_layout(spec)
    is_text = layout.kind == Kind.TEXT
    tokens = torch.where(is_text, torch.randint(0, vocab, is_text.shape, generator=generator), 0)
    # the next token where that is text of the same sample; a sample begins with its video
    labels = torch.where(is_text, tokens, IGNORE).roll(-1)
    labels[-1] = IGNORE
    patches = torch.cat([_video(model, frames, grid, generator) for _ in range(samples)])
    return Pack(spec, tokens, labels, patches, keys=[str(i) for i in range(samples)], samples=samples)


def _video(model: ModelConfig, frames: int, grid: int, generator: torch.Generator) -> Tensor:
    """``[T * Hp * Wp * r * r, P * P * 3]`` uint8: waves that drift to the right, faster from row to row."""
    cell, side, r = model.cell_pixels, model.patch_size, model.cell_reduction
    place = torch.arange(grid * cell) / cell
    speed = FASTEST * torch.arange(grid).repeat_interleave(cell) / max(1, grid - 1)
    shift = torch.arange(frames)[:, None] * speed  # [T, height] in cells
    x = place[None, None, :] - shift[:, :, None]
    y = place[None, :, None]
    image = torch.zeros(frames, grid * cell, grid * cell, 3)
    for colour in range(3):
        for wavelength in (2.0, 3.0):  # in cells
            phase, slope = (float(torch.rand((), generator=generator)) for _ in range(2))
            image[..., colour] += torch.sin(2 * math.pi * (x / wavelength + slope * y + phase))
    image = 127.5 + 60 * image + NOISE * torch.randn(image.shape, generator=generator)
    patches = image.view(frames, grid, r, side, grid, r, side, 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return patches.reshape(-1, model.patch_values).round().clamp(0, 255).to(torch.uint8)
