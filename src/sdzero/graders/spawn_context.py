"""multiprocessing context whose workers inherit neither the main script nor the modules of this process."""

from __future__ import annotations

import io
import os
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from typing import Any, cast


class _Popen(cast(Any, popen_spawn_posix).Popen):
    """Spawn without re-running the main script, which may lack a guard and import torch.

    All workers hash strings alike, since sympy depends on the order of sets.
    """

    def _launch(self, process_obj: Any) -> None:
        prepared = spawn.get_preparation_data(process_obj._name)
        prepared = {key: value for key, value in prepared.items() if not key.startswith("init_main")}
        sent = io.BytesIO()
        set_spawning_popen(cast(Any, self))
        try:
            reduction.dump(prepared, sent)
            reduction.dump(process_obj, sent)
        finally:
            set_spawning_popen(None)
        sentinel, child_end = os.pipe()
        child_reads, parent_writes = os.pipe()
        self.finalizer = util.Finalize(self, cast(Any, util).close_fds, (sentinel, parent_writes))
        try:
            tracker = cast(int, resource_tracker.getfd())
            command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=child_reads)
            command = [b"/usr/bin/env", b"PYTHONHASHSEED=0", *map(os.fsencode, command)]
            self._fds += [tracker, child_reads, child_end]
            self.pid = util.spawnv_passfds(command[0], command, self._fds)
            self.sentinel = sentinel
            with open(parent_writes, "wb", closefd=False) as pipe:
                pipe.write(sent.getbuffer())
        finally:
            os.close(child_reads)
            os.close(child_end)


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)


class CleanSpawnContext(SpawnContext):
    """multiprocessing context for pebble's workers."""

    launches = 0  # workers started since the last result

    def Process(self, *args: Any, **kwargs: Any) -> _Process:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.launches += 1
        return _Process(*args, **kwargs)
