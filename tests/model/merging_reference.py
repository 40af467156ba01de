"""Merging over time in plain loops over lists of tokens, and random packs to try it on.

It knows nothing of tubes, states or the merge index: a pack is a list of `Token`, and a merge point makes a
shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from megatron_elva.config.merge_schedule import ResolvedPoint
from megatron_elva.layout.spec import PackSpec, SampleSpec, VideoSpec

NEAR = 2e-6
"""Similarities this close to a boundary may fall on either side of it in fp32."""


@dataclass(frozen=True)
class Token:
    """One position of a pack; -1 where a field does not apply. `stands`: how many cells it stands for."""

    kind: str
    sample: int
    position: int
    origin: int
    video: int = -1
    klass: int = -1
    frame: int = -1
    cell: int = -1
    stands: int = 1


@dataclass(frozen=True)
class Link:
    """Two neighbours in time, by their places in the list of tokens, with their similarity in fp32 and in fp64.

    `operands` are their hidden states, bit for bit; None where a value is not finite.
    """

    earlier: int
    later: int
    score: np.float32
    precise: float
    operands: bytes | None


@dataclass(frozen=True)
class Step:
    """What a merge point makes of a list of tokens.

    Attributes:
        tokens: what is left.
        sources: for each of them, the tokens it is made of with their weights; none for padding.
        undecided: links on which fp32 may decide either way.
    """

    tokens: list[Token]
    sources: list[list[tuple[int, Fraction]]]
    undecided: int


def lay_out(spec: PackSpec) -> list[Token]:
    """All tokens of a pack before any merge."""
    tokens: list[Token] = []
    video = -1
    for s, sample in enumerate(spec.samples):
        start = len(tokens)

        def add(kind: str, s: int = s, start: int = start, **ids: int) -> None:
            tokens.append(Token(kind, s, len(tokens) - start, len(tokens), **ids))

        for segment in sample.segments:
            if isinstance(segment, int):
                for _ in range(segment):
                    add("TEXT")
                continue
            video += 1
            for frame, klass in enumerate(segment.frame_class):
                rows, columns = segment.grids[klass]
                add("FRAME", video=video, frame=frame)
                for row in range(rows):
                    for column in range(columns):
                        add("CELL", video=video, frame=frame, klass=klass, cell=row * columns + column)
                    add("LINE", video=video, frame=frame)
    return tokens + padding_tokens(len(spec.samples), spec.padding)


def padding_tokens(sample: int, n: int) -> list[Token]:
    return [Token("PADDING", sample, position, -1) for position in range(n)]


def class_names(spec: PackSpec) -> list[tuple[int, int]]:
    """Video and number of each resolution class that has frames."""
    return [(v, k) for v, video in enumerate(spec.videos) for k in range(len(video.grids)) if k in video.frame_class]


def merge_matrix(tokens: list[Token], spec: PackSpec, video: int, klass: int) -> list[list[int]]:
    """The merge index of one class."""
    found = {(t.frame, t.cell) for t in tokens if t.kind == "CELL" and (t.video, t.klass) == (video, klass)}
    rows, columns = spec.videos[video].grids[klass]
    frames = [f for f, k in enumerate(spec.videos[video].frame_class) if k == klass]
    return [[int((frame, cell) in found) for cell in range(rows * columns)] for frame in frames]


def cosine(a: np.ndarray, b: np.ndarray, dtype: type) -> np.floating:
    """Cosine similarity from sums in `dtype`; what is not a number counts as -1."""
    with np.errstate(all="ignore"):
        a, b = a.astype(dtype), b.astype(dtype)
        norms = np.sqrt(np.float64((a * a).sum(dtype=dtype)) * np.float64((b * b).sum(dtype=dtype)))
        value = dtype(np.float64((a * b).sum(dtype=dtype)) / max(norms, 1e-24))
    return dtype(-1) if not np.isfinite(value) else min(max(value, dtype(-1)), dtype(1))


def exact_in_fp32(values: np.ndarray) -> bool:
    """Whether sums of products of these rows (`[n, H]`) are exact in fp32 in any order."""
    finite = values[np.isfinite(values).all(1)].astype(np.float64) * 16
    return bool((finite == np.round(finite)).all() and (finite**2).sum(1).max(initial=0.0) < 2**24)


def find_links(tokens: list[Token], values: np.ndarray, video: int, klass: int) -> list[Link]:
    """The links of one class in the order that settles ties."""
    last: dict[int, int] = {}
    links = []
    for i, token in enumerate(tokens):  # tokens of a video stand in the order of their frames
        if token.kind != "CELL" or (token.video, token.klass) != (video, klass):
            continue
        if token.cell in last:
            a, b = values[last[token.cell]], values[i]
            operands = a.tobytes() + b.tobytes() if np.isfinite([a, b]).all() else None
            scores = cosine(a, b, np.float32), float(cosine(a, b, np.float64))
            links.append(Link(last[token.cell], i, *scores, operands))
        last[token.cell] = i
    return sorted(links, key=lambda link: (tokens[link.earlier].frame, tokens[link.earlier].cell))


def cells_left(present: int, keep: float, frames: int, cells: int) -> int:
    return min(present, max(math.ceil(Fraction(str(keep)) * frames * cells), cells))


def choose(
    links: list[Link], point: ResolvedPoint, take: int, exact: bool, merged: Callable[[Link], bool]
) -> tuple[list[Link], int]:
    """Links of one class that merge, and how many of them fp32 may decide either way."""
    if point.rule == "threshold":
        assert point.tau is not None
        low = high = point.tau
        picked = [link for link in links if link.score > np.float32(point.tau)]
    else:
        ranked = sorted(links, key=lambda link: -(link.score if exact else link.precise))  # stable: ties stay in order
        picked = ranked[:take]
        if take in (0, len(links)):
            return picked, 0
        low, high = (float(link.precise) for link in (ranked[take], ranked[take - 1]))
    if exact or (point.rule == "budget" and high - low > NEAR):
        return picked, 0
    near = [link for link in links if low - NEAR <= link.precise <= high + NEAR]
    if not near:
        return picked, 0
    picked = [link for link in links if (merged(link) if link in near else link.precise > high)]
    if point.rule == "budget":
        assert len(picked) == take
    for a, first in enumerate(near):  # what is equal bit by bit is decided, whatever the rounding
        for second in near[a + 1 :]:
            if first.operands == second.operands:
                assert merged(first) >= merged(second) if point.rule == "budget" else merged(first) == merged(second)
    return picked, len(near)


def merge_step(
    tokens: list[Token],
    values: np.ndarray,
    spec: PackSpec,
    point: ResolvedPoint,
    survivor: str,
    multiple: int,
    gone: set[int],
) -> Step:
    """Pass one merge point.

    Args:
        tokens: what the pack is made of.
        values: ``[S, H]`` their hidden states.
        spec: the pack before any merge.
        point: the rule.
        survivor: ``first`` or ``last``.
        multiple: what the length is padded to a multiple of, where something merged.
        gone: origins of the tokens that the tested code removed; asked only where fp32 may decide either way.
    """
    exact = exact_in_fp32(np.stack([values[i] for i, t in enumerate(tokens) if t.kind == "CELL"] or [values[0] * 0]))
    goes_on: dict[int, int] = {}  # earlier -> later, of links that merge
    undecided = 0
    for video, klass in class_names(spec):
        links = find_links(tokens, values, video, klass)
        rows, columns = spec.videos[video].grids[klass]
        present = sum(1 for t in tokens if t.kind == "CELL" and (t.video, t.klass) == (video, klass))
        assert len(links) == present - rows * columns
        take = 0
        if point.rule == "budget":
            assert point.keep is not None
            frames = spec.videos[video].frame_class.count(klass)
            take = present - cells_left(present, point.keep, frames, rows * columns)

        def merged(link: Link) -> bool:
            return tokens[link.later if survivor == "first" else link.earlier].origin in gone

        picked, near = choose(links, point, take, exact, merged)
        goes_on |= {link.earlier: link.later for link in picked}
        undecided += near
    if not goes_on:
        return Step(tokens, [[(i, Fraction(1))] for i in range(len(tokens))], undecided)

    runs: dict[int, list[int]] = {}
    for i in range(len(tokens)):
        if i in goes_on and i not in goes_on.values():
            run = [i]
            while run[-1] in goes_on:
                run.append(goes_on[run[-1]])
            runs[run[0] if survivor == "first" else run[-1]] = run
    lost = {i for run in runs.values() for i in run} - set(runs)
    new, sources = [], []
    for i, token in enumerate(tokens):
        if token.kind == "PADDING" or i in lost:
            continue
        run = runs.get(i, [i])
        stands = sum(tokens[j].stands for j in run)
        new.append(Token(**{**vars(token), "stands": stands}))
        sources.append([(j, Fraction(tokens[j].stands, stands)) for j in run])
    padding = padding_tokens(len(spec.samples), -len(new) % multiple)
    return Step(new + padding, sources + [[] for _ in padding], undecided)


def weighted(step: Step, values: np.ndarray) -> np.ndarray:
    """``[K, H]`` fp64: the hidden states after a merge point."""
    out = np.zeros((len(step.tokens), values.shape[1]))
    with np.errstate(invalid="ignore"):
        for row, members in zip(out, step.sources, strict=True):
            for i, share in members:
                row += float(share) * values[i].astype(np.float64)
    return out


def dense(step: Step, length: int) -> np.ndarray:
    """``[K, S]`` fp32: a merge point as a matrix."""
    out = np.zeros((len(step.tokens), length), np.float32)
    for row, members in zip(out, step.sources, strict=True):
        for i, share in members:
            row[i] = float(share)
    return out


# Random cases.


@st.composite
def merge_videos(draw) -> VideoSpec:
    """Videos of one to three resolution classes; some of one frame, some of one cell."""
    side = st.integers(1, 3)
    frames = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 9]))
    grids = draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    if draw(st.integers(0, 5)) == 0:
        grids = [(1, 1)]
    if len(grids) == 1:
        return VideoSpec.uniform(frames, *grids[0])
    pattern = draw(st.integers(0, 3**9 - 1))
    return VideoSpec(tuple(grids), tuple(pattern // 3**i % 3 % len(grids) for i in range(frames)))


@st.composite
def merge_packs(draw) -> PackSpec:
    """Packs of one to three samples; some of text alone, some of one video alone."""
    shapes = draw(st.lists(st.sampled_from(["t", "v", "tv", "tvt", "vv", "tvv"]), min_size=1, max_size=3))
    parts = {"t": st.integers(1, 4), "v": merge_videos()}
    return PackSpec(tuple(SampleSpec(tuple(draw(parts[letter]) for letter in shape)) for shape in shapes))


@st.composite
def schedules(draw, rules: tuple[str, ...] = ("threshold", "budget")) -> list[ResolvedPoint]:
    """One to four points in any order; budgets do not rise."""
    chosen = draw(st.lists(st.sampled_from(rules), min_size=1, max_size=4))
    keeps = sorted(
        (draw(st.sampled_from([1.0, 0.9, 0.75, 0.6, 0.5, 0.333, 0.25, 0.1])) for rule in chosen if rule == "budget"),
        reverse=True,
    )
    points = []
    for i, rule in enumerate(chosen):
        if rule == "budget":
            points.append(ResolvedPoint(i, i + 1, rule, None, keeps.pop(0)))
        else:
            points.append(ResolvedPoint(i, i + 1, rule, draw(st.sampled_from([0.6, 0.0, -0.5, 0.3, 0.9, 0.99])), None))
    return points


SCENES = (
    "integers", "signs", "normal", "static", "static_integers", "cuts", "pan", "equal", "zeros", "opposite", "broken",
)  # fmt: skip
"""What the hidden states of a video look like over time."""


def hidden_states(spec: PackSpec, scene: str, seed: int, width: int) -> np.ndarray:
    """``[S, H]`` fp32."""
    rng = np.random.default_rng(seed)
    tokens = lay_out(spec)
    out = rng.normal(size=(len(tokens), width)).astype(np.float32)
    fixed: dict[tuple[int, ...], np.ndarray] = {}

    def once(*key: int, whole: bool = False) -> np.ndarray:
        """The same random vector for the same key."""
        if key not in fixed:
            fixed[key] = rng.integers(-3, 4, width) if whole else rng.normal(size=width)
        return fixed[key]

    for i, t in enumerate(tokens):
        if t.kind != "CELL":
            continue
        place = (t.video, t.klass, t.cell)
        if scene == "integers":
            out[i] = rng.integers(-3, 4, width)
        elif scene == "signs":
            out[i] = rng.choice([-1, 1], width)
        elif scene in ("static", "static_integers"):
            out[i] = once(*place, whole=scene == "static_integers")
        elif scene == "cuts":
            out[i] = once(*place, t.frame // 3) + 0.05 * rng.normal(size=width)
        elif scene == "pan":
            out[i] = math.cos(0.5 * t.frame) * once(*place, 0) + math.sin(0.5 * t.frame) * once(*place, 1)
        elif scene == "equal":
            out[i] = 1
        elif scene == "zeros":
            out[i] = 0
        elif scene == "opposite":
            out[i] = (-1) ** t.frame * once(*place, whole=True)
        elif scene == "broken" and rng.random() < 0.2:
            out[i] = rng.choice([np.nan, np.inf, -np.inf])
            if rng.random() < 0.5:
                out[i, 1:] = 1
    return out
