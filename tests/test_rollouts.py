"""Generate calls that are kept once finished, and the files that hold them."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import Toy
from sdzero.engines import ScriptedEngine
from sdzero.engines.base import EngineSpec
from sdzero.prompts import PromptBuilder
from sdzero.rollouts import CallJournal, Sampler, read_jsonl, read_traces, score, write_text, write_traces
from sdzero.seeds import derive_seed
from sdzero.types import Prompt, Question, Rollout, Sampling, Trace
from tiny_model import write_tiny_model

SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    return PromptBuilder.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("model")))


class Seeds(ScriptedEngine):
    """Answers with the call's seed; keeps each call's seed and questions."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, seed: str(seed)[:5])
        self.calls: list[tuple[int, list[str]]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, policy_version: int) -> list[Rollout]:
        self.calls.append((seed, [prompt.question.id for prompt in prompts]))
        return super().generate(prompts, sampling, seed, policy_version)


def sampler(builder: PromptBuilder, folder: Path, call_size: int = 2, rank: int = 0, seed: int = 7) -> Sampler:
    engine = Seeds()
    engine.start(EngineSpec("", 512, load_weights=True), builder)
    return Sampler(engine, Toy(), CallJournal(folder), call_size, seed, rank, weights="w")


def prompts(builder: PromptBuilder, num: int = 5) -> list[Prompt]:
    return [builder.prompt(question) for question in Toy().questions("phase1", num)]


def calls(sampler: Sampler) -> list[tuple[int, list[str]]]:
    assert isinstance(sampler.engine, Seeds)
    return sampler.engine.calls


# --- sampling -------------------------------------------------------------------------------------


def test_calls_have_a_fixed_composition_and_a_seed_of_their_own(builder: PromptBuilder, tmp_path: Path) -> None:
    one = sampler(builder, tmp_path)
    progress: list[int] = []
    scored = one.sample(prompts(builder), SAMPLING, "train-000003", 0, progress.append)
    assert [s.rollout.prompt.question.id for s in scored] == [f"phase1-{i}" for i in range(5)]
    expected = [(0, ["phase1-0", "phase1-1"]), (1, ["phase1-2", "phase1-3"]), (2, ["phase1-4"])]
    assert calls(one) == [(derive_seed(7, "train-000003", call, 0), ids) for call, ids in expected]
    assert progress == [2, 2, 1]


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
        """What each rank's engine was asked for; a rank that waits for the other in vain breaks the barrier."""
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
            one.largest = largest
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


def test_a_cut_response_is_truncated_whatever_it_holds(builder: PromptBuilder, tmp_path: Path) -> None:
    question = Question("q", "1+1=", "2")
    right = Rollout(builder.prompt(question), (), (), "=2", "stop", 0)
    assert score([right], Toy())[0].verdict.reason == "correct"
    cut = Rollout(builder.prompt(question), (), (), "=2", "length", 0)
    assert (score([cut], Toy())[0].verdict.reward, score([cut], Toy())[0].verdict.reason) == (0, "truncated")


# --- the journal ----------------------------------------------------------------------------------


def test_forget_removes_the_groups_it_names_alone(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    for group in ("train-000001", "train-000002", "eval-000001-00000"):
        journal.start(group, "0")
        journal.put(group, "0", "f", [{"text": group}])
    journal.forget(lambda group: group < "train-000002" and group.startswith("train"))
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
    assert caplog.messages == [f"{path}: dropped a half-written last line (5 bytes)"]


@pytest.mark.parametrize("line", [b'{"a": 1', b"\x00\x00", b"\xff\xfe", b"[]", b"null"])
def test_a_damaged_line_is_an_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 2 is .*: remove the file to have it made again"):
        read_jsonl(path)


# --- files ----------------------------------------------------------------------------------------


def test_traces_survive_the_file(tmp_path: Path) -> None:
    question = Question("q/é", "1+1=\n", "2", {"n": 1})
    traces = [Trace(question, (1, 2), (3,), (4,), (5, 6), 1), Trace(question, (1,), (), (), (5,), None)]
    write_traces(tmp_path / "traces.jsonl", traces)
    assert read_traces(tmp_path / "traces.jsonl") == traces
    assert [f.name for f in tmp_path.iterdir()] == ["traces.jsonl"]


def test_a_trace_without_a_field_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text('{"question": {}, "prompt_ids": []}\n')
    with pytest.raises(ValueError, match="line 1 lacks 'init_ids': it is no trace"):
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
