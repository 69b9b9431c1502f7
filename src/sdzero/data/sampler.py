"""Sampling as every phase does it: generate calls of fixed composition, kept once finished, then scored."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdzero.engines.base import EngineDied, OnTokens, RolloutEngine, TokenChunk
from sdzero.tasks.base import Task
from sdzero.types import Prompt, Rollout, Sampling, ScoredRollout, Verdict
from sdzero.utils.disk_full import add_path_to_errors
from sdzero.utils.files import read_jsonl
from sdzero.utils.row_checksum import dumps_with_checksum
from sdzero.utils.seeds import derive_seed

log = logging.getLogger(__name__)

FSYNC_SECONDS = 1.0  # while a call is made: its thousands of steps must not cost as many of them


def score(rollouts: Sequence[Rollout], task: Task) -> list[ScoredRollout]:
    """The verdicts on rollouts; one that was cut at the token limit is `truncated`, whatever it contains."""
    finished = [(r.prompt.question, r.text) for r in rollouts if r.finish_reason == "stop"]
    verdicts = iter(task.verify_all(finished))
    return [
        ScoredRollout(r, next(verdicts) if r.finish_reason == "stop" else Verdict(0, "truncated")) for r in rollouts
    ]


class CallJournal:
    """Finished generate calls on disk, one JSON line with its checksum each, one file per `group`.

    A call is reused only under the same key and fingerprint (prompts, sampling, seed, policy weights).
    `calls.log` (`calls-RANK.log` of a further rank) holds a line per call that was started, also the ones that a kill
    cut short.
    `GROUP.partial` holds the call of a group that is being made, where its engine `resumes_partial`: a first line with
    its fingerprint, then a JSON line per step of the engine, place in the call -> [new token ids, their
    log-probabilities]. Any number of whole lines is one state of all responses. Calls of a group are made in order, so
    one file a group will do.
    Ranks that make different groups may share a folder, and what one began another may go on with.
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
        if group != self._group:  # calls come group by group, so one group is held at a time
            file = self._file(group)
            self._rows = {row["key"]: row for row in read_jsonl(file)} if file.exists() else {}
            self._group = group
        row = self._rows.get(key)
        return row["responses"] if row and row["fingerprint"] == fingerprint else None

    def start(self, group: str, key: str) -> None:
        with self._log.open("a") as file:
            file.write(f"{group} {key}\n")

    def put(self, group: str, key: str, fingerprint: str, responses: list[dict[str, Any]]) -> None:
        row = {"key": key, "fingerprint": fingerprint, "responses": responses}
        with add_path_to_errors(self._file(group)), self._file(group).open("a") as file:
            file.write(dumps_with_checksum(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._partial(group).unlink(missing_ok=True)
        if group == self._group:
            self._rows[key] = row

    def begun(self, group: str, fingerprint: str) -> dict[int, TokenChunk]:
        """What an unfinished call has so far: place in the call -> tokens. Another call's file is removed."""
        partial = self._partial(group)
        first, *steps = (read_jsonl(partial) if partial.exists() else []) or [{}]
        if first.get("fingerprint") != fingerprint:
            partial.unlink(missing_ok=True)
            return {}
        drawn: dict[int, tuple[list[int], list[float]]] = {}
        for step in steps:
            for place, (token_ids, logprobs) in step.items():
                ids, values = drawn.setdefault(int(place), ([], []))
                ids += token_ids
                values += logprobs
        return {place: TokenChunk(tuple(ids), tuple(values)) for place, (ids, values) in drawn.items()}

    @contextmanager
    def writing(self, group: str, fingerprint: str) -> Iterator[OnTokens]:
        """What keeps the tokens of the call that is being made; `begun` was asked for those before.

        Every step is handed to the system at once: were it done when a response ends, a kill would take back tokens
        only of responses that went on, and each of them would get a second chance to end.
        """
        with self._partial(group).open("a") as file:
            synced = time.monotonic()
            if not file.tell():
                file.write(dumps_with_checksum({"fingerprint": fingerprint}) + "\n")

            def write(pieces: Mapping[int, TokenChunk]) -> None:
                nonlocal synced
                step = {place: (piece.token_ids, piece.logprobs) for place, piece in pieces.items()}
                with add_path_to_errors(self._partial(group)):
                    file.write(dumps_with_checksum(step) + "\n")
                    file.flush()
                    if time.monotonic() - synced >= FSYNC_SECONDS:
                        os.fsync(file.fileno())
                        synced = time.monotonic()

            yield write

    @property
    def num_started(self) -> int:
        """Calls started so far, by all ranks that share the folder, before restarts too."""
        return sum(len(file.read_text().splitlines()) for file in self.folder.glob("calls*.log"))

    def forget(self, groups: Callable[[str], bool]) -> None:
        """Removes the files of the groups that no restart will ask for again."""
        for file in self.folder.glob("*.jsonl"):
            if groups(file.stem):
                file.unlink()


@dataclass
class Sampler:
    """Draws and scores responses.

    Attributes:
        call_size: prompts per generate call; part of the run's identity.
        seed: names the run and the stage; each call's seed is derived from it and the call's own name.
        weights: checksum of the policy's weights, set after each sync.
        largest: a number's largest value over the ranks. Ranks that share an engine make every call together, the
            ones that have no prompt left or have finished the call before a restart too.
    """

    engine: RolloutEngine
    task: Task
    journal: CallJournal
    call_size: int
    seed: int
    rank: int = 0
    weights: str = ""
    largest: Callable[[int], int] = lambda value: value

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        group: str,
        policy_version: int,
        progress: Callable[[int], None] = lambda done: None,
        keep_partial: bool = True,
    ) -> list[ScoredRollout]:
        """One scored response per prompt, in order. `group` names the draw, e.g. "train-000012".

        With `keep_partial`, an engine that allows it continues each response of a call that was cut short from its
        tokens so far. (Were only finished responses kept and the long ones drawn anew, short ones would be favoured.)
        """
        scored: list[ScoredRollout] = []
        for rollouts in self.draw(prompts, sampling, group, policy_version, keep_partial):
            scored += score(rollouts, self.task)
            progress(len(rollouts))
        return scored

    def draw(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, policy_version: int, keep_partial: bool = True
    ) -> Iterator[list[Rollout]]:
        """The responses of each call; as `sample`, without the scores."""
        keep = keep_partial and self.engine.resumes_partial
        for call in range(self.largest(-(-len(prompts) // self.call_size))):
            mine = prompts[call * self.call_size : (call + 1) * self.call_size]
            yield self._call_together(mine, sampling, group, call, policy_version, keep)

    def drawn(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, policy_version: int
    ) -> list[Rollout] | None:
        """What `draw` returned before, from the journal alone; None where a call is missing."""
        rollouts: list[Rollout] = []
        for call, first in enumerate(range(0, len(prompts), self.call_size)):
            mine = prompts[first : first + self.call_size]
            key, _, fingerprint = self._name(mine, sampling, group, call)
            rows = self.journal.get(group, key, fingerprint)
            if rows is None:
                return None
            rollouts += [_decode(prompt, row, policy_version) for prompt, row in zip(mine, rows, strict=True)]
        return rollouts

    def _name(self, prompts: Sequence[Prompt], sampling: Sampling, group: str, call: int) -> tuple[str, int, str]:
        """A call's key in its group, its seed, and the fingerprint of all it depends on."""
        seed = derive_seed(self.seed, group, call, self.rank)
        identity = [type(self.engine).__name__, seed, repr(sampling), self.weights, [p.token_ids for p in prompts]]
        return str(call), seed, hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def _call_together(self, *call: Any) -> list[Rollout]:
        """Where the engine dies in the call of one of the ranks that share it, all of them learn of it: they would make
        the next call without that one."""
        rollouts: list[Rollout] = []
        fault = None
        try:
            rollouts = self._call(*call)
        except EngineDied as error:
            fault = error
        if self.largest(int(fault is not None)):
            raise fault or EngineDied("the engine died in the call of another rank that shares it")
        return rollouts

    def _call(
        self, prompts: Sequence[Prompt], sampling: Sampling, group: str, call: int, policy_version: int, keep: bool
    ) -> list[Rollout]:
        key, seed, fingerprint = self._name(prompts, sampling, group, call)
        responses = self.journal.get(group, key, fingerprint)
        missing = self.largest(int(responses is None))
        if responses is None or missing:
            made = self._made(group, fingerprint, responses) if keep else {}
            if num_made := sum(len(piece.token_ids) for piece in made.values()):
                log.warning("%s, call %s: goes on from the %d tokens it had before a stop", group, key, num_made)
            else:
                self.journal.start(group, key)
            if keep:
                begun = [made.get(place, TokenChunk()) for place in range(len(prompts))]
                seed = self._seed_of_rest(seed, num_made)
                with self.journal.writing(group, fingerprint) as on_tokens:
                    drawn = self.engine.generate(prompts, sampling, seed, policy_version, on_tokens, begun)
            else:
                drawn = self.engine.generate(prompts, sampling, seed, policy_version)
            responses = [_encode(rollout) for rollout in drawn]
            self.journal.put(group, key, fingerprint, responses)
        return [_decode(prompt, row, policy_version) for prompt, row in zip(prompts, responses, strict=True)]

    def _made(self, group: str, fingerprint: str, responses: list[dict[str, Any]] | None) -> dict[int, TokenChunk]:
        """Place -> tokens: of a whole call where only ranks that share the engine lack it, else of what it has."""
        if responses is None:
            return self.journal.begun(group, fingerprint)
        return {i: TokenChunk(tuple(row["token_ids"]), tuple(row["logprobs"])) for i, row in enumerate(responses)}

    def _seed_of_rest(self, seed: int, num_made: int) -> int:
        """Another seed where a part was made: from the same one, tokens would meet the noise of tokens before them."""
        num_made = self.largest(num_made)
        return derive_seed(seed, "rest", num_made) if num_made else seed


def _encode(rollout: Rollout) -> dict[str, Any]:
    return {
        "question": rollout.prompt.question.id,
        "token_ids": rollout.token_ids,
        "logprobs": rollout.logprobs,
        "text": rollout.text,
        "finish_reason": rollout.finish_reason,
    }


def _decode(prompt: Prompt, row: dict[str, Any], policy_version: int) -> Rollout:
    return Rollout(
        prompt, tuple(row["token_ids"]), tuple(row["logprobs"]), row["text"], row["finish_reason"], policy_version
    )
