"""Data sets of the Hugging Face hub, by `datasets`: pinned, their size said first, kept where they are streamed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdzero.tasks.files import Row, plain, read_rows
from sdzero.utils.files import atomic_write

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub, or a folder that is laid out like one of its repositories.

    Args:
        id: `owner/name` on the hub, or a folder.
        split: split of the data set.
        config: its configuration (`name` of `datasets.load_dataset`); null takes the default one.
        revision: commit of the repository, 40 hexadecimal digits; null takes what it holds now, and says which that is.
        columns: columns to read; null reads all. Those that the task needs are always among them.
        data_files: files of the repository to read, in place of a configuration; patterns may be used.
        streaming: read the rows over the network, and keep them, without first downloading the whole files.
    """

    id: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    columns: tuple[str, ...] | None = None
    data_files: tuple[str, ...] | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        for name in ("columns", "data_files"):  # a config gives lists, which have no hash
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))

    def __str__(self) -> str:
        return f"{self.id} ({', '.join(filter(None, (self.config, self.split)))})"

    @property
    def is_local(self) -> bool:
        return Path(self.id).is_dir()


def read_hub(source: HubDataset, columns: Sequence[str], keep: Callable[[Row], bool] | None = None) -> list[Row]:
    """The rows of a data set in the order in which it is published, with `source.columns` and `columns`.

    Rows that were streamed lie in the cache of `datasets` under the commit, and are not streamed again. `keep` is not
    asked of them.

    Raises:
        FileNotFoundError: it cannot be had: offline, or no such data set or revision.
        ValueError: it has no such configuration or split, or lacks a column.
    """
    if source.is_local:
        return _load(source, columns, keep)
    commit = source.revision if _is_commit(source.revision) else _had(source, lambda: _commit(source))
    kept = _kept(source, columns, str(commit)) if source.streaming else None
    if kept is not None and kept.is_file():
        return read_rows(kept)
    if commit != source.revision:
        _say(f"{source.id}: the newest revision is {commit}: task.path.revision pins it")
    rows = _had(source, lambda: _load(source, columns, None if kept else keep))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept, tag=f".{os.getpid()}") as file:  # ranks may write it at the same time
            file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
    return rows


def hub_files(source: HubDataset, names: Sequence[str]) -> list[Path]:
    """Files of a data set's repository, downloaded where they are not in the cache.

    Raises:
        FileNotFoundError: a file is not there, or the hub is out of reach.
    """
    if source.is_local:
        paths = [Path(source.id) / name for name in names]
        if missing := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"task.path: no file {missing[0]}")
        return paths
    return _had(source, lambda: _download(source, names))


def _download(source: HubDataset, names: Sequence[str]) -> list[Path]:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from tqdm import tqdm

    where: dict[str, Any] = {"repo_id": source.id, "repo_type": "dataset", "revision": source.revision}
    wanted = [name for name in names if not isinstance(try_to_load_from_cache(filename=name, **where), str)]
    sizes = []
    for start in range(0, len(wanted), 500):  # the hub answers for so many at a time
        infos = HfApi().get_paths_info(paths=wanted[start : start + 500], **where)
        sizes += [getattr(info, "size", 0) for info in infos]
    if wanted:
        _say(f"downloading {len(wanted)} files of {source.id}: {_size(sum(sizes))}")
    shown = tqdm(names, desc=source.id, unit="file", disable=not wanted)
    return [Path(hf_hub_download(filename=name, **where)) for name in shown]


def _load(source: HubDataset, columns: Sequence[str], keep: Callable[[Row], bool] | None) -> list[Row]:
    """Rows by `datasets.load_dataset`; the first time, it is said how much is downloaded."""
    import datasets

    options: dict[str, Any] = {"path": source.id, "name": source.config, "data_files": source.data_files}
    if not source.is_local:
        options["revision"] = source.revision
    try:
        builder = datasets.load_dataset_builder(**options)
    except ValueError as error:  # the library's way to say that there is no such configuration
        raise ValueError(f"task.path.config: {source.id}: {_line(error)}") from None
    files, found = _files_of(builder, source), builder.info.features
    is_parquet = str(files[0]).endswith(".parquet")
    wanted = None if source.columns is None else [*dict.fromkeys((*columns, *source.columns))]
    if wanted is not None and is_parquet:
        options["columns"] = wanted  # read from the file; other formats have to be read whole
    if source.is_local:
        options["cache_dir"] = _local_cache(files)
    is_cached = Path(datasets.load_dataset_builder(**options).cache_dir).is_dir()
    if found is None and is_parquet and not is_cached:
        found = _parquet_columns(files[0])
    if found is not None and (missing := [c for c in wanted or columns if c not in found]):
        raise ValueError(f"{source} has no column {missing[0]!r}; it has {sorted(found)}")
    if not source.is_local and not is_cached:
        _say_size(source, files, wanted)
    data = datasets.load_dataset(**options, split=source.split, streaming=source.streaming)
    if wanted is not None and not is_parquet:
        data = data.select_columns(wanted)
    return plain([row for row in map(dict, data) if keep is None or keep(row)], str(source))


def _local_cache(files: Sequence[Any]) -> str:
    """Where rows of a folder are kept: `datasets` by itself takes folders of one name for the same, changed or not."""
    from datasets import config

    stats = [(str(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns) for file in files]
    return str(Path(config.HF_DATASETS_CACHE) / "sdzero" / hashlib.sha256(repr(stats).encode()).hexdigest()[:16])


def _parquet_columns(file: Any) -> list[str]:
    import fsspec
    import pyarrow.parquet

    with fsspec.open(str(file), "rb") as opened:
        return pyarrow.parquet.read_schema(opened).names


def _files_of(builder: Any, source: HubDataset) -> list[Any]:
    """Raises: ValueError where the data set has no such split."""
    splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if source.split not in splits:
        raise ValueError(f"task.path.split: {source.id} has no split {source.split!r}; it has {sorted(splits)}")
    return splits[source.split]


def _say_size(source: HubDataset, files: Sequence[Any], columns: Sequence[str] | None) -> None:
    from huggingface_hub import HfFileSystem

    system = HfFileSystem()
    size = _size(sum(system.info(str(file))["size"] for file in files))
    part = f", of which only the columns {', '.join(columns)} are read" if columns and source.streaming else ""
    _say(f"{'reading' if source.streaming else 'downloading'} {source}: {len(files)} files, {size}{part}")


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def _commit(source: HubDataset) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(source.id, revision=source.revision).sha)


def _kept(source: HubDataset, columns: Sequence[str], commit: str) -> Path:
    from datasets import config

    identity = [source.config, source.split, source.data_files, source.columns, sorted(columns)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = f"{source.id.replace('/', '--')}-{commit}-{digest}.jsonl"
    return Path(config.HF_DATASETS_CACHE) / "sdzero" / name


def _had(source: HubDataset, get: Callable[[], Result]) -> Result:
    """What `get` gets from the hub. Raises: FileNotFoundError, with one line in place of the libraries' many."""
    from huggingface_hub.utils import HfHubHTTPError, httpx  # the client that it asks with, whatever its name is

    try:
        return get()
    except (OSError, httpx.HTTPError, HfHubHTTPError) as error:  # datasets' own errors are OSErrors
        raise FileNotFoundError(
            f"task.path: {source} cannot be had at revision {source.revision or 'main'}: {_line(error)} (offline, it "
            "must be in the cache, HF_HOME, and task.path.revision must name its commit; a folder laid out like it "
            "will do too: task.path.id)"
        ) from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
