"""Generate calls that are kept once finished, and the files that hold them."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.data import journal as journal_module
from sdzero.data.journal import CallJournal
from sdzero.data.sampler import Sampler, score
from sdzero.data.trace_file import read_traces, write_traces
from sdzero.engines import ScriptedEngine
from sdzero.engines.base import EngineDied, EngineSpec, OnTokens, RolloutEngine, TokenChunk, ignore, is_complete
from sdzero.prompts import PromptBuilder
from sdzero.types import Prompt, Question, Rollout, Sampling, Trace
from sdzero.utils.files import read_jsonl, write_text
from sdzero.utils.row_checksum import dumps_with_checksum, verify_checksum
from sdzero.utils.seeds import derive_seed
from support.helpers import Toy
from support.tiny_model import write_tiny_model

SAMPLING = Sampling(max_new_tokens=8)
END = 0.3  # with it a response has 3.1 tokens, and in 8 of 100 cases 8 that are cut


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    return PromptBuilder.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("model")))


class Seeds(ScriptedEngine):
    """Answers with the call's seed; keeps each call's seed and questions."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, seed: str(seed)[:5])
        self.calls: list[tuple[int, list[str]]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        policy_version: int,
        on_tokens: OnTokens = ignore,
        partials: Sequence[TokenChunk] = (),
    ) -> list[Rollout]:
        self.calls.append((seed, [prompt.question.id for prompt in prompts]))
        return super().generate(prompts, sampling, seed, policy_version, on_tokens, partials)


class Killed(BaseException):
    """An end of the process that no code catches."""


class Stepping(ScriptedEngine):
    """Draws all responses of a call side by side, a token a step, as vLLM does, and is killed after `lives` steps.

    Each token is the last one with a probability of `END`. A token's log-probability is told from the token.
    """

    resumes_partial = True

    def __init__(self, lives: int = 1000) -> None:
        super().__init__({})
        self.lives = lives
        self.calls: list[tuple[int, list[str]]] = []  # each call's seed, and the questions that it drew tokens for
        self.num_drawn = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        policy_version: int,
        on_tokens: OnTokens = ignore,
        partials: Sequence[TokenChunk] = (),
    ) -> list[Rollout]:
        limit, noise, end_ids = sampling.max_new_tokens, random.Random(seed), self._builder.end_ids
        ids = [list(piece.token_ids) for piece in partials] or [[] for _ in prompts]
        values = [list(piece.logprobs) for piece in partials] or [[] for _ in prompts]
        running = [place for place, row in enumerate(ids) if not is_complete(row, end_ids, limit)]
        self.calls.append((seed, [prompts[place].question.id for place in running]))
        while running:
            if self.lives == 0:
                raise Killed
            self.lives -= 1
            tokens = [self._builder.end_id if noise.random() < END else noise.randrange(10, 90) for _ in running]
            step = {place: TokenChunk((token,), (-token / 7,)) for place, token in zip(running, tokens, strict=True)}
            for place, piece in step.items():
                ids[place] += piece.token_ids
                values[place] += piece.logprobs
            self.num_drawn += len(step)
            on_tokens(step)
            running = [place for place in running if not is_complete(ids[place], end_ids, limit)]
        return [self._rollout(self._builder, *response, limit) for response in zip(prompts, ids, values, strict=True)]


class ByBatches(Stepping):
    """Like the transformers engine: a call that broke off is redone."""

    resumes_partial = False


def sampler(
    builder: PromptBuilder,
    folder: Path,
    call_size: int = 2,
    rank: int = 0,
    seed: int = 7,
    engine: RolloutEngine | None = None,
) -> Sampler:
    engine = engine or Seeds()
    engine.start(EngineSpec("", 512, load_weights=True), builder)
    return Sampler(engine, Toy(), CallJournal(folder), call_size, seed, rank, weights="w")


def prompts(builder: PromptBuilder, num: int = 5) -> list[Prompt]:
    return [builder.prompt(question) for question in Toy().questions("phase1", num)]


def calls(sampler: Sampler) -> list[tuple[int, list[str]]]:
    assert isinstance(sampler.engine, Seeds | Stepping)
    return sampler.engine.calls


# --- sampling -------------------------------------------------------------------------------------


