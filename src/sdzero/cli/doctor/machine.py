"""Checks of the machine: platform, cores, memory, disks, compiler, sandbox, model hub."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

GIB = 2**30
HUB_SECONDS = 2.5
Status = Literal["ok", "warning", "missing", "broken"]


@dataclass(frozen=True)
class Row:
    """One finding and its remedy. sdzero cannot work where a `required` row is missing or broken."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    required: bool = False

    @property
    def is_fatal(self) -> bool:
        return self.required and self.status in ("missing", "broken")


def machine_rows() -> Iterator[Row]:
    system = f"{platform.platform()}, Python {platform.python_version()}"
    if sys.platform == "win32":  # a run's folder is locked with POSIX calls
        yield Row("platform", "broken", system, "use Linux, macOS or WSL", required=True)
        return
    yield Row("platform", "ok", system)
    yield cpu_row()
    yield memory_row()
    yield disk_row("disk", Path.cwd(), 5, "a checkpoint takes 12 to 16 bytes per parameter, and up to three are kept")
    try:
        yield disk_row("TMPDIR", Path(tempfile.gettempdir()), 1, "libraries write temporary files there")
    except FileNotFoundError as error:
        yield Row("TMPDIR", "broken", str(error), "set TMPDIR to a writable folder")
    yield compiler_row()
    yield sandbox_row()
    yield hub_row()


def cpu_row() -> Row:
    # a scheduler or a container may leave this process fewer cores than the machine has
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(value) if value.isdigit() else cores
    found = f"{cores} cores, OMP_NUM_THREADS is {value or 'not set: torch starts one thread per core'}"
    if threads > cores or (cores > 1 and not value):
        remedy = "export OMP_NUM_THREADS=1 for a tiny model: two threads on two shared cores were ten times slower"
        return Row("CPU", "warning", found, remedy)
    return Row("CPU", "ok", found)


def memory_row(meminfo: Path = Path("/proc/meminfo")) -> Row:
    if not meminfo.is_file():
        return Row("memory", "ok", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB")
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in meminfo.open())}
    available, total = (kib[key] * 1024 / GIB for key in ("MemAvailable", "MemTotal"))
    found = f"{available:.1f} of {total:.1f} GiB available"
    if available < 3:
        return Row("memory", "warning", found, "close other programs: the tiny model with vLLM needs 2 GiB")
    return Row("memory", "ok", found)


def disk_row(name: str, folder: Path, wanted_gib: float, why: str) -> Row:
    free = shutil.disk_usage(folder).free / GIB
    if not os.access(folder, os.W_OK):
        return Row(name, "warning", f"{folder} is not writable", "use another folder")
    found = f"{free:.1f} GiB free in {folder}"
    return Row(name, "ok", found) if free >= wanted_gib else Row(name, "warning", found, f"free some space: {why}")


def compiler_row() -> Row:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    lacking = [name for name, there in (("C++ compiler", compiler), ("Python C headers", headers)) if not there]
    if lacking:
        remedy = "Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install"
        return Row("C++", "warning", f"no {' and no '.join(lacking)}; vLLM's CPU build needs them", remedy)
    return Row("C++", "ok", str(compiler))


def sandbox_row() -> Row:
    """Start the sandbox client, which tries the sandboxes in turn."""
    from sdzero.graders.errors import GraderError
    from sdzero.graders.sandbox.client import SandboxClient  # its modules do not exist on every platform

    try:
        with SandboxClient(num_workers=1) as client:
            memory = "counted by a cgroup" if client.counted else "polled: no writable cgroup"
            found = f"{client.backend}, memory {memory}; Python for programs: {client.options.python}"
            return Row("code sandbox", "ok", found)
    except (GraderError, ValueError, OSError) as error:
        remedy = "apt install bubblewrap, needed only to judge programs" if sys.platform == "linux" else ""
        return Row("code sandbox", "missing", str(error), remedy)


def hub_row() -> Row:
    """Ask the model hub for an answer within HUB_SECONDS, name lookup included."""
    if find_spec("huggingface_hub") is None:
        return Row("model hub", "missing", "huggingface_hub is not installed", "pip install transformers")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Row("model hub", "ok", "offline by HF_HUB_OFFLINE: only model folders and models downloaded before")
    faults: list[str] = []
    request = Thread(target=lambda: faults.append(_hub_fault(constants.ENDPOINT)), daemon=True)
    request.start()
    request.join(HUB_SECONDS)
    fault = faults[0] if faults else f"no answer in {HUB_SECONDS} s"
    if fault:
        found = f"offline ({fault}): student.path takes folders and models downloaded before"
        return Row("model hub", "warning", found, "export HF_HUB_OFFLINE=1 to skip waiting for it")
    return Row("model hub", "ok", f"{constants.ENDPOINT} answers")


def _hub_fault(endpoint: str) -> str:
    """Return the reason why the hub cannot be used; empty if it can."""
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError as error:
        return f"it answers {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""
