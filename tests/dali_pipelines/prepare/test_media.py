"""Files that hurt their worker, journals, and encoding again."""

import json
import os
import signal
import time
from dataclasses import dataclass

import av
import numpy as np
import pytest

from dali_pipelines.media import probe
from dali_pipelines.prepare import cli, media
from dali_pipelines.prepare.media import Bad, Fact, Handler, look_at_files, read_journals
from dali_pipelines.prepare.reencode import reencode
from dali_pipelines.prepare.run import start
from dali_pipelines.prepare.settings import Reencode, Room, Settings
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import encode, gray_frames, levels, textured_frames, turned_by_header
from tests.dali_pipelines.prepare.conftest import read_all

LIMITS = Settings(()).limits


@dataclass(frozen=True)
class Hostile(Handler):
    """Dies, hangs or raises where a file's name says so."""

    def handle(self, file, note):
        note(file.name)
        if "dies" in file.name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hangs" in file.name:
            time.sleep(600)
        return super().handle(file, note)


def folder_of(tmp_path, names):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(names):
        (tmp_path / "in" / f"{name}.mp4").write_bytes(encode(gray_frames(3 + i)))
        (tmp_path / "in" / f"{name}.txt").write_text(f"Clip {name}.")
    room, settings = Room(tmp_path / "out"), Settings((str(tmp_path / "in"),), timeout_s=3.0)
    start(settings, room)
    return room, settings


def test_a_file_that_kills_or_hangs_its_worker_is_reported_and_the_others_are_done(tmp_path, monkeypatch):
    names = ["a", "b_dies", "c", "d_hangs", "e", "f_dies", "g"]
    room, settings = folder_of(tmp_path, names)
    monkeypatch.setattr(media, "Handler", Hostile)
    look_at_files(room, settings, 2)
    found = read_journals(room)
    assert sorted(found) == list(range(7))
    bad = {names[i]: fact for i, fact in found.items() if isinstance(fact, Bad)}
    assert set(bad) == {"b_dies", "d_hangs", "f_dies"}
    assert {fact.stage for fact in bad.values()} == {"worker"}
    assert "SIGKILL" in bad["b_dies"].reason and "no progress" in bad["d_hangs"].reason
    assert found[6].frames == 9


def test_a_journal_with_a_line_that_was_cut_goes_on_behind_it(tmp_path):
    room, settings = folder_of(tmp_path, "abcd")
    look_at_files(room, settings, 1)
    whole = read_journals(room)
    path = media.journal(room, 0)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][: len(lines[2]) // 2])
    assert len(read_journals(room)) == 2
    look_at_files(room, settings, 1)
    assert read_journals(room) == whole


def test_tasks_share_the_files(tmp_path):
    room, settings = folder_of(tmp_path, "abcde")
    look_at_files(room, settings, 1, task=1, tasks=2)
    assert sorted(read_journals(room)) == [1, 3]
    look_at_files(room, settings, 1, task=0, tasks=2)
    assert sorted(read_journals(room)) == [0, 1, 2, 3, 4]
    assert all(isinstance(fact, Fact) for fact in read_journals(room).values())


def again(data, tmp_path, **options):
    """Encode again; the result's bytes, its probe and its frames."""
    path = tmp_path / "again.mp4"
    lost = reencode(data, Reencode(**options), LIMITS, path, lambda: None)
    with av.open(str(path)) as container:
        assert not container.streams.audio
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return path.read_bytes(), probe(path.read_bytes(), LIMITS), frames, lost


def keyframes(data, tmp_path):
    (tmp_path / "keys.mp4").write_bytes(data)
    with av.open(str(tmp_path / "keys.mp4")) as container:
        return [i for i, packet in enumerate(p for p in container.demux(video=0) if p.size) if packet.is_keyframe]


@pytest.mark.parametrize("container", ["mp4", "matroska", "webm", "avi"])
def test_encoding_again_keeps_frames_and_times(tmp_path, container):
    source = encode(gray_frames(25), container, options={"g": "250"} if container in ("mp4", "matroska") else None)
    data, found, frames, lost = again(source, tmp_path, gop=10)
    assert (found.frames, found.codec, lost, len(frames)) == (25, "h264", 0, 25)
    assert levels(frames) == list(range(25))
    np.testing.assert_allclose(found.times, probe(source, LIMITS).times, atol=2e-3)
    assert keyframes(data, tmp_path) == [0, 10, 20]
    assert again(source, tmp_path, gop=10)[0] == data


def test_the_same_bytes_come_out_each_time(tmp_path):
    """Of a width that is no multiple of 16, in which x264 is not repeatable by itself."""
    data = encode(textured_frames(90, 84, 110), options={"g": "90"})
    made = []
    for i in range(4):
        reencode(data, Reencode(gop=30), LIMITS, tmp_path / f"{i}.mp4", lambda: None)
        made.append((tmp_path / f"{i}.mp4").read_bytes())
    assert all(one == made[0] for one in made)


def test_a_cut_between_scenes_adds_no_keyframe(tmp_path):
    frames = np.concatenate([gray_frames(13), textured_frames(13)])
    data, *_ = again(encode(frames, options={"g": "250"}), tmp_path, gop=8)
    assert keyframes(data, tmp_path) == [0, 8, 16, 24]


def test_sizes_become_even_and_never_larger(tmp_path):
    wide = encode(textured_frames(3, 45, 91))
    for side, native in ((None, (44, 90)), (400, (44, 90)), (46, (22, 46))):
        assert again(wide, tmp_path, max_side=side)[1].native == native


def test_a_rotated_video_is_stored_upright(tmp_path):
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, :32, :32] = 255  # a white corner, upper left as stored
    source = turned_by_header(encode(frames))
    before = probe(source, LIMITS)
    assert before.turns and before.native == (96, 64)
    _, found, decoded, _ = again(source, tmp_path)
    assert (found.turns, found.native) == (0, (96, 64))
    wanted = np.rot90(frames[0], before.turns)
    assert np.abs(decoded[0].astype(int) - wanted).mean() < 8