def test_calls_have_a_fixed_composition_and_a_seed_of_their_own(builder: PromptBuilder, tmp_path: Path) -> None:
    one = sampler(builder, tmp_path)
    scored = one.sample(prompts(builder), SAMPLING, "train-000003", 0)
    assert [s.rollout.prompt.question.id for s in scored] == [f"phase1-{i}" for i in range(5)]
    expected = [(0, ["phase1-0", "phase1-1"]), (1, ["phase1-2", "phase1-3"]), (2, ["phase1-4"])]
    assert calls(one) == [(derive_seed(7, "train-000003", call, 0), ids) for call, ids in expected]


def test_no_two_calls_share_a_seed(builder: PromptBuilder, tmp_path: Path) -> None:
    seeds = []
    for rank in (0, 1):
        for seed in (7, 8):
            one = sampler(builder, tmp_path / f"{rank}{seed}", rank=rank, seed=seed)
            for group in ("train-000000", "train-000001"):
                one.sample(prompts(builder), SAMPLING, group, 0)
            seeds += [call[0] for call in calls(one)]
    assert len(set(seeds)) == len(seeds) == 24


def test_finished_calls_are_read_back_as_they_were(builder: PromptBuilder, tmp_path: Path) -> None:
    before = sampler(builder, tmp_path).sample(prompts(builder), SAMPLING, "g", 0)
    again = sampler(builder, tmp_path)
    assert again.sample(prompts(builder), SAMPLING, "g", 0) == before and not calls(again)
    assert again.journal.num_started == 3


@pytest.mark.parametrize("change", ["sampling", "weights", "prompts", "seed", "group"])
def test_a_call_of_another_identity_is_made_anew(builder: PromptBuilder, tmp_path: Path, change: str) -> None:
    sampler(builder, tmp_path).sample(prompts(builder, 4), SAMPLING, "g", 0)
    again = sampler(builder, tmp_path, seed=8 if change == "seed" else 7)
    again.weights = "other" if change == "weights" else "w"
    asked = prompts(builder, 4)[::-1] if change == "prompts" else prompts(builder, 4)
    sampling = Sampling(0.5, 1.0, 8) if change == "sampling" else SAMPLING
    again.sample(asked, sampling, "h" if change == "group" else "g", 0)
    assert len(calls(again)) == 2


def test_ranks_that_share_an_engine_make_every_call_together(builder: PromptBuilder, tmp_path: Path) -> None:
    """Five prompts on one rank, two on the other; after a kill one has two calls more in its journal."""

    def together(*num: int) -> list[list[list[str]]]:
        """Calls of each rank's engine; a rank that waits for the other in vain breaks the barrier."""
        barrier, said = threading.Barrier(2, timeout=10), [0, 0]

        def run(rank: int) -> list[list[str]]:
            def largest(value: int) -> int:
                said[rank] = value
                barrier.wait()
                result = max(said)
                barrier.wait()
                return result

            own = PromptBuilder.from_pretrained(builder.tokenizer.name_or_path)  # tokenizers are no friends of threads
            one = sampler(own, tmp_path / str(rank), rank=rank)
            one.all_reduce_max = largest
            assert len(one.sample(prompts(own, num[rank]), SAMPLING, "g", 0)) == num[rank]
            return [ids for _, ids in calls(one)]

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, (0, 1)))

    ids = [f"phase1-{i}" for i in range(5)]
    assert together(5, 2) == [[ids[:2], ids[2:4], ids[4:]], [ids[:2], [], []]]
    assert together(5, 2) == [[], []]
    journal = tmp_path / "1/g.jsonl"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    assert together(5, 2) == [[ids[2:4], ids[4:]], [[], []]]


# --- calls that broke off -------------------------------------------------------------------------


def killed(builder: PromptBuilder, folder: Path, engine: Stepping, num: int = 6, **options: Any) -> None:
    """A draw of `num` prompts in one call that does not come to its end."""
    with pytest.raises(Killed):
        sampler(builder, folder, num, engine=engine).sample(prompts(builder, num), SAMPLING, "g", 0, **options)


def partial(folder: Path) -> dict[int, list[int]]:
    """Place -> tokens in `g.partial`, from its whole lines."""
    drawn: dict[int, list[int]] = {}
    lines = (folder / "g.partial").read_bytes().split(b"\n")[1:-1]
    for step in (verify_checksum(json.loads(line)) for line in lines):
        for place, (token_ids, logprobs) in step.items():
            assert logprobs == [-token / 7 for token in token_ids]
            drawn.setdefault(int(place), []).extend(token_ids)
    return drawn


