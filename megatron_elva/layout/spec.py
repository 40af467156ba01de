"""What a pack is made of, in numbers: samples of text segments and videos. Everything else about positions follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


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
        return [self.grids[c] for c in self.frame_class]

    @property
    def cells(self) -> int:
        """Cells in all frames."""
        return sum(h * w for h, w in self.frame_grids)

    @property
    def tokens(self) -> int:
        """Length of the visual span: a FRAME, and for each row its cells and a LINE."""
        return sum(1 + h * (w + 1) for h, w in self.frame_grids)


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
                classes = tuple(next(it) for _ in range(frames)) if len(grids) > 1 else (0,) * frames
                segments.append(VideoSpec(grids, classes))
            samples.append(SampleSpec(tuple(segments)))
        return cls(tuple(samples), padding)
