"""The model on plain transformers against the training model, and chat from a checkpoint at tensor 2 x pipeline 2."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_elva.config.build import load, save
from megatron_elva.inference import chat
from megatron_elva.inference.model import Assistant
from megatron_elva.layout import PackSpec
from megatron_elva.model.weights import draw
from tests.builders import random_pack, small_config, small_model
from tests.dali_pipelines.make_samples import encode, encode_audio, textured_frames
from tests.distributed import run_distributed
from tests.inference.drawn import elva_with_drawn_weights, shapes
from tests.model.test_elva import logits


@pytest.mark.parametrize("mask", ["causal", "frame_bidirectional"])
def test_inference_logits_equal_training_logits(mask):
    config = small_config(small_model(attention_mask=mask, tied_head=False, cell_reduction=2))
    (names,) = run_distributed(shapes, 1, config)
    pack = random_pack(config.model, 4, videos=(2,), multiple=1)
    ((expected,),) = run_distributed(logits, 1, config, [pack])
    got = elva_with_drawn_weights(config, names).logits(pack.spec.samples[0], pack.tokens, pack.patches)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_generation_with_a_cache_equals_generation_without_one():
    config = small_config(small_model(init_std=0.3))
    (names,) = run_distributed(shapes, 1, config)
    model = elva_with_drawn_weights(config, names)
    pack = random_pack(config.model, 6, videos=(1,), multiple=1)
    sample = pack.spec.samples[0]
    ids = model.generate(sample, pack.tokens, pack.patches, stop=-1, known_tokens=90, max_new_tokens=6)
    tokens = pack.tokens
    for token in ids:
        longer = PackSpec((sample,)).samples[0]
        longer = replace(longer, segments=(*longer.segments[:-1], longer.segments[-1] + len(tokens) - len(pack.tokens)))
        assert int(model.logits(longer, tokens, pack.patches)[-1, :90].argmax()) == token
        tokens = torch.cat([tokens, torch.tensor([token])])
    assert len(ids) == 6 and max(ids) < 90


def test_one_process_reads_what_four_wrote(run_dir):
    config = small_config(small_model(patch_size=14, vocab_size=None))
    state = Assistant(run_dir).model.state_dict()
    drawn = draw("patch_embedding.proj.weight", (16, 588), config.seed, 0.05, 4)
    torch.testing.assert_close(state["patch_embedding.proj.weight"], drawn, atol=0, rtol=0)
    whole = draw("decoder.layers.3.mlp.linear_fc1.weight", (96, 32), config.seed, 0.05, 4)
    torch.testing.assert_close(state["language.model.layers.3.mlp.up_proj.weight"], whole[48:], atol=0, rtol=0)


def test_chat_answers_a_question(run_dir, video, capsys):
    assert chat.main(["--run", str(run_dir), "--video", str(video), "--max-new-tokens", "3", "What is this?"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_chat_without_a_question_converses(run_dir, video, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\nAnd now?\n\n"))
    assert chat.main(["--run", str(run_dir), "--video", str(video), "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.count(">") >= 3


BAD = {
    "empty.mp4": b"",
    "random.mp4": bytes(range(256)) * 40,
    "text.mp4": b"not a video at all",
}


@pytest.mark.parametrize("name", [*BAD, "audio.mp4", "cut.mp4", "missing.mp4"])
def test_chat_refuses_bad_videos_in_one_line(name, run_dir, video, tmp_path, capsys):
    path = tmp_path / name
    if name == "audio.mp4":
        path.write_bytes(encode_audio())
    elif name == "cut.mp4":
        path.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    elif name in BAD:
        path.write_bytes(BAD[name])
    assert chat.main(["--run", str(run_dir), "--video", str(path), "What is this?"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error


def test_chat_as_a_command_prints_one_line_and_nothing_else(run_dir, video, tmp_path):
    (tmp_path / "empty.mp4").touch()
    command = [sys.executable, "-m", "megatron_elva.inference.chat", "--run", str(run_dir), "--max-new-tokens", "2"]
    good = subprocess.run([*command, "--video", str(video), "What?"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr, good.stdout.count("\n")) == (0, "", 1)
    bad = subprocess.run(
        [*command, "--video", str(tmp_path / "empty.mp4"), "What?"], capture_output=True, text=True, check=False
    )
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)


def test_chat_refuses_what_is_no_run(run_dir, tmp_path, capsys):
    assert chat.main(["--run", str(tmp_path), "What is this?"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert chat.main(["--run", str(run_dir), "  "]) == 2
    assert "empty" in capsys.readouterr().err


def test_scores():
    from megatron_elva.config.errors import InputError
    from megatron_elva.evaluation.questions import Answered, by_type, score, wilson

    def asked(kind: str, expected: str, answer: str) -> Answered:
        return Answered("k", kind, "q", expected, answer)

    answers = [
        asked("digit", "7", "7"),
        asked("digit", "7", "1"),
        asked("digit", "2", " 2. "),
        asked("way", "Left", "left"),
    ]
    total = score(answers)
    assert (total.accuracy, total.questions) == (0.75, 4)
    assert total.chance == 0.75  # the best constant for digit is right twice of three, for way always
    assert by_type(answers)["digit"].chance == pytest.approx(2 / 3)
    low, high = wilson(75, 100)  # statsmodels' proportion_confint(75, 100, method="wilson")
    assert (low, high) == (pytest.approx(0.6569, abs=1e-4), pytest.approx(0.8245, abs=1e-4))
    with pytest.raises(InputError):
        score([])


def test_questions_are_read_from_shards(tmp_path):
    from dali_pipelines.prepare.cli import main as prepare
    from megatron_elva.evaluation.questions import questions

    (tmp_path / "a.mp4").write_bytes(encode(textured_frames(2)))
    lines = [
        {"video": "a.mp4", "qa": [{"question": "Q1", "answer": "1"}, {"question": "Q2", "answer": "2"}]},
        {"video": "none.mp4", "caption": "is not there"},
        {"image": "a.mp4", "video": "a.mp4"},
        {"text": "Text alone."},
    ]
    annotations = tmp_path / "annotations.jsonl"
    annotations.write_text("\n".join(map(json.dumps, lines)) + "\nno json\n")
    assert prepare([f"--input={annotations}", f"--out={tmp_path / 'out'}", "--workers=1"]) == 0
    shards = [str(tmp_path / "out" / "*.tar")]
    assert [qa["question"] for _, qa in questions(shards)] == ["Q1", "Q2"]
    assert len(list(questions(shards, 1))) == 1
    assert prepare([f"--input={Path(tmp_path / 'none')}", f"--out={tmp_path / 'out'}"]) == 2


@pytest.mark.parametrize(
    "sampling",
    [{"sampling": "clip", "clip_seconds": 0.1}, {"sampling": "timestamps"}, {"sampling": "rate", "rate": 5.0}],
)
def test_a_question_is_about_the_whole_video(run_dir, video, tmp_path, sampling):
    """Whatever stretch training took of it; a rate stays."""
    folder = shutil.copytree(run_dir, tmp_path / "run")
    config = load(folder / "config.yaml")
    save(replace(config, data=replace(config.data, **sampling)), folder / "config.yaml")
    got, plain = (Assistant(place).watch(video.read_bytes()) for place in (folder, run_dir))
    if sampling["sampling"] == "rate":
        assert got.spec.frames < plain.spec.frames
    else:
        assert got.spec == plain.spec and torch.equal(got.patches, plain.patches)
