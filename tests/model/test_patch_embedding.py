"""The patch embedding against a plain loop over frames, rows and heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_elva.layout import PackSpec, SampleSpec, VideoSpec
from megatron_elva.model.patch_embedding import CrossAttention, Groups, PatchEmbedding, VisualIndex
from tests.layout.test_spec import packs, videos, windows_of

VALUES, WIDTH, HEADS = 12, 16, 2


def embedding(reduction: int = 1, kind: str = "cross_attention", seed: int = 0) -> PatchEmbedding:
    """A small patch embedding in fp64 whose every parameter, norms and biases included, is off its default."""
    module = PatchEmbedding(VALUES, WIDTH, HEADS, reduction**2, kind).double()
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5 + ("norm" in name)
    return module


def pixels_of(pack: PackSpec, reduction: int = 1, seed: int = 0) -> Tensor:
    count = sum(v.cells for v in pack.videos) * reduction**2
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, VALUES), generator=g, dtype=torch.uint8)


def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    x = x - x.mean()
    return x / torch.sqrt((x * x).mean() + layer.eps) * layer.weight + layer.bias


def look(block: CrossAttention, cells: list[Tensor]) -> Tensor:
    """What one learned token becomes after looking at `cells`: softmax written out, head by head."""
    q = block.q.weight @ norm(block.token, block.norm_q)
    keys, values = [], []
    for cell in cells:
        kv = block.kv.weight @ norm(cell, block.norm_kv)
        keys.append(kv[:WIDTH])
        values.append(kv[WIDTH:])
    d = WIDTH // HEADS
    out = torch.zeros(WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        weights = [math.exp(float(q[part] @ k[part]) / math.sqrt(d)) for k in keys]
        out[part] = sum(w / sum(weights) * v[part] for w, v in zip(weights, values, strict=True))
    return block.token + block.out.weight @ out + block.out.bias


def plain(module: PatchEmbedding, pack: PackSpec, patches: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Cells, FRAMEs and LINEs, one by one."""
    r2 = module.cell_patches
    cells, frames, lines, at = [], [], [], 0
    for video in pack.videos:
        for rows, columns in video.frame_grids:
            own = []
            for _ in range(rows * columns):
                projected = [module.proj.weight @ ((p.double() - 127.5) / 127.5) for p in patches[at : at + r2]]
                own.append(sum(projected) / r2)  # the mean of the projections, not the projection of the mean
                at += r2
            cells += own
            if module.frame is None or module.line is None:
                frames.append(module.frame_token)
                lines += [module.line_token] * rows
                continue
            frames.append(look(module.frame, own))
            lines += [look(module.line, own[i * columns : (i + 1) * columns]) for i in range(rows)]
    assert at == len(patches)
    return cells, frames, lines


@settings(max_examples=15, deadline=None)
@given(packs(), st.sampled_from([1, 2]), st.sampled_from(["cross_attention", "naive"]))
def test_equals_a_plain_loop(pack, reduction, kind):
    module = embedding(reduction, kind)
    patches = pixels_of(pack, reduction)
    with torch.no_grad():
        got = module(patches, VisualIndex.of(pack))
        expected = plain(module, pack, patches)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == (len(b), WIDTH)
        if b:
            torch.testing.assert_close(a, torch.stack(b), atol=1e-5, rtol=1e-5)  # pixels are averaged in fp32


def assert_groups(groups: Groups, expected: list[list[int]]) -> None:
    assert groups.index.dtype == torch.long and groups.mask.dtype == torch.bool
    assert groups.index.shape == groups.mask.shape == (len(expected), max(map(len, expected), default=0))
    pairs = zip(groups.index, groups.mask, strict=True)
    assert [index[mask].tolist() for index, mask in pairs] == expected
    assert not groups.index[~groups.mask].any()


