"""The token layout against a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings

from megatron_elva.layout import Kind, PackSpec, SampleSpec, VideoSpec, build_layout
from tests.layout.test_spec import packs

COLUMNS = ("kind", "sample", "video", "frame", "cell", "position")


def walk(pack: PackSpec) -> list[tuple[Any, ...]]:
    """``(kind, sample, video, frame, cell, position)`` of each token, one after another."""
    tokens: list[tuple[Any, ...]] = []
    video = 0
    for sample, segments in enumerate(s.segments for s in pack.samples):
        position = 0

        def put(kind: Kind, video: int = -1, frame: int = -1, cell: int = -1, sample: int = sample) -> None:
            nonlocal position
            tokens.append((int(kind), sample, video, frame, cell, position))
            position += 1

        for segment in segments:
            if not isinstance(segment, VideoSpec):
                for _ in range(segment):
                    put(Kind.TEXT)
                continue
            for frame, c in enumerate(segment.frame_class):
                rows, columns = segment.grids[c]
                put(Kind.FRAME, video, frame)
                for row in range(rows):
                    for column in range(columns):
                        put(Kind.CELL, video, frame, row * columns + column)
                    put(Kind.LINE, video, frame)
            video += 1
    tokens += [(int(Kind.PADDING), len(pack.samples), -1, -1, -1, i) for i in range(pack.padding)]
    return tokens


@settings(max_examples=40, deadline=None)
@given(packs())
def test_equals_a_plain_loop(pack):
    layout = build_layout(pack)
    columns = [getattr(layout, name) for name in COLUMNS]
    assert all(c.dtype == torch.long and c.shape == (pack.tokens,) for c in columns)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == walk(pack)
    assert layout.tokens == pack.tokens
    assert list(layout.lengths) == pack.lengths and layout.padding == pack.padding
    kinds = layout.kind.tolist()
    for kind in Kind:
        assert layout.where(kind).tolist() == [i for i, k in enumerate(kinds) if k == kind]


def test_a_known_pack():
    hybrid = VideoSpec(((1, 2), (1, 1)), (0, 1))
    layout = build_layout(PackSpec((SampleSpec((1,)), SampleSpec((2, hybrid))), padding=2))
    text, frame, line, cell, pad = (int(k) for k in (Kind.TEXT, Kind.FRAME, Kind.LINE, Kind.CELL, Kind.PADDING))
    assert layout.kind.tolist() == [text, text, text, frame, cell, cell, line, frame, cell, line, pad, pad]
    assert layout.sample.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    assert layout.video.tolist() == [-1, -1, -1, 0, 0, 0, 0, 0, 0, 0, -1, -1]
    assert layout.frame.tolist() == [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, -1, -1]
    assert layout.cell.tolist() == [-1, -1, -1, -1, 0, 1, -1, -1, 0, -1, -1, -1]
    assert layout.position.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]
    assert layout.lengths == (1, 9, 2)


def test_a_frame_of_336_pixels_is_12_rows_of_12_cells():
    layout = build_layout(PackSpec((SampleSpec((VideoSpec.uniform(1, 12, 12),)),)))
    counts = {kind: layout.where(kind).numel() for kind in Kind}
    assert counts == {Kind.TEXT: 0, Kind.FRAME: 1, Kind.LINE: 12, Kind.CELL: 144, Kind.PADDING: 0}
    assert layout.tokens == 157


def test_to_moves_every_column_and_keeps_the_host_numbers():
    layout = build_layout(PackSpec((SampleSpec((2, VideoSpec.uniform(1, 1, 1))),), padding=1))
    moved = layout.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in COLUMNS)
    assert moved.lengths == (5, 1) and moved.padding == 1
