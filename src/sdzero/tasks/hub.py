"""Hugging Face Hub data sets through `datasets`: pinned revisions, announced downloads, cached streaming."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdzero.utils.files import atomic_write

Row = dict[str, Any]


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face Hub, or a local folder laid out like its repository.

    Args:
        id: `owner/name` on the Hub, or a folder.
        split: split of the data set.
        config: configuration (`name` of `datasets.load_dataset`); null for the default one.
        revision: commit of the repository, 40 hexadecimal digits; null for the newest, whose commit is printed.
        columns: columns to read in addition to those the task needs; null for all.
        streaming: read rows over the network and cache them, without downloading whole files first.
    """

    id: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    columns: tuple[str, ...] | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.columns is not None:  # a config gives a list, which is not hashable
            object.__setattr__(self, "columns", tuple(self.columns))

    def __str__(self) -> str:
        return f"{self.id} ({', '.join(filter(None, (self.config, self.split)))})"

    @property
    def is_local(self) -> bool:
        return Path(self.id).is_dir()


def read_hub(source: HubDataset, columns: Sequence[str], keep: Callable[[Row], bool] | None = None) -> list[Row]:
    """Return the rows of a data set in published order, with `columns` and `source.columns`.

    Streamed rows are cached by `datasets`' cache folder and commit, before `keep` filters them.

    Raises:
        FileNotFoundError: unavailable: offline, or no such data set or revision.
        ValueError: no such configuration, split or column.
    """
    if source.is_local:
        return _load(source, columns, keep)
    commit = source.revision
    if not re.fullmatch("[0-9a-f]{40}", commit or ""):
        from huggingface_hub import HfApi

        with _hub_errors(source):
            commit = HfApi().dataset_info(source.id, revision=source.revision).sha
    cache = _cache_file(source, columns, str(commit)) if source.streaming else None
    if cache is not None and cache.is_file():
        return [json.loads(line) for line in cache.read_bytes().splitlines()]
    if commit != source.revision:
        print(f"{source.id}: the newest revision is {commit}: set task.path.revision to pin it", file=sys.stderr)
    with _hub_errors(source):
        rows = _load(source, columns, None if cache else keep)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache, tag=f".{os.getpid()}") as file:  # ranks may write it at the same time
            file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
    return rows


def _cache_file(source: HubDataset, columns: Sequence[str], commit: str) -> Path:
    from datasets import config

    identity = [source.config, source.split, source.columns, sorted(columns)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Path(config.HF_DATASETS_CACHE) / "sdzero" / f"{source.id.replace('/', '--')}-{commit}-{digest}.jsonl"


def _load(source: HubDataset, columns: Sequence[str], keep: Callable[[Row], bool] | None) -> list[Row]:
    """Load rows with `datasets.load_dataset`; print the size of a download."""
    import datasets

    options: dict[str, Any] = {"path": source.id, "name": source.config}
    if not source.is_local:
        options["revision"] = source.revision
    try:
        builder = datasets.load_dataset_builder(**options)
    except ValueError as error:  # how the library reports an unknown configuration
        raise ValueError(f"task.path.config: {source.id}: {_first_line(error)}") from None
    splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if source.split not in splits:
        raise ValueError(f"task.path.split: {source.id} has no split {source.split!r}; it has {sorted(splits)}")
    files, found = splits[source.split], builder.info.features
    is_parquet = str(files[0]).endswith(".parquet")
    wanted = None if source.columns is None else [*dict.fromkeys((*columns, *source.columns))]
    if wanted is not None and is_parquet:
        options["columns"] = wanted  # other formats can only be read whole
    is_new = source.is_local or not Path(datasets.load_dataset_builder(**options).cache_dir).is_dir()
    if found is None and is_parquet and is_new:
        found = _parquet_columns(files[0])
    if found is not None and (missing := [c for c in wanted or columns if c not in found]):
        raise ValueError(f"{source} has no column {missing[0]!r}; it has {sorted(found)}")
    if is_new and not source.is_local:
        _announce_size(source, files, wanted)
    # streamed, a folder is read as it is now: the cache of `datasets` is keyed by its name, changed or not
    data = datasets.load_dataset(**options, split=source.split, streaming=source.streaming or source.is_local)
    if wanted is not None and not is_parquet:
        data = data.select_columns(wanted)
    return check_json([row for row in map(dict, data) if keep is None or keep(row)], str(source))


def check_json(rows: list[Row], source: str) -> list[Row]:
    """Return the rows unchanged. Raises: ValueError for a cell JSON cannot hold, as traces and rollouts are JSON."""
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(
                    f"{source}: row {number}: column {column!r}: {error}: convert it to text, or drop the column"
                ) from None
    return rows


def _parquet_columns(file: Any) -> list[str]:
    import fsspec
    import pyarrow.parquet

    with fsspec.open(str(file), "rb") as opened:
        return pyarrow.parquet.read_schema(opened).names


def _announce_size(source: HubDataset, files: Sequence[Any], columns: Sequence[str] | None) -> None:
    from huggingface_hub import HfFileSystem

    system = HfFileSystem()
    size = _size(sum(system.info(str(file))["size"] for file in files))
    part = f", only columns {', '.join(columns)}" if columns and source.streaming else ""
    verb = "streaming" if source.streaming else "downloading"
    print(f"{verb} {source}: {len(files)} files, {size}{part}", file=sys.stderr)


def hub_files(source: HubDataset, names: Sequence[str]) -> list[Path]:
    """Return local paths of files of a repository, downloading those not yet cached. Raises: FileNotFoundError."""
    if source.is_local:
        paths = [Path(source.id) / name for name in names]
        if missing := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"task.path: no file {missing[0]}")
        return paths

    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from tqdm import tqdm

    where: dict[str, Any] = {"repo_id": source.id, "repo_type": "dataset", "revision": source.revision}
    missing = [name for name in names if not isinstance(try_to_load_from_cache(filename=name, **where), str)]
    num_bytes = 0
    with _hub_errors(source):
        for start in range(0, len(missing), 500):  # limit of the Hub per request
            infos = HfApi().get_paths_info(paths=missing[start : start + 500], **where)
            num_bytes += sum(getattr(info, "size", 0) for info in infos)
        if missing:
            print(f"downloading {len(missing)} files of {source.id}: {_size(num_bytes)}", file=sys.stderr)
        progress = tqdm(names, desc=source.id, unit="file", disable=not missing)
        return [Path(hf_hub_download(filename=name, **where)) for name in progress]


@contextmanager
def _hub_errors(source: HubDataset) -> Iterator[None]:
    """Turn the Hub's errors into a one-line FileNotFoundError."""
    from huggingface_hub.utils import HfHubHTTPError, httpx  # its HTTP client, whatever the version

    try:
        yield
    except (OSError, httpx.HTTPError, HfHubHTTPError) as error:  # datasets' own errors are OSErrors
        raise FileNotFoundError(
            f"task.path: {source} is unavailable at revision {source.revision or 'main'}: {_first_line(error)} "
            "(offline, it must be in the cache, HF_HOME, and task.path.revision must be its commit; or set "
            "task.path.id to a folder laid out like the repository)"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
