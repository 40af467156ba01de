"""Writes the merge index of every video of a step to a file, to look for faults with (`debug.dump_merge_index`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_elva.layout import Pack
from megatron_elva.parallel.engine import Engine

Entry = tuple[int, int, int, int, int, int, np.ndarray]
"""Replica, microbatch, merge point, sample, video of the sample, class of the video, ``[T, cells]`` uint8."""


def dump_merge_index(engine: Engine, packs: Sequence[Pack | None], path: Path) -> None:
    """Gather what every pipeline rank merged in the last step and write one file; all ranks call it.

    Keys: ``<sample key>/<video>/point_<i>`` (uint8 ``[T, cells]``, 1 where a cell still has its own token; with several
    resolution classes ``.../point_<i>/class_<c>``) and ``<sample key>/<video>/kept`` (float64, the share of the video's
    cells with their own token after each merge point). Nothing in them depends on padding or the parallel layout.
    """
    ranks = engine.ranks
    entries = _entries(engine) if ranks.tensor == 0 else []
    keys = [[] if pack is None else pack.keys for pack in packs] if ranks.is_reader else []
    gathered: list[tuple[int, list[Entry], list[list[str]]] | None] = [None] * ranks.world
    dist.all_gather_object(gathered, (ranks.data, entries, keys))
    if ranks.rank:
        return
    parts = [part for part in gathered if part is not None]
    names = _names({data: own for data, _, own in parts if own})
    arrays = _arrays([entry for _, own, _ in parts for entry in own], names)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}")
    with half.open("wb") as f:
        np.savez_compressed(f, **arrays)  # type: ignore[arg-type]
    half.replace(path)


def _entries(engine: Engine) -> list[Entry]:
    out = []
    for micro, point, state in engine.merge_indices():
        first: dict[int, int] = {}
        for klass, matrix in zip(state.tubes.classes, state.merge_index(), strict=True):
            video = klass.video - first.setdefault(klass.sample, klass.video)
            out.append((engine.ranks.data, micro, point, klass.sample, video, klass.number, matrix.numpy()))
    return out


def _names(keys: dict[int, list[list[str]]]) -> dict[tuple[int, int, int], str]:
    """Name of each sample by replica, microbatch and place; one that comes twice in a step gets a number."""
    seen: Counter[str] = Counter()
    out = {}
    packs = [(micro, data, pack) for data, own in keys.items() for micro, pack in enumerate(own)]
    for micro, data, pack in sorted(packs, key=lambda p: p[:2]):  # the order of the samples, whatever the replicas
        for place, key in enumerate(pack):
            seen[key] += 1
            out[data, micro, place] = key if seen[key] == 1 else f"{key}#{seen[key]}"
    return out


def _arrays(entries: Sequence[Entry], names: dict[tuple[int, int, int], str]) -> dict[str, np.ndarray]:
    by_video: dict[str, dict[int, dict[int, np.ndarray]]] = {}
    for data, micro, point, sample, video, klass, matrix in sorted(entries, key=lambda e: e[:6]):
        points = by_video.setdefault(f"{names[data, micro, sample]}/{video}", {})
        points.setdefault(point, {})[klass] = matrix
    out: dict[str, np.ndarray] = {}
    for name, video_points in by_video.items():
        for point, classes in video_points.items():
            one = len(classes) == 1
            for klass, matrix in classes.items():
                out[f"{name}/point_{point}" + ("" if one else f"/class_{klass}")] = matrix
        shares = [sum(m.sum() for m in c.values()) / sum(m.size for m in c.values()) for c in video_points.values()]
        out[f"{name}/kept"] = np.array(shares, dtype=np.float64)
    return out
