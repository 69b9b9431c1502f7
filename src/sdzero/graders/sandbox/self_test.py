"""Self-test of a sandbox: a benign program must run, and hostile ones must be contained."""

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

# Prints what it succeeded in. %r: JSON of a file it must not read, one it must not write, a port it must not reach, and
# a variable it must not see
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
attempt("read a file of the host", lambda: open(secret).read())
attempt("write a file of the host", lambda: open(target, "w").write("x"))
attempt("read /etc/shadow", lambda: open("/etc/shadow").read())
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


async def find_weakness(executor: Executor, python: str, folder: Path) -> str | None:
    """Return why a sandbox is not safe on this machine, or None. Programs must not reach the server's `folder`."""
    secret, target, variable = folder / "secret", folder / "target", "SDZERO_SANDBOX_TEST"
    secret.write_text("secret")
    os.environ[variable] = "1"
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        known = json.dumps([str(secret), str(target), listener.getsockname()[1], variable])
        programs = [_REACH % known, *([_FORK, _MEMORY] if executor.backend.name != "unsafe" else [])]
        runs = (executor.run(Job((python, "-I", "-S", "-c", program), _LIMITS)) for program in programs)
        outcomes = await asyncio.gather(*runs, return_exceptions=True)
        ended = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
        for outcome in outcomes:  # all have ended: the next executor reaps its own children
            if isinstance(outcome, SandboxFailure):
                return f"it does not run: {outcome}"
            if isinstance(outcome, BaseException):
                raise outcome
        return None if executor.backend.name == "unsafe" else _verdict(*ended)
    finally:
        listener.close()
        del os.environ[variable]
        secret.unlink()
        target.unlink(missing_ok=True)


def _verdict(reach: Outcome, fork: Outcome, memory: Outcome) -> str | None:
    if reach.stopped or reach.code != 7:
        return f"it does not run: {_describe(reach)}"
    if done := json.loads(reach.stdout):
        return f"a program could {', '.join(done)}"
    if not fork.stopped and int(fork.stdout or 0) >= _LIMITS.processes:
        return f"a program could start {int(fork.stdout)} processes of {_LIMITS.processes}"
    if not memory.stopped and memory.code == 0:
        return "a program could allocate memory without limit"
    return None


def _describe(outcome: Outcome) -> str:
    lines = outcome.stderr.decode(errors="replace").strip().splitlines()
    return f"exit code {outcome.code}" + (f", {lines[-1]}" if lines else "")
