"""Whether a sandbox holds on this machine: a program that must run, and some whose harm must not happen."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path

from sdzero.graders.sandbox.backend import Job
from sdzero.graders.sandbox.executor import Executor, Outcome, SandboxFailure
from sdzero.graders.sandbox.types import Limits

_LIMITS = Limits(time=2, memory_mb=128, processes=16, wall=10)

# Tells what it could do. %s: JSON of the file it must not read, the file it must not write, the port it must not reach,
# and the variable that it must not see
_REACH = """
import json, os, socket
secret, target, port, variable = json.loads(%r)
done = []
def attempt(name, act):
    try:
        act()
        done.append(name)
    except (OSError, KeyError):
        pass
attempt("read a file of the machine", lambda: open(secret).read())
attempt("write a file of the machine", lambda: open(target, "w").write("x"))
attempt("read the passwords", lambda: open("/etc/shadow").read())
attempt("reach the network", lambda: socket.create_connection(("127.0.0.1", port), 2))
attempt("see the environment", lambda: os.environ[variable])
attempt("be root", lambda: open("/dev/mem", "rb"))
print(json.dumps(done))
raise SystemExit(7)
"""
_FORK = """
import os, time
children = 0
try:
    for _ in range(60):
        if os.fork() == 0:
            time.sleep(20)
        children += 1
except OSError:
    pass
print(children)
"""
_MEMORY = """
held = []
while True:
    held.append(bytearray(b"x") * (16 << 20))
    print(len(held), flush=True)
"""


async def failing(runs: Executor, python: str, folder: Path) -> str | None:
    """Why a sandbox cannot be trusted here; None where it holds.

    Args:
        folder: of the judge; programs must not reach it.
    """
    secret, target, variable = folder / "secret", folder / "target", "SDZERO_JUDGE_PROBE"
    secret.write_text("secret")
    os.environ[variable] = "1"
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        known = json.dumps([str(secret), str(target), listener.getsockname()[1], variable])
        programs = [_REACH % known, *([_FORK, _MEMORY] if runs.backend.name != "unsafe" else [])]
        outcomes = await asyncio.gather(*(_run(runs, python, program) for program in programs), return_exceptions=True)
        ended = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
        for outcome in outcomes:  # all have ended: the next sandbox has a reaper of its own
            if isinstance(outcome, SandboxFailure):
                return f"it does not run: {outcome}"
            if isinstance(outcome, BaseException):
                raise outcome
        return None if runs.backend.name == "unsafe" else _verdict(*ended)
    finally:
        listener.close()
        del os.environ[variable]
        secret.unlink()
        target.unlink(missing_ok=True)


async def _run(runs: Executor, python: str, program: str) -> Outcome:
    return await runs.run(Job((python, "-I", "-S", "-c", program), _LIMITS))


def _verdict(reach: Outcome, fork: Outcome, memory: Outcome) -> str | None:
    if reach.stopped or reach.code != 7:
        return f"it does not run: {_words(reach)}"
    if done := json.loads(reach.stdout):
        return f"a program could {', '.join(done)}"
    if not fork.stopped and int(fork.stdout or 0) >= _LIMITS.processes:
        return f"a program could start {int(fork.stdout)} processes of {_LIMITS.processes}"
    if not memory.stopped and memory.code == 0:
        return "a program could take any amount of memory"
    return None


def _words(outcome: Outcome) -> str:
    words = outcome.stderr.decode(errors="replace").strip().splitlines()
    return f"exit code {outcome.code}" + (f", {words[-1]}" if words else "")