def complete(builder: PromptBuilder, token_ids: Sequence[int]) -> bool:
    return is_complete(token_ids, builder.end_ids, SAMPLING.max_new_tokens)


def test_a_call_that_broke_off_goes_on_where_it_stood(
    builder: PromptBuilder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(builder, tmp_path, Stepping(3))
    kept = partial(tmp_path)
    num_kept = sum(map(len, kept.values()))
    running = [place for place in range(6) if not complete(builder, kept[place])]
    assert 0 < len(running) < 6 and all(len(kept[place]) == 3 for place in running)
    engine = Stepping()
    again = sampler(builder, tmp_path, 6, engine=engine)
    scored = again.sample(prompts(builder, 6), SAMPLING, "g", 0)
    ids = [f"phase1-{i}" for i in range(6)]
    assert [s.rollout.prompt.question.id for s in scored] == ids
    seed = derive_seed(derive_seed(7, "g", 0, 0), "rest", num_kept)
    assert engine.calls == [(seed, [ids[place] for place in running])]
    for place, one in enumerate(scored):
        ids, logprobs, drawn = one.rollout.token_ids, one.rollout.logprobs, kept[place]
        assert list(ids[: len(drawn)]) == drawn and (len(ids) > len(drawn)) == (place in running)
        assert logprobs == tuple(-token / 7 for token in ids)
        assert one.rollout.finish_reason == ("stop" if ids[-1] in builder.end_ids else "length")
    assert sum(len(s.rollout.token_ids) for s in scored) == num_kept + engine.num_drawn
    assert caplog.messages == [f"g, call 0: continues from {num_kept} tokens before an interruption"]
    assert again.journal.num_started == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["calls.log", "g.jsonl"]
    assert sampler(builder, tmp_path, 6, engine=Stepping(0)).sample(prompts(builder, 6), SAMPLING, "g", 0) == scored


@pytest.mark.parametrize("change", ["sampling", "weights", "prompts", "seed", "group", "engine"])
def test_the_begin_of_a_call_of_another_identity_is_no_use(builder: PromptBuilder, tmp_path: Path, change: str) -> None:
    killed(builder, tmp_path, Stepping(2))
    engine = type("Another", (Stepping,), {})() if change == "engine" else Stepping()
    again = sampler(builder, tmp_path, 6, seed=8 if change == "seed" else 7, engine=engine)
    again.weights = "other" if change == "weights" else "w"
    asked = prompts(builder, 6)[::-1] if change == "prompts" else prompts(builder, 6)
    sampling = Sampling(0.5, 1.0, 8) if change == "sampling" else SAMPLING
    scored = again.sample(asked, sampling, "h" if change == "group" else "g", 0)
    assert [len(ids) for _, ids in engine.calls] == [6]
    assert engine.num_drawn == sum(len(s.rollout.token_ids) for s in scored)
    left = ["g.partial"] if change == "group" else []  # that group may be asked for again
    assert [file.name for file in tmp_path.glob("*.partial")] == left and again.journal.num_started == 2


@pytest.mark.parametrize(("kind", "options"), [(ByBatches, {}), (Stepping, {"keep_partial": False})])
def test_other_calls_that_broke_off_are_made_anew(
    builder: PromptBuilder, tmp_path: Path, kind: type[Stepping], options: dict[str, Any]
) -> None:
    """Of an engine that repeats to the bit, and of a training step."""
    killed(builder, tmp_path, kind(2), **options)
    assert [f.name for f in tmp_path.iterdir()] == ["calls.log"]
    again = sampler(builder, tmp_path, 6, engine=kind())
    again.sample(prompts(builder, 6), SAMPLING, "g", 0, **options)
    assert calls(again) == [(derive_seed(7, "g", 0, 0), [f"phase1-{i}" for i in range(6)])]
    assert again.journal.num_started == 2


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 400)), max_size=4), st.integers(1, 5))
def test_every_response_goes_on_from_its_tokens_whatever_the_kills(
    builder: PromptBuilder, tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[int, int]], call_size: int
) -> None:
    """Each kill comes after some steps, and may cut bytes off the file as a lost machine does."""
    folder = tmp_path_factory.mktemp("kills")
    for lives, num_cut in [*kills, (1000, 0)]:
        before = read_jsonl(folder / "g.jsonl") if (folder / "g.jsonl").exists() else []
        kept = partial(folder) if (folder / "g.partial").exists() else {}
        engine = Stepping(lives)
        one = sampler(builder, folder, call_size, engine=engine)
        try:
            scored = one.sample(prompts(builder), SAMPLING, "g", 0)
        except Killed:
            now = partial(folder)
        else:
            assert not (folder / "g.partial").exists()
            now = {}
        after = read_jsonl(folder / "g.jsonl") if (folder / "g.jsonl").exists() else []
        assert after[: len(before)] == before and [row["key"] for row in after] == [str(i) for i in range(len(after))]
        made = [[r["token_ids"] for r in row["responses"]] for row in after[len(before) :]]
        made.append([now.get(place, []) for place in range(max(now, default=-1) + 1)])
        for place, token_ids in kept.items():  # they belong to the first call that was not in the journal
            assert made[0][place][: len(token_ids)] == token_ids
            assert not complete(builder, token_ids) or made[0][place] == token_ids
        assert sum(len(ids) for row in made for ids in row) == sum(map(len, kept.values())) + engine.num_drawn
        if (file := folder / "g.partial").exists():
            file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - num_cut)])
    assert [s.rollout.prompt.question.id for s in scored] == [f"phase1-{i}" for i in range(5)]
    assert [list(s.rollout.token_ids) for s in scored] == [r["token_ids"] for row in after for r in row["responses"]]
    assert all(complete(builder, s.rollout.token_ids) for s in scored)


