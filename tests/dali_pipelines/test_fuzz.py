"""Damaged files: frames of this clip or one line why not; never a crash, a hang, or pixels of another clip."""

import os
import time

import numpy as np
import pytest

from tests.dali_pipelines import corrupt
from tests.dali_pipelines.corrupt import A, B, Bench, C, WrongError

ALLOWED = {"decoded", "refused"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("fuzz")
    corrupt.bases(made)
    return made


@pytest.fixture(scope="module")
def bench(folder):
    started = Bench(folder)
    yield started
    started.close()


def tried(bench, number, kinds=corrupt.KINDS):
    """Try so many files; all must come out as they may."""
    outcomes = bench.run(corrupt.cases(number, kinds))
    assert len(outcomes) == number
    wrong = {case: outcome for case, outcome in outcomes.items() if outcome not in ALLOWED}
    assert not wrong, f"{len(wrong)} of {number}:\n" + "\n".join(f"{c}: {o}" for c, o in list(wrong.items())[:40])
    return outcomes


def test_three_hundred_damaged_files(bench):
    outcomes = tried(bench, 300)
    # both must be common, or the files are damaged too little or too much to say anything
    assert all(sum(o == kind for o in outcomes.values()) > 50 for kind in ALLOWED)


@pytest.mark.slow
def test_two_thousand_five_hundred_damaged_files(bench):
    outcomes = tried(bench, 2600)
    for kind in corrupt.KINDS:
        mine = [o for (k, _), o in outcomes.items() if k == kind]
        assert len(mine) == 100
        if kind != "still.png":  # a sum over every part of it: hardly any damage passes
            assert ("decoded" in mine) == (kind != "h264.ts")  # a container that is not let in
        assert "refused" in mine


@pytest.mark.slow
def test_six_hundred_damaged_files_through_dali(folder):
    pytest.importorskip("nvidia.dali")
    bench = Bench(folder, target="tests.dali_pipelines.corrupt:attempt_dali")
    outcomes = tried(bench, 600, corrupt.DALI_KINDS)
    bench.close()
    assert all(sum(o == kind for o in outcomes.values()) > 100 for kind in ALLOWED)


@pytest.mark.parametrize("kind", corrupt.KINDS)
def test_clips_are_recognised(folder, kind):
    known = corrupt.bases(folder)
    for clip in range(4):
        got = corrupt.look(known[kind, clip], corrupt.options_of(2), 0)
        if kind == "h264.ts":
            assert isinstance(got, str)
            continue
        patches, video = got
        frames = corrupt.unpatched(patches, video)
        assert len(frames) == (corrupt.FRAMES if kind in corrupt.VIDEOS else 4 if kind == "moving.gif" else 1)
        assert [corrupt.recognised(f) for f in frames] == [{clip}] * len(frames)


def test_damage_is_seeded_and_of_all_ways(folder):
    known = corrupt.bases(folder)
    seen = set()
    for seed in range(60):
        data, how = corrupt.damaged(known, "h264.mp4", seed)
        assert (data, how) == corrupt.damaged(known, "h264.mp4", seed)
        seen.update(how.split("+"))
    assert seen == set(corrupt.HOW)


@pytest.mark.parametrize("leak", ["half a frame of the clip before", "a few bytes", "none"])
def test_pixels_of_another_clip_are_found(folder, monkeypatch, leak):
    known = corrupt.bases(folder)
    last = []
    real = corrupt.watch
    untouched = real(known["h264.mp4", A], corrupt.options_of(0), (0,))

    def leaky(data, options, seed, stamps=None):
        got = real(data, options, seed, stamps)
        if data in (known["h264.mp4", B], known["h264.mp4", C]):
            last[:] = [got.patches]
        elif leak != "none":
            rows = len(got.patches) // 2 if "half" in leak else 1
            got.patches[:rows] = last[0][:rows]
        return got

    monkeypatch.setattr(corrupt, "watch", leaky)
    monkeypatch.setattr(corrupt, "damaged", lambda known, kind, seed: (known[kind, A], "nothing"))
    if leak == "none":
        assert corrupt.attempt(known, "h264.mp4", 0) == "decoded"
        np.testing.assert_array_equal(
            corrupt.look(known["h264.mp4", A], corrupt.options_of(0), 0)[0], untouched.patches
        )
    else:
        with pytest.raises(WrongError, match="decoded before"):
            corrupt.attempt(known, "h264.mp4", 0)


def faulty(known, kind, seed):
    """What a worker may meet, by the seed."""
    if seed == 1:
        os.abort()
    if seed == 2:
        time.sleep(60)
    if seed == 3:
        raise ValueError("no InputError")
    if seed == 4:
        return f"{len(np.ones(400_000_000, np.uint8))} bytes"
    return "decoded"


def test_crashes_hangs_and_other_errors_are_named(folder):
    bench = Bench(folder, workers=2, limit_s=3, target="tests.dali_pipelines.test_fuzz:faulty")
    outcomes = bench.run([("h264.mp4", seed) for seed in range(8)])
    bench.close()
    named = [outcomes["h264.mp4", seed].split(":")[0] for seed in range(8)]
    assert named == ["decoded", "CRASH", "HANG", "RAISED", "MEMORY", "decoded", "decoded", "decoded"]
    assert "-6" in outcomes["h264.mp4", 1]
