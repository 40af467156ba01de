"""The global order of samples, as a function of the sample's number alone.

Nothing is counted up while training runs: sample number i of a run is the same on every rank, in every process and
after every restart.
"""

from __future__ import annotations

from collections import OrderedDict
from fractions import Fraction
from zlib import crc32

import numpy as np

from megatron_elva.config.errors import ConfigError

BLOCK = 1024
"""Sample numbers that are shuffled together; each block holds every source's exact share."""

_BLOCKS, _PERMUTATION = 0, 1  # keep the two uses of one seed apart


def shuffled(n: int, *seed: int) -> np.ndarray:
    """A permutation of ``n`` numbers, ``[n]`` int64, that depends on the seed alone and not on numpy's version."""
    # Only the raw streams of bit generators are promised to stay as they are, not Generator.permutation.
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(keys, kind="stable")


class Blend:
    """An endless mixture of sources.

    ``blend[i]`` is ``(source, index, epoch)`` of global sample i. Every source is gone through completely, in an order
    of its own for each epoch, before any of its samples comes again.
    """

    def __init__(self, sizes: dict[str, int], weights: dict[str, float], seed: int) -> None:
        """Make a blend.

        Args:
            sizes: samples in each source.
            weights: relative weight of each source; zero leaves it out.
            seed: not negative.
        """
        for name, weight in weights.items():
            if name not in sizes:
                raise ConfigError(f"stage.blend.{name}: no such source; allowed: {', '.join(sorted(sizes))}")
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"stage.blend.{name}: {weight}; allowed: a number of at least 0")
            if weight and not sizes[name]:
                raise ConfigError(f"stage.blend.{name}: the source has no samples")
        # Sorted, so that the order of keys in a file does not matter.
        self.names = sorted(name for name, weight in weights.items() if weight > 0)
        if not self.names:
            raise ConfigError("stage.blend: needs a source with a weight above 0")
        self.sizes = [sizes[name] for name in self.names]
        self.seed = seed
        left = sum(Fraction(weights[name]) for name in self.names)
        self._share_of_rest: list[Fraction] = []
        for name in self.names:
            self._share_of_rest.append(Fraction(weights[name]) / left)
            left -= Fraction(weights[name])
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def counts(self, n: int) -> list[int]:
        """How many of the first ``n`` samples come from each source: its share to within the number of sources.

        Each source in turn takes its share, rounded down, of what the ones before it left. Every step grows with ``n``
        by 0 or 1, so counts never fall, they add up to ``n``, and the rounding does not drift (exact fractions).
        """
        taken = []
        for share in self._share_of_rest:
            taken.append(n * share.numerator // share.denominator)
            n -= taken[-1]
        return taken

    def __getitem__(self, i: int) -> tuple[str, int, int]:
        """Source, index within it, and epoch of that source, of global sample ``i``."""
        if i < 0:
            raise IndexError(f"sample numbers start at 0, got {i}")
        block, offset = divmod(i, BLOCK)
        sources, ordinals = self._block(block)
        source = int(sources[offset])
        epoch, at = divmod(int(ordinals[offset]), self.sizes[source])
        return self.names[source], int(self._order(source, epoch)[at]), epoch

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each number of a block, and how many of that source came before it in the whole run."""
        if block not in self._blocks:
            before, after = self.counts(block * BLOCK), self.counts((block + 1) * BLOCK)
            here = [b - a for a, b in zip(before, after, strict=True)]
            order = shuffled(BLOCK, _BLOCKS, self.seed, block)
            sources = np.repeat(np.arange(len(here)), here)[order]
            ordinals = np.empty(BLOCK, np.int64)
            for source, first in enumerate(before):
                mine = sources == source
                ordinals[mine] = first + np.arange(int(mine.sum()))
            self._blocks[block] = sources, ordinals
            if len(self._blocks) > 4:
                self._blocks.popitem(last=False)
        return self._blocks[block]

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """The permutation of a source in one epoch; those last used are kept."""
        at = source, epoch
        if at not in self._orders:
            name = crc32(self.names[source].encode())  # not its number: other sources must not change its order
            order = shuffled(self.sizes[source], _PERMUTATION, self.seed, name, epoch)
            self._orders[at] = order.astype(np.int32) if self.sizes[source] < 2**31 else order
            if len(self._orders) > 2 * len(self.names):
                self._orders.popitem(last=False)
        self._orders.move_to_end(at)
        return self._orders[at]

    def __getstate__(self) -> dict[str, object]:
        """Leave the caches out when sent to another process."""
        return {**self.__dict__, "_blocks": OrderedDict(), "_orders": OrderedDict()}
