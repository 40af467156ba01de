"""Runs a function on N gloo ranks of this machine, with a timeout, and gives back what each rank returned."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil
import torch

_PRELOAD = [
    "torch",
    "megatron_elva.parallel.engine",
    "megatron.core.transformer.moe.experts",
    "transformers.models.qwen2.modeling_qwen2",
]


_server: int | None = None
"""The fork server with these imports: a test before may have started one with others, which costs seconds a rank."""


def _context() -> Any:
    global _server
    context = mp.get_context("forkserver")
    running = forkserver._forkserver
    if _server is None or running._forkserver_pid != _server:
        running._stop()
        context.set_forkserver_preload(_PRELOAD)
        forkserver.ensure_running()
        _server = running._forkserver_pid
    return context


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _main(rank: int, world: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    log = Path(folder, f"{rank}.log").open("w")  # noqa: SIM115 - open until the process ends
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(10, file=log)  # SIGUSR1: the parent asks for the stacks of a hanging rank
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), Path(folder, f"{rank}.pt"))
    except BaseException:
        traceback.print_exc()
        _leave(log, 1)
    _leave(log, 0)


def _leave(log: IO[str], code: int) -> NoReturn:
    """End at once, and with it the processes that writing a checkpoint started."""
    log.flush()
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(code)


def run_distributed(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` on `world` ranks; fails with the logs of the ranks when one fails or time runs out."""
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        processes = [
            _context().Process(target=_main, args=(r, world, port, folder, function, args)) for r in range(world)
        ]
        for p in processes:
            p.start()
        end = time.monotonic() + timeout
        failed = False
        while any(p.is_alive() for p in processes):
            failed = any(p.exitcode not in (None, 0) for p in processes) or time.monotonic() > end
            if failed:
                break
            time.sleep(0.02)
        late = [r for r, p in enumerate(processes) if p.is_alive()]
        for r in late:
            os.kill(processes[r].pid, 10)
        time.sleep(0.3 if late else 0)
        for p in processes:
            p.kill()
            p.join()
        codes = [p.exitcode for p in processes]
        if failed or any(codes):
            logs = "\n".join(f"--- rank {r}\n{Path(folder, f'{r}.log').read_text()[-4000:]}" for r in range(world))
            raise AssertionError(f"ranks failed: exit codes {codes}, hanging {late} after {timeout} s\n{logs}")
        return [torch.load(Path(folder, f"{r}.pt"), weights_only=False) for r in range(world)]
