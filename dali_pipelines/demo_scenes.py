"""What happens in a video of the demo corpus, what its caption says and which questions it answers.

Pure and seeded: ``video_scene(seed, split, index)`` is the same scene everywhere. A scene knows where each digit is in
each frame, so its captions and answers are true by construction. Pixels are the business of `demo_render`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dali_pipelines.demo_balance import COUNTS, DIRECTIONS, SPLITS, Slot, deal, digit_images, image_deck, video_deck

COLOURS = ("white", "yellow", "green", "blue", "pink", "orange")
BACKGROUNDS = ("plain", "gradient", "noise", "stripes", "photo")
SIZES = ((56, 56), (56, 56), (56, 56), (58, 60), (70, 56), (56, 70))
FRAME_RATES = (8, 10, 12, 15, 24, 25, 30)
FRAMES = (6, 16)
"""Fewest and most frames of a video."""
HALF_PATCH = 7
"""Digits stand and move on a grid of this many pixels."""
SINGLE_SIZE = (24, 28)
GROUP_SIZE = (20, 27)

QUESTIONS = {
    "digit": ("Which digit is it?", "What digit do you see?", "Name the digit."),
    "direction": ("Which way does it move?", "Where does the digit go?", "In which direction does it move?"),
    "count": ("How many digits are there?", "Count the digits.", "How many digits do you see?"),
    "first": ("Which digit came first?", "What was the first digit?"),
    "last": ("Which digit came last?", "What was the last digit?"),
    "change": ("Does the digit change?", "Is there a change of digit?"),
    "into": ("What does it change into?", "Which digit does it become?"),
}
TRAINING_ONLY = ("last", "into")
"""Types that help to learn the others; the held-out split does not ask them."""

Point = tuple[int, int]
Story = tuple[list["Sprite"], str, list["Question"]]
"""Digits, caption and questions."""


@dataclass(frozen=True)
class Sprite:
    """A digit on the screen from frame ``start`` until before frame ``stop``, moving from ``origin`` to ``target``.

    Attributes:
        digit: the digit it shows.
        image: index of its handwritten image.
        colour: one of `COLOURS`.
        size: side in pixels.
        start: first frame it is in.
        stop: first frame it is no longer in.
        origin: centre in the first frame, ``(x, y)``.
        target: centre in the last frame, ``(x, y)``.
    """

    digit: int
    image: int
    colour: str
    size: int
    start: int
    stop: int
    origin: Point
    target: Point

    def centre(self, frame: int) -> Point:
        """Where it is in a frame: on the straight way, in steps of half a patch."""
        steps = HALF_PATCH * max(self.stop - self.start - 1, 1)
        (x0, y0), (x1, y1) = self.origin, self.target
        done = frame - self.start
        return x0 + HALF_PATCH * round(done * (x1 - x0) / steps), y0 + HALF_PATCH * round(done * (y1 - y0) / steps)


@dataclass(frozen=True)
class Question:
    """A question, its answer and its type, a key of `QUESTIONS`."""

    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Scene:
    """A video before it has pixels; an image is a scene of one frame.

    Attributes:
        kind: ``move``, ``count``, ``order`` or ``change``.
        split: ``train`` or ``heldout``.
        width: pixels.
        height: pixels.
        frames: number of frames.
        fps: frames a second.
        background: one of `BACKGROUNDS`.
        background_seed: what the background is drawn from.
        sprites: the digits.
        caption: one sentence about the video.
        qa: what it can be asked.
    """

    kind: str
    split: str
    width: int
    height: int
    frames: int
    fps: int
    background: str
    background_seed: int
    sprites: tuple[Sprite, ...]
    caption: str
    qa: tuple[Question, ...]


def video_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of one video.

    Args:
        seed: seed of the corpus.
        split: ``train`` or ``heldout``.
        index: number of the video in its split.

    Returns:
        The scene.
    """
    stream = SPLITS.index(split)
    rng = np.random.default_rng([seed, stream, index])
    frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    return _Director(rng, split, frames, int(rng.choice(FRAME_RATES))).shoot(deal(video_deck(), seed, stream, index))


def image_scene(seed: int, index: int) -> Scene:
    """The scene of one training image."""
    stream = len(SPLITS)
    rng = np.random.default_rng([seed, stream, index])
    return _Director(rng, "train", 1, 1).shoot(deal(image_deck(), seed, stream, index))


