"""Stands in for Slurm's ``sacct`` where no accounting daemon runs: ``sacct -o FIELDS --parsable2 -j ID``.

slurmctld remembers ended jobs for ``MinJobAge`` seconds, so ``scontrol show job`` knows the same.
"""

from __future__ import annotations

import re
import subprocess
import sys

FIELDS = {
    "jobid": "JobId", "state": "JobState", "nodelist": "NodeList", "exitcode": "ExitCode", "elapsed": "RunTime",
    "timelimit": "TimeLimit", "start": "StartTime", "end": "EndTime", "jobname": "JobName", "partition": "Partition",
    "submit": "SubmitTime", "nnodes": "NumNodes", "reason": "Reason", "restarts": "Restarts",
}  # fmt: skip
"""sacct's names in lower case to scontrol's."""


def main(arguments: list[str]) -> int:
    """Print the table."""
    ids: list[str] = []
    wanted = ["JobID", "State", "NodeList"]
    header, rest = True, list(arguments)
    while rest:
        name, _, value = rest.pop(0).partition("=")
        if name in ("-j", "--jobs"):
            ids += (value or rest.pop(0)).split(",")
        elif name in ("-o", "--format"):
            wanted = (value or rest.pop(0)).split(",")
        elif name in ("-n", "--noheader"):
            header = False
        elif name not in ("-P", "--parsable2", "-X", "--allocations", "-D", "--duplicates"):
            print(f"sacct: not known here: {name}", file=sys.stderr)
            return 1
    if header:
        print("|".join(wanted))
    for job in ids:
        shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=False)
        for line in shown.stdout.splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            print("|".join(fields.get(FIELDS.get(name.split("%")[0].lower(), ""), "") for name in wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
