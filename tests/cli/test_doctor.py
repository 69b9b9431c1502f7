"""`sdzero doctor` in this environment, and its checks of the machine."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import packaging.requirements
import pytest
from huggingface_hub import constants

from sdzero.cli import doctor
from sdzero.cli.doctor import machine
from sdzero.cli.doctor.machine import Row, Status

ROOT = Path(__file__).parents[2]
# --- this environment -----------------------------------------------------------------------------


def test_installed_parts_are_found_without_importing_torch_or_lightning() -> None:
    code = "import sys; from sdzero.cli.main import main; main()\n"
    code += "sys.exit(3 * bool({'torch', 'lightning'} & {*sys.modules}))"
    command = [sys.executable, "-c", code, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    real = [Row(**row) for row in json.loads(done.stdout)]
    rows = {row.name: row for row in real}
    required = [packaging.requirements.Requirement(line) for line in metadata.requires("sdzero") or ()]
    names = [r.name for r in required if r.marker is None]
    assert len(names) > 10 and all(f"{name} {metadata.version(name)}" in rows["dependencies"].found for name in names)
    assert rows["dependencies"].status == rows["imports"].status == "ok"
    assert str(ROOT / "src/sdzero") in rows["sdzero"].found
    assert all(f"{name} in " in rows["imports"].found for name in ("torch", "transformers", "lightning"))
    assert not any(row.is_fatal for row in real)
    assert {"platform", "CPU", "memory", "disk", "TMPDIR", "C++", "model hub", "GPUs", "engine vLLM"} <= {*rows}
    assert [row.name for row in real if row.status != "ok" and not row.remedy] == [], "every problem has a remedy"


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "value", "status"),
    [(2, None, "warning"), (1, None, "ok"), (2, "1", "ok"), (2, "2", "ok"), (2, "8", "warning"), (2, "1,1", "ok")],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, cores: int, value: str | None, status: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert machine.cpu_row().status == status


def test_memory(tmp_path: Path) -> None:
    for available, status in ((2, "warning"), (4, "ok")):
        text = f"MemTotal: {8 * 2**20} kB\nMemAvailable: {available * 2**20} kB\nHugePages_Total: 0\n"
        (tmp_path / "meminfo").write_text(text)
        row = machine.memory_row(tmp_path / "meminfo")
        assert (row.found, row.status) == (f"{available}.0 of 8.0 GiB available", status)


def test_a_full_disk_and_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 2**40 - 2**30, 2**30))
    assert [machine.disk_row("disk", tmp_path, wanted, "why").status for wanted in (1, 2)] == ["ok", "warning"]
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert "is not writable" in machine.disk_row("disk", tmp_path, 1, "why").found


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(machine, "hub_row", lambda: Row("model hub", "ok", ""))
    row = next(row for row in machine.machine_rows() if row.name == "TMPDIR")
    assert row.status == "broken" and "set TMPDIR" in row.remedy


def test_programs_are_looked_up_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in machine.compiler_row().found and machine.compiler_row().status == "warning"
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    (tmp_path / "clang++").chmod(0o755)
    assert "no C++ compiler" not in machine.compiler_row().found


def test_doctor_starts_without_the_modules_of_the_judge() -> None:
    """Windows lacks them."""
    script = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import sdzero.cli.doctor"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_reasons_against_each_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "sandlock.py").write_text("def landlock_abi_version(): return -1\ndef min_landlock_abi(): return 6\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = machine.sandbox_row()
    assert row.status == "missing" and "bwrap is not installed" in row.found and "bubblewrap" in row.remedy
    (tmp_path / "bwrap").symlink_to("/bin/false")
    assert "bubblewrap: it does not run" in machine.sandbox_row().found


def test_windows_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    (row,) = machine.machine_rows()
    assert row.is_fatal and "WSL" in row.remedy


def test_a_hub_that_answers_refuses_or_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = threading.Event()

    class Hub(http.server.BaseHTTPRequestHandler):
        status: int | None = 200  # None: no answer

        def do_HEAD(self) -> None:
            if self.status is None:
                silence.wait(60)
            else:
                self.send_response(self.status)
                self.end_headers()

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(machine, "HUB_SECONDS", 0.5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert machine.hub_row().status == "ok"
        Hub.status = 403
        assert "it answers 403" in machine.hub_row().found
        Hub.status = None
        assert machine.hub_row().status == "warning" and "offline" in machine.hub_row().found
        silence.set()
        server.shutdown()
    monkeypatch.setattr(machine, "_hub_fault", lambda endpoint: time.sleep(300))  # a name lookup has no time limit
    assert "no answer in 0.5 s" in machine.hub_row().found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert machine.hub_row().status == "ok" and "HF_HUB_OFFLINE" in machine.hub_row().found


# --- output ---------------------------------------------------------------------------------------

ROWS = [
    Row("torch", "ok", "here"),
    Row("extra [tasks]", "missing", "would add gym", 'pip install -e ".[tasks]"'),
    Row("engine vLLM", "broken", "two builds", "remove one"),
]


def test_the_table_and_the_remedies(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter(ROWS))
    doctor.main([])  # does not exit: no required part is missing
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1)[0] for line in lines[:3]] == ["torch", "extra", "engine"]
    assert all(row.status in line and row.found in line for row, line in zip(ROWS, lines, strict=False))
    assert '  extra [tasks]: pip install -e ".[tasks]"' in lines


@pytest.mark.parametrize("status", ["missing", "broken", "warning", "ok"])
def test_the_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([*ROWS, Row("lightning", status, "", required=True)]))
    fails = pytest.raises(SystemExit, match="sdzero cannot work here: lightning")
    with fails if status in ("missing", "broken") else nullcontext():
        doctor.main(["--json"])
    assert len(json.loads(capsys.readouterr().out)) == 4
