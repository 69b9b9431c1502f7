"""JSON over HTTP to vLLM servers: hundreds of concurrent requests, from any thread, each call with a deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import aiohttp

from sdzero.engines.base import EngineDied, EngineError

_CONNECTIONS = 512  # twice what a server runs at once; more would only queue there, using a descriptor each
_KEEPALIVE_SECONDS = 2.0  # vLLM closes a connection that is idle for 5: no request may meet that
_SHORT_SECONDS = 60.0  # for calls without work


class Client:
    """Connection pool on its own thread, usable from any thread and from a notebook.

    Every method raises EngineDied if a server cannot be reached, fails or passes the deadline, and EngineError if it
    rejects the request.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sdzero-http", daemon=True)
        self._thread.start()
        self._pending: set[Future[Any]] = set()
        self._session = self._run(self._open(), _SHORT_SECONDS, "start")

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=_KEEPALIVE_SECONDS)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))

    def get(self, url: str, seconds: float = _SHORT_SECONDS) -> Any:
        return self._run(self._send("GET", url, None), seconds, url)

    def post(self, url: str, body: Any = None, seconds: float = _SHORT_SECONDS) -> Any:
        return self._run(self._send("POST", url, body), seconds, url)

    def post_all(self, requests: Sequence[tuple[str, Any]], seconds: float) -> list[Any]:
        """Post (url, body) pairs concurrently; return the answers in order. The first error cancels the others."""
        return self._run(self._send_all(requests), seconds, requests[0][0]) if requests else []

    async def _send_all(self, requests: Sequence[tuple[str, Any]]) -> list[Any]:
        tasks = [asyncio.ensure_future(self._send("POST", url, body)) for url, body in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # a server aborts a request when its connection closes

    async def _send(self, method: str, url: str, body: Any) -> Any:
        try:
            async with self._session.request(method, url, json=body) as response:
                if response.status == 200:
                    return await response.json(content_type=None) if response.content_length != 0 else None
                text = (await response.text())[:500]
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineDied(f"the vLLM server does not answer {method} {url}: {error!r}. Is it running?") from error
        kind = EngineDied if response.status >= 500 else EngineError
        raise kind(f"the vLLM server answered {method} {url} with {response.status}: {text}")

    def _run(self, work: Coroutine[Any, Any, Any], seconds: float, what: str) -> Any:
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), self._loop)
        self._pending.add(future)
        try:
            return future.result()
        except TimeoutError as error:
            raise EngineDied(f"the vLLM server did not finish {what} in {seconds:g} seconds") from error
        except CancelledError as error:
            raise EngineError(f"{what} was cancelled: the engine was closed") from error
        finally:
            future.cancel()  # if the wait itself was interrupted, as by Ctrl-C
            self._pending.discard(future)

    def close(self) -> None:
        """Cancel running calls, also those of other threads, and close the connections."""
        for future in list(self._pending):
            future.cancel()
        self._run(self._session.close(), _SHORT_SECONDS, "close")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
