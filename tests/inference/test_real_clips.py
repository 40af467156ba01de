"""Real clips, learned by heart: each caption comes back word for word from its own video."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIPS = os.environ.get("ELVA_REAL_CLIPS", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CLIPS, reason="ELVA_REAL_CLIPS names no folder of clips (annotations.jsonl and files)"),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def test_every_caption_comes_back_from_its_own_video(tmp_path):
    from megatron_elva.inference.model import Assistant

    annotations = Path(CLIPS, "annotations.jsonl")
    clips = [json.loads(line) for line in annotations.read_text().splitlines() if line.strip()]
    assert len({c["caption"] for c in clips}) == len(clips), "each caption has to tell its video from the others"
    corpus, folder = tmp_path / "corpus", tmp_path / "run"
    run("-m", "dali_pipelines.prepare", f"--input={annotations}", f"--out={corpus}")
    run("-m", "dali_pipelines.tokenizer", "--shards", f"{corpus}/*.tar", "--vocab=1024", f"--out={corpus}/tokenizer")
    said: dict[str, str] = {}
    for steps in (200, 300, 450, 600, 900):
        run(
            "launchers/submit.py", "stage=2", "cluster=local", "data=clips", f"data.root={corpus}",
            f"run_dir={folder}", f"train.steps={steps}", "train.checkpoint_every=1000", "follow=true",
        )  # fmt: skip
        assistant = Assistant(folder)
        prompt = [{"role": "user", "content": assistant.config.data.caption_prompt}]
        said = {
            c["video"]: assistant.answer(prompt, [assistant.watch(Path(CLIPS, c["video"]).read_bytes())], 512)
            for c in clips
        }
        if all(said[c["video"]] == c["caption"] for c in clips):
            break
    assert said == {c["video"]: c["caption"] for c in clips}
    last = clips[-1]
    chat = ["-m", "megatron_elva.inference.chat", "--run", str(folder), "--max-new-tokens", "512"]
    answer = run(*chat, "--video", str(Path(CLIPS, last["video"])), assistant.config.data.caption_prompt)
    assert answer.stdout.strip() == last["caption"]
