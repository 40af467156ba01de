"""A pack as the data side hands it to the model: one microbatch of samples in one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megatron_elva.layout.spec import PackSpec

IGNORE = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Skipped:
    """A sample that did not make it into its pack.

    Attributes:
        key: ``shard/key`` of the sample.
        reason: one line, what was wrong with it.
        stage: where that was found: ``read``, ``text``, ``decode``, ``length``, ``worker`` or ``quarantine``.
        replaced_by: key of the sample that took its place, None where the pack went without.
    """

    key: str
    reason: str
    stage: str = ""
    replaced_by: str | None = None


@dataclass
class Pack:
    """Samples in one sequence of S tokens.

    Attributes:
        spec: what the pack is made of.
        tokens: ``[S]`` int64, token ids; 0 at visual positions and padding.
        labels: ``[S]`` int64, the id that the position should predict (already shifted), `IGNORE` where none.
        patches: ``[N * r * r, P * P * 3]`` uint8, all videos in order, cell by cell; within a cell its ``r x r``
            patches row by row; within a patch row by row with the colours last. Empty on ranks that need no pixels.
        keys: the samples in the pack, ``shard/key``.
        skipped: samples of the stream that are not in the pack, or not in one after all.
        samples: samples drawn from the stream for this pack, the skipped ones included; replacements do not count.
        video_bytes: size of the encoded videos and images of the samples in the pack, known where the pack was read.
    """

    spec: PackSpec
    tokens: Tensor
    labels: Tensor
    patches: Tensor
    keys: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    samples: int = 0
    video_bytes: int = 0
