"""Journal of generate calls: finished ones, and the tokens so far of an unfinished one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdzero.engines.base import OnTokens, TokenChunk
from sdzero.utils.files import add_path_to_errors, read_jsonl
from sdzero.utils.row_checksum import dumps_with_checksum

FSYNC_SECONDS = 1.0  # minimum interval within a call: an fsync for each of its thousands of steps costs too much


class CallJournal:
    """Generate calls on disk, one file per `group`, one JSON line with its checksum per finished call.

    A call is reused only under the same key and fingerprint (prompts, sampling, seed, policy weights).
    `calls.log` (`calls-RANK.log` on other ranks) has a line per started call, including those that were killed.
    `GROUP.partial` holds the group's unfinished call if the engine `resumes_partial`: a line with its fingerprint, then
    a line per engine step, index in the call -> [new token ids, their log-probabilities]. Any prefix of its lines is a
    state of all responses at one time. Calls of a group are made in order, so one such file per group is enough.
    Ranks with different groups may share a folder, and one may finish the call that another has started.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / (f"calls-{rank}.log" if rank else "calls.log")
        self._group = ""
        self._rows: dict[str, dict[str, Any]] = {}

    def _file(self, group: str) -> Path:
        return self.folder / f"{group}.jsonl"

    def _partial(self, group: str) -> Path:
        return self.folder / f"{group}.partial"

    def get(self, group: str, key: str, fingerprint: str) -> list[dict[str, Any]] | None:
        """Return the responses of a finished call, or None."""
        if group != self._group:  # calls come group by group, so one group is cached at a time
            file = self._file(group)
            self._rows = {row["key"]: row for row in read_jsonl(file)} if file.exists() else {}
            self._group = group
        row = self._rows.get(key)
        return row["responses"] if row and row["fingerprint"] == fingerprint else None

    def start(self, group: str, key: str) -> None:
        """Count a call."""
        with self._log.open("a") as file:
            file.write(f"{group} {key}\n")

    def put(self, group: str, key: str, fingerprint: str, responses: list[dict[str, Any]]) -> None:
        """Store a finished call durably, and remove what was kept of it while unfinished."""
        row = {"key": key, "fingerprint": fingerprint, "responses": responses}
        with add_path_to_errors(self._file(group)), self._file(group).open("a") as file:
            file.write(dumps_with_checksum(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._partial(group).unlink(missing_ok=True)
        if group == self._group:
            self._rows[key] = row

    def read_partial(self, group: str, fingerprint: str) -> dict[int, TokenChunk]:
        """Return index in the call -> tokens so far of the unfinished call. The file of another call is removed."""
        partial = self._partial(group)
        first, *steps = (read_jsonl(partial) if partial.exists() else []) or [{}]
        if first.get("fingerprint") != fingerprint:
            partial.unlink(missing_ok=True)
            return {}
        chunks: dict[int, tuple[list[int], list[float]]] = {}
        for step in steps:
            for index, (token_ids, logprobs) in step.items():
                ids, values = chunks.setdefault(int(index), ([], []))
                ids += token_ids
                values += logprobs
        return {index: TokenChunk(tuple(ids), tuple(values)) for index, (ids, values) in chunks.items()}

    @contextmanager
    def append_partial(self, group: str, fingerprint: str) -> Iterator[OnTokens]:
        """Yield a callback that appends each step's tokens; call `read_partial` first.

        Each step is flushed at once. If only finished responses were, a kill would lose tokens of the unfinished ones
        alone, whose second chance to end early would bias the sample towards short responses.
        """
        with self._partial(group).open("a") as file:
            synced = time.monotonic()
            if not file.tell():
                file.write(dumps_with_checksum({"fingerprint": fingerprint}) + "\n")

            def write(chunks: Mapping[int, TokenChunk]) -> None:
                nonlocal synced
                step = {index: (chunk.token_ids, chunk.logprobs) for index, chunk in chunks.items()}
                with add_path_to_errors(self._partial(group)):
                    file.write(dumps_with_checksum(step) + "\n")
                    file.flush()
                    if time.monotonic() - synced >= FSYNC_SECONDS:
                        os.fsync(file.fileno())
                        synced = time.monotonic()

            yield write

    @property
    def num_started(self) -> int:
        """Calls started so far, before restarts too, by all ranks that share the folder."""
        return sum(len(file.read_text().splitlines()) for file in self.folder.glob("calls*.log"))

    def delete(self, is_obsolete: Callable[[str], bool]) -> None:
        """Remove the files of groups that no restart will read."""
        for file in self.folder.glob("*.jsonl"):
            if is_obsolete(file.stem):
                file.unlink()