def lengths_of_killed_calls(builder: PromptBuilder, folder: Path, finished_alone: bool) -> list[int]:
    """Lengths of 4,000 responses, by 40 a call that is killed after 3 steps and then made to its end.

    finished_alone: of the killed call only the finished responses are left, and the others are drawn from their start.
    """
    lengths = []
    for seed in range(100):
        own, asked = folder / str(seed), prompts(builder, 40)
        with pytest.raises(Killed):
            sampler(builder, own, 40, seed=seed, engine=Stepping(3)).sample(asked, SAMPLING, "g", 0)
        if finished_alone:
            kept = {place: ids for place, ids in partial(own).items() if complete(builder, ids)}
            header = (own / "g.partial").read_text().splitlines()[0]
            step = {place: (ids, [-token / 7 for token in ids]) for place, ids in kept.items()}
            (own / "g.partial").write_text(f"{header}\n{json.dumps(step)}\n")
        scored = sampler(builder, own, 40, seed=seed, engine=Stepping()).sample(asked, SAMPLING, "g", 0)
        lengths += [len(s.rollout.token_ids) for s in scored]
    return lengths


def chi_square(lengths: Sequence[int]) -> float:
    """Of lengths against those of calls that nobody kills: geometric, and cut at the limit. 7 degrees of freedom."""
    limit, counts = SAMPLING.max_new_tokens, Counter(lengths)
    shares = [END * (1 - END) ** (length - 1) for length in range(1, limit)] + [(1 - END) ** (limit - 1)]
    expected = [share * len(lengths) for share in shares]
    return sum((counts[length] - mean) ** 2 / mean for length, mean in enumerate(expected, 1))


def test_a_kill_changes_no_distribution(builder: PromptBuilder, tmp_path: Path) -> None:
    """By chance 26 is passed once in 2,000; keeping what was finished alone favours short responses beyond doubt."""
    assert chi_square(lengths_of_killed_calls(builder, tmp_path / "continued", finished_alone=False)) < 26
    assert chi_square(lengths_of_killed_calls(builder, tmp_path / "redrawn", finished_alone=True)) > 500


def test_each_step_is_handed_to_the_system_and_on_disk_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = [100.0], []
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(now[0]))
    journal = CallJournal(tmp_path)
    with journal.append_partial("g", "f") as write:
        for step in range(1, 101):
            now[0] += 0.03125
            write({0: TokenChunk((step,), (-0.5,)), 7: TokenChunk((), ())})
            assert len(partial_lines(tmp_path)) == 1 + step
    assert journal.read_partial("g", "f") == {0: TokenChunk(tuple(range(1, 101)), (-0.5,) * 100), 7: TokenChunk()}
    assert synced == [101.0, 102.0, 103.0]


@pytest.mark.parametrize("num_bytes", [0, 5])
def test_a_file_that_was_lost_but_for_its_name_holds_nothing(tmp_path: Path, num_bytes: int) -> None:
    journal = CallJournal(tmp_path)
    with journal.append_partial("g", "f") as write:
        write({0: TokenChunk((3,), (-0.5,))})
    with (tmp_path / "g.partial").open("r+b") as file:
        file.truncate(num_bytes)
    assert journal.read_partial("g", "f") == {} and not (tmp_path / "g.partial").exists()


