"""Which frames of a video are taken: pure arithmetic on the times of its frames."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dali_pipelines.options import Sampling
from megatron_elva.config.errors import InputError

_ROUNDING = 1e-3  # seconds: Matroska and others round the times of frames to a millisecond


def choose(
    sampling: Sampling, times: np.ndarray, seed: Sequence[int] = (), timestamps: Sequence[float] | None = None
) -> list[int]:
    """Choose frames of a video.

    ``uniform`` spreads them over the video. ``rate`` takes the frame shown at every ``1 / rate`` seconds. ``clip``
    does the one or the other within a stretch of ``clip_seconds`` whose start is drawn from ``seed``. ``timestamps``
    takes the frame shown at each of the given times. Where these are more than ``sampling.frames``, that many of them
    are taken, spread uniformly.

    Args:
        sampling: the way, and the frames at most.
        times: ``[n]`` float64, seconds of each frame from the first, ascending, n at least 1.
        seed: whole numbers from 0 that stand for the sample and the epoch.
        timestamps: seconds from the first frame, in any order; those outside the video mean its first or last frame.

    Returns:
        Distinct indices in ascending order, at least one and at most ``sampling.frames``.

    Raises:
        InputError: ``timestamps`` are wanted and there are none, or they are no numbers.
    """
    if len(times) < 1:
        raise ValueError("sampling needs at least one frame")
    if sampling.mode == "uniform":
        return uniform(len(times), sampling.frames)
    if sampling.mode == "rate":
        assert sampling.rate is not None  # Sampling sees to it
        found = _at_rate(times, 0.0, _span(times), sampling.rate)
    elif sampling.mode == "clip":
        found = _clip(sampling, times, seed)
    else:
        found = _shown_at(times, _checked(timestamps))
    return [found[i] for i in uniform(len(found), sampling.frames)]


def uniform(n: int, k: int) -> list[int]:
    """Choose frames at the centres of ``k`` equal segments of a video.

    Args:
        n: frames that the video has, at least 1.
        k: frames wanted at most, at least 1.

    Returns:
        ``min(n, k)`` distinct indices in ascending order; all of them if the video is no longer than ``k``.
    """
    if n < 1 or k < 1:
        raise ValueError(f"sampling needs at least one frame on both sides, got n={n}, k={k}")
    if n <= k:
        return list(range(n))
    # (i + 1/2) n / k in whole numbers, so that no rounding of floats decides which frame is taken.
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def _span(times: np.ndarray) -> float:
    """Seconds until the last frame ends, if it is shown as long as the others on average."""
    n = len(times)
    return float(times[-1]) * n / (n - 1) if n > 1 else 0.0


def _shown_at(times: np.ndarray, stamps: np.ndarray) -> list[int]:
    """The frames on the screen at the given times, without repetition."""
    at = np.searchsorted(times, stamps + _ROUNDING, side="right") - 1
    return sorted(set(np.clip(at, 0, len(times) - 1).tolist()))


def _at_rate(times: np.ndarray, start: float, end: float, rate: float) -> list[int]:
    """The frames shown at start, start + 1 / rate and so on before the end."""
    count = max(math.ceil((end - start - _ROUNDING) * rate), 1)
    # the number of the first of these times at which each frame is already there
    first = np.clip(np.ceil((times - _ROUNDING - start) * rate), 0, count)
    return np.flatnonzero(first < np.append(first[1:], count)).tolist()


def _between(times: np.ndarray, start: float, end: float) -> range:
    """The frames that begin within a stretch."""
    first, last = np.searchsorted(times, (start - _ROUNDING, end - _ROUNDING), side="left").tolist()
    return range(first, last)


def _clip(sampling: Sampling, times: np.ndarray, seed: Sequence[int]) -> list[int]:
    """Frames of a stretch drawn at random, each start equally likely."""
    assert sampling.clip_seconds is not None  # Sampling sees to it
    generator = np.random.default_rng(np.random.SeedSequence([int(n) for n in seed]))
    room = max(_span(times) - sampling.clip_seconds, 0.0)
    start = room * float(generator.random())
    end = start + sampling.clip_seconds
    if sampling.rate is not None:
        return _at_rate(times, start, min(end, _span(times)), sampling.rate)
    inside = _between(times, start, end)
    return list(inside) or _shown_at(times, np.array([start]))


def _checked(timestamps: Sequence[float] | None) -> np.ndarray:
    """The timestamps as numbers."""
    if timestamps is None:
        raise InputError("no timestamps in the sample, data.sampling=timestamps needs at least one")
    try:
        stamps = np.asarray(timestamps, np.float64)
    except (TypeError, ValueError):
        stamps = np.array(np.nan)
    if stamps.ndim != 1 or not stamps.size or not np.isfinite(stamps).all():
        raise InputError(f"timestamps: {' '.join(str(timestamps).split())[:60]}; needed: a list of seconds")
    return stamps
