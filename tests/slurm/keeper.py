"""Run a program as if it were a machine: adopt all it ever starts, and end all of that at once.

    keeper.py PROGRAM [ARGUMENT ...]

The end comes with SIGTERM, or when standard input closes, which the kernel does when whoever holds its other end is
gone, however that one died. slurmd's steps leave their parent on purpose; a subreaper is the parent of such orphans.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def descendants(root: int) -> list[int]:
    """All living processes below one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # it has just ended
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def bury() -> bool:
    """Take note of dead children. Returns whether any child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def end_all() -> None:
    """Kill everything below this process, until nothing is left that could start more."""
    until = time.monotonic() + 10
    while (left := descendants(os.getpid())) and time.monotonic() < until:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        bury()
        time.sleep(0.01)
    while bury() and time.monotonic() < until:
        time.sleep(0.01)


def main(command: list[str]) -> None:
    """Keep the program until the end."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signalled, wake = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(wake, b"x"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while bury():
        if select.select([0, signalled], [], [], 0.2)[0]:
            end_all()
            return


if __name__ == "__main__":
    main(sys.argv[1:])
