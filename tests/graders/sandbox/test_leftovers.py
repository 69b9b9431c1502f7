"""Many runs, good and bad, leave nothing behind."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdzero.graders.sandbox.client import SandboxClient
from sdzero.graders.sandbox.resources import process_tree
from sdzero.graders.sandbox.types import Limits, StdioTest, Submission
from support.sandboxes import server_pid

pytestmark = pytest.mark.sandbox
LIMITS = Limits(time=1, memory_mb=64, processes=16, files_mb=4, output_mb=1, wall=1)
PROGRAMS = {
    "correct": "print('right')",
    "wrong": "import os\nif os.fork() == 0:\n    os.setsid()\n    __import__('time').sleep(60)\nprint('no')",
    "runtime_error": "import os; open('/tmp/x', 'wb').write(bytes(99999)); os.kill(os.getpid(), 11)",
    "memory": "x = bytearray(b'x') * (99 << 20)",
    "output_limit": "print('x' * (2 << 20))",
}
NUM_RUNS, NUM_TIMEOUTS = 250, 4


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.timeout(900)
def test_many_runs_leave_nothing_behind() -> None:
    with SandboxClient(num_workers=4) as client:
        server = server_pid(client)
        folder = client._connection.folder
        runs = Path(f"{folder}-work/runs")

        def seen() -> tuple[object, ...]:
            shared = subprocess.run(["ipcs", "-a"], capture_output=True, text=True, check=True).stdout
            group = Path(cgroup) if cgroup else None
            return (
                {*process_tree(server)},
                sorted(path.name for path in runs.iterdir()),
                len([*Path(f"/proc/{server}/fd").iterdir()]),
                shared,
                sorted(path.name for path in group.iterdir() if path.is_dir()) if group else [],
            )

        cgroup = json.loads((folder / "handshake.json").read_text())["cgroup"]
        submissions = [Submission("python", s, (StdioTest("", "right"),), LIMITS) for s in PROGRAMS.values()]
        client.grade(submissions)
        before = seen()
        assert before[0] == {server}
        slow = Submission("python", "import time; time.sleep(60)", (StdioTest("", ""),), LIMITS)
        batch = submissions * ((NUM_RUNS - NUM_TIMEOUTS) // len(submissions) + 1) + [slow] * NUM_TIMEOUTS
        verdicts = client.grade(batch)
        assert len(verdicts) >= NUM_RUNS
        assert [v.reason for v in verdicts[:-NUM_TIMEOUTS]] == [*PROGRAMS] * (len(batch) // len(PROGRAMS))
        assert {v.reason for v in verdicts[-NUM_TIMEOUTS:]} == {"timeout"}
        assert eventually(lambda: seen() == before), (before, seen())
    assert not folder.exists() and not Path(f"{folder}-work").exists()
    assert not cgroup or not Path(cgroup).exists()
    assert not Path(f"/proc/{server}").exists()
