"""Weight transfer to vLLM servers, by folder or NCCL, and its verification."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdzero.engines.base import EngineError
from sdzero.engines.remote.client import Client
from sdzero.engines.sync_check import WeightLayout

_SHARD_BYTES = 2 * 2**30
_VOCABULARY_MULTIPLE = 64  # vLLM pads vocabularies to it
EMPTY = hashlib.sha256().hexdigest()  # of a weight that vLLM's CPU build has packed


class FolderTransport:
    """Writes weights as safetensors into a folder from which the servers load them, under the same path.

    Use /dev/shm if trainer and servers share a machine, otherwise a shared file system. Files are removed after use.
    """

    def __init__(self, client: Client, urls: Sequence[str], folder: Path, dtype: torch.dtype, seconds: float) -> None:
        self._client, self._urls, self._folder, self._dtype, self._seconds = client, urls, folder, dtype, seconds

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send (Hugging Face name, full tensor) pairs to all servers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(prefix="weights-", dir=self._folder))
        folder.chmod(0o755)  # a server may run as another user
        try:
            self._write(weights, folder)
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._client.post_all([(f"{url}/collective_rpc", call) for url in self._urls], self._seconds)
        finally:
            shutil.rmtree(folder)

    def _write(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        shard: dict[str, Tensor] = {}
        size = number = 0
        for name, tensor in weights:
            shard[name] = tensor.to("cpu", self._dtype).contiguous()
            size += shard[name].nbytes
            if size >= _SHARD_BYTES:
                save_file(shard, folder / f"model-{number:05d}.safetensors")
                shard, size, number = {}, 0, number + 1
        if shard:
            save_file(shard, folder / f"model-{number:05d}.safetensors")

    def close(self) -> None:
        pass


class NCCLTransport:
    """Sends weights from GPU to GPU by vLLM's own weight transfer; this process is rank 0 of the group."""

    def __init__(self, url: str, layout: WeightLayout, num_workers: int, dtype: torch.dtype, seconds: float) -> None:
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._source = nccl_source(layout, torch.device("cuda", torch.cuda.current_device()), dtype)
        address, port = _own_address(url)
        info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=num_workers + 1, rank=0)
        self._engine: Any = WeightTransferTrainerFactory.trainer_init(
            info, client=HTTPVLLMWeightSyncClient(url, timeout=seconds), source=self._source
        )

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send (Hugging Face name, full tensor) pairs to the server."""
        self._source.weights = weights
        self._engine.send_weights()

    def close(self) -> None:
        self._engine.shutdown()


def nccl_source(layout: WeightLayout, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a vLLM `WeightSource` with the metadata of `layout`; each sync sets its `weights`."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Source(WeightSource):
        weights: Iterable[tuple[str, Tensor]] = ()

        def metadata(self) -> list[ParamMeta]:
            shapes = {name: shape for name, shape in layout.shapes.items() if name in layout.required}
            return [ParamMeta(name, dtype, tuple(shape)) for name, shape in shapes.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.weights:
                yield name, tensor.to(device, dtype)

    return Source()


def _own_address(url: str) -> tuple[str, int]:
    """Return this machine's address as seen from the server, and a free port."""
    parts = urlparse(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((parts.hostname, parts.port or 80))  # sends nothing, but selects the interface
        address = route.getsockname()[0]
    with socket.socket() as listener:
        listener.bind(("", 0))
        return address, listener.getsockname()[1]


class Digests:
    """SHA-256 digests of the sent tensors that vLLM keeps unchanged, to compare with those of the servers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sent: dict[str, str] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            if tensor.dim() == 1 or (is_vocabulary and tensor.shape[0] % _VOCABULARY_MULTIPLE == 0):
                raw = tensor.detach().to("cpu", self._dtype).contiguous().view(torch.uint8)
                self._sent[name] = hashlib.sha256(raw.numpy().data).hexdigest()
            yield name, tensor

    def compare(self, url: str, held: Mapping[str, str], num_workers: int) -> None:
        """Compare with the digests that a server holds, `dp0:...:NAME` -> SHA-256.

        Raises:
            EngineError: a tensor of the server differs from the one sent.
        """
        if num_workers > 1:  # each holds a part, whose digest is unknown here
            return
        own = {key.rpartition(":")[2]: digest for key, digest in held.items()}
        wrong = [name for name, sent in self._sent.items() if own.get(name, EMPTY) not in (EMPTY, sent)]
        if wrong:
            raise EngineError(
                f"weight sync: {wrong[0]!r} of the vLLM server at {url} differs from what was sent ({len(wrong)} such "
                "tensors): its weights are stale or broken"
            )