def grid_stops(side: int, low: float, high: float) -> list[int]:
    """Coordinates in ``low..high`` on the half-patch grid of a side that is cropped to whole patches.

    Falls back to the middle where the grid has none.
    """
    offset = (side % (2 * HALF_PATCH)) // 2
    return [x for x in range(offset, side, HALF_PATCH) if low <= x <= high] or [int(low + high) // 2]


class _Director:
    """Draws the free choices of a scene."""

    def __init__(self, rng: np.random.Generator, split: str, frames: int, fps: int) -> None:
        self.rng, self.split, self.frames, self.fps = rng, split, frames, fps
        self.width, self.height = SIZES[int(rng.integers(len(SIZES)))]

    def shoot(self, slot: Slot) -> Scene:
        """Make the scene of a slot."""
        tell = {"move": self._move, "count": self._count, "order": self._order, "change": self._change}[slot.kind]
        sprites, caption, qa = tell(slot)
        if slot.count:
            qa.append(self._ask("count", COUNTS[len(sprites) - 1]))
        asked = [qa[int(i)] for i in self.rng.permutation(len(qa))]
        return Scene(
            kind=slot.kind,
            split=self.split,
            width=self.width,
            height=self.height,
            frames=self.frames,
            fps=self.fps,
            background=str(self.rng.choice(BACKGROUNDS)),
            background_seed=int(self.rng.integers(2**62)),
            sprites=tuple(sprites),
            caption=caption,
            qa=tuple(q for q in asked if self.split == "train" or q.type not in TRAINING_ONLY),
        )

    def _move(self, slot: Slot) -> Story:
        """One digit moves over 50 to 90% of its free range."""
        size = int(self.rng.integers(SINGLE_SIZE[0], SINGLE_SIZE[1] + 1))
        dx, dy = DIRECTIONS[slot.answer]
        side = self.width if dx else self.height
        stops, free = grid_stops(side, size / 2, side - size / 2), side - size
        pairs = [p for p in itertools.combinations(stops, 2) if 0.5 * free <= p[1] - p[0] <= 0.9 * free]
        pair = pairs[int(self.rng.integers(len(pairs)))] if pairs else (stops[0], stops[-1])
        x, y = self._place(size)
        way = [(at, y) if dx else (x, at) for at in (pair if dx + dy > 0 else pair[::-1])]
        sprite = self._sprite(slot.digit, size, way)
        qa = [self._ask("digit", slot.digit), self._ask("direction", slot.answer)]
        return [sprite], f"{sprite.colour.capitalize()} {slot.digit} moves {slot.answer}.", qa

    def _count(self, slot: Slot) -> Story:
        """Digits stand in separate quadrants; one alone stands anywhere. An image's caption is just the digits."""
        number = COUNTS.index(slot.answer) + 1
        if number == 1:
            size = int(self.rng.integers(SINGLE_SIZE[0], SINGLE_SIZE[1] + 1))
            sprite = self._sprite(slot.digit, size, [self._place(size)])
            caption = f"One digit: {slot.digit}." if self.frames > 1 else str(slot.digit)
            return [sprite], caption, [self._ask("digit", slot.digit)]
        size, places = self._quadrants(number)
        digits = self.rng.permutation([slot.digit, *self.rng.integers(10, size=number - 1)]).tolist()
        sprites = [self._sprite(d, size, [place]) for d, place in zip(digits, places, strict=True)]
        if self.frames == 1:
            return sprites, " ".join(map(str, digits)), []
        return sprites, f"{slot.answer.capitalize()} digits: {', '.join(map(str, digits))}.", []

    def _order(self, slot: Slot) -> Story:
        """A second digit comes later; the first, there soon after the beginning, stays or leaves."""
        size, places = self._quadrants(2)
        first, last = (places[int(i)] for i in self.rng.permutation(2))
        start = int(self.rng.uniform(0, 0.12) * self.frames)
        turn = int(self.rng.uniform(0.4, 0.65) * self.frames)
        leaves = not slot.count and self.rng.random() < 0.5
        other = self._other(slot.digit)
        sprites = [
            self._sprite(slot.digit, size, [first], start, turn if leaves else self.frames),
            self._sprite(other, size, [last], turn),
        ]
        qa = [self._ask("first", slot.digit), self._ask("last", other)]
        return sprites, f"First {slot.digit}, then {other}.", qa

    def _change(self, slot: Slot) -> Story:
        """One digit stands still and half-way becomes another, or does not."""
        size = int(self.rng.integers(SINGLE_SIZE[0], SINGLE_SIZE[1] + 1))
        place = [self._place(size)]
        before = self._sprite(slot.digit, size, place)
        if slot.answer == "no":
            qa = [self._ask("change", "no"), self._ask("digit", slot.digit)]
            return [before], f"{slot.digit} stays {slot.digit}.", qa
        other = self._other(slot.digit)
        turn = int(self.rng.uniform(0.35, 0.65) * self.frames)
        after = self._sprite(other, size, place, turn)
        before = replace(before, stop=turn)
        after = replace(after, colour=before.colour)
        qa = [self._ask("change", "yes"), self._ask("into", other)]
        return [before, after], f"{slot.digit} becomes {other}.", qa

    def _ask(self, kind: str, answer: str | int) -> Question:
        return Question(str(self.rng.choice(QUESTIONS[kind])), str(answer), kind)

    def _other(self, digit: int) -> int:
        return int((digit + self.rng.integers(1, 10)) % 10)

    def _sprite(self, digit: int, size: int, way: Sequence[Point], start: int = 0, stop: int | None = None) -> Sprite:
        image = int(self.rng.choice(digit_images(self.split)[digit]))
        stop = self.frames if stop is None else stop
        return Sprite(digit, image, str(self.rng.choice(COLOURS)), size, start, stop, way[0], way[-1])

    def _place(self, size: int) -> Point:
        sides = (self.width, self.height)
        x, y = (int(self.rng.choice(grid_stops(side, size / 2, side - size / 2))) for side in sides)
        return x, y

    def _quadrants(self, number: int) -> tuple[int, list[Point]]:
        """A digit size and centres in that many quadrants, in reading order."""
        size = int(self.rng.integers(GROUP_SIZE[0], GROUP_SIZE[1] + 1))
        size = min(size, self.width // 2, self.height // 2)
        places = []
        for quadrant in sorted(self.rng.permutation(4)[:number].tolist()):
            x, y = (
                int(self.rng.choice(grid_stops(side, (half * side + size) / 2, ((half + 1) * side - size) / 2)))
                for side, half in ((self.width, quadrant % 2), (self.height, quadrant // 2))
            )
            places.append((x, y))
        return size, places
