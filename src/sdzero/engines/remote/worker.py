"""What a vLLM server on the CPU takes into its worker, where the model's head is tied to its embedding."""

from __future__ import annotations

from typing import Any

from sdzero.engines.vllm_patches import repack_heads


class RepackHeads:
    """For `vllm serve --worker-extension-cls sdzero.engines.remote.worker.RepackHeads`. vLLM mixes it into its worker;
    what it does after a reload says `repack_heads`. Servers on GPUs need none."""

    model_runner: Any

    def repack_heads(self) -> None:
        repack_heads(self.model_runner.get_model())
