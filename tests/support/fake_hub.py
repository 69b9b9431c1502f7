"""Local server with the part of the Hugging Face Hub's API that reading data sets needs; `hub` is the fixture.

`publish` adds a commit to a data set's repository; `main` is the last one. Within the test, `datasets` and
`huggingface_hub` use this server with empty caches, as do child processes through HF_ENDPOINT and HF_HOME. (The
libraries read both at import, so the fixture patches their constants in this process.) An unknown commit, file or data
set gets the Hub's own errors. `num_bytes` counts the bytes of files sent, `requests` lists the requests, `forget`
resets both. After `close` connections are refused; the client retries an uncached file six times, over 23 seconds.

Files are sent whole or by ranges, over plain HTTP: no redirect to another host, no Xet, no access tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import datasets.config
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest

_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Revision(NamedTuple):
    """A commit of a repository: file contents by path."""

    commit: str
    files: dict[str, bytes]


class Reply(NamedTuple):
    """An HTTP response. huggingface_hub recognizes errors by their headers."""

    status: int
    body: bytes
    headers: dict[str, str]


class FakeHub:
    """The server, running until `close`."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.requests: list[str] = []
        self._revisions: dict[str, list[Revision]] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def publish(self, id: str, folder: Path) -> str:
        """Publish a folder as the newest revision of `owner/name`; return its commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        digest = hashlib.sha1(id.encode())
        for name in sorted(files):
            digest.update(name.encode() + hashlib.sha1(files[name]).digest())
        self._revisions.setdefault(id, []).append(Revision(digest.hexdigest(), files))
        return digest.hexdigest()

    def forget(self) -> None:
        with self._lock:
            self.num_bytes, self.requests = 0, []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()

    def answer(self, method: str, url: str, form: dict[str, list[str]], wanted: str | None) -> Reply:
        """Answer a request; `form` holds the fields of a POST, `wanted` is the header Range."""
        with self._lock:
            self.requests.append(f"{method} {url}")
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if match := _API.fullmatch(parts.path):
            id, action, commit, path = match.groups()
            found = self._find(id, unquote(commit) if commit else "main")
            return found if isinstance(found, Reply) else _api(id, found, action, unquote(path or ""), query, form)
        if match := _FILE.fullmatch(parts.path):
            id, commit, path = match.groups()
            found = self._find(id, unquote(commit))
            reply = found if isinstance(found, Reply) else _file(found, unquote(path), wanted)
            if method == "GET" and reply.status < 400:
                with self._lock:
                    self.num_bytes += len(reply.body)
            return reply
        return _refusal(404, "", "Not found")

    def _find(self, id: str, revision: str) -> Revision | Reply:
        if id not in self._revisions:
            return _refusal(401, "RepoNotFound", "Repository not found")  # the hub says so to whom it does not know
        known = {found.commit: found for found in self._revisions[id]}
        known["main"] = self._revisions[id][-1]
        return known.get(revision) or _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


def _refusal(status: int, code: str, message: str, **headers: str) -> Reply:
    body = json.dumps({"error": message}).encode()
    return Reply(status, body, {"X-Error-Code": code, "X-Error-Message": message, **headers})


def _file(revision: Revision, path: str, wanted: str | None) -> Reply:
    headers = {"X-Repo-Commit": revision.commit}
    if path not in revision.files:
        return _refusal(404, "EntryNotFound", "Entry not found", **headers)
    body = revision.files[path]
    headers |= {"ETag": f'"{_blob(body)}"', "Accept-Ranges": "bytes"}
    if wanted is None or not (match := _RANGE.fullmatch(wanted)):
        return Reply(200, body, headers)
    start, end = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
    return Reply(206, body[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"})


def _api(
    id: str, revision: Revision, action: str | None, path: str, query: dict[str, str], form: dict[str, list[str]]
) -> Reply:
    if action == "tree":
        listed = _tree(revision, path, query.get("recursive", "").lower() in ("true", "1"))
        return _json(listed) if listed else _refusal(404, "EntryNotFound", f'"{path}" does not exist')
    if action == "paths-info":
        every = {entry["path"]: entry for entry in _tree(revision, "", recursive=True)}
        return _json([every[name] for name in form.get("paths", []) if name in every])
    siblings = [{"rfilename": name} for name in sorted(revision.files)]
    about = {"id": id, "author": id.split("/")[0], "sha": revision.commit, "private": False, "gated": False}
    return _json({**about, "disabled": False, "tags": [], "siblings": siblings})


def _tree(revision: Revision, path: str, recursive: bool) -> list[dict[str, Any]]:
    """List the entries below a folder as the Hub does, folders included."""
    entries: dict[str, dict[str, Any]] = {}
    prefix = f"{path}/" if path else ""
    for name, body in sorted(revision.files.items()):
        if not name.startswith(prefix):
            continue
        steps = name.removeprefix(prefix).split("/")
        for depth in range(1, len(steps) if recursive else min(2, len(steps))):
            folder = prefix + "/".join(steps[:depth])
            entries[folder] = {"type": "directory", "oid": _blob(folder.encode()), "size": 0, "path": folder}
        if recursive or len(steps) == 1:
            entries[name] = {"type": "file", "oid": _blob(body), "size": len(body), "path": name}
    return [*entries.values()]


def _blob(body: bytes) -> str:
    """Return git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _json(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


class _Server(ThreadingHTTPServer):
    """HTTP server that can close its clients' keep-alive connections."""

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._connections: set[Any] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in [*self._connections]:
            self.shutdown_request(connection)


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as clients expect
        disable_nagle_algorithm = True  # else an answer, written in two pieces, waits for the first's receipt

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            form = parse_qs(self.rfile.read(length).decode())
            reply = hub.answer(self.command, self.path, form, self.headers.get("Range"))
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _point(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Direct this process and its children to the endpoint, with caches in `home`."""
    for name, value in (("HF_ENDPOINT", endpoint), ("HF_HOME", str(home)), ("NO_PROXY", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    constants, config = huggingface_hub.constants, datasets.config
    changed: list[tuple[Any, str, Any]] = [
        (constants, "ENDPOINT", endpoint),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_HUB_CACHE", str(home / "hub")),
        (constants, "HF_HUB_OFFLINE", False),
        (huggingface_hub.hf_api.api, "endpoint", endpoint),  # functions of the package are its methods
        (config, "HF_ENDPOINT", endpoint),
        (config, "HUB_DATASETS_URL", endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"),
        (config, "HF_CACHE_HOME", str(home)),
        (config, "HF_DATASETS_CACHE", home / "datasets"),
        (config, "DOWNLOADED_DATASETS_PATH", home / "datasets/downloads"),
        (config, "HF_HUB_OFFLINE", False),
    ]
    for owner, name, value in changed:
        monkeypatch.setattr(owner, name, value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    served = FakeHub()
    _point(monkeypatch, served.endpoint, tmp_path / "hf_home")
    huggingface_hub.HfFileSystem.clear_instance_cache()  # instances that know another endpoint
    yield served
    huggingface_hub.HfFileSystem.clear_instance_cache()
    served.close()
