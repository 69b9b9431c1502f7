"""Worker extension for vLLM servers on the CPU whose model ties its head to its embedding."""

from __future__ import annotations

from typing import Any

from sdzero.engines.vllm_patches import repack_heads


class RepackHeads:
    """Mixin for vLLM's worker: `vllm serve --worker-extension-cls sdzero.engines.remote.worker.RepackHeads`.

    Called after each reload. Servers on GPUs do not need it.
    """

    model_runner: Any

    def repack_heads(self) -> None:
        repack_heads(self.model_runner.get_model())
