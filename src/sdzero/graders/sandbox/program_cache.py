"""Cache of runnable programs: a folder with the Python source or the compiled C++ program."""

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

BOX = "/box"  # sandbox path of a program's folder
_HEADER = "/headers"
_CPP = ("/usr/bin/g++", "-O2", "-std=c++17", "-DONLINE_JUDGE", "-w")
_COMPILING = Limits(time=30, memory_mb=2048, processes=32, files_mb=512, output_mb=1)
_MAX_PROGRAMS = 1024  # kept on disk
_PRECOMPILE_FROM = 4  # programs; compiling the header takes as long as that


@dataclass(frozen=True)
class Program:
    """Program to run by `argv` with `binds`, or the compiler's `error`."""

    argv: tuple[str, ...]
    binds: tuple[tuple[str, str], ...]
    error: str | None = None


class ProgramCache:
    """Compiles each program once, into `folder`; removes the least recently used."""

    def __init__(self, executor: Executor, folder: Path, python: str) -> None:
        self.executor, self.folder, self.python = executor, folder, python
        self._programs: OrderedDict[str, asyncio.Task[Program]] = OrderedDict()
        self._num_compiled = 0
        self._header: Path | None = None
        self._precompiling: asyncio.Task[None] | None = None

    async def get(self, language: Language, source: str) -> Program:
        """Return a program, compiling it if necessary.

        Raises:
            GraderError: no compiler is installed.
            SandboxFailure: the sandbox did not prove that the compiler ran.
        """
        key = hashlib.sha256(f"{language}\0{source}".encode(errors="surrogatepass")).hexdigest()[:32]
        if key not in self._programs:
            self._programs[key] = asyncio.ensure_future(self._make(language, source, self.folder / key))
        self._programs.move_to_end(key)
        program = self._programs[key]
        try:
            return await asyncio.shield(program)
        except (GraderError, SandboxFailure):
            if self._programs.get(key) is program:  # only the first of those that wait for it
                del self._programs[key]  # allows a retry
                shutil.rmtree(self.folder / key, ignore_errors=True)
            raise

    def evict(self) -> None:
        """Remove the least recently used programs beyond the limit. Call it only while none runs."""
        while len(self._programs) > _MAX_PROGRAMS:
            key, _ = self._programs.popitem(last=False)
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
            raise GraderError(f"no C++ compiler at {_CPP[0]}: install it (apt install g++)")
        self._num_compiled += 1
        if self._num_compiled == _PRECOMPILE_FROM:
            self._precompiling = asyncio.ensure_future(self._precompile())
        include, binds = (("-I", _HEADER), ((str(self._header), _HEADER),)) if self._header else ((), ())
        argv = (*_CPP, *include, "-o", f"{WORK}/main", f"{WORK}/main.cpp")
        outcome = await self.executor.run(Job(argv, _COMPILING, binds, str(folder)))
        (folder / "main.cpp").unlink()
        if outcome.stopped or outcome.code or not (folder / "main").exists():
            why = f"the compiler was stopped: {outcome.stopped}\n" if outcome.stopped else ""
            return Program((), (), why + outcome.stderr[:KEPT].decode(errors="replace"))
        return Program((f"{BOX}/main",), ((str(folder), BOX),))

    async def _precompile(self) -> None:
        """Precompile bits/stdc++.h with the same flags: programs that include it compile five times as fast."""
        folder = self.folder / "headers"
        (folder / "bits").mkdir(parents=True)
        (folder / "bits/stdc++.h").write_text("#include_next <bits/stdc++.h>\n")
        argv = (*_CPP, "-x", "c++-header", "-o", f"{WORK}/bits/stdc++.h.gch", f"{WORK}/bits/stdc++.h")
        with suppress(SandboxFailure):  # not required
            outcome = await self.executor.run(Job(argv, _COMPILING, (), str(folder)))
            if not outcome.stopped and outcome.code == 0:  # fails with standard libraries other than GNU's
                self._header = folder