@settings(max_examples=60, deadline=None)
@given(packs())
def test_the_index_equals_a_plain_loop(pack):
    frames, rows, at = [], [], 0
    for video in pack.videos:
        for height, width in video.frame_grids:
            frames.append(list(range(at, at + height * width)))
            rows += [frames[-1][i * width : (i + 1) * width] for i in range(height)]
            at += height * width
    index = VisualIndex.of(pack)
    assert_groups(index.frames, frames)
    assert_groups(index.rows, rows)
    assert index.pool is None


def pooled_by_hand(pack: PackSpec, patches: Tensor, r2: int, window: int) -> Tensor:
    """The patches of the pooled pack ``[N' * r * r, V]`` fp64: means over the frames of a window, patch by patch."""
    out, at = [patches[:0].double()], 0
    for video in pack.videos:
        frames = []
        for rows, columns in video.frame_grids:
            size = rows * columns * r2
            frames.append(patches[at : at + size].double())
            at += size
        for members in windows_of(video, window):
            out.append(sum(frames[i] for i in members) / len(members))
    assert at == len(patches)
    return torch.cat(out)


@settings(max_examples=25, deadline=None)
@given(
    st.one_of(packs(), videos(longest=9).map(lambda v: PackSpec((SampleSpec((v, 2)), SampleSpec((v,)))))),
    st.integers(1, 10),
    st.sampled_from([1, 2]),
    st.sampled_from(["cross_attention", "naive"]),
)
def test_pooling_equals_a_plain_loop_over_frames(pack, window, reduction, kind):
    module = embedding(reduction, kind)
    patches = pixels_of(pack, reduction)
    with torch.no_grad():
        got = module(patches, VisualIndex.of(pack, window))
        expected = plain(module, pack.pooled(window), pooled_by_hand(pack, patches, reduction**2, window))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == (len(b), WIDTH)
        if b:
            torch.testing.assert_close(a, torch.stack(b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("frames", "window"), [(4, 2), (5, 2), (5, 3), (3, 8), (1, 4)])
def test_a_static_video_pools_to_its_frame(frames, window):
    module = embedding(2)
    one = PackSpec((SampleSpec((VideoSpec.uniform(1, 2, 3),)),))
    many = PackSpec((SampleSpec((VideoSpec.uniform(frames, 2, 3),)),))
    patches = pixels_of(one, 2)
    with torch.no_grad():
        still = module(patches, VisualIndex.of(one))
        moving = module(patches.repeat(frames, 1), VisualIndex.of(many, window))
    for a, b in zip(moving, still, strict=True):
        torch.testing.assert_close(a, b.repeat(-(-frames // window), 1), atol=1e-6, rtol=1e-6)


def test_pooled_gradients_are_those_of_the_averaged_pixels():
    module, pack = embedding(), PackSpec((SampleSpec((VideoSpec.uniform(3, 2, 2),)),))
    patches = pixels_of(pack) // 2 * 2  # the mean of two even numbers is a whole one
    scale = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = []
    averaged = pooled_by_hand(pack, patches, 1, 2).to(torch.uint8)
    for pixels, index in ((patches, VisualIndex.of(pack, 2)), (averaged, VisualIndex.of(pack.pooled(2)))):
        module.zero_grad()
        sum((x * scale).sum() for x in module(pixels, index)).backward()
        grads.append({name: p.grad.clone() for name, p in module.named_parameters()})
    for name, expected in grads[1].items():
        assert expected.abs().max() > 1e-6, name
        torch.testing.assert_close(grads[0][name], expected, atol=1e-4, rtol=1e-4)  # pixels are averaged in fp32


def test_the_index_moves_as_a_whole():
    pack = two_videos()
    for index, groups in ((VisualIndex.of(pack), 2), (VisualIndex.of(pack, 2), 3)):
        moved = index.to("meta")
        held = [g for g in (moved.frames, moved.rows, moved.pool) if g is not None]
        assert len(held) == groups
        assert all(t.device.type == "meta" for g in held for t in (g.index, g.mask))
    with pytest.raises(ValueError, match="at least one frame"):
        VisualIndex.of(pack, 0)


def two_videos() -> PackSpec:
    """Two videos of unequal grids, so that the groups of the smaller one are padded."""
    small, large = VideoSpec.uniform(1, 1, 2), VideoSpec(((3, 4), (2, 1)), (0, 1))
    return PackSpec((SampleSpec((2, small)), SampleSpec((large, 1))))


@pytest.mark.parametrize("reduction", [1, 2])
def test_nothing_of_one_video_is_touched_by_pixels_of_another(reduction):
    module, pack = embedding(reduction), two_videos()
    a = pixels_of(pack, reduction)
    b = a.clone()
    first = pack.videos[0].cells * reduction**2
    b[:first] = 255 - b[:first]
    with torch.no_grad():
        before, after = (module(x, VisualIndex.of(pack)) for x in (a, b))
    for old, new, own in zip(before, after, (2, 1, 1), strict=True):  # cells, FRAMEs and LINEs of the first video
        torch.testing.assert_close(old[own:], new[own:], atol=0, rtol=0)
        assert ((old[:own] - new[:own]).abs().amax(1) > 1e-3).all()


def test_a_line_is_touched_by_its_row_alone_and_a_frame_by_all_its_rows():
    module, pack = embedding(), two_videos()
    grids = [grid for v in pack.videos for grid in v.frame_grids]
    row_of_cell = [row for row, columns in enumerate(c for h, c in grids for _ in range(h)) for _ in range(columns)]
    frame_of_row = [frame for frame, (h, _) in enumerate(grids) for _ in range(h)]
    a = pixels_of(pack)
    with torch.no_grad():
        _, frames, lines = module(a, VisualIndex.of(pack))
        for i, row in enumerate(row_of_cell):
            b = a.clone()
            b[i] = 255 - b[i]
            _, new_frames, new_lines = module(b, VisualIndex.of(pack))
            assert (new_lines != lines).any(1).nonzero().flatten().tolist() == [row], f"cell {i}"
            assert (new_frames != frames).any(1).nonzero().flatten().tolist() == [frame_of_row[row]], f"cell {i}"


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", ["cross_attention", "naive"])
def test_a_pack_without_videos_gives_nothing_and_no_nan(kind, window):
    module, pack = embedding(2, kind), PackSpec((SampleSpec((5,)),))
    outputs = module(pixels_of(pack, 2), VisualIndex.of(pack, window))
    assert all(x.shape == (0, WIDTH) for x in outputs)
    torch.cat(outputs).sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is None or not p.grad.any(), name  # not even NaN, which counts as non-zero


def test_every_parameter_gets_a_gradient_and_padding_of_groups_none_of_it():
    module, pack = embedding(), two_videos()
    patches = pixels_of(pack)
    outputs = module(patches, VisualIndex.of(pack))
    scale = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sum((x * scale).sum() for x in outputs).backward()
    got = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    # each video alone has no padded group but where its own grids differ; the gradients add up
    at = 0
    for sample in pack.samples:
        cells = sum(v.cells for v in sample.videos)
        parts = module(patches[at : at + cells], VisualIndex.of(PackSpec((sample,))))
        sum((x * scale).sum() for x in parts).backward()
        at += cells
    for name, p in module.named_parameters():
        assert got[name].isfinite().all() and got[name].abs().max() > 1e-6, name
        torch.testing.assert_close(got[name], p.grad, atol=1e-9, rtol=1e-9)


def test_naive_has_tokens_that_see_nothing():
    module, pack = embedding(kind="naive"), two_videos()
    with torch.no_grad():
        _, frames, lines = module(pixels_of(pack), VisualIndex.of(pack))
    assert frames.shape == (3, WIDTH) and (frames == module.frame_token).all()
    assert lines.shape == (6, WIDTH) and (lines == module.line_token).all()
    assert {n for n, _ in module.named_parameters()} == {"proj.weight", "frame_token", "line_token"}
