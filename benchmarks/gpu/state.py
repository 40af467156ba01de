"""What a result belongs to, code and device: ``python -m benchmarks.gpu.state DEVICE`` prints both, a line each.

The code's version is a hash of the sources, so that a result counts for every commit with the same sources, such as one
that adds the result, and for none with others, committed or not.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "megatron_elva/**/*.py",
    "dali_pipelines/**/*.py",
    "configs/**/*.yaml",
    "benchmarks/*.py",
    "benchmarks/gpu/*.py",
)


@cache
def code_version() -> str:
    """12 hex digits of the sources that figures depend on."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """What ``COMMIT`` in the environment says, else the commit of the checkout.

    ``+`` is behind it where sources differ from it; outside of a checkout it is ``unknown``.
    """
    if given := os.environ.get("COMMIT"):
        return given
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def main(argv: Sequence[str]) -> int:
    """Print both."""
    sys.stdout.write(f"{code_version()}\n{report.machine(argv[0] if argv else 'cuda')['device']}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
