"""Decoded frames -> RGB with the very bits of DALI's decoder on a CPU.

DALI hands swscale bare planes: no matrix, no range and no place of the chroma samples, so it takes BT.601, limited
range (full for the ``yuvj`` formats) and chroma in the middle. Frames are brought to the same state here.
"""

from __future__ import annotations

import re
from typing import cast

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

_ACCURATE = int(Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND)
_OTHER_SIZE = int(Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND)
_COPY = int(Interpolation.POINT)
_UNSPECIFIED = (2, 0)  # libavutil's numbers for no matrix and no range
_PLANAR_YUV = re.compile(r"yuvj?(420|422|444)p(10le|12le)?")


class ToRgb:
    """Decoded frames of one file -> RGB of one size.

    Args:
        coded: ``(H, W)`` of the result; frames that change their size midway are scaled to it.
    """

    def __init__(self, coded: tuple[int, int]) -> None:
        self._coded = coded
        self._bare: VideoFrame | None = None
        self._planes: list[np.ndarray] = []
        self._first, self._second = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """``[H, W, 3]`` uint8 of some strides; it holds its own memory."""
        name = frame.format.name
        found = _PLANAR_YUV.fullmatch(name)
        bare = self._stripped(frame, name) if found else frame
        bare.colorspace, bare.color_range = _UNSPECIFIED
        height, width = self._coded
        if (frame.height, frame.width) != self._coded:
            return _pixels(self._first.reformat(bare, width, height, "rgb24", interpolation=_OTHER_SIZE, threads=1))
        if found and (found[1] != "420" or frame.height % 2 == 0):
            # through planes of red, green and blue: the same bits, and twice as fast since that is vector code
            planes = self._first.reformat(bare, format="gbrp", interpolation=_ACCURATE, threads=1)
            return _pixels(self._second.reformat(planes, format="rgb24", interpolation=_COPY, threads=1))
        return _pixels(self._first.reformat(bare, format="rgb24", interpolation=_ACCURATE, threads=1))

    def _stripped(self, frame: VideoFrame, name: str) -> VideoFrame:
        """The planes alone. The place of the chroma samples cannot be taken from a frame, so they are copied."""
        bare = self._bare
        if bare is None or (bare.width, bare.height, bare.format.name) != (frame.width, frame.height, name):
            bare = self._bare = av.VideoFrame(frame.width, frame.height, name)
            self._planes = [_lines(plane) for plane in bare.planes]
        for plane, lines, source in zip(bare.planes, self._planes, frame.planes, strict=True):
            if source.line_size == plane.line_size:
                plane.update(cast(bytes, source))  # in truth any buffer
            else:
                used = min(source.line_size, plane.line_size)
                lines[:, :used] = _lines(source)[:, :used]
        return bare


def _lines(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """The memory of a plane, ``[lines, bytes of a line]``."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)


def _pixels(rgb: VideoFrame) -> np.ndarray:
    """The pixels of an RGB frame, without a copy."""
    plane = rgb.planes[0]
    return np.ndarray((rgb.height, rgb.width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))
