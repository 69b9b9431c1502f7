"""Ranks forked from a process that has imported everything: a run of two ranks costs its steps, not its imports."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from torch import distributed as dist

SECONDS = 120.0


def forked(num_ranks: int, logs: Path, work: Callable[[int], None]) -> list[int]:
    """Run `work(rank)` in processes of its own, as torchrun would start them; return their exit codes.

    Their output goes to the files LOGS + rank + .log. Those still running after SECONDS are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        os.fork() or _child(rank, num_ranks, port, Path(f"{logs}{rank}.log"), work) for rank in range(num_ranks)
    ]
    return _wait(children)


def run_ranks(num_ranks: int, logs: Path, work: Callable[[int], None]) -> None:
    """Run `work` as `forked` does; a rank that fails raises with the end of all logs."""
    codes = forked(num_ranks, logs, work)
    texts = [log.read_text()[-3000:] for log in sorted(logs.parent.glob(f"{logs.name}*.log"))]
    assert codes == [0] * num_ranks, f"{logs.name}: exit codes {codes}\n" + "\n".join(texts)


def _child(rank: int, num_ranks: int, port: int, log: Path, work: Callable[[int], None]) -> int:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "RANK": str(rank)}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        if dist.is_initialized():  # a vLLM engine of an earlier test leaves its process group in this worker
            dist.destroy_process_group()
        work(rank)
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must never return into its parent's code
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(children: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
        if time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]
