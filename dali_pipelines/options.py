"""What the config says about watching a video, as small values that every decoder shares."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_elva.config.errors import ConfigError
from megatron_elva.config.schema import DataConfig, ModelConfig

FITS = ("crop", "pad")
"""How height and width become whole cells."""

SAMPLINGS = ("uniform", "rate", "clip", "timestamps")
"""Which frames of a video are taken."""

_HYBRID = re.compile(r"hi=(\d+),lo=(\d+),k=(\d+)")


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken, see `dali_pipelines.sampling.choose`.

    Attributes:
        mode: one of `SAMPLINGS`.
        frames: frames taken at most.
        rate: frames a second, with ``rate`` and within a ``clip``.
        clip_seconds: length of a ``clip``.

    Raises:
        ConfigError: a value that cannot be used, or one that is missing.
    """

    mode: str
    frames: int
    rate: float | None = None
    clip_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in SAMPLINGS:
            raise ConfigError(f"data.sampling: {self.mode!r}; allowed: {', '.join(SAMPLINGS)}")
        if self.frames < 1:
            raise ConfigError(f"data.frames: {self.frames}; allowed: at least 1")
        for name, value, mode in (("rate", self.rate, "rate"), ("clip_seconds", self.clip_seconds, "clip")):
            if value is None and self.mode == mode:
                raise ConfigError(f"data.{name}: null; data.sampling={mode} needs a number above 0")
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"data.{name}: {value}; allowed: a number above 0")


@dataclass(frozen=True)
class Hybrid:
    """Two resolution classes: of each ``1 + k`` frames the first is large and the others are small.

    Attributes:
        hi: a large frame has at most ``hi * hi`` pixels.
        lo: a small frame has at most ``lo * lo``.
        k: small frames after each large one.

    Raises:
        ConfigError: the numbers do not fit each other.
    """

    hi: int
    lo: int
    k: int

    def __post_init__(self) -> None:
        if not 1 <= self.lo <= self.hi or self.k < 1:
            raise ConfigError(f"data.hybrid: {self}; allowed: hi at least lo, lo and k at least 1")

    @classmethod
    def parse(cls, text: str) -> Hybrid:
        """Read ``hi=336,lo=168,k=3``."""
        found = _HYBRID.fullmatch(text.replace(" ", ""))
        if found is None:
            raise ConfigError(f"data.hybrid: {text!r}; allowed: a text such as hi=336,lo=168,k=3, or null")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"hi={self.hi},lo={self.lo},k={self.k}"


@dataclass(frozen=True)
class Limits:
    """What a file may be at most; anything beyond is refused before it is decoded.

    Attributes:
        pixels: area of a frame.
        frames: frames of the video.
        bytes: size of the file.
        seconds: length of the video.
    """

    pixels: int
    frames: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class VisionOptions:
    """All that decides what the model sees of a file.

    Attributes:
        sampling: which frames.
        patch: side of a patch in pixels (P).
        reduction: patches per side of a cell (r).
        fit: one of `FITS`.
        max_pixels: area of a frame at most; larger ones are scaled down. None: no bound.
        hybrid: two resolution classes, or None.
        limits: what a file may be at most.

    Raises:
        ConfigError: an unknown ``fit``, or sizes below 1.
    """

    sampling: Sampling
    patch: int
    reduction: int
    fit: str
    max_pixels: int | None
    hybrid: Hybrid | None
    limits: Limits

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ConfigError(f"data.fit: {self.fit!r}; allowed: {', '.join(FITS)}")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ConfigError(f"data.max_pixels: {self.max_pixels}; allowed: at least 1, or null")
        if self.patch < 1 or self.reduction < 1:
            raise ConfigError(
                f"model.patch_size, model.cell_reduction: {self.patch}, {self.reduction}; at least 1 each"
            )

    @classmethod
    def from_config(cls, data: DataConfig, model: ModelConfig) -> VisionOptions:
        """Gather them from a config.

        Raises:
            ConfigError: names the key that cannot be used.
        """
        return cls(
            sampling=Sampling(data.sampling, data.frames, data.rate, data.clip_seconds),
            patch=model.patch_size,
            reduction=model.cell_reduction,
            fit=data.fit,
            max_pixels=data.max_pixels,
            hybrid=None if data.hybrid is None else Hybrid.parse(data.hybrid),
            limits=Limits(
                pixels=data.max_source_pixels,
                frames=data.max_source_frames,
                bytes=data.max_source_mb * 10**6,
                seconds=data.max_source_seconds,
            ),
        )

    @property
    def side(self) -> int:
        """Side of a cell in pixels."""
        return self.patch * self.reduction
