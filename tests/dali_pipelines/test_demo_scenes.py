"""The demo scenes: true answers, balanced answers, disjoint splits."""

import math
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dali_pipelines.demo_balance import COUNTS, digit_images, image_deck, video_deck
from dali_pipelines.demo_render import background, draw_frames, photo_columns
from dali_pipelines.demo_scenes import BACKGROUNDS, QUESTIONS, TRAINING_ONLY, image_scene, video_scene

WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
DECK = len(video_deck())
TRAIN = [video_scene(3, "train", i) for i in range(2 * DECK)]
HELDOUT = [video_scene(3, "heldout", i) for i in range(2 * DECK)]
IMAGES = [image_scene(3, i) for i in range(2 * len(image_deck()))]
EVERYTHING = TRAIN + HELDOUT + IMAGES


def truth(scene, kind):
    """The answer to a type of question, from where the digits are and nothing else."""
    by_start = sorted(scene.sprites, key=lambda s: s.start)
    first, last = by_start[0], by_start[-1]
    (x0, y0), (x1, y1) = first.centre(first.start), first.centre(first.stop - 1)
    return {
        "digit": str(first.digit),
        "direction": next((n for n, (x, y) in WAYS.items() if (x1 - x0) * x + (y1 - y0) * y > 6), "none"),
        "count": COUNTS[len({s.centre(s.start) for s in scene.sprites}) - 1],
        "first": str(first.digit),
        "last": str(last.digit),
        "change": "yes" if first.digit != last.digit else "no",
        "into": str(last.digit),
    }[kind]


def test_every_answer_is_true():
    asked = Counter()
    for scene in EVERYTHING:
        assert scene.qa
        for q in scene.qa:
            assert q.answer == truth(scene, q.type), scene
            assert q.question in QUESTIONS[q.type]
            asked[q.type] += 1
    assert set(asked) == set(QUESTIONS)


def test_captions_name_the_digits_in_order():
    for scene in EVERYTHING:
        digits = [str(s.digit) for s in scene.sprites]
        if scene.kind == "change" and len(digits) == 1:
            digits *= 2
        assert [c for c in scene.caption if c.isdigit()] == digits
        if scene.kind == "move":
            assert truth(scene, "direction") in scene.caption
            assert scene.sprites[0].colour in scene.caption.lower()


@pytest.mark.parametrize("scenes", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_answers_are_uniform(scenes):
    answers = {}
    for q in (q for s in scenes for q in s.qa):
        answers.setdefault(q.type, Counter())[q.answer] += 1
    numbers = {"digit": 10, "direction": 4, "count": 4, "first": 10, "change": 2}
    for kind, number in numbers.items():
        counts = answers[kind].values()
        assert len(counts) == number
        assert max(counts) - min(counts) <= 2, (kind, answers[kind])


def test_the_held_out_split_asks_the_five_types():
    assert {q.type for s in HELDOUT for q in s.qa} == set(QUESTIONS) - set(TRAINING_ONLY)


def test_digit_images_of_the_splits_are_disjoint_and_labelled():
    train, held_out = ({i for pool in digit_images(split) for i in pool} for split in ("train", "heldout"))
    assert not train & held_out
    assert len(train | held_out) == len(load_digits().target)
    assert 0.15 < len(held_out) / len(train | held_out) < 0.25
    used = {
        split: {s.image for scene in EVERYTHING if scene.split == split for s in scene.sprites}
        for split in ("train", "heldout")
    }
    assert used["train"] <= train
    assert used["heldout"] <= held_out
    labels = load_digits().target
    assert all(labels[s.image] == s.digit for scene in EVERYTHING for s in scene.sprites)


def test_backgrounds_of_the_splits_are_disjoint(monkeypatch):
    seeds = Counter(s.background_seed for s in EVERYTHING)
    assert max(seeds.values()) == 1
    (_, end), (start, _) = photo_columns("train", 640), photo_columns("heldout", 640)
    assert end <= start
    # A photograph that is black where a split may not look shows whether it looks there.
    for scenes, split in ((TRAIN, "train"), (HELDOUT, "heldout")):
        left, right = photo_columns(split, 640)
        photo = np.zeros((427, 640, 3), np.uint8)
        photo[:, left:right] = 255
        monkeypatch.setattr("dali_pipelines.demo_render._photos", lambda photo=photo: (photo, photo))
        crops = [background(s) for s in scenes if s.background == "photo"]
        assert crops
        assert min(c.min() for c in crops) > 0


def test_digits_are_whole_apart_and_in_sampled_frames():
    for scene in EVERYTHING:
        sampled = {int((i + 0.5) * scene.frames / 6) for i in range(6)}
        for s in scene.sprites:
            assert sampled & set(range(s.start, s.stop))
            for frame in range(s.start, s.stop):
                x, y = s.centre(frame)
                assert s.size / 2 - 1 <= x <= scene.width - s.size / 2 + 1
                assert s.size / 2 - 1 <= y <= scene.height - s.size / 2 + 1
        for a, b in ((a, b) for a in scene.sprites for b in scene.sprites if a is not b):
            together = set(range(a.start, a.stop)) & set(range(b.start, b.stop))
            if together:
                (ax, ay), (bx, by) = a.centre(a.start), b.centre(b.start)
                assert max(abs(ax - bx), abs(ay - by)) >= a.size - 1


def test_pixels_move_as_told():
    for scene in (s for s in HELDOUT if s.kind == "move"):
        light = np.abs(draw_frames(scene).astype(float) - background(scene)).sum(-1)
        y, x = np.mgrid[: scene.height, : scene.width]
        centres = [(float((f * x).sum() / f.sum()), float((f * y).sum() / f.sum())) for f in (light[0], light[-1])]
        (x0, y0), (x1, y1) = centres
        dx, dy = WAYS[truth(scene, "direction")]
        assert (x1 - x0) * dx + (y1 - y0) * dy > 6
        assert math.hypot((x1 - x0) * dy, (y1 - y0) * dx) < 3


def test_digits_are_brighter_than_their_background():
    for scene in EVERYTHING:
        frame = draw_frames(scene)[-1].max(-1).astype(float)
        behind = background(scene)
        assert behind.max() < 100
        assert frame.max() > 200
        assert behind.shape == (scene.height, scene.width, 3)


def test_scenes_vary():
    for field, least in (("width", 3), ("frames", 10), ("fps", 5), ("background", len(BACKGROUNDS))):
        assert len({getattr(s, field) for s in TRAIN}) >= least, field
    assert len({s.width / s.height for s in TRAIN}) >= 3


def test_a_scene_depends_on_seed_split_and_index_alone():
    assert video_scene(3, "train", 17) == TRAIN[17]
    assert video_scene(4, "train", 17) != TRAIN[17]
    assert HELDOUT[17] != TRAIN[17]
    kinds = [[s.kind for s in scenes[:DECK]] for scenes in (TRAIN, TRAIN[DECK:], HELDOUT)]
    assert kinds[0] != kinds[1] != kinds[2]
    assert all(Counter(k) == Counter(slot.kind for slot in video_deck()) for k in kinds)
