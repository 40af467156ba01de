"""What a pack is made of, in numbers: samples of text segments and videos. Everything else about positions follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np


@dataclass(frozen=True)
class VideoSpec:
    """One video in cells.

    Attributes:
        grids: ``(Hp, Wp)`` in cells, one for each resolution class.
        frame_class: the class of each frame, so its length is the number of frames.
    """

    grids: tuple[tuple[int, int], ...]
    frame_class: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.frame_class:
            raise ValueError("a video needs at least one frame")
        if any(h < 1 or w < 1 for h, w in self.grids):
            raise ValueError(f"a grid needs at least one cell each way, got {self.grids}")
        if not 0 <= min(self.frame_class) <= max(self.frame_class) < len(self.grids):
            raise ValueError(f"frame classes {self.frame_class} do not fit {len(self.grids)} grids")

    @classmethod
    def uniform(cls, frames: int, rows: int, columns: int) -> VideoSpec:
        """A video whose frames all have ``rows x columns`` cells."""
        return cls(((rows, columns),), (0,) * frames)

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.frame_class)

    @property
    def frame_grids(self) -> list[tuple[int, int]]:
        """``(Hp, Wp)`` of each frame in order."""
        return list(map(self.grids.__getitem__, self.frame_class))

    @property
    def frame_sizes(self) -> np.ndarray:
        """``[F, 2]`` int64, what `frame_grids` holds."""
        return np.array(self.grids, np.int64)[np.array(self.frame_class)]

    @property
    def class_frames(self) -> list[int]:
        """Number of frames of each resolution class."""
        return [self.frame_class.count(c) for c in range(len(self.grids))]

    @property
    def cells(self) -> int:
        """Cells in all frames."""
        return sum(n * h * w for n, (h, w) in zip(self.class_frames, self.grids, strict=True))

    @property
    def rows(self) -> int:
        """Rows in all frames."""
        return sum(n * h for n, (h, _) in zip(self.class_frames, self.grids, strict=True))

    @property
    def tokens(self) -> int:
        """Length of the visual span: a FRAME, and for each row its cells and a LINE."""
        return self.frames + self.cells + self.rows

    def pooled(self, window: int) -> VideoSpec:
        """What is left when ``window`` consecutive frames of a resolution class become one.

        Such a frame stands where the first of them stood; the last window of a class may be shorter.
        """
        if window < 1:
            raise ValueError(f"a window needs at least one frame, got {window}")
        frame_class = np.array(self.frame_class)
        _, rank = order_in_class(frame_class)
        return VideoSpec(self.grids, tuple(frame_class[rank % window == 0].tolist()))


def order_in_class(frame_class: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell the frames of each class apart.

    Args:
        frame_class: ``[F]``, the class of each frame, from 0.

    Returns:
        ``[F]`` the frames class by class, in order within each; and ``[F]`` for each frame, how many frames of its
        class come before it.
    """
    order = np.argsort(frame_class, kind="stable")
    counts = np.bincount(frame_class)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order, rank


Segment = int | VideoSpec
"""A number of text tokens, or a video."""


@dataclass(frozen=True)
class SampleSpec:
    """One training example: its segments in order."""

    segments: tuple[Segment, ...]

    @property
    def videos(self) -> list[VideoSpec]:
        """The videos of the sample in order."""
        return [s for s in self.segments if isinstance(s, VideoSpec)]

    @cached_property
    def tokens(self) -> int:
        """Length of the sample."""
        return sum(s.tokens if isinstance(s, VideoSpec) else s for s in self.segments)


@dataclass(frozen=True)
class PackSpec:
    """Samples of one pack and the isolated padding sample that brings it to its length.

    Attributes:
        samples: the samples in order.
        padding: tokens of the padding sample at the end (0: there is none).
    """

    samples: tuple[SampleSpec, ...]
    padding: int = 0

    @property
    def tokens(self) -> int:
        """Length of the pack, padding included."""
        return sum(s.tokens for s in self.samples) + self.padding

    @property
    def lengths(self) -> list[int]:
        """Length of each sample, the padding sample last."""
        return [s.tokens for s in self.samples] + ([self.padding] if self.padding else [])

    @property
    def videos(self) -> list[VideoSpec]:
        """The videos of all samples in order."""
        return [v for s in self.samples for v in s.videos]

    @property
    def frame_sizes(self) -> np.ndarray:
        """``[F, 2]`` int64, ``(Hp, Wp)`` of each frame of all videos."""
        return np.concatenate([np.empty((0, 2), np.int64), *(v.frame_sizes for v in self.videos)])

    def pooled(self, window: int) -> PackSpec:
        """The pack with each video pooled over time, see `VideoSpec.pooled`; the padding stays as it is."""
        samples = (
            SampleSpec(tuple(s.pooled(window) if isinstance(s, VideoSpec) else s for s in sample.segments))
            for sample in self.samples
        )
        return PackSpec(tuple(samples), self.padding)

    def padded_to(self, multiple: int) -> PackSpec:
        """The same pack with as much padding as makes its length a multiple of ``multiple``."""
        tokens = sum(s.tokens for s in self.samples)
        return PackSpec(self.samples, -tokens % multiple)

    def to_ints(self) -> list[int]:
        """The pack as plain numbers, to be sent or stored; `from_ints` reads them.

        Per segment: ``[text tokens]`` after a 0, or after a 1 the number of classes, the grids, the number of frames
        and the class of each. A video with one class sends no list of classes.
        """
        out = [len(self.samples), self.padding]
        for sample in self.samples:
            out.append(len(sample.segments))
            for segment in sample.segments:
                if isinstance(segment, int):
                    out += [0, segment]
                    continue
                out += [1, len(segment.grids), *(n for grid in segment.grids for n in grid), segment.frames]
                if len(segment.grids) > 1:
                    out += segment.frame_class
        return out

    @classmethod
    def from_ints(cls, numbers: list[int]) -> PackSpec:
        """Read what `to_ints` wrote."""
        it = iter(numbers)
        n_samples, padding = next(it), next(it)
        samples = []
        for _ in range(n_samples):
            segments: list[Segment] = []
            for _ in range(next(it)):
                if next(it) == 0:
                    segments.append(next(it))
                    continue
                grids = tuple((next(it), next(it)) for _ in range(next(it)))
                frames = next(it)
                classes = tuple(islice(it, frames)) if len(grids) > 1 else (0,) * frames
                if len(classes) < frames:
                    raise ValueError(f"the numbers end after {len(classes)} of {frames} frame classes")
                segments.append(VideoSpec(grids, classes))
            samples.append(SampleSpec(tuple(segments)))
        return cls(tuple(samples), padding)