def partial_lines(folder: Path) -> list[str]:
    return (folder / "g.partial").read_text().splitlines()


def test_ranks_that_share_an_engine_make_only_what_each_lacks(builder: PromptBuilder, tmp_path: Path) -> None:
    """One rank stopped in the middle of its five responses, the other has its two: both make the call, from new
    seeds."""
    said: list[list[int]] = []

    def run(rank: int, others: list[int]) -> Stepping:
        """`others` are the other rank's values: number of calls, whether it lacks the call, its tokens, whether its
        engine died."""
        engine, heard = Stepping(), iter(others)
        one = sampler(builder, tmp_path / str(rank), 5, rank, engine=engine)

        def largest(value: int) -> int:
            said[rank].append(value)
            return max(value, next(heard))

        said.append([])
        one.all_reduce_max = largest
        one.sample(prompts(builder, (5, 2)[rank]), SAMPLING, "g", 0)
        return engine

    killed(builder, tmp_path / "0", Stepping(2), 5)
    num_kept = sum(map(len, partial(tmp_path / "0").values()))
    scored = sampler(builder, tmp_path / "1", 5, 1, engine=Stepping()).sample(prompts(builder, 2), SAMPLING, "g", 0)
    num_whole = sum(len(s.rollout.token_ids) for s in scored)
    [(seed, first)], [(other_seed, second)] = run(0, [1, 0, num_whole, 0]).calls, run(1, [1, 1, num_kept, 0]).calls
    assert 0 < len(first) <= 5 and second == [] and said == [[1, 1, num_kept, 0], [1, 0, num_whole, 0]]
    largest = max(num_kept, num_whole)
    assert [seed, other_seed] == [derive_seed(derive_seed(7, "g", 0, rank), "rest", largest) for rank in (0, 1)]
    for rank, num in ((0, 5), (1, 2)):
        assert [len(row["responses"]) for row in read_jsonl(tmp_path / f"{rank}/g.jsonl")][-1] == num
    again = sampler(builder, tmp_path / "1", 5, 1, engine=Stepping(0)).sample(prompts(builder, 2), SAMPLING, "g", 0)
    assert again == scored


