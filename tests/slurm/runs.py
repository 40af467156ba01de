"""Runs on the test cluster: submitted by the product's own command, watched, and compared with each other."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.submit import main
from tests.slurm.cluster import Slurm, exported
from tests.slurm.jobs import PacedJob

SAME = ("loss", "grad_norm", "lr", "samples", "tokens", "visual_tokens_in", "visual_tokens_out", "skipped_samples")
"""What of a step does not depend on time or place."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
TOLD = ("JobState", "Reason", "ExitCode", "Restarts", "SubmitTime", "StartTime", "EndTime", "NodeList", "BatchHost")
"""Fields of ``scontrol show job`` that explain an end."""
NOISE = re.compile("Warning|return func|warnings.warn|frame #|submitit INFO|step \\d+/|load_state_dict")
"""Lines of ranks that explain nothing."""
_SUBMITTING = threading.Lock()  # a submission changes this process's environment and output for a moment


def overrides(clips: Path, run: Path, *more: str) -> list[str]:
    """The command of a short training run on two nodes of two ranks; what comes last wins."""
    values = dict(override.split("=", 1) for override in (
        "stage=2", "cluster=slurm", "model=tiny", "data=clips", f"data.root={clips}", f"run_dir={run}", "device=cpu",
        "precision=fp32", "tracking.mlflow=false", "nodes=2", "tasks_per_node=2", "parallel.tensor=2",
        "parallel.pipeline=2", "train.steps=10", "train.checkpoint_every=4", "train.global_batch=8",
        "train.accumulate=2", "train.warmup_steps=2", "train.log_every=1", "data.workers=0", "model.hidden=64",
        "fault.step_timeout_s=60", "fault.collective_timeout_s=90", *more,
    ))  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def submit(slurm: Slurm, command: Sequence[str], make_job: Callable[..., Any] | None = None) -> tuple[list[str], str]:
    """Run the product's command. Returns the numbers of the jobs and what it printed."""
    out = io.StringIO()
    with _SUBMITTING, exported(slurm.environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(list(command), *([make_job] if make_job else []))
    assert code == 0, out.getvalue()
    # not from what was printed: a chain runs in a thread, and pytest's capture may take its output meanwhile
    folder = run_folder(command)
    record = min([*folder.glob("logs/submission.json"), *folder.glob("stage_1/logs/submission.json")])
    return json.loads(record.read_text())["jobs"], out.getvalue()


def run_folder(command: Sequence[str]) -> Path:
    """The run directory that a command names."""
    return Path(next(o for o in command if o.startswith("run_dir=")).split("=", 1)[1])


@dataclass
class Run:
    """One run directory and the job that trains in it.

    Attributes:
        slurm: the cluster.
        command: overrides; `submit` may be called again with them.
        make_job: what the ranks run.
        job: the number of the job.
    """

    slurm: Slurm
    command: Sequence[str]
    make_job: Callable[..., Any] = PacedJob
    job: str = ""
    said: str = field(default="", repr=False)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return run_folder(self.command)

    def submit(self) -> Run:
        """Submit the command."""
        jobs, self.said = submit(self.slurm, self.command, self.make_job)
        (self.job,) = jobs
        return self

    # --- looking

    def steps(self) -> dict[int, dict[str, Any]]:
        """The last line of each step of `metrics.jsonl`."""
        return {line["step"]: line for line in self.lines("metrics.jsonl")}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a file of JSON lines."""
        path = self.folder / name
        text = path.read_text() if path.is_file() else ""
        found = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def state(self) -> str:
        """Slurm's word for the job."""
        return self.slurm.job(self.job)["JobState"]

    def starts(self) -> int:
        """How often Slurm started the job again."""
        return int(self.slurm.job(self.job)["Restarts"])

    def complete(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return sorted(int(m.parent.name[5:]) for m in self.folder.glob("checkpoints/step_*/complete.json"))

    def begun(self) -> list[int]:
        """Steps of all checkpoints, those that are being written too."""
        return sorted(int(folder.name[5:]) for folder in self.folder.glob("checkpoints/step_*"))

    def advanced(self) -> bool:
        """Whether the attempt that runs has completed a checkpoint of its own."""
        begins = [line for line in self.lines("logs/attempts.jsonl") if line["event"] == "begin"]
        return len(begins) == self.starts() + 1 and max(self.complete(), default=0) > begins[-1]["step"]

    def ends(self) -> list[dict[str, Any]]:
        """The ends of the attempts, as the product wrote them down."""
        return [line for line in self.lines("logs/attempts.jsonl") if line.get("event") == "end"]

    def logs(self) -> str:
        """Everything that ranks and batch script printed."""
        files = [p for p in sorted((self.folder / "logs").glob("*")) if p.suffix in (".out", ".err")]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')}" for p in files)

    def account(self) -> str:
        """What is known of the job, shortest first, for a test that fails."""
        job = {key: value for key, value in self.slurm.job(self.job).items() if key in TOLD}
        attempts = "\n".join(map(str, self.lines("logs/attempts.jsonl")))
        controller = (self.slurm.folder / "log" / "slurmctld.log").read_text(errors="replace").splitlines()
        about = re.compile(rf"JobId={self.job}\b|\bnode\d+ .*(down|DOWN|respond|return)")
        ours = [line for line in controller if about.search(line)]
        printed = [line for line in self.logs().splitlines() if not NOISE.search(line)]
        return "\n".join([str(job), attempts, "", *ours[-40:], "", *printed[-80:]])

    # --- waiting

    def until(self, what: str, reached: Callable[[], Any], seconds: float = 240, early: bool = False) -> Any:
        """Wait for something; fails when the job ends before it (unless `early`) or time runs out."""
        until = time.monotonic() + seconds
        while not (found := reached()):
            over = not early and self.state() in ENDED and not reached()
            if over or time.monotonic() > until:
                raise AssertionError(f"{what}: not reached; job {self.job} is {self.state()}\n{self.account()}")
            time.sleep(0.1)
        return found

    def until_step(self, step: int) -> None:
        """Wait until a step is done."""
        self.until(f"step {step}", lambda: step in self.steps())

    def until_ended(self, seconds: float = 240) -> str:
        """Wait for the job's end. Returns its state."""
        self.until("the end", lambda: self.state() in ENDED, seconds, early=True)
        return self.state()


def same_run(run: Run, other: Run) -> None:
    """Every step of both runs, bit for bit."""
    ours, theirs = run.steps(), other.steps()
    assert sorted(ours) == sorted(theirs)
    for step, line in theirs.items():
        keys = [key for key in SAME if key in line]
        assert len(keys) >= 6
        assert {key: ours[step][key] for key in keys} == {key: line[key] for key in keys}, f"step {step}"
