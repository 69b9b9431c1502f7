"""`python -m sdzero`: the command line of this very interpreter, as the stages of a run need it."""

from __future__ import annotations

import os
import threading
import time

from sdzero.cli import main


def _end_with_parent(pid: int) -> None:
    """A stage whose `sdzero run` was killed must not go on beside the next run of the same folder."""
    while os.getppid() == pid:
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    if parent := os.environ.pop("SDZERO_PARENT", None):
        threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
    main()