def test_ranks_that_share_an_engine_learn_of_its_death_together(builder: PromptBuilder, tmp_path: Path) -> None:
    """One that has finished the call keeps it, and makes no other alone."""
    one = sampler(builder, tmp_path, 2, engine=Stepping())
    one.all_reduce_max = lambda value: 1 if one.engine.calls else max(value, 1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(EngineDied, match="another rank that shares it"):
        one.sample(prompts(builder, 2), SAMPLING, "g", 0)
    assert [len(row["responses"]) for row in read_jsonl(tmp_path / "g.jsonl")] == [2]


# --- scores ---------------------------------------------------------------------------------------


def test_a_cut_response_is_truncated_whatever_it_holds(builder: PromptBuilder, tmp_path: Path) -> None:
    question = Question("q", "1+1=", "2")
    right = Rollout(builder.prompt(question), (), (), "=2", "stop", 0)
    assert score([right], Toy())[0].verdict.reason == "correct"
    cut = Rollout(builder.prompt(question), (), (), "=2", "length", 0)
    assert (score([cut], Toy())[0].verdict.reward, score([cut], Toy())[0].verdict.reason) == (0, "truncated")


# --- the journal ----------------------------------------------------------------------------------


def test_delete_removes_the_groups_it_names_alone(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    for group in ("train-000001", "train-000002", "eval-000001-00000"):
        journal.start(group, "0")
        journal.put(group, "0", "f", [{"text": group}])
    journal.delete(lambda group: group < "train-000002" and group.startswith("train"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["calls.log", "eval-000001-00000.jsonl", "train-000002.jsonl"]
    assert journal.get("train-000001", "0", "f") is None
    assert journal.get("train-000002", "0", "f") == [{"text": "train-000002"}]
    assert journal.get("train-000002", "0", "another") is None and journal.get("train-000002", "1", "f") is None
    assert journal.num_started == 3 and CallJournal(tmp_path / "new").num_started == 0


def test_the_latest_of_two_calls_of_one_name_counts(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.put("g", "0", "old", [{"text": "old"}])
    journal.put("g", "0", "new", [{"text": "new"}])
    for one in (journal, CallJournal(tmp_path)):
        assert one.get("g", "0", "new") == [{"text": "new"}] and one.get("g", "0", "old") is None


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3), max_size=4), st.data())
def test_a_cut_file_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = rows[: whole[:cut].count(b"\n")]
    assert read_jsonl(path) == kept == read_jsonl(path)


def test_a_cut_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a":')
    with caplog.at_level(logging.WARNING):
        assert read_jsonl(path) == read_jsonl(path) == [{"a": 1}]
    assert caplog.messages == [f"{path}: dropped an incomplete last line (5 bytes)"]


@pytest.mark.parametrize("line", [b'{"a": 1', b"\x00\x00", b"\xff\xfe", b"[]", b"null"])
def test_a_damaged_line_is_an_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 2 is .*: remove the file to have it created again"):
        read_jsonl(path)


def flips(raw: bytes) -> Iterator[bytes]:
    """The file with one of its bits turned over; of every byte some."""
    for bit in range(0, 8 * len(raw), 3):
        yield raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


def test_no_bit_that_flips_in_a_journal_changes_a_response(tmp_path: Path) -> None:
    """Most would leave rows of JSON that read well. Only the last line's end may go: the call is made again."""
    row = {"token_ids": [5, 16], "logprobs": [-0.25, -1e-05], "text": "7", "finish_reason": "stop"}
    journal = CallJournal(tmp_path)
    journal.put("g", "0", "f", [row])
    file = tmp_path / "g.jsonl"
    errors = Counter()
    for damaged in flips(file.read_bytes()):
        file.write_bytes(damaged)
        try:
            kept = CallJournal(tmp_path).get("g", "0", "f")
        except ValueError as error:
            assert str(file) in str(error) and "remove the file to have it created again" in str(error)
            errors["crc32" in str(error)] += 1
        else:
            assert kept == [row] or (kept is None and not damaged.endswith(b"\n"))
    assert errors[True] > 150 and errors[False] > 150  # many are found by the seal alone


def test_no_bit_that_flips_in_the_traces_changes_one(tmp_path: Path) -> None:
    path, traces = tmp_path / "traces.jsonl", [Trace(Question("q", "1+1=", "2"), (1, 2), (3,), (4,), (5, 6), 1)]
    write_traces(path, traces)
    for damaged in flips(path.read_bytes()):
        path.write_bytes(damaged)
        try:
            assert read_traces(path) == traces
        except ValueError as error:
            assert f"{path}: line" in str(error)


def test_rows_of_before_the_seals_are_read(tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text('{"key": "0", "fingerprint": "f", "responses": [1]}\n')
    assert CallJournal(tmp_path).get("g", "0", "f") == [1]
    row = {"a": (1, 2.5, float("inf"), "é"), 3: None}
    assert verify_checksum(json.loads(dumps_with_checksum(row))) == {"a": [1, 2.5, float("inf"), "é"], "3": None}


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = CallJournal(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = r"No space left on device: '{}'"
    with pytest.raises(OSError, match=said.format(".*g.jsonl")):
        journal.put("g", "0", "f", [])
    with pytest.raises(OSError, match=said.format(".*traces.jsonl")):
        write_traces(tmp_path / "traces.jsonl", [])
    assert not (tmp_path / "traces.jsonl").exists()


# --- files ----------------------------------------------------------------------------------------


def test_traces_survive_the_file(tmp_path: Path) -> None:
    question = Question("q/é", "1+1=\n", "2", {"n": 1})
    traces = [Trace(question, (1, 2), (3,), (4,), (5, 6), 1), Trace(question, (1,), (), (), (5,), None)]
    write_traces(tmp_path / "traces.jsonl", traces)
    assert read_traces(tmp_path / "traces.jsonl") == traces
    assert [f.name for f in tmp_path.iterdir()] == ["traces.jsonl"]


def test_a_trace_without_a_field_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text('{"question": {}, "prompt_ids": []}\n')
    with pytest.raises(ValueError, match="line 1 lacks 'init_ids': it is not a trace"):
        read_traces(tmp_path / "traces.jsonl")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Trace]:
        yield Trace(Question("q", "x", "a"), (1,), (), (), (2,), None)
        raise RuntimeError("the source broke off")

    path = tmp_path / "traces.jsonl"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="broke off"):
        write_traces(path, broken())
    assert path.read_text() == "old"
