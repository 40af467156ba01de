"""Every failure on a real Slurm, on two nodes: the run goes on by itself, and no step differs by a bit.

A chain is a run that is struck several times. Chains run side by side, for most of the time is Slurm's and Python's.
`docs/failures.md` is the table of what this measures: ``ELVA_RECOVERIES=table.jsonl pytest -s`` writes it down.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import pytest

from tests.slurm.cluster import has_namespaces
from tests.slurm.table import Table, chosen

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LONG, SHORT = 60, 14
"""Steps of runs that are struck often, and once."""
NO_WRITERS = "train.checkpoint_async=false"
"""Where the way of saving does not matter: the writing processes cost the ranks' time at the start."""
BATCH_HOST = ("batch host off", "cable of the batch host cut") if os.environ.get("ELVA_RECOVERIES") else ()
"""Two more failures, for the whole table: they cost minutes."""
REPLICAS = ("parallel.tensor=1",)
"""Pipeline 2 x data 2, in place of tensor 2 x pipeline 2."""
ONE_EACH = ("parallel.tensor=1", "tasks_per_node=1")
"""One rank a node, for failures that ask no more: on a machine of few cores ranks cost time at their start."""
NETNS = pytest.mark.skipif(not has_namespaces(), reason="needs nodes with a network of their own: root and iproute2")


def signals(table: Table) -> None:
    """What Slurm and people do to a job on purpose, and what the kernel does to a rank."""
    slurm, steps = table.slurm, f"train.steps={LONG}"
    run = table.run("signals", steps, "cluster.partition=low", "data.workers=1").submit()
    planned = table.strike(run, "signal ahead of the limit", lambda: slurm.run("scancel", "--signal=USR2", run.job))
    assert (planned.outcome, planned.again) == ("requeue", 0)
    operator = table.strike(run, "scontrol requeue", lambda: slurm.run("scontrol", "requeue", run.job))
    assert operator.again == 0  # TERM comes first, and the ranks save
    killed = table.strike(run, "rank killed", lambda: os.kill(slurm.tasks(run.job)[3], signal.SIGKILL))
    assert killed.outcome in ("failed", "lost") and 0 <= killed.again <= 5

    def preempt() -> None:
        nodes = ",".join(slurm.nodes_of(run.job))
        slurm.run(
            "sbatch",
            "-pmain",
            "-N2",
            "-t5",
            "--exclusive",
            f"--nodelist={nodes}",
            "--output=/dev/null",
            "--wrap",
            "sleep 3",
        )

    preempted = table.strike(run, "preemption", preempt)
    assert (preempted.outcome, preempted.again) == ("requeue", 0)
    slurm.reconfigure("preempt_send_user_signal", "idle_on_node_suspend")  # the default: TERM alone
    try:
        unannounced = table.strike(run, "preemption by TERM alone", preempt)
    finally:
        slurm.reconfigure("idle_on_node_suspend", "preempt_send_user_signal")
    assert unannounced.again == 0
    table.finish(run, "data.workers=1", steps=LONG)
    assert run.starts() >= 5  # where other chains have lost nodes, it may be preempted once more


