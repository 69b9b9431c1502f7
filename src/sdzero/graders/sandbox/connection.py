"""The socket to the judge's process: starts it, tells whether it is alive, and removes what it leaves."""

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
# what names the job that several processes of this node belong to; each starts no judge of its own
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


class Connection:
    """The socket to the judge of this job, which the first to come starts."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._socket: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        job = [os.environ.get(name, "") for name in _JOB]
        alone = [] if any(job) else [os.getpid(), id(self)]
        name = hashlib.sha256(json.dumps([job, alone, dataclasses.astuple(options)]).encode()).hexdigest()[:12]
        self.folder = Path(tempfile.gettempdir()) / f"sdzero-sandbox-{os.getuid()}-{name}"

    def open(self) -> Handshake | None:
        """Connects, and starts the judge where there is none. Returns what it has found, once."""
        if self._socket:
            return None
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise GraderError(f"{self.folder} belongs to another user: remove it")
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of the node's processes starts it, the others wait here
            if not self._connect():
                self._start()
                if not self._connect():
                    raise GraderError("the judge ended as soon as it was ready")
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
        """Starts the judge and waits until it has found a sandbox. It gets nothing of this process's environment."""
        _end_remains(self.folder)
        _remove_others()
        argv = [
            sys.executable,
            "-m",
            "sdzero.graders.sandbox.server",
            str(self.folder),
            json.dumps(dataclasses.asdict(self.options)),
        ]
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
            raise GraderError(f"the judge did not start (exit code {self.process.wait()})")
        (self.folder / "handshake.json").write_bytes(line)
        found = Handshake(**json.loads(line))
        if found.backend is None:
            self.close()
            raise NoSandboxError(
                "no sandbox holds on this machine, so no program is run. "
                + "; ".join(found.refused)
                + ". Mend one of them; or, for programs that you trust as you trust your own, backend: unsafe"
            )

    def send(self, data: bytes) -> None:
        assert self._socket
        self._socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            EOFError, OSError: the judge has ended, or hangs: it says at short intervals that it is there.
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
                raise EOFError("it closed the connection")
            data += part
        return bytes(data)

    def disconnect(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def abandon(self) -> None:
        """Leaves a judge that answers no more; ends it if it was started here."""
        self.disconnect()
        if self.process:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Waits for the judge that was started here, if nobody else asks it, and removes what it could not."""
        self.disconnect()
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):  # another process of this job still asks it
            self.process.wait(_END_SECONDS)
            self.process = None
            _remove(self.folder)


def _end_remains(folder: Path) -> None:
    """Ends the sandboxes that a killed judge has left, and removes its cgroup."""
    for process in Path("/proc").glob("[0-9]*"):  # bubblewrap, orphaned in its first milliseconds, waits for ever
        with suppress(OSError):
            if os.fsencode(folder) in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
    with suppress(OSError, ValueError):
        if place := Handshake(**json.loads((folder / "handshake.json").read_text())).cgroup:
            deadline = time.monotonic() + _END_SECONDS
            while Path(place).exists() and time.monotonic() < deadline:  # what was killed may not have ended yet
                for group in (*Path(place).glob("*/"), Path(place)):
                    with suppress(OSError):
                        group.rmdir()
                time.sleep(0.001)


def _remove(folder: Path) -> None:
    _end_remains(folder)
    for path in (Path(f"{folder}-work"), folder):
        shutil.rmtree(path, ignore_errors=True)


def _remove_others() -> None:
    """What is left of judges whose trainer was killed, and so could not remove it."""
    for folder in Path(tempfile.gettempdir()).glob(f"sdzero-sandbox-{os.getuid()}-*"):
        if folder.name.endswith("-work") or not (folder / "handshake.json").exists():
            continue
        with suppress(OSError), (folder / "lock").open() as lock, socket.socket(socket.AF_UNIX) as listener:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while a judge is being started
            if listener.connect_ex(str(folder / "socket")):  # nobody listens
                _remove(folder)
