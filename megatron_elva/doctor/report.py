"""The doctor's words: a table for a terminal, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_elva.doctor import gather, hardware, libraries, pairs, slurm
from megatron_elva.doctor.findings import Finding
from megatron_elva.doctor.snapshot import Snapshot
from megatron_elva.doctor.verdict import Verdict, judge

TIMEOUT_S = 90.0
"""Seconds that a probe may take: the first import of torch from a busy network file system takes that long."""


@dataclass(frozen=True)
class Report:
    """All that is said of a machine."""

    findings: tuple[Finding, ...]
    verdict: Verdict

    @property
    def bad(self) -> int:
        """How many findings keep something that is installed, or needed, from running."""
        return sum(finding.state == "bad" for finding in self.findings)


def examine(timeout: float = TIMEOUT_S) -> Report:
    """Look at this machine and say what there is.

    Args:
        timeout: seconds that each probe may take; they run side by side.
    """
    return say(gather.look(timeout))


def say(snapshot: Snapshot) -> Report:
    """What there is to say of a snapshot."""
    parts = (hardware, libraries, slurm, pairs)
    findings = tuple(finding for part in parts for finding in part.findings(snapshot))
    return Report(findings, judge(snapshot, findings))


def as_text(report: Report) -> str:
    """Lines for a terminal: what is there, below it what to do, and what will run at the end."""
    width = max(len(finding.topic) for finding in report.findings)
    lines = [line for finding in report.findings for line in _lines(finding, width)]
    return "\n".join([*lines, "", *_summary(report.findings), report.verdict.line])


def as_json(report: Report) -> str:
    """One JSON object: ``findings`` with topic, state, there and remedy; ``runs``; ``bad``, a count."""
    findings = [asdict(finding) for finding in report.findings]
    return json.dumps({"findings": findings, "runs": asdict(report.verdict), "bad": report.bad}, indent=2)


def _lines(finding: Finding, width: int) -> list[str]:
    first = f"{finding.topic:{width}}  {finding.state:7}  {finding.there}"
    return [first, f"{'':{width}}           -> {finding.remedy}"] if finding.remedy else [first]


def _summary(findings: Sequence[Finding]) -> list[str]:
    bad = [finding.topic for finding in findings if finding.state == "bad"]
    return [f"{len(bad)} bad: {', '.join(bad)}"] if bad else []
