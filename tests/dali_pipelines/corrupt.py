"""Small clips of every codec and container, damaged in seeded ways, and worker processes that try them.

``python -m tests.dali_pipelines.corrupt KIND SEED [FILE]`` repeats one case (and writes the damaged file).
"""

import contextlib
import functools
import importlib
import io
import math
import multiprocessing as mp
import pickle
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image

from dali_pipelines.decode import measure, select, watch
from dali_pipelines.media import probe
from dali_pipelines.options import Hybrid, Limits, Sampling, VisionOptions
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import encode

SIDE, GRID, FRAMES = 64, 8, 9
QUICK = {
    "libx264": {"g": "4", "bf": "2", "preset": "ultrafast", "x264-params": "bframes=2:b-adapt=0:scenecut=0"},
    "libx265": {"x265-params": "keyint=4:bframes=2:log-level=none:pools=1:frame-threads=1", "preset": "ultrafast"},
    "libvpx": {"g": "4", "deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"g": "4", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "6"},
    "libsvtav1": {"g": "4", "preset": "12", "svtav1-params": "lp=1"},
    "mpeg4": {"g": "4", "bf": "1"},
}
VIDEOS = {
    "h264.mp4": ("mp4", "libx264"),
    "h264.mov": ("mov", "libx264"),
    "h264.mkv": ("matroska", "libx264"),
    "h264.avi": ("avi", "libx264"),
    "h264-faststart.mp4": ("mp4", "libx264"),
    "h264-pieces.mp4": ("mp4", "libx264"),
    "h264.ts": ("mpegts", "libx264"),
    "hevc.mp4": ("mp4", "libx265"),
    "hevc.mkv": ("matroska", "libx265"),
    "vp8.webm": ("webm", "libvpx"),
    "vp9.webm": ("webm", "libvpx-vp9"),
    "vp9.mp4": ("mp4", "libvpx-vp9"),
    "av1.mp4": ("mp4", "libsvtav1"),
    "av1.mkv": ("matroska", "libsvtav1"),
    "mjpeg.avi": ("avi", "mjpeg"),
    "mjpeg.mov": ("mov", "mjpeg"),
    "mjpeg.mkv": ("matroska", "mjpeg"),
    "mpeg4.avi": ("avi", "mpeg4"),
    "mpeg4.mp4": ("mp4", "mpeg4"),
}
IMAGES = ("still.gif", "moving.gif", "still.jpeg", "progressive.jpeg", "still.png", "still.webp", "lossless.webp")
KINDS = (*VIDEOS, *IMAGES)
MUXER = {"h264-faststart.mp4": {"movflags": "faststart"}, "h264-pieces.mp4": {"movflags": "frag_keyframe+empty_moov"}}

A, B, C, DONOR = range(4)
"""The clip that is damaged, two that are decoded right before it, and one that parts are taken from."""

SIGNS = np.random.default_rng(20).integers(0, 2, (4, GRID, GRID)) * 2.0 - 1
"""Light and dark blocks by which each of the four is known."""

LIMITS = Limits(pixels=1 << 20, frames=1000, bytes=1 << 24, seconds=3600.0)
MOST_MB = 250
"""Memory that one file may add at most; frames within the limits need a tenth of it."""


def pictures(clip, frames=FRAMES):
    """The frames of a clip: its blocks, and a small square that moves."""
    blocks = 128 + 80 * SIGNS[clip].repeat(SIDE // GRID, 0).repeat(SIDE // GRID, 1)
    shown = np.repeat(blocks[None, ..., None], 3, -1).repeat(frames, 0)
    shown += np.random.default_rng(clip).normal(0, 6, shown.shape)
    for t in range(frames):
        shown[t, 30:34, 6 * t : 6 * t + 4] = (250, 20, 20)
    return np.clip(shown, 0, 255).astype(np.uint8)


def recognised(frame):
    """Which of the four clips show in the upper or lower half of a frame ``[H, W, 3]``."""
    height, width = (n // GRID * GRID for n in frame.shape[:2])
    if min(height, width) < GRID:
        return set()
    gray = frame[:height, :width].astype(np.float64).mean(-1)
    found = set()
    blocks = gray.reshape(GRID, height // GRID, GRID, width // GRID).mean((1, 3))
    for half in (slice(0, GRID // 2), slice(GRID // 2, GRID)):
        seen = blocks[half] - blocks[half].mean()
        for clip, signs in enumerate(SIGNS):
            known = signs[half] - signs[half].mean()
            norm = math.sqrt((seen**2).sum() * (known**2).sum())
            if norm > 1 and (seen * known).sum() / norm > 0.85:
                found.add(clip)
    return found


def _image(kind, clip):
    buffer = io.BytesIO()
    shown = [Image.fromarray(p) for p in pictures(clip, 4)]
    form = kind.split(".")[1]
    more = {
        "moving.gif": {"save_all": True, "append_images": shown[1:], "duration": 100},
        "progressive.jpeg": {"progressive": True},
        "lossless.webp": {"lossless": True},
    }
    shown[0].save(buffer, form, **more.get(kind, {}))
    return buffer.getvalue()


def base(kind, clip):
    """An undamaged file."""
    if kind not in VIDEOS:
        return _image(kind, clip)
    container, codec = VIDEOS[kind]
    return encode(pictures(clip), container, codec, options=QUICK.get(codec, {}), muxer=MUXER.get(kind, {}))


def bases(folder):
    """All undamaged files, made once and kept in a folder."""
    stored = Path(folder) / "bases.pickle"
    if not stored.is_file():
        made = {(kind, clip): base(kind, clip) for kind in KINDS for clip in range(4)}
        stored.write_bytes(pickle.dumps(made))
    return pickle.loads(stored.read_bytes())


def _stretch(rng, n, most=0.3):
    """First byte and end of a part of a file; short ones as often as long ones."""
    length = min(n, int(math.exp(rng.uniform(0, math.log(max(2, most * n))))))
    first = int(rng.integers(0, n - length + 1))
    return first, first + length


def _flip(rng, data, donor):
    out = bytearray(data)
    for _ in range(int(math.exp(rng.uniform(0, 4)))):
        out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _cut(rng, data, donor):
    return data[: int(rng.integers(0, len(data)))]


def _beheaded(rng, data, donor):
    return data[_stretch(rng, len(data))[1] :]


def _zero(rng, data, donor):
    first, end = _stretch(rng, len(data))
    return data[:first] + bytes(end - first) + data[end:]


def _noise(rng, data, donor):
    first, end = _stretch(rng, len(data))
    return data[:first] + rng.bytes(end - first) + data[end:]


def _removed(rng, data, donor):
    first, end = _stretch(rng, len(data))
    return data[:first] + data[end:]


def _doubled(rng, data, donor):
    first, end = _stretch(rng, len(data))
    return data[:end] + data[first:end] + data[end:]


def _swapped(rng, data, donor):
    a, b, c, d = sorted(int(n) for n in rng.integers(0, len(data) + 1, 4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _inserted(rng, data, donor):
    at = int(rng.integers(0, len(data)))
    return data[:at] + rng.bytes(int(rng.integers(1, 400))) + data[at:]


def _spliced(rng, data, donor):
    return data[: int(rng.integers(1, len(data)))] + donor[int(rng.integers(0, len(donor))) :]


def _patched_from(rng, data, donor):
    """A part of the other file at the very same place, where offsets still fit."""
    first, end = _stretch(rng, min(len(data), len(donor)))
    return data[:first] + donor[first:end] + data[end:]


# Names of boxes, elements and chunks in whose first bytes sizes, durations, counts and times stand.
_NAMES = (
    *(b"mvhd tkhd mdhd stsd stts stss ctts stsc stsz stco elst avc1 avcC hvc1 hev1 hvcC vp09 vpcC av01 av1C".split()),
    *(b"mp4v esds jpeg colr pasp trun tfhd tfdt trex moof mdat moov trak mdia minf stbl ftyp sidx mfra".split()),
    *(b"RIFF avih strh strf idx1 movi 00dc JUNK IHDR IDAT PLTE IEND VP8X ANIM ANMF GIF89a GIF87a".split()),
    *(b"VP8\x20", b"VP8L", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\x21\xf9", b"\x2c\x00"),
    *(b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x15\x49\xa9\x66", b"\x2a\xd7\xb1", b"\x44\x89", b"\x16\x54\xae\x6b"),
    *(b"\x1f\x43\xb6\x75", b"\x1c\x53\xbb\x6b", b"\xe0", b"\xb0", b"\xba", b"\x23\xe3\x83", b"\x63\xa2", b"\xe7"),
    *(b"\xa3", b"\xa0", b"\xa1", b"\x55\xee", b"\x83", b"\x86"),
)
_LIES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0xFFFFFF, 0x7FFFFFFF, 0x80000000)


def _lie(rng, data, donor):
    """A false number in a header."""
    places = [p for name in _NAMES if (p := data.find(name)) >= 0]
    at = int(rng.choice(places)) if places and rng.random() < 0.9 else int(rng.integers(0, min(len(data), 256)))
    at = max(0, at + int(rng.integers(-4, 48)))
    size = int(rng.choice([1, 2, 4, 4, 8]))
    order = "big" if rng.random() < 0.6 else "little"
    number = int(rng.choice([*_LIES, 0xFFFFFFFF, int(rng.integers(1 << 31))])) % (1 << 8 * size)
    return data[:at] + number.to_bytes(size, order) + data[at + size :]


HOW = {
    f.__name__.strip("_"): f
    for f in (
        _flip,
        _cut,
        _beheaded,
        _zero,
        _noise,
        _removed,
        _doubled,
        _swapped,
        _inserted,
        _spliced,
        _patched_from,
        _lie,
    )
}


def damaged(known, kind, seed):
    """A damaged file, and in words what was done to it."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    data, done = known[kind, A], []
    names = list(HOW)
    # each way in turn, lies and flips more often; now and then several
    wanted = [names[seed % len(names)] if rng.random() < 0.7 else str(rng.choice(["lie", "flip"]))]
    if rng.random() < 0.25:
        wanted += [str(rng.choice(names)) for _ in range(int(rng.integers(1, 4)))]
    for how in wanted:
        if len(data) > 4:
            data = HOW[how](rng, data, known[kind, DONOR])
            done.append(how)
    return data, "+".join(done)


STAMPS = (0.0, 0.25, 0.25, 1e9)


def options_of(seed):
    """How many frames, which, and now and then scaled: by the seed."""
    frames = (2, 4, 100)[seed % 3]
    mode, rate, length = {
        1: ("rate", 3.0, None),
        3: ("clip", None, 0.5),
        4: ("timestamps", None, None),
        6: ("clip", 7.0, 0.4),
    }.get(seed % 11, ("uniform", None, None))
    bound, hybrid = {5: (40 * 40, None), 7: (None, Hybrid(60, 30, 1))}.get(seed % 8, (None, None))
    return VisionOptions(
        Sampling(mode, frames, rate, length), 4, 2, "pad" if seed % 2 else "crop", bound, hybrid, LIMITS
    )


def unpatched(patches, video, patch=4, reduction=2):
    """Patches of a video of one class back to frames ``[T, H, W, 3]``."""
    (rows, columns), r, p = video.grids[0], reduction, patch
    split = patches.reshape(video.frames, rows, columns, r, r, p, p, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return split.reshape(video.frames, rows * r * p, columns * r * p, 3)


def look(data, options, seed):
    """What a file gives: patches with their spec, or the reason why not. Checks their form."""
    said = spec = None
    stamps = STAMPS if options.sampling.mode == "timestamps" else None
    try:
        spec = measure(data, options, (seed,), stamps)
    except InputError as error:
        said = str(error)
    try:
        got = watch(data, options, (seed,), stamps)
    except InputError as error:
        assert_that(str(error) and "\n" not in str(error), f"not one line: {error!r}")
        return str(error)
    assert_that(spec is not None, f"measure refuses what watch takes: {said}")
    video, n = got.video, got.video.frames
    assert_that(spec.tokens >= video.tokens, f"measure promised {spec.tokens} tokens at most, watch has {video.tokens}")
    assert_that(got.patches.dtype == np.uint8, f"dtype {got.patches.dtype}")
    assert_that(got.patches.shape == (video.cells * 4, 48), f"patches {got.patches.shape} for {video}")
    assert_that(len(got.indices) == len(got.timestamps) == n, f"{got.indices} {got.timestamps} for {n} frames")
    assert_that(list(got.indices) == sorted(set(got.indices)) and got.indices[0] >= 0, f"indices {got.indices}")
    assert_that(n <= options.sampling.frames, f"{n} frames, {options.sampling.frames} were asked for")
    times = np.array(got.timestamps)
    assert_that(np.isfinite(times).all() and (np.diff(times) >= 0).all() and times[0] >= 0, f"times {times}")
    return got.patches, video


class WrongError(Exception):
    """A file was not treated as it must be."""


def assert_that(holds, message):
    if not holds:
        raise WrongError(message)


def attempt(known, kind, seed):
    """Try one damaged file after each of two other clips; the outcome in a word, `WrongError` if it must not be.

    What comes must not depend on what was decoded before, and must not show it.
    """
    data, _ = damaged(known, kind, seed)
    options = options_of(seed)
    results = []
    for before in (B, C):
        with contextlib.suppress(InputError):  # a container that is not let in at all
            watch(known[kind, before], options_of(2), (seed,))  # all frames of it, so that their memory is used again
        results.append(look(data, options, seed))
    first, second = results
    if isinstance(first, str) or isinstance(second, str):
        assert_that(first == second if isinstance(first, str) else False, f"once {first!r:.200}, once {second!r:.200}")
        return "refused"
    for (patches, video), before in zip(results, (B, C), strict=True):
        if len(video.grids) == 1:
            for i, frame in enumerate(unpatched(patches, video)):
                assert_that(before not in recognised(frame), f"frame {i} shows the clip that was decoded before")
    assert_that(first[1] == second[1], f"once {first[1]}, once {second[1]}")
    differing = int((first[0] != second[0]).sum())
    assert_that(differing == 0, f"{differing} of {first[0].size} bytes depend on what was decoded before")
    return "decoded"


DALI_KINDS = tuple(kind for kind in VIDEOS if kind.split(".")[0] in ("vp8", "vp9", "mjpeg"))


@functools.cache
def dali():
    """What DALI decodes on a CPU, and the graph."""
    from dali_pipelines.codecs import native
    from dali_pipelines.graph import DeviceDecoder

    return native("cpu"), DeviceDecoder("cpu", 3, 4, 2)


def item_of(data, seed):
    """What the loader would give to DALI of a file."""
    from dali_pipelines.graph import GraphItem
    from dali_pipelines.remux import sparse

    options = options_of(seed)
    stamps = STAMPS if options.sampling.mode == "timestamps" else None
    found = probe(data, LIMITS)
    takes, why = dali()[0].takes(found)
    if not takes:
        raise InputError(why)
    indices, geometry = select(found, options, (seed,), stamps)
    copied, kept = sparse(data, indices, LIMITS)
    return GraphItem(copied, kept, None, geometry)


def attempt_dali(known, kind, seed):
    """As `attempt`, through DALI: in one batch with two other clips, which must come unharmed."""
    data, _ = damaged(known, kind, seed)
    decoder = dali()[1]
    try:
        item = item_of(data, seed)
    except InputError as error:
        assert_that(str(error) and "\n" not in str(error), f"not one line: {error!r}")
        return "refused"
    results = []
    for before, after in ((B, C), (C, B)):
        others = [item_of(known[kind, clip], 2) for clip in (before, after)]
        alone = [decoder.decode([other])[0] for other in others]
        first, mine, last = decoder.decode([others[0], item, others[1]])
        for expected, got in zip(alone, (first, last), strict=True):
            assert_that(not isinstance(got, str) and got.equal(expected), "it harmed another clip of its batch")
        results.append(mine if isinstance(mine, str) else mine.numpy().copy())
        if not isinstance(mine, str) and len(item.geometry.classes) == 1:
            for i, frame in enumerate(unpatched(results[-1], item.geometry.video)):
                assert_that(not {B, C} & recognised(frame), f"frame {i} shows another clip")
    once, again = results
    if isinstance(once, str) or isinstance(again, str):
        assert_that(type(once) is type(again), f"once {once!r:.200}, once {again!r:.200}")
        assert_that("\n" not in once, f"not one line: {once!r}")
        return "refused"
    differing = int((once != again).sum())
    assert_that(differing == 0, f"{differing} of {once.size} bytes depend on what was decoded before")
    return "decoded"


def peak_mb(restart=False):
    """The most memory that this process held, since the last restart."""
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def serve(connection, folder, target):
    """A worker process: tries what it is sent."""
    module, name = target.split(":")
    run = getattr(importlib.import_module(module), name)
    known = bases(folder)
    while (case := connection.recv()) is not None:
        before = peak_mb(restart=True)
        try:
            outcome = run(known, *case)
        except WrongError as error:
            outcome = f"WRONG: {error}"
        except BaseException as error:  # anything that is not an InputError is a finding, whatever it is
            outcome = f"RAISED: {type(error).__name__}: {error}"
        grown = peak_mb() - before
        connection.send(f"MEMORY: {grown:.0f} MB more" if grown > MOST_MB else outcome)


@dataclass
class Worker:
    """A process with what it is busy with."""

    process: mp.Process
    connection: object
    case: tuple | None = None
    since: float = 0.0


class Bench:
    """Worker processes that outlive crashes and hangs of what they try."""

    def __init__(self, folder, workers=2, limit_s=20.0, target="tests.dali_pipelines.corrupt:attempt"):
        self.folder, self.limit_s, self.target = str(folder), limit_s, target
        self.context = mp.get_context("spawn")
        self.workers = [self._start() for _ in range(workers)]

    def _start(self):
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs, self.folder, self.target), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, mine)

    def run(self, cases):
        """Outcome of every case: ``decoded``, ``refused``, or what went wrong."""
        outcomes, left = {}, list(reversed(cases))
        while left or any(w.case for w in self.workers):
            for i, worker in enumerate(self.workers):
                if worker.case is None and left:
                    worker.case, worker.since = left.pop(), time.monotonic()
                    worker.connection.send(worker.case)
                elif worker.case and time.monotonic() - worker.since > self.limit_s:
                    outcomes[worker.case] = f"HANG: more than {self.limit_s:g} s"
                    worker.process.kill()
                    worker.process.join()
                    self.workers[i] = self._start()
            for connection in wait([w.connection for w in self.workers if w.case], timeout=0.2):
                (i,) = (i for i, w in enumerate(self.workers) if w.connection is connection)
                worker = self.workers[i]
                try:
                    outcomes[worker.case] = connection.recv()
                    worker.case = None
                except EOFError:
                    worker.process.join()
                    outcomes[worker.case] = f"CRASH: exit code {worker.process.exitcode}"
                    self.workers[i] = self._start()
        return outcomes

    def close(self):
        for worker in self.workers:
            worker.connection.send(None)
            worker.process.join(10)
            worker.process.kill()


def cases(number, kinds=KINDS):
    """So many cases over kinds of files."""
    return [(kinds[i % len(kinds)], i // len(kinds)) for i in range(number)]


def main(kind, seed, file=None):
    known = {(kind, clip): base(kind, clip) for clip in range(4)}
    data, how = damaged(known, kind, int(seed))
    if file:
        Path(file).write_bytes(data)
    print(f"{kind} {seed}: {how}, {len(data)} bytes, {options_of(int(seed))}")
    print(attempt(known, kind, int(seed)))


if __name__ == "__main__":
    main(*sys.argv[1:])