def nodes(table: Table) -> None:
    """Nodes that go, and come back sooner or later."""
    slurm = table.slurm
    run = table.run(
        "nodes", *REPLICAS, f"train.steps={LONG}", "fault.step_timeout_s=20", "fault.collective_timeout_s=30"
    )
    run.submit()

    def power_off(place: int, back: bool = False) -> Callable[[], None]:
        def strike() -> None:
            name = slurm.nodes_of(run.job)[place]
            slurm.kill_node(name)
            off.append(name)
            if back:
                slurm.start_node(off.pop())

        return strike

    def pull_cable(place: int) -> Callable[[], None]:
        def strike() -> None:
            cut.append(slurm.nodes_of(run.job)[place])
            slurm.cut(cut[-1])

        return strike

    off: list[str] = []
    cut: list[str] = []
    try:
        table.strike(run, "node off", power_off(1))
        table.strike(run, "node off and on", power_off(1, back=True))
        if BATCH_HOST:
            table.strike(run, "batch host off", power_off(0))
        while off:
            slurm.start_node(off.pop())
        table.strike(run, "cable cut", pull_cable(1))
        if BATCH_HOST:  # rank 0 lives on, cut off, and holds the lock of the run directory
            table.strike(run, "cable of the batch host cut", pull_cable(0))
    finally:
        for name in off:
            slurm.start_node(name)
        for name in cut:
            slurm.heal(name)
    table.finish(run, *REPLICAS, steps=LONG)
    assert run.starts() == len(CHAINS["nodes"][1])
    assert all(table.recoveries[failure].again <= 8 for failure in CHAINS["nodes"][1])


def repeated(table: Table) -> None:
    """A minute later Slurm repeats the order to end a step whose ranks were slow to end; the next ranks live on."""
    place = f"cluster.sbatch_args={{nodelist:'{','.join(table.slurm.nodes[-2:])}',mem:'0'}}"  # the same nodes again
    given = (f"train.steps={LONG}", "data.workers=1", NO_WRITERS, place)
    run = table.run("repeated", *given, pause_s=1.5).submit()
    table.strike(run, "killed on the same nodes", lambda: os.kill(table.slurm.tasks(run.job)[3], signal.SIGKILL))
    table.finish(run, "data.workers=1", steps=LONG)
    assert run.starts() == 1


def hang(table: Table) -> None:
    """A rank that waits for ever ends the job, and is named."""
    given = (*ONE_EACH, f"train.steps={SHORT}", "fault.step_timeout_s=15")
    run = table.run("hang", *given, fault="hang", at=10, rank=1).submit()
    recovery = table.strike(run, "rank hangs", lambda: run.until_step(9))
    assert recovery.outcome == "hang" and recovery.again <= 5
    table.finish(run, *ONE_EACH, steps=SHORT)
    # the first of them: on a machine that is busy enough a later attempt may be slow at the same step
    folder = min((run.folder / "logs").glob("hang_step_10*"), key=lambda path: path.stat().st_mtime)
    assert "rank 1" in run.ends()[0]["reason"]
    assert json.loads((folder / "summary.json").read_text())
    assert "wait_for_ever" in (folder / "rank_1.txt").read_text()
    assert len(list(folder.glob("rank_*.txt"))) == 2


def torn(table: Table) -> None:
    """A rank is killed before a checkpoint is complete."""
    run = table.run("torn", *ONE_EACH, f"train.steps={SHORT}", fault="slow_marker", at=8).submit()
    half = run.folder / "checkpoints" / "step_8"

    def strike() -> None:
        run.until("the files of step 8", lambda: half.is_dir() and any(half.glob("*.distcp")))
        os.kill(table.slurm.tasks(run.job)[0], signal.SIGKILL)
        assert not (half / "complete.json").exists()
        for file in half.glob("*.distcp"):
            os.truncate(file, file.stat().st_size // 2)

    recovery = table.strike(run, "killed while saving", strike)
    assert recovery.outcome in ("failed", "lost") and recovery.again >= 4
    assert f"resumed from {run.folder}/checkpoints/step_4" in run.logs()
    table.finish(run, *ONE_EACH, steps=SHORT)


def cancel(table: Table) -> None:
    """scancel: saves and ends; the same command goes on."""
    run = table.run("cancel", *ONE_EACH, f"train.steps={SHORT}", NO_WRITERS).submit()
    recovery = table.strike(run, "scancel", lambda: table.slurm.run("scancel", run.job), resubmit=True)
    assert (recovery.outcome, recovery.again) == ("stopped", 0)
    table.finish(run, *ONE_EACH, steps=SHORT)


def disk(table: Table) -> None:
    """A full disk: a clear error, no restart, the last checkpoint is kept; with space the same command goes on."""
    slurm, room = table.slurm, 200_000
    run = table.run("disk", *ONE_EACH, f"train.steps={SHORT}", pause_s=2, paced=1, folder=slurm.small_disk).submit()
    ballast = slurm.small_disk / "ballast"

    def fill() -> None:
        run.until("nothing being saved", lambda: run.complete() == run.begun())
        state = os.statvfs(slurm.small_disk)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - room)  # at once or not at all
        try:
            before = run.complete()
            assert run.until_ended() == "FAILED"
        finally:
            ballast.unlink()
        assert run.starts() == 0
        assert run.complete() == before
        # the checkpoint is too large for the room that is left; whoever writes meanwhile has none either
        assert run.ends()[-1]["outcome"] == "refused"
        reason = run.ends()[-1]["reason"]
        assert "No space left" in reason and f"checkpoints/step_{before[-1]}" in reason, reason
        assert "not started again" in run.logs()

    table.strike(run, "disk full", fill, resubmit=True)
    table.finish(run, *ONE_EACH, steps=SHORT)


