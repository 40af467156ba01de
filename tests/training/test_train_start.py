"""What happens before the first step: another job's run is left alone, and what later attempts need is kept whole."""

from __future__ import annotations

from dali_pipelines.tokenizer import load_tokenizer, train_tokenizer
from megatron_elva.training import attempts
from megatron_elva.training.runs import RunLock
from megatron_elva.training.train import _keep_tokenizer, main
from tests.dali_pipelines.make_samples import image, textured_frames, write_shard


def test_a_run_in_which_another_job_trains_is_refused_before_anything_is_written(tmp_path, capsys):
    """Without a job number the refused one could be taken for the one at work, and end its attempt."""
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    corpus.mkdir()
    sample = {"json": {"caption": "A word."}, "png": image(textured_frames(1)[0])}
    write_shard(corpus / "videos-0.tar", [("a", sample)])
    train_tokenizer(["A word. Describe the video."] * 9, 300, corpus / "tokenizer")
    lock = RunLock(run)
    attempts.begin(run, 0)
    try:
        code = main(["stage=2", "cluster=local", "data=clips", f"data.root={corpus}", f"run_dir={run}"])
    finally:
        lock.release()
    assert code == 2 and "a job is training there" in capsys.readouterr().err
    assert attempts.read(run)[-1].outcome is None
    assert not (run / "config.yaml").exists()


def test_a_tokenizer_that_was_half_saved_is_none(tmp_path):
    train_tokenizer(["A word."] * 9, 300, tmp_path / "source")
    tokenizer, own = load_tokenizer(str(tmp_path / "source")), tmp_path / "tokenizer"
    torn = tmp_path / ".tokenizer.part"
    torn.mkdir()
    (torn / "left_over").write_text("{")
    for _ in range(2):  # also over an older one
        _keep_tokenizer(tokenizer, own)
        assert load_tokenizer(str(own)).get_vocab() == tokenizer.get_vocab()
        assert not torn.exists() and not (own / "left_over").exists()
