"""Makes a submission's text into something that runs: a folder with the source, and for C++ the compiled program."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdzero.graders.errors import GraderError
from sdzero.graders.sandbox.backend import WORK, Job
from sdzero.graders.sandbox.executor import KEPT, Executor, SandboxFailure
from sdzero.graders.sandbox.types import Language, Limits

BOX = "/box"  # where a program's folder is bound
_HEADER = "/headers"
_CPP = ("/usr/bin/g++", "-O2", "-std=c++17", "-DONLINE_JUDGE", "-w")
_COMPILING = Limits(time=30, memory_mb=2048, processes=32, files_mb=512, output_mb=1)
_NUM_KEPT = 1024  # programs that stay on disk
_PAYS_FROM = 4  # programs: the header takes as long to compile as that


@dataclass(frozen=True)
class Program:
    """`argv` and `binds` run it in a sandbox; `error` is the compiler's message where there is nothing to run."""

    argv: tuple[str, ...]
    binds: tuple[tuple[str, str], ...]
    error: str | None = None


class ProgramCache:
    """Prepares programs, each once; the ones used longest ago are removed.

    Args:
        runs: where the compiler runs.
        folder: where programs are kept.
        python: the interpreter in the sandbox.
    """

    def __init__(self, runs: Executor, folder: Path, python: str) -> None:
        self.runs, self.folder, self.python = runs, folder, python
        self._made: OrderedDict[str, asyncio.Task[Program]] = OrderedDict()
        self._num_compiled = 0
        self._header: Path | None = None
        self._precompiling: asyncio.Task[None] | None = None

    async def get(self, language: Language, source: str) -> Program:
        """A program, ready to run.

        Raises:
            GraderError: this machine has no compiler for the language.
            SandboxFailure: the sandbox did not prove that the compiler ran.
        """
        key = hashlib.sha256(f"{language}\0{source}".encode(errors="surrogatepass")).hexdigest()[:32]
        if key not in self._made:
            self._made[key] = asyncio.ensure_future(self._make(language, source, self.folder / key))
        self._made.move_to_end(key)
        made = self._made[key]
        try:
            return await asyncio.shield(made)
        except (GraderError, SandboxFailure):
            if self._made.get(key) is made:  # the first of those who wait for it
                del self._made[key]  # it may be tried again
                shutil.rmtree(self.folder / key, ignore_errors=True)
            raise

    def forget(self) -> None:
        """Removes the programs used longest ago, all but the last ones. Only while none runs."""
        while len(self._made) > _NUM_KEPT:
            key, _ = self._made.popitem(last=False)
            shutil.rmtree(self.folder / key, ignore_errors=True)

    async def _make(self, language: Language, source: str, folder: Path) -> Program:
        folder.mkdir()
        name = "main.py" if language == "python" else "main.cpp"
        (folder / name).write_text(source, encoding="utf-8", errors="surrogatepass")
        if language == "python":
            return Program((self.python, "-I", "-B", f"{BOX}/main.py"), ((str(folder), BOX),))
        return await self._compile(folder)

    async def _compile(self, folder: Path) -> Program:
        if not Path(_CPP[0]).exists():
            raise GraderError(f"no C++ compiler at {_CPP[0]}: install one (apt install g++)")
        self._num_compiled += 1
        if self._num_compiled == _PAYS_FROM:
            self._precompiling = asyncio.ensure_future(self._precompile())
        include, binds = (("-I", _HEADER), ((str(self._header), _HEADER),)) if self._header else ((), ())
        argv = (*_CPP, *include, "-o", f"{WORK}/main", f"{WORK}/main.cpp")
        outcome = await self.runs.run(Job(argv, _COMPILING, binds, str(folder)))
        (folder / "main.cpp").unlink()
        if outcome.stopped or outcome.code or not (folder / "main").exists():
            why = f"the compiler was stopped: {outcome.stopped}\n" if outcome.stopped else ""
            return Program((), (), why + outcome.stderr[:KEPT].decode(errors="replace"))
        return Program((f"{BOX}/main",), ((str(folder), BOX),))

    async def _precompile(self) -> None:
        """bits/stdc++.h once for all, by the same flags: a program that includes it compiles in a fifth of the time."""
        folder = self.folder / "headers"
        (folder / "bits").mkdir(parents=True)
        (folder / "bits/stdc++.h").write_text("#include_next <bits/stdc++.h>\n")
        argv = (*_CPP, "-x", "c++-header", "-o", f"{WORK}/bits/stdc++.h.gch", f"{WORK}/bits/stdc++.h")
        with suppress(SandboxFailure):  # programs compile without it
            outcome = await self.runs.run(Job(argv, _COMPILING, (), str(folder)))
            if not outcome.stopped and outcome.code == 0:  # another standard library than GNU's has no such header
                self._header = folder
