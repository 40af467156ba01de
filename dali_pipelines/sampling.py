"""Which frames of a video are taken."""

from __future__ import annotations


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
