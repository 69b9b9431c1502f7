"""The rows of what needs torch: imports, GPUs, engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sdzero.cli.doctor.machine import GIB
from sdzero.cli.doctor.packages import other_torch, pip_install, version_of, vllm_builds, with_version
from sdzero.cli.doctor.probe import COMPANIONS, Finding
from sdzero.cli.doctor.rows import Row

REQUIRED = ("torch", "transformers", "lightning")
NOT_ASKED = Finding(fault="not asked")
TRANSFORMERS_ENGINE = "or sample with transformers: sdzero run RECIPE --engine transformers"


def import_rows(findings: Mapping[str, Finding]) -> Iterator[Row]:
    """`findings` as `Probe.findings` gives them."""
    for name in filter(version_of, REQUIRED):
        fault = findings.get(name, NOT_ASKED).fault
        if fault:
            remedy = _reinstall(name, fault)
            yield Row(name, "broken", f"{version_of(name)} does not import: {fault}", remedy, required=True)
    good = {name: f.seconds for name, f in findings.items() if name in (*REQUIRED, "vllm") and not f.fault}
    if good:
        yield Row("imports", "ok", ", ".join(f"{name} in {seconds:.1f} s" for name, seconds in good.items()))
    for package in filter(version_of, COMPANIONS):
        other = other_torch(package)
        fault = f"it wants {other}" if other else findings.get(package, NOT_ASKED).fault
        if fault:
            found = f"{with_version([package])} beside torch {version_of('torch')}: {fault}"
            yield Row(package, "broken", found, f"pip uninstall -y {package} (no engine needs it)")
    yield gpu_row(findings)
    yield vllm_row(findings)


def _reinstall(name: str, fault: str) -> str:
    """A package of another build than torch is to blame where the fault names it."""
    to_blame = [package for package in COMPANIONS if package in fault and version_of(package)]
    return f"pip uninstall -y {' '.join(to_blame)}" if to_blame else f"pip install --force-reinstall {name}"


def gpu_row(findings: Mapping[str, Finding]) -> Row:
    driver, gpus = findings.get("driver", Finding()), findings.get("gpus", NOT_ASKED)
    if gpus.value:
        each = [f"{g['name']}, {g['memory'][0] / GIB:.1f} of {g['memory'][1] / GIB:.1f} GiB free" for g in gpus.value]
        return Row("GPUs", "ok", "; ".join(each) + (f" (driver: {driver.value})" if driver.value else ""))
    if not driver.value and not driver.fault:  # without a driver no torch sees a GPU, whatever it was built for
        return Row("GPUs", "ok", "none")
    torch = f"torch {version_of('torch')}"
    if driver.fault:
        return Row("GPUs", "warning", f"nvidia-smi: {driver.fault}", "mend the driver, or train on the CPU")
    if not (findings.get("torch", NOT_ASKED).value or {}).get("cuda"):
        return Row("GPUs", "warning", f"{driver.value}, but {torch} is a CPU build", pip_install("cuda"))
    why = gpus.fault or "no reason is given"
    return Row("GPUs", "warning", f"{driver.value}, but {torch} sees none: {why}", "look at CUDA_VISIBLE_DEVICES")


def vllm_row(findings: Mapping[str, Finding]) -> Row:
    builds, has_gpu = vllm_builds(), bool(findings.get("gpus", NOT_ASKED).value)
    if not builds:
        remedy = f"{pip_install('cuda' if has_gpu else 'cpu')}, {TRANSFORMERS_ENGINE}"
        return Row("engine vLLM", "missing", "not installed", remedy)
    found = with_version(builds)
    if len(builds) > 1:
        remedy = f"pip uninstall -y {' '.join(builds)}, then {pip_install('cuda' if has_gpu else 'cpu')}"
        return Row("engine vLLM", "broken", f"{found}: two builds of the same modules", remedy)
    if fault := findings.get("vllm", NOT_ASKED).fault:
        remedy = f"{_reinstall(builds[0], fault)}, {TRANSFORMERS_ENGINE}"
        return Row("engine vLLM", "broken", f"{found} does not import: {fault}", remedy)
    if other := other_torch(builds[0]):
        found = f"{found} wants {other}, and torch {version_of('torch')} is installed"
        return Row("engine vLLM", "warning", found, f'pip install "{other}"')
    if (builds == ["vllm"]) != has_gpu:
        what = "the CUDA build, and there is no GPU" if builds == ["vllm"] else "the CPU build, and there is a GPU"
        right = pip_install("cuda" if has_gpu else "cpu")
        return Row("engine vLLM", "warning", f"{found}: {what}", f"pip uninstall -y {builds[0]}, then {right}")
    return Row("engine vLLM", "ok", found)
