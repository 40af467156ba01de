"""What decodes: DALI on the device, or PyAV. Chosen once at the start and said in a line."""

from __future__ import annotations

from dataclasses import dataclass

from dali_pipelines.codecs import NativeCodecs, dali_missing, native
from megatron_elva.config.errors import ConfigError, InputError


@dataclass(frozen=True)
class Route:
    """What decodes.

    Attributes:
        native: codecs that DALI decodes on the device; PyAV decodes the rest. None: PyAV decodes all.
        about: one line, the choice and its reason.
    """

    native: NativeCodecs | None
    about: str


def choose_route(decoder: str, device: str) -> Route:
    """Choose by ``data.decoder`` and by what the device decodes, which is tried and never assumed.

    Args:
        decoder: ``auto``, ``dali`` or ``pyav``.
        device: ``cpu`` or ``cuda:0`` and the like.

    Raises:
        InputError: ``dali`` is wanted and not there.
        ConfigError: another word.
    """
    if decoder not in ("auto", "dali", "pyav"):
        raise ConfigError(f"data.decoder: {decoder}; allowed: auto, dali, pyav")
    if decoder == "pyav":
        return Route(None, "decoding: PyAV (data.decoder=pyav)")
    if decoder == "auto" and device == "cpu":
        return Route(None, "decoding: PyAV (data.decoder=auto: on a CPU it is faster than DALI)")
    missing = dali_missing()
    if missing is not None:
        if decoder == "dali":
            raise InputError(f"data.decoder=dali: {missing}")
        return Route(None, f"decoding: PyAV (data.decoder=auto: {missing})")
    found = native(device)
    if not found.formats:
        if decoder == "dali":
            raise InputError(f"data.decoder=dali: DALI decodes nothing on {device}: {found.describe()}")
        return Route(None, f"decoding: PyAV (data.decoder=auto: DALI decodes nothing on {device}: {found.describe()})")
    return Route(found, f"decoding: DALI on {device} for {found.describe()}; PyAV for the rest")