def same_step(table: Table) -> None:
    """A job that fails three times at one step is left alone, and says why."""
    run = table.run(
        "same_step", *ONE_EACH, "train.steps=6", NO_WRITERS, fault="raise", at=3, rank=1, attempts=99
    ).submit()
    assert run.until_ended(240) == "FAILED"
    assert run.starts() == 2
    ends = run.ends()
    assert [(end["outcome"], end["step"]) for end in ends] == [("failed", 2)] * 3
    assert "banana" in ends[-1]["reason"] and "rank 1" in ends[-1]["reason"]
    said = run.logs()
    assert "not started again" in said and "fault.same_step=3" in said


def limit(table: Table) -> None:
    """A true time limit, which comes before the run is done at the first attempt's pace."""
    steps, minutes = 40, ("cluster.time_min=2", "cluster.signal_s=30")
    run = table.run("limit", *ONE_EACH, f"train.steps={steps}", NO_WRITERS, *minutes, pause_s=3, paced=1).submit()
    recovery = table.strike(run, "time limit", lambda: run.until("the signal", lambda: run.starts() == 1))
    assert (recovery.outcome, recovery.again) == ("requeue", 0)
    table.finish(run, *ONE_EACH, steps=steps)


CHAINS: dict[str, tuple[Callable[[Table], None], tuple[str, ...]]] = {
    "nodes": (nodes, ("node off", "node off and on", *(BATCH_HOST[:1]), "cable cut", *(BATCH_HOST[1:]))),
    "signals": (
        signals,
        ("signal ahead of the limit", "scontrol requeue", "rank killed", "preemption", "preemption by TERM alone"),
    ),
    "limit": (limit, ("time limit",)),
    "repeated": (repeated, ("killed on the same nodes",)),
    "same_step": (same_step, ()),
    "hang": (hang, ("rank hangs",)),
    "torn": (torn, ("killed while saving",)),
    "cancel": (cancel, ("scancel",)),
    "disk": (disk, ("disk full",)),
}
"""By name: what runs, and the failures in it. The longest come first."""


@pytest.fixture(scope="module")
def table(slurm, clips, tmp_path_factory, request):
    wanted = chosen(list(CHAINS), request.session.items)
    chains = {name: run for name, (run, _) in CHAINS.items() if name in wanted}
    made = Table(slurm, clips, tmp_path_factory.mktemp("table"), chains)
    yield made
    made.close()


@pytest.mark.parametrize("chain", [pytest.param(n, marks=NETNS if n in ("nodes", "disk") else ()) for n in CHAINS])
def test_nothing_is_lost(table, chain, request):
    table.wait(chain, tries=getattr(request.node, "execution_count", 1))  # a second try is a second run
    assert set(CHAINS[chain][1]) <= set(table.recoveries)
