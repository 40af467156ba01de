"""The stream of packs: exact whatever the workers, the restarts and the ranks; and what it survives."""

import gc
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_pipelines import loader as loader_module
from dali_pipelines.from_config import open_stream
from dali_pipelines.plans import LaneShare, merged
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import encode, same, textured_frames, write_shard
from tests.dali_pipelines.test_packs import last, with_


@pytest.fixture(params=["samples", "budget"])
def settings(request, config):
    """A run that counts samples, and one that packs by a token budget."""
    return config if request.param == "samples" else with_(config, pack_tokens=420)


def fingerprint(pack):
    """Everything of a pack, pixels included."""
    digest = hashlib.sha256(pack.patches.numpy().tobytes() + pack.tokens.numpy().tobytes()).hexdigest()
    return pack.spec, digest, tuple(pack.keys), tuple((s.key, s.reason, s.replaced_by) for s in pack.skipped)


def take(loader, n):
    with loader:
        return [fingerprint(next(loader)) for _ in range(n)]


def begin(stream):
    return stream.share.start(0, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(settings, workers):
    stream = open_stream(settings, 0, 1)
    expected = take(stream.loader(begin(stream)), 16)
    before = torch.get_rng_state()
    for k in (0, 1, 5):
        with stream.loader(begin(stream), workers=workers, prefetch=3) as loader:
            assert [fingerprint(next(loader)) for _ in range(k)] == expected[:k]
            state = json.loads(json.dumps(loader.state))
        again = open_stream(settings, 0, 1)
        assert take(again.loader(state, workers=workers), 16 - k) == expected[k:]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({key for pack in expected for key in pack[2]}) > 20
    assert any(pack[3] for pack in expected), "a bad sample must be among them"


@pytest.mark.parametrize("workers", [0, 1])
def test_packs_tell_the_size_of_the_files_that_they_were_made_of(settings, corpus, workers):
    """Of videos and images alike, from a worker's cache too; not of samples that were skipped, nor of texts."""
    sizes = {}
    for shard in corpus.glob("*.tar"):
        with tarfile.open(shard) as tar:
            files = [member for member in tar.getmembers() if not member.name.endswith(".json")]
            sizes |= {f"{shard.name}/{file.name.split('.')[0]}": file.size for file in files}
    stream = open_stream(with_(settings, cache_mb=50), 0, 1)
    with stream.loader(begin(stream), workers=workers) as loader:
        packs = [next(loader) for _ in range(12)]
    for pack in packs:
        assert pack.video_bytes == sum(sizes.get(key, 0) for key in pack.keys) > 0
    kinds = {last(key)[0] for pack in packs for key in pack.keys}
    assert kinds == {"v", "i", "t"} and any(pack.skipped for pack in packs)
    assert len({key for pack in packs for key in pack.keys}) < sum(len(pack.keys) for pack in packs)  # some came again


def test_state_counts_what_was_handed_out(settings):
    stream = open_stream(settings, 0, 1)
    with stream.loader(begin(stream), workers=2, prefetch=3) as ahead, stream.loader(begin(stream)) as plain:
        assert ahead.state == plain.state
        for _ in range(5):
            next(ahead)
            time.sleep(0.05)
            next(plain)
            assert ahead.state == plain.state


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 8, 1), (8, 2, 4)])
def test_other_data_parallel_sizes_go_on_in_the_same_global_order(config, sizes):
    """Steps on one rank, then on several, then on others: their packs together are those of one rank."""
    config = with_(config, pack_tokens=420)
    lanes = config.train.global_batch
    one = open_stream(config, 0, 1)
    with one.loader(begin(one)) as loader:
        expected = [fingerprint(next(loader)) for _ in range((1 + len(sizes)) * lanes)]
    assert len({key for pack in expected for key in pack[2]}) == 35
    with one.loader(begin(one)) as loader:
        got = {i: fingerprint(next(loader)) for i in range(lanes)}
        state = json.loads(json.dumps(loader.state))
    for step, size in enumerate(sizes, 1):
        saved = []
        for rank in range(size):
            stream = open_stream(config, rank, size)
            with stream.loader(state) as loader:
                for micro in range(lanes // size):
                    got[step * lanes + micro * size + rank] = fingerprint(next(loader))
                assert loader.state["turn"] == 0 and len(loader.state["lanes"]) == lanes // size
                saved.append(json.loads(json.dumps(loader.state)))
        state = merged(saved)
    assert [got[i] for i in range(len(expected))] == expected


def test_states_that_do_not_fit_are_refused(config):
    stream = open_stream(with_(config, pack_tokens=420), 0, 2)
    good = begin(stream)
    lanes = dict(good["lanes"])
    lacking = {**good, "lanes": {k: v for k, v in lanes.items() if k != "4"}}
    negative = {**good, "lanes": {**lanes, "4": {"next": 3, "waiting": [-1]}}}
    for wrong, words in [
        (lacking, "not complete: KeyError"), (negative, "damaged"), ({}, "not complete"), ({"lanes": 3}, "damaged"),
        ({**good, "turn": "x"}, "damaged"), ({**good, "total": 8}, "that of 8 packs a step"),
        ({**good, "turn": 1, "size": 1}, "within a step on 1 data-parallel"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            stream.loader(wrong)


def test_hopeless_means_bad_ones_in_a_row(config, monkeypatch):
    """Many bad samples with good ones between them are no reason to stop."""
    monkeypatch.setattr("dali_pipelines.plans.HOPELESS", 6)
    config = with_(config, pack_tokens=3000, pack_buffer=64)
    config.train.global_batch = 1
    stream = open_stream(config, 0, 1)
    with stream.loader(begin(stream)) as loader:
        bad = sum(len(next(loader).skipped) for _ in range(4))
    assert bad > 6


def test_a_dropped_loader_ends_its_workers(config):
    stream = open_stream(config, 0, 1)
    loader = stream.loader(begin(stream), workers=2)
    next(loader)
    pids = loader._end.peek()[2][1].pool.pids
    assert len(pids) == 2
    del loader
    gc.collect()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_an_error_stays(config, monkeypatch):
    stream = open_stream(config, 0, 1)
    for workers in (0, 1):
        with monkeypatch.context() as patch, stream.loader(begin(stream), workers=workers) as loader:
            patch.setattr(loader_module.Built, "pack", lambda *_: 1 // 0)
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    next(loader)


def test_packs_of_a_budget_keep_it_and_are_full(config):
    config = with_(config, pack_tokens=900, pack_buffer=32)
    config.train.global_batch = 2
    stream = open_stream(config, 0, 1)
    with stream.loader(begin(stream)) as loader:
        packs = [next(loader) for _ in range(12)]
    used = [p.spec.tokens - p.spec.padding for p in packs]
    assert max(used) <= 900
    assert np.mean(used) / 900 > 0.95
    assert all(p.samples == len(p.keys) + sum(s.replaced_by is None for s in p.skipped) for p in packs)


def test_a_stream_of_bad_samples_ends_with_a_reason(config, monkeypatch):
    monkeypatch.setattr("dali_pipelines.plans.HOPELESS", 50)
    config = with_(config, pack_tokens=3)
    stream = open_stream(config, 0, 1)
    with stream.loader(begin(stream)) as loader, pytest.raises(InputError, match=r"in a row are bad, the last one .*/"):
        next(loader)


def test_saving_the_state_is_fast():
    """512 packs a step, 64 samples waiting in each lane: the largest shipped stage."""
    waiting = list(range(10**7, 10**7 + 64))
    state = {"lanes": {str(v): {"next": 10**6, "waiting": waiting} for v in range(512)}}
    began = time.perf_counter()
    text = json.dumps(merged([state, {"lanes": {"3": {"next": 1, "waiting": []}}}]))
    assert time.perf_counter() - began < 0.02 * (4 if os.environ.get("CI") else 1)
    assert len(text) < 10**6


def test_a_share_without_its_state_is_refused(config):
    stream = open_stream(with_(config, pack_tokens=420), 0, 1)
    assert isinstance(stream.share, LaneShare)
    with pytest.raises(InputError, match="no state of the token-budget packing"):
        stream.share.start(3, 1)


class Trap:
    """A builder that dies or hangs when it meets a certain sample. It reaches the workers by pickling."""

    def __init__(self, builder, key, how):
        self.builder, self.key, self.how = builder, key, how
        self.encoder = builder.encoder

    def __call__(self, task, report):
        def watched(key):
            report(key)
            if last(key) == self.key:
                if self.how == "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                time.sleep(1000)

        return self.builder(task, watched)


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_a_sample_that_kills_or_hangs_its_worker_is_passed_by(settings, how):
    from dataclasses import replace

    stream = open_stream(settings, 0, 1)
    plain = take(stream.loader(begin(stream)), 12)
    victim = last(plain[5][2][1])
    trapped = replace(stream, builder=Trap(stream.builder, victim, how))
    got = take(trapped.loader(begin(stream), workers=2, timeout_s=3.0), 12)
    assert not any(last(key) == victim for pack in got for key in pack[2])
    blamed = [s for pack in got for s in pack[3] if last(s[0]) == victim]
    assert blamed and all("on the list" not in reason for _, reason, _ in blamed)
    listed = Path(settings.run_dir, "quarantine.txt").read_text()
    assert f"/{victim}\t" in listed
    # a run that starts anew has the list, and no trap: the same stream
    again = open_stream(settings, 0, 1)
    names = {line.split("\t")[0] for line in listed.splitlines()}
    assert again.quarantine.listed.keys | again.quarantine.listed.built == names
    assert [(p[1], p[2]) for p in take(again.loader(begin(again)), 12)] == [(p[1], p[2]) for p in got]


def test_an_error_that_is_no_samples_fault_ends_the_stream(config, tmp_path):
    stream = open_stream(config, 0, 1)
    stream.builder.encoder.tokenizer_path = str(tmp_path / "gone")
    with stream.loader(begin(stream), workers=1) as loader, pytest.raises(InputError, match="gone"):
        next(loader)


def test_closing_is_final(config):
    stream = open_stream(config, 0, 1)
    loader = stream.loader(begin(stream), workers=2)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


TRAINER = """
import pickle, sys
from dali_pipelines.from_config import open_stream
stream = open_stream(pickle.load(open(sys.argv[1], "rb")), 0, 1)
loader = stream.loader(stream.share.start(0, 1), workers=2, prefetch=1)
for line in sys.stdin:
    print(len(next(loader).keys), flush=True)
"""


@pytest.fixture
def trainer(config, tmp_path):
    """A process of its own with a loader."""
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "config")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    process.kill()
    process.communicate()


def ask(process):
    process.stdin.write("pack\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def session_of(pid):
    """Processes of the session that a process leads, without it."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != pid and os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_signals_for_the_trainer_do_not_reach_its_helpers(trainer):
    assert ask(trainer) == 8
    helpers = session_of(trainer.pid)
    assert len(helpers) >= 2
    for pid in helpers:
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGINT)
    assert [ask(trainer) for _ in range(6)] == [8] * 6
    assert set(session_of(trainer.pid)) == set(helpers)


def test_the_trainer_itself_still_hears_signals(config):
    stream = open_stream(config, 0, 1)
    with stream.loader(begin(stream), workers=1):
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, set()) & {signal.SIGUSR2, signal.SIGINT}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_killed_trainer_leaves_no_process(trainer):
    ask(trainer)
    assert session_of(trainer.pid)
    trainer.kill()
    trainer.wait()
    end = time.monotonic() + 15
    while session_of(trainer.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert session_of(trainer.pid) == []


def test_what_is_left_to_a_device_comes_into_its_place(config, monkeypatch):
    """A device that fails once: the pack is built again by PyAV, and no pixel differs."""
    pytest.importorskip("nvidia.dali")
    stream = open_stream(with_(config, decoder="dali"), 0, 1)
    plain = open_stream(config, 0, 1)
    expected = take(plain.loader(begin(plain)), 6)
    assert take(stream.loader(begin(stream)), 6) == expected
    decode, calls = loader_module.DeviceDecoder.decode, []

    def failing(self, items):
        calls.append(len(items))
        return ["torn"] * len(items) if len(calls) == 1 else decode(self, items)

    monkeypatch.setattr(loader_module.DeviceDecoder, "decode", failing)
    assert take(stream.loader(begin(stream)), 6) == expected


def test_a_device_that_hangs_ends_the_run_and_names_what_it_had(config, monkeypatch):
    pytest.importorskip("nvidia.dali")
    config = with_(config, decoder="dali")
    vp9 = encode(textured_frames(6, 56, 56), "webm")
    folder = Path(config.run_dir).parent
    write_shard(folder / "vp9.tar", [(f"w{i}", {"json": {"caption": f"Clip {i}."}, "webm": vp9}) for i in range(9)])
    config.data.sources["videos"].shards = [str(folder / "vp9.tar")]
    config.stage.blend = {"videos": 1.0}
    stream = open_stream(config, 0, 1)
    monkeypatch.setattr(loader_module.DeviceDecoder, "decode", lambda self, items: time.sleep(20))
    words = r"hangs since 4 s .* with vp9\.tar/w\d, .*quarantine\.txt now"
    with stream.loader(begin(stream), workers=1, timeout_s=4.0) as loader, pytest.raises(RuntimeError, match=words):
        next(loader)
    assert len(open_stream(config, 0, 1).quarantine.listed.built) == 8


def test_images_same():
    """`same` tells packs apart: else nothing above would prove anything."""
    from tests.builders import random_pack, small_config

    pack, other = (random_pack(small_config().model, seed) for seed in (1, 2))
    assert same(pack, pack) and not same(pack, other)
