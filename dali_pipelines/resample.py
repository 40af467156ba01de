"""Scaling of frames, equal bit for bit to DALI's ``fn.resize`` on a CPU.

The two routes of decoding must give the same pixels, so the PyAV route cannot take any other scaler. DALI filters one
axis after the other: uint8 -> float32 -> uint8, with a cubic filter that is stretched when the axis shrinks. What
decides the last bit is kept here: weights interpolated in a table of float32, taps added one by one without fused
multiply-add, the order of the axes, and ties that its vector code rounds to even and its scalar code away from zero.
Found for DALI 2.4.0 on x86; the tests compare with the DALI that is installed.

Shape letters: T frames, H and W pixels before and h and w after, S taps, n lines before and m after, L values a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_F = np.float32
_TABLE_SIZE = 129  # samples of the cubic on [-2, 2]
_MIDDLE = 64
_MAX_TAPS = 8192  # wider filters are cut to this
_LANES = 16  # pixels (or values) that the vector code takes at once; what is left of a line goes through scalar code
_BLOCK = 1 << 14  # values worked on at once, so that they stay in the cache
_CHUNK = 1 << 23  # values of the source that are float32 at one time


@dataclass(frozen=True)
class _Taps:
    """The filter of one axis.

    Attributes:
        first: ``[m]`` int64, the source line of the first tap; may lie outside, where edge lines are repeated.
        weights: ``[S, m]`` float32.
    """

    first: np.ndarray
    weights: np.ndarray


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale frames with a cubic filter; where they shrink, the filter takes in all the pixels.

    Args:
        frames: ``[T, H, W, 3]`` uint8.
        height: h, at least 1.
        width: w, at least 1.

    Returns:
        ``[T, h, w, 3]`` uint8; the input itself if it has that size.
    """
    if height < 1 or width < 1:
        raise ValueError(f"resize: {height}x{width}; both sides must be at least 1")
    n_frames, before_h, before_w, channels = frames.shape
    if (before_h, before_w) == (height, width):
        return frames
    out = np.empty((n_frames, height, width, channels), np.uint8)
    at_once = max(1, _CHUNK // max(before_h * before_w * channels, 1))
    for i in range(0, n_frames, at_once):
        out[i : i + at_once] = _resize(frames[i : i + at_once], height, width)
    return out


def _resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """`resize` of a few frames."""
    t, before_h, before_w, c = frames.shape
    if _vertical_first((before_h, before_w), (height, width)):
        lines = _vertical(frames.astype(_F), height)
        columns = _columns(lines)
        columns = _filter(columns[None], before_w, width)[0]
        _round(columns, _scalar_columns(before_w, width))
        return columns.astype(np.uint8).reshape(width, t, height, c).transpose(1, 2, 0, 3)
    columns = _filter(_columns(frames).astype(_F)[None], before_w, width)[0]
    lines = np.ascontiguousarray(columns.reshape(width, t, before_h, c).transpose(1, 2, 0, 3))
    lines = _vertical(lines, height).reshape(t * height, width * c)
    _round(lines.T, np.arange(width * c) >= width * c // _LANES * _LANES)
    return lines.astype(np.uint8).reshape(t, height, width, c)


def _columns(frames: np.ndarray) -> np.ndarray:
    """``[T, H, W, 3]`` -> ``[W, T * H * 3]``, so that a column of all frames is one line."""
    return np.ascontiguousarray(frames.transpose(2, 0, 1, 3)).reshape(frames.shape[2], -1)


def _vertical(frames: np.ndarray, height: int) -> np.ndarray:
    """``[T, H, w, 3]`` float32 -> ``[T, h, w, 3]`` float32."""
    t, before, width, c = frames.shape
    return _filter(frames.reshape(t, before, width * c), before, height).reshape(t, height, width, c)


def _filter(planes: np.ndarray, before: int, after: int) -> np.ndarray:
    """Filter along axis 1: ``[T, n, L]`` float32 -> ``[T, m, L]`` float32, before rounding."""
    if before == after:
        return planes  # the filter is 1 at its centre and 0 at every other whole number
    taps = _taps(before, after)
    n_planes, _, length = planes.shape
    out = np.empty((n_planes, after, length), _F)
    step = min(length, _BLOCK)
    rows = max(1, _BLOCK // step)
    product = np.empty((rows, step), _F)
    source = np.clip(taps.first + np.arange(len(taps.weights))[:, None], 0, before - 1)
    for plane, filtered in zip(planes, out, strict=True):
        for y in range(0, after, rows):
            index, weights = source[:, y : y + rows], taps.weights[:, y : y + rows, None]
            for x in range(0, length, step):
                into = filtered[y : y + rows, x : x + step]
                buffer = product[: into.shape[0], : into.shape[1]]
                _weighted_sum(plane[:, x : x + step], index, weights, buffer, into)
    return out


def _weighted_sum(
    lines: np.ndarray, index: np.ndarray, weights: np.ndarray, buffer: np.ndarray, into: np.ndarray
) -> None:
    """Add the taps one by one, as DALI does: ``into[j] = sum over k of lines[index[k, j]] * weights[k, j]``."""
    for k in range(len(index)):
        target = buffer if k else into
        if len(target) == 1:
            np.multiply(lines[index[k, 0]], weights[k, 0, 0], out=target[0])
        else:
            np.multiply(lines[index[k]], weights[k], out=target)
        if k:
            np.add(into, buffer, out=into)


def _round(lines: np.ndarray, scalar: np.ndarray) -> None:
    """Round and clip to 0..255 in place: lines where ``scalar`` ``[n]`` is set have ties upwards, others to even."""
    ties = lines[scalar]
    whole = np.rint(ties)
    whole += ties - whole == _F(0.5)
    np.rint(lines, out=lines)
    lines[scalar] = whole
    np.clip(lines, 0, 255, out=lines)


def _scalar_columns(before: int, after: int) -> np.ndarray:
    """``[w]`` bool: the columns that DALI's horizontal pass leaves to scalar code.

    It takes the columns whose taps stick out on the left, those inside and those that stick out on the right apart, and
    in each stretch what is left after whole vectors is scalar.
    """
    taps = _taps(before, after)
    left = int(np.count_nonzero(taps.first < 0))
    inside = int(np.count_nonzero(taps.first + len(taps.weights) <= before))
    scalar = np.zeros(after, bool)
    at = 0
    for end in (min(left, inside), left, inside, after):
        if end > at:
            scalar[at + (end - at) // _LANES * _LANES : end] = True
            at = end
    return scalar


def _vertical_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Which axis DALI filters first: the order that it holds for cheaper. Sizes are ``(height, width)``."""
    taps = [_support(n, m)[0] for n, m in zip(before, after, strict=True)]

    def cost(axis: int, pixels: int) -> np.float32:
        weight = (_F(1.0), _F(1.4))[axis]
        return weight * _F(taps[axis] * pixels) + _F(pixels) * _F(3)

    area = after[0] * after[1]
    vertical = cost(0, after[0] * before[1]) + cost(1, area)
    horizontal = cost(1, before[0] * after[1]) + cost(0, area)
    return bool(vertical < horizontal)


def _support(before: int, after: int) -> tuple[int, np.float32, np.float32]:
    """Taps of an axis, where their centre lies among them, and steps of the table between two taps."""
    radius = max(_F(2), _F(2 * before) / _F(after))
    step = _F(_TABLE_SIZE - 1) / min(_F(2) * radius, _F(_MAX_TAPS))
    return int(np.ceil(_F(_TABLE_SIZE - 1) / step)), _F(_MIDDLE) / step, step


@lru_cache(maxsize=256)
def _taps(before: int, after: int) -> _Taps:
    """The filter that brings an axis from ``before`` to ``after`` pixels. All in float32, in DALI's order."""
    count, centre, step = _support(before, after)
    scale = _F(before) / _F(after)
    start = (_F(0.5) * scale - _F(0.5)) - centre
    position = np.arange(after, dtype=_F) * scale + start
    first = np.ceil(position)
    at = ((first - position) + np.arange(count, dtype=_F)[:, None]) * step
    table = np.append(_cubic_table(), _F(0))
    below = np.clip(at.astype(np.int64), 0, _TABLE_SIZE - 1)
    weights = table[below] + (at - below.astype(_F)) * (table[below + 1] - table[below])
    weights[at >= _TABLE_SIZE] = 0
    total = np.zeros(after, _F)
    for row in weights:
        total += row
    weights /= np.where(total == 0, _F(1), total)
    return _Taps(first.astype(np.int64), weights)


@lru_cache(maxsize=1)
def _cubic_table() -> np.ndarray:
    """``[129]`` float32: the cubic with a = -1/2 at equal steps on [-2, 2]."""
    x = np.abs(_F(4) * (np.arange(_TABLE_SIZE, dtype=_F) - _F(_MIDDLE)) / _F(_TABLE_SIZE - 1))
    square = x * x
    cube = square * x
    inner = _F(1.5) * cube - _F(2.5) * square + _F(1)
    outer = _F(-0.5) * cube + _F(2.5) * square - _F(4) * x + _F(2)
    return np.where(x > 1, outer, inner).astype(_F)
