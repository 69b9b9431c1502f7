"""Clients of the hub get from the made-up one what they get from the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import httpx  # the client that it asks with, which newer versions call httpx2

from support.fake_hub import FakeHub
from support.fake_hub import hub as hub  # the fixture
from support.fixtures.make import make
from support.fixtures.mathematics import HMMT, OPENR1
from support.fixtures.programs import CODEFORCES
from support.fixtures.repository import rename_column

NOBODYS = "0" * 40


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_what_the_folder_holds(hub: FakeHub, tmp_path: Path, streaming: bool) -> None:
    folder = make(tmp_path, OPENR1)
    commit = hub.publish(OPENR1, folder)
    for config, split in ((None, "train"), ("all", "extended")):
        local = datasets.load_dataset(str(folder), config, split=split)
        data = datasets.load_dataset(OPENR1, config, split=split, revision=commit, streaming=streaming)
        assert data.features == local.features
        assert [*data] == [*local]


def test_a_revision_is_what_was_published_under_it(hub: FakeHub, tmp_path: Path) -> None:
    folder = make(tmp_path, HMMT)
    first = hub.publish(HMMT, folder)
    rename_column(folder, "answer", "gold")
    second = hub.publish(HMMT, folder)
    names: dict[str | None, list[str]] = {}
    for revision in (first, second, None):
        for streaming in (False, True):
            data = datasets.load_dataset(HMMT, split="train", revision=revision, streaming=streaming)
            names.setdefault(revision, []).extend({*(data.features or ())} & {"answer", "gold"})
    assert names == {first: ["answer"] * 2, second: ["gold"] * 2, None: ["gold"] * 2}
    assert [HfApi().dataset_info(HMMT, revision=revision).sha for revision in (first, None)] == [first, second]


def test_what_is_in_the_cache_is_not_sent_again(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.publish(HMMT, make(tmp_path, HMMT))
    datasets.load_dataset(HMMT, split="train", revision=commit)
    assert hub.num_bytes > 1000
    hub.forget()
    datasets.load_dataset(HMMT, split="train", revision=commit)
    assert hub.num_bytes == 0 and not any("GET /datasets/" in request for request in hub.requests)


def test_information_lists_files_with_their_sizes(hub: FakeHub, tmp_path: Path) -> None:
    folder = make(tmp_path, CODEFORCES)
    commit = hub.publish(CODEFORCES, folder)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    about = HfApi().dataset_info(CODEFORCES, revision=commit, files_metadata=True)
    assert about.sha == commit and {sibling.rfilename: sibling.size for sibling in about.siblings or []} == sizes
    assert all(sibling.size is None for sibling in HfApi().dataset_info(CODEFORCES).siblings or [])
    tree = [*HfApi().list_repo_tree(CODEFORCES, repo_type="dataset", revision=commit, recursive=True)]
    assert {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)} == sizes
    folders = {"data", "generated_tests", "verifiable", "verifiable-prompts"}
    assert {entry.path for entry in tree if isinstance(entry, RepoFolder)} == folders
    root = {entry.path for entry in HfApi().list_repo_tree(CODEFORCES, repo_type="dataset")}
    assert root == {"README.md", *folders}
    below = [*HfApi().list_repo_tree(CODEFORCES, "generated_tests", repo_type="dataset")]
    assert {entry.path for entry in below} == {f"generated_tests/test_cases_{n}.parquet" for n in ("0042", "0902")}
    asked = ["generated_tests/test_cases_0042.parquet", "generated_tests/test_cases_9999.parquet"]
    infos = HfApi().get_paths_info(CODEFORCES, asked, repo_type="dataset", revision=commit)
    assert [(info.path, getattr(info, "size", None)) for info in infos] == [(asked[0], sizes[asked[0]])]
    name = f"datasets/{CODEFORCES}@{commit}/{asked[0]}"
    assert HfFileSystem().info(name)["size"] == sizes[asked[0]]
    assert HfFileSystem().read_bytes(name) == (folder / asked[0]).read_bytes()


def test_a_file_is_downloaded_once(hub: FakeHub, tmp_path: Path) -> None:
    folder = make(tmp_path, CODEFORCES)
    commit = hub.publish(CODEFORCES, folder)
    name = "generated_tests/test_cases_0902.parquet"
    for _ in range(2):
        path = hf_hub_download(CODEFORCES, name, repo_type="dataset", revision=commit)
        assert Path(path).read_bytes() == (folder / name).read_bytes()
        assert hub.num_bytes == (folder / name).stat().st_size
    assert try_to_load_from_cache(CODEFORCES, name, repo_type="dataset", revision=commit) == path
    assert tmp_path in Path(path).parents


def test_refusals_are_the_hubs_own(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.publish(HMMT, make(tmp_path, HMMT))
    with pytest.raises(RevisionNotFoundError, match="404"):
        HfApi().dataset_info(HMMT, revision=NOBODYS)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(HMMT, "README.md", repo_type="dataset", revision=NOBODYS)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(HMMT, "data/other.parquet", repo_type="dataset", revision=commit)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().dataset_info("made/up")
    with pytest.raises(DatasetNotFoundError, match="doesn't exist on the Hub"):
        datasets.load_dataset("made/up", split="train")
    for streaming in (False, True):
        with pytest.raises(DatasetNotFoundError, match=f"Revision '{NOBODYS}' doesn't exist"):
            datasets.load_dataset(HMMT, split="train", revision=NOBODYS, streaming=streaming)
    with pytest.raises(ValueError, match="BuilderConfig 'other' not found"):
        datasets.load_dataset(HMMT, "other", split="train")


def test_streaming_some_columns_reads_less_than_the_whole(hub: FakeHub, tmp_path: Path) -> None:
    """Readers ask for 5 MB at least, so that only a large file shows it."""
    heavy = [os.urandom(2**20) for _ in range(16)]
    light = [*range(16)]
    table = pa.table({"light": light, "heavy": heavy})
    (tmp_path / "large").mkdir()
    pq.write_table(table, tmp_path / "large/train.parquet", compression="none")
    hub.publish("made/large", tmp_path / "large")
    size = (tmp_path / "large/train.parquet").stat().st_size
    read = {}
    for columns in (["light"], None):
        hub.forget()
        data = datasets.load_dataset("made/large", split="train", streaming=True, columns=columns)
        assert [row["light"] for row in data] == light
        read[bool(columns)] = hub.num_bytes
    assert read[True] < size / 2 < size <= read[False], (read, size)


def test_a_child_process_asks_it_too(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(HMMT, make(tmp_path, HMMT))
    code = f"import datasets; print(len(datasets.load_dataset({HMMT!r}, split='train')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("30\n", 0), done.stderr
    assert (tmp_path / "hf_home/hub").is_dir() and hub.num_bytes > 0


def test_nobody_answers_after_close(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.publish(HMMT, make(tmp_path, HMMT))
    kept = hf_hub_download(HMMT, "README.md", repo_type="dataset", revision=commit)
    hub.close()
    assert hf_hub_download(HMMT, "README.md", repo_type="dataset", revision=commit) == kept
    with pytest.raises(httpx.ConnectError):
        HfApi().dataset_info(HMMT)
