"""The system call filter from inside: denied calls fail, ordinary programs are unaffected."""

import platform

import pytest

from sdzero.graders.sandbox import seccomp
from sdzero.graders.sandbox.client import SandboxClient
from sdzero.graders.sandbox.types import StdioTest, Submission

pytestmark = pytest.mark.sandbox

TRIES = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for name, number in %r:
    ctypes.set_errno(0)
    print(name, libc.syscall(number, 0, 0, 0, 0, 0), ctypes.get_errno())
child = libc.syscall(%d, 0x10000000 | 17, 0, 0, 0, 0)  # clone into a new user namespace
if child == 0:
    os._exit(0)
print("namespace", child, ctypes.get_errno())
"""
ORDINARY = """
import subprocess, threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pipe

thread = threading.Thread(target=print, args=("thread",))
thread.start(); thread.join()
print(subprocess.run(["/bin/echo", "process"], capture_output=True, text=True).stdout.strip())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no table of this architecture's calls")
def test_system_calls_of_attacks_are_denied() -> None:
    column = 0 if platform.machine() == "x86_64" else 1
    calls = [(name, numbers[column]) for name, numbers in seccomp._DENIED.items()]
    source = TRIES % (calls, 56 if column == 0 else 220)
    with SandboxClient(num_workers=1) as client:
        denied, ordinary = client.grade(
            [Submission("python", text, (StdioTest("", ""),)) for text in (source, ORDINARY)]
        )
    assert client.backend in ("bubblewrap", "nsjail"), "sandlock has rules of its own"
    lines = denied.tests[0].stdout.splitlines()
    assert lines == [f"{name} -1 1" for name in (*dict(calls), "namespace")]
    assert ordinary.tests[0].stdout.split() == ["thread", "process"], ordinary.tests[0].stderr


def test_a_program_of_the_filter_is_whole_instructions() -> None:
    assert len(seccomp.bpf_program()) % 8 == 0
    assert seccomp.kafel_policy().count("SYSCALL[") == len(seccomp._DENIED) + 1
