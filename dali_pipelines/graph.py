"""The DALI pipeline: encoded bytes or decoded frames in, patches out. One definition for CPU and GPU.

Only ``device`` changes: ``fn.decoders.video`` is ``cpu`` or ``mixed``, and everything after it runs where its input
lies. All sizes come in as numbers that `dali_pipelines.geometry` computed, so the graph decides nothing. On a CPU the
result equals `dali_pipelines.decode.watch` bit for bit.

Files reach DALI's decoder only through `dali_pipelines.remux.sparse`: the header of a user's file may promise frames
that are not there, and DALI then gave pixels of an earlier clip.

Not verified, for want of a GPU: conditionals around the ``mixed`` decoder, batches in which no sample takes one of the
routes, the hand-over of device memory to torch, and how far NVDEC's colours and the GPU's ``fn.resize`` are from those
of the CPU (close, not equal).

Shape letters: T frames, H and W pixels, P side of a patch, r patches per side of a cell, N cells of all frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.geometry import Fit, Geometry

CLASSES = 2
"""Resolution classes that one video may have."""

_BATCH_BYTES = 1 << 29  # of frames in one run, before scaling; a single video may have more
_TURNS = {0: (0, 0, 0), 1: (1, 1, 0), 2: (0, 1, 1), 3: (1, 0, 1)}
"""np.rot90 as: swap height and width, then flip rows, flip columns."""


@dataclass(frozen=True)
class GraphItem:
    """One video for the graph.

    Attributes:
        data: a file of `dali_pipelines.remux.sparse`, which DALI decodes, or None.
        indices: frames of that file, one for each frame of the geometry.
        frames: ``[T, H, W, 3]`` uint8 RGB as coded, where PyAV has decoded them, or None.
        geometry: how frames become cells.
    """

    data: bytes | None
    indices: Sequence[int]
    frames: np.ndarray | None
    geometry: Geometry

    def __post_init__(self) -> None:
        if (self.data is None) == (self.frames is None):
            raise ValueError("a video for the graph has either data or frames")
        given = len(self.indices) if self.frames is None else len(self.frames)
        if given != len(self.geometry.frame_class):
            raise ValueError(f"{given} frames for a geometry of {len(self.geometry.frame_class)}")
        if not 1 <= len(self.geometry.classes) <= CLASSES:
            raise ValueError(f"{len(self.geometry.classes)} resolution classes; the graph takes up to {CLASSES}")

    @property
    def source_bytes(self) -> int:
        """Size of its frames before scaling."""
        height, width = self.geometry.native
        return len(self.geometry.frame_class) * height * width * 3


class DeviceDecoder:
    """Makes patches of videos on one device.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        max_batch: videos that go through the graph at once.
        patch: side of a patch in pixels (P).
        reduction: patches per side of a cell (r).
        threads: CPU threads of the graph.
    """

    def __init__(self, device: str, max_batch: int, patch: int, reduction: int, threads: int = 2) -> None:
        self.device, self.max_batch = torch.device(device), max_batch
        self.patch, self.reduction, self.threads = patch, reduction, threads
        self._graph = self._built()
        self._copies = None if self.device.type == "cpu" else torch.cuda.Stream(self.device)

    def decode(self, items: Sequence[GraphItem]) -> list[Tensor | str]:
        """Decode videos, any number of them.

        Args:
            items: the videos, with a geometry of this decoder's cells.

        Returns:
            For each video its patches ``[N * r * r, P * P * 3]`` uint8 on the device, cells in the order of frames, or
            one line that says why it cannot be decoded; the others come all the same.
        """
        side = self.patch * self.reduction
        for item in items:
            if item.geometry.side != side:
                raise ValueError(f"a geometry with cells of {item.geometry.side} pixels; the graph's have {side}")
        return [out for batch in self._batches(items) for out in self._isolated(batch)]

    def _built(self) -> Any:
        return _build(self.device, self.max_batch, self.threads)

    def _batches(self, items: Sequence[GraphItem]) -> Iterator[list[GraphItem]]:
        """Cut where a batch would hold too many videos or too many bytes."""
        batch: list[GraphItem] = []
        size = 0
        for item in items:
            if batch and (len(batch) == self.max_batch or size + item.source_bytes > _BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += item.source_bytes
        if batch:
            yield batch

    def _isolated(self, batch: list[GraphItem]) -> list[Tensor | str]:
        """Run a batch; where DALI fails, its halves, down to the videos that make it fail."""
        try:
            return self._run(batch)
        except RuntimeError as error:
            self._graph = self._built()  # after an error DALI says that its pipeline is no longer valid
            if len(batch) == 1:
                return [_reason(error)]
            half = len(batch) // 2
            return self._isolated(batch[:half]) + self._isolated(batch[half:])

    def _run(self, batch: list[GraphItem]) -> list[Tensor | str]:
        rows = [self._inputs(item) for item in batch]
        for name in rows[0]:
            self._graph.feed_input(name, [row[name] for row in rows])
        shapes, *outputs = self._graph.run()

        def joined() -> list[Tensor | str]:
            return [self._joined(item, np.array(shapes[i]), [o[i] for o in outputs]) for i, item in enumerate(batch)]

        if self._copies is None:
            return joined()
        # DALI takes its memory back once the outputs are let go: by then the copies must be done. On the stream of the
        # training they would wait for all steps that are queued there
        with torch.cuda.stream(self._copies):
            made = joined()
        for patches in made:
            if isinstance(patches, Tensor):
                patches.record_stream(torch.cuda.default_stream(self.device))
        self._copies.synchronize()
        return made

    def _inputs(self, item: GraphItem) -> dict[str, np.ndarray]:
        """What the graph reads of one video, by the names in `_INPUTS`."""
        geometry = item.geometry
        swap, flip_rows, flip_columns = _TURNS[geometry.turns]
        inputs: dict[str, Any] = {
            "native": item.data is not None,
            "data": np.frombuffer(item.data or b"\0", np.uint8),
            "indices": item.indices if item.data is not None else [0],
            "frames": np.zeros((1, 1, 1, 3), np.uint8) if item.frames is None else item.frames,
            "turned": geometry.turns != 0,
            "swap": swap,
            "flip_rows": flip_rows,
            "flip_columns": flip_columns,
            "several": len(geometry.classes) > 1,
        }
        for c in range(CLASSES):
            used = min(c, len(geometry.classes) - 1)
            inputs |= self._class_inputs(c, geometry, geometry.classes[used], used)
        return {name: np.asarray(value, _NUMPY[_INPUTS[name][0]], order="C") for name, value in inputs.items()}

    def _class_inputs(self, c: int, geometry: Geometry, fit: Fit, used: int) -> dict[str, Any]:
        order = [i for i, of in enumerate(geometry.frame_class) if of == used]
        rows, columns, r = fit.height // geometry.side, fit.width // geometry.side, self.reduction
        return {
            f"order_{c}": order,
            f"scaled_{c}": fit.size != geometry.native,
            f"size_{c}": fit.size,
            f"cut_{c}": fit.size != (fit.height, fit.width),
            f"start_{c}": (fit.top, fit.left),
            f"shape_{c}": (fit.height, fit.width),
            f"split_{c}": (len(order) * rows, r, self.patch, columns, r, self.patch * 3),
            f"flat_{c}": (len(order) * rows * columns * r * r, self.patch**2 * 3),
        }

    def _joined(self, item: GraphItem, shape: np.ndarray, outputs: Sequence[Any]) -> Tensor | str:
        """The patches of all classes with their frames in order, if the frames were what the geometry says."""
        geometry = item.geometry
        expected = (len(geometry.frame_class), *(geometry.native[::-1] if geometry.turns % 2 else geometry.native), 3)
        if tuple(shape.tolist()) != expected:
            return f"DALI gave frames of another size or number: {shape.tolist()}, not {list(expected)}"
        per_frame = [f.height * f.width // self.patch**2 for f in geometry.classes]
        made = [torch.from_dlpack(out) for out in outputs[: len(per_frame)]]
        if len(made) == 1:
            return made[0] if self.device.type == "cpu" else made[0].clone()
        parts = [iter(m.split(n)) for m, n in zip(made, per_frame, strict=True)]
        return torch.cat([next(parts[c]) for c in geometry.frame_class])


_COMMON = {
    "native": ("int", 0),
    "data": ("byte", 1),
    "indices": ("int", 1),
    "frames": ("byte", 4),
    "turned": ("int", 0),
    "swap": ("int", 0),
    "flip_rows": ("int", 0),
    "flip_columns": ("int", 0),
    "several": ("int", 0),
}
_BY_CLASS = {
    "order": ("int", 1),
    "scaled": ("int", 0),
    "size": ("float", 1),
    "cut": ("int", 0),
    "start": ("int", 1),
    "shape": ("int", 1),
    "split": ("int", 1),
    "flat": ("int", 1),
}
_NUMPY: dict[str, type[np.generic]] = {"int": np.int32, "byte": np.uint8, "float": np.float32}
_INPUTS = _COMMON | {f"{name}_{c}": kind for name, kind in _BY_CLASS.items() for c in range(CLASSES)}
"""Kind of numbers, and dimensions, of each input of the graph."""


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what went wrong."""
    said = str(error).rpartition("encountered:")[2].partition("C++ context:")[0]
    return f"DALI cannot decode it: {' '.join(said.split())}"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _build(device: torch.device, max_batch: int, threads: int) -> Any:
    """Build the graph for a device. What it computes is the same for all of them."""
    # by name, so that types are checked alike with and without DALI
    fn, types = import_module("nvidia.dali.fn"), import_module("nvidia.dali.types")
    pipeline_def = import_module("nvidia.dali").pipeline_def

    kinds = {"int": types.INT32, "byte": types.UINT8, "float": types.FLOAT}
    on_gpu = device.type != "cpu"
    decoder = "mixed" if on_gpu else "cpu"

    def source(name: str) -> Any:
        kind, dimensions = _INPUTS[name]
        layout = "FHWC" if name == "frames" else None
        return fn.external_source(name=name, dtype=kinds[kind], ndim=dimensions, layout=layout)

    def patches(frames: Any, given: dict[str, Any]) -> Any:
        """Frames of one class, ``[T, H, W, 3]`` upright -> ``[N * r * r, P * P * 3]``."""
        if given["scaled"] == 1:
            scaled = fn.resize(frames, size=given["size"], interp_type=types.INTERP_CUBIC, antialias=True)
        else:
            scaled = frames
        if given["cut"] == 1:
            whole = fn.slice(
                scaled, start=given["start"], shape=given["shape"], axis_names="HW", out_of_bounds_policy="edge"
            )
        else:
            whole = scaled
        split = fn.reshape(whole, shape=given["split"], layout="")
        ordered = fn.transpose(split, perm=[0, 3, 1, 4, 2, 5], transpose_layout=False)
        return fn.reshape(ordered, shape=given["flat"], layout="")

    @pipeline_def(
        batch_size=max_batch,
        num_threads=threads,
        device_id=_index(device) if on_gpu else None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def graph() -> Any:
        # sources stand before all conditions, which split what was made before them
        given = {name: source(name) for name in _COMMON}
        by_class = [{name: source(f"{name}_{c}") for name in _BY_CLASS} for c in range(CLASSES)]
        if given["native"] == 1:
            decoded = fn.decoders.video(given["data"], frames=given["indices"], device=decoder, pad_mode="none")
        else:
            decoded = given["frames"].gpu() if on_gpu else given["frames"]
        decoded = fn.reshape(decoded, layout="FHWC")
        if given["turned"] == 1:
            if given["swap"] == 1:
                swapped = fn.transpose(decoded, perm=[0, 2, 1, 3], transpose_layout=False)
            else:
                swapped = decoded
            upright = fn.flip(swapped, vertical=given["flip_rows"], horizontal=given["flip_columns"])
        else:
            upright = decoded
        if given["several"] == 1:
            first = fn.sequence_rearrange(upright, new_order=by_class[0]["order"])
            second = patches(fn.sequence_rearrange(upright, new_order=by_class[1]["order"]), by_class[1])
        else:
            first = upright
            second = fn.constant(shape=[1, 1], idata=[0], dtype=types.UINT8, device="gpu" if on_gpu else "cpu")
        return decoded.shape(dtype=types.INT32), patches(first, by_class[0]), second

    pipeline = graph()
    pipeline.build()
    return pipeline