def test_times_of_a_variable_rate_stay(tmp_path):
    path = tmp_path / "vfr.mp4"
    stamps = [0, 1, 2, 7, 8, 20, 21, 40]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for stamp, pixels in zip(stamps, gray_frames(8, 48, 48), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = stamp
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    _, found, frames, _ = again(path.read_bytes(), tmp_path, gop=4)
    np.testing.assert_allclose(found.times, np.array(stamps) / 10, atol=1e-3)
    assert levels(frames) == list(range(8))


def test_too_much_damage_is_refused_and_a_little_is_counted(tmp_path):
    whole = encode(textured_frames(40, 64, 96), "avi")
    chunks = [i for i in range(len(whole) - 4) if whole[i : i + 4] == b"00dc"][:40]

    def without(numbers):
        source = bytearray(whole)
        for number in numbers:
            at = chunks[number] + 8
            size = int.from_bytes(whole[at - 4 : at], "little")
            source[at : at + size] = bytes(size)
        return bytes(source)

    _, found, frames, lost = again(without([5]), tmp_path)
    assert (found.frames, len(frames), lost) == (39, 39, 1)
    with pytest.raises(InputError, match="10 of 40 frames"):
        again(without(range(5, 15)), tmp_path)


def test_a_run_that_encodes_again(prepare, media):
    run = prepare("--reencode=gop=5,max-side=40", "--split=val=0.2")
    assert not run.room.encoded.exists()
    found = {**read_all(run.out), **read_all(run.out, "val/*.tar")}
    assert len(found) == 15
    for raw in found.values():
        for about, data in zip(raw.meta.get("media", []), raw.media, strict=True):
            now = probe(data, LIMITS)
            assert (now.frames, now.native) == (about["frames"], (about["height"], about["width"]))
            if about["file"].endswith(".mp4"):
                assert max(now.native) <= 40 and now.codec == "h264"
                assert now.frames == probe((media / about["file"]).read_bytes(), LIMITS).frames
            else:
                assert data == (media / about["file"]).read_bytes()


def test_a_file_that_has_changed_since_is_left_out(tmp_path, capsys):
    room, settings = folder_of(tmp_path, "abc")
    look_at_files(room, settings, 1)
    (tmp_path / "in/b.mp4").write_bytes(encode(gray_frames(9)))
    assert cli.main([f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--timeout=3"]) == 0
    assert sorted(raw.meta["id"] for raw in read_all(tmp_path / "out").values()) == ["a", "c"]
    (line,) = [json.loads(line) for line in (tmp_path / "out/report.jsonl").read_text().splitlines()]
    assert (line["stage"], line["key"]) == ("write", "00000001_b") and "has changed" in line["reason"]
    assert "2 samples" in capsys.readouterr().out
