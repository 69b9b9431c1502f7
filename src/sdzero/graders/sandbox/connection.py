"""Connection to the sandbox server: starts it, detects its death, and removes its remains."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdzero.graders.errors import GraderError, NoSandboxError
from sdzero.graders.sandbox.protocol import LENGTH, SILENCE_SECONDS, Handshake, ServerOptions

_START_SECONDS = 60.0
_END_SECONDS = 5.0
# variables that identify the job, whose processes on a node share one server
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


class Connection:
    """Socket to the server of this job, which the first process to connect starts."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._socket: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        job = [os.environ.get(name, "") for name in _JOB]
        private = [] if any(job) else [os.getpid(), id(self)]
        name = hashlib.sha256(json.dumps([job, private, dataclasses.astuple(options)]).encode()).hexdigest()[:12]
        self.folder = Path(tempfile.gettempdir()) / f"sdzero-sandbox-{os.getuid()}-{name}"

    def open(self) -> Handshake | None:
        """Connect, starting the server if there is none. None if already connected."""
        if self._socket:
            return None
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise GraderError(f"{self.folder} belongs to another user: remove it")
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the node starts the server; the others wait here
            if not self._connect():
                self._start()
                if not self._connect():
                    raise GraderError("the sandbox server ended right after its start")
        return Handshake(**json.loads((self.folder / "handshake.json").read_text()))

    def _connect(self) -> bool:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SILENCE_SECONDS)
        with suppress(OSError):
            self._socket.connect(str(self.folder / "socket"))
            return True
        self._socket.close()
        self._socket = None
        return False

    def _start(self) -> None:
        """Start the server, without this process's environment, and wait until it has chosen a sandbox."""
        _kill_remains(self.folder)
        _remove_orphaned_folders()
        options = json.dumps(dataclasses.asdict(self.options))
        argv = [sys.executable, "-m", "sdzero.graders.sandbox.server", str(self.folder), options]
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self.process.stdout
        with self.process.stdout as ready:
            there, _, _ = select.select([ready], [], [], _START_SECONDS)
            line = ready.readline() if there else b""
        if not line:
            self.process.kill()
            raise GraderError(f"the sandbox server did not start (exit code {self.process.wait()})")
        (self.folder / "handshake.json").write_bytes(line)
        found = Handshake(**json.loads(line))
        if found.backend is None:
            self.close()
            raise NoSandboxError(
                "no sandbox is safe on this machine, so no program is run. "
                + "; ".join(found.rejected)
                + ". Fix one of them, or set backend: unsafe for programs that you trust like your own"
            )

    def send(self, data: bytes) -> None:
        assert self._socket
        self._socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """Receive the next answer, skipping the empty heartbeat messages.

        Raises:
            EOFError, OSError: the server has ended, or hangs.
        """
        while not (answer := json.loads(self._read(int.from_bytes(self._read(LENGTH), "big")))):
            pass
        return answer

    def _read(self, number: int) -> bytes:
        assert self._socket
        data = bytearray()
        while len(data) < number:
            part = self._socket.recv(min(number - len(data), 1 << 20))
            if not part:
                raise EOFError("the connection was closed")
            data += part
        return bytes(data)

    def disconnect(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def abandon(self) -> None:
        """Disconnect from a server that no longer answers; kill it if this process started it."""
        self.disconnect()
        if self.process:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Disconnect; wait for the server if this process started it, and remove its remains."""
        self.disconnect()
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):  # it still has another client
            self.process.wait(_END_SECONDS)
            self.process = None
            _remove(self.folder)


def _kill_remains(folder: Path) -> None:
    """Kill the sandboxes that a killed server has left, and remove its cgroup."""
    for process in Path("/proc").glob("[0-9]*"):  # bubblewrap orphaned at its start waits forever
        with suppress(OSError):
            if os.fsencode(folder) in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
    with suppress(OSError, ValueError, KeyError):
        if place := json.loads((folder / "handshake.json").read_text())["cgroup"]:
            deadline = time.monotonic() + _END_SECONDS
            while Path(place).exists() and time.monotonic() < deadline:  # killed processes may not have ended yet
                for group in (*Path(place).glob("*/"), Path(place)):
                    with suppress(OSError):
                        group.rmdir()
                time.sleep(0.001)


def _remove(folder: Path) -> None:
    _kill_remains(folder)
    for path in (Path(f"{folder}-work"), folder):
        shutil.rmtree(path, ignore_errors=True)


def _remove_orphaned_folders() -> None:
    """Remove the folders of servers whose clients were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"sdzero-sandbox-{os.getuid()}-*"):
        if folder.name.endswith("-work") or not (folder / "handshake.json").exists():
            continue
        with suppress(OSError), (folder / "lock").open() as lock, socket.socket(socket.AF_UNIX) as listener:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while a server starts
            if listener.connect_ex(str(folder / "socket")):  # no server listens
                _remove(folder)
