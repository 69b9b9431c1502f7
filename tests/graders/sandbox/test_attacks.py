"""Hostile programs on every sandbox of this machine do no harm, whatever the verdict."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graders.sandbox.attacks import ATTACKS, LEGAL
from graders.sandbox.forging import FORGING
from sdzero.graders.sandbox.backends import SANDBOXES
from sdzero.graders.sandbox.client import SandboxClient
from sdzero.graders.sandbox.resources import process_tree
from sdzero.graders.sandbox.server import UID
from sdzero.graders.sandbox.types import AssertTest, CallTest, Limits, StdioTest, Submission
from support.sandboxes import command_line, server_pid

pytestmark = pytest.mark.sandbox
CANARY = "canary-5bd1c0"
NUM_WORKERS = 4
LIMITS = Limits(time=1, memory_mb=160, processes=24, files_mb=16, output_mb=2, wall=10)
SERVER_USER = UID if os.getuid() == 0 else os.getuid()
# where a sandbox holds less by its design: (backend, attack) -> what it does
WEAKER = {
    ("sandlock", "fills its folder"): "its folder is on disk: each file is limited, not their sum",
    ("sandlock", "memfd"): "allowed, and counted by the cgroup",
}


def backends() -> list[str]:
    """Installed sandboxes, and bubblewrap without a cgroup; also where required but missing, to fail."""
    there = [kind.name for kind in SANDBOXES if kind().missing() is None]
    required = "sandbox" in os.environ.get("SDZERO_TEST_REQUIRE", "").split(",")
    return [*there, "bubblewrap, no cgroup"] if required or "bubblewrap" in there else there


@pytest.fixture(scope="module", params=backends())
def client(request: pytest.FixtureRequest) -> Iterator[SandboxClient]:
    name, _, without = request.param.partition(", ")
    with SandboxClient(name, num_workers=NUM_WORKERS, cgroups=not without) as client:
        yield client


@pytest.fixture
def listeners() -> Iterator[dict[str, socket.socket]]:
    """Sockets that attacks could reach on this machine."""
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
    with tcp, udp, socket.socket(socket.AF_UNIX) as unix:
        udp.bind(("127.0.0.1", 0))
        unix.bind(f"\0sdzero-{os.getpid()}")
        unix.listen()
        for listener in (tcp, udp, unix):
            listener.setblocking(False)
        yield {"TCP": tcp, "UDP": udp, "unix": unix}


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """Process of the user that programs run as."""
    with subprocess.Popen(["/bin/sleep", "600"], user=SERVER_USER if os.getuid() == 0 else None) as process:
        yield process
        process.kill()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """World-writable folder: only the sandbox keeps programs out of it, unlike pytest's folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def contacted(listeners: dict[str, socket.socket]) -> list[str]:
    """Names of the listeners that received anything."""
    found = []
    for name, listener in listeners.items():
        try:
            listener.recv(1) if name == "UDP" else listener.accept()
            found.append(name)
        except BlockingIOError:
            continue
    return found


def fill_in(source: str, values: dict[str, object]) -> str:
    for name, value in values.items():
        source = source.replace(f"@{name}@", str(value))
    return source


def test_attacks_do_no_harm(
    client: SandboxClient,
    listeners: dict[str, socket.socket],
    victim: subprocess.Popen[bytes],
    open_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All attacks, several at a time, so that they are also each other's neighbours; then checks from outside."""
    monkeypatch.setenv("CANARY", CANARY)
    secret = open_folder / "canary.h"
    secret.write_text(f'"{CANARY}"\n')
    values: dict[str, object] = {
        "SECRET": secret,
        "TARGET": open_folder / "target",
        "PORT": listeners["TCP"].getsockname()[1],
        "UDP": listeners["UDP"].getsockname()[1],
        "ABSTRACT": f"sdzero-{os.getpid()}",
        "VICTIM": victim.pid,
        "SERVER": server_pid(client),
        "TEST": os.getpid(),
        "SOCKET": client._connection.folder / "socket",
        "VENV": sys.prefix,
    }
    submissions = [
        Submission(
            attack.language,
            fill_in(attack.source, values),
            (StdioTest("", "right"),),
            replace(LIMITS, wall=1.5) if "timeout" in attack.reasons else LIMITS,
            files=("input.txt", "output.txt") if attack.files else None,
        )
        for attack in ATTACKS
    ]
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], len([*process_tree(server_pid(client))]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        verdicts = client.grade(submissions)
    finally:
        ended.set()
        watcher.join()
    faults = []
    for attack, submission, verdict in zip(ATTACKS, submissions, verdicts, strict=True):
        output = verdict.message + "".join(run.stdout + run.stderr for run in verdict.tests)
        harm = "HARM" in output and (client.backend, attack.name) not in WEAKER
        long = any(run.wall_seconds > submission.limits.wall_seconds + 5 for run in verdict.tests)
        large = client.counted and any(run.memory_mb > LIMITS.memory_mb + 1 for run in verdict.tests)
        if harm or long or large or CANARY in output or verdict.reward or verdict.reason not in attack.reasons:
            faults.append((attack.language, attack.name, verdict.reason, output[-300:]))
    assert faults == []

    assert contacted(listeners) == []
    if client.backend != "sandlock":  # its limit lets bombs pass it for moments; memory and time still hold them
        assert most[0] <= NUM_WORKERS * (LIMITS.processes + 8) + 1
    server = server_pid(client)
    while any(b"stdc++.h.gch" in command_line(pid) for pid in process_tree(server)):  # precompiled meanwhile
        time.sleep(0.1)
    time.sleep(1)  # a daemon would write now
    assert {*process_tree(server)} == {server}, "processes outlived their runs"
    assert [path.name for path in open_folder.iterdir()] == [secret.name] and secret.read_text() == f'"{CANARY}"\n'
    assert not any(Path(path).exists() for path in ("/usr/x", "/usr/bin/x", "/etc/x"))
    assert victim.poll() is None, "a process of the server's user was killed"
    assert client.grade([Submission("python", "print('right')", (StdioTest("", "right"),), LIMITS)])[0].reward == 1


def test_a_daemon_that_holds_the_output_open_delays_nothing(client: SandboxClient) -> None:
    source = "import os, time\nprint('right', flush=True)\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"
    verdict = client.grade([Submission("python", source, (StdioTest("", "right"),), LIMITS)])[0]
    assert verdict.reward == 1 and verdict.tests[0].wall_seconds < 1.5


def test_the_time_of_children_that_nobody_waits_for_counts(client: SandboxClient) -> None:
    source = (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        end = time.process_time() + 0.6\n"
        "        while time.process_time() < end: pass\n        os._exit(0)\n"
        "ends = time.time() + 4\nwhile time.time() < ends: time.sleep(0.1)\nprint('right')"
    )
    limits = Limits(time=0.7, memory_mb=160, processes=24, wall=9)
    verdict = client.grade([Submission("python", source, (StdioTest("", "right"),), limits)])[0]
    assert verdict.reason == "timeout" and verdict.tests[0].cpu_seconds > 0.7


def test_runs_see_nothing_of_each_other(client: SandboxClient) -> None:
    places = ["/tmp/left", "/dev/shm/left", "left", "/work/left"]
    leaves = f"for p in {places}:\n    try: open(p, 'w').write('x')\n    except OSError: pass\nprint('right')"
    looks = f"import os\nprint(*[p for p in {places} if os.path.exists(p)], sorted(os.listdir('.')))"
    submissions = [
        Submission("python", leaves, (StdioTest("", "right"), StdioTest("", "right")), LIMITS),
        Submission("python", looks, (StdioTest("", "[]"),), LIMITS),
    ]
    for submission in submissions:  # one after the other
        verdict = client.grade([submission])[0]
        assert verdict.reward == 1, verdict.tests[-1]


def test_calls_are_not_forged(client: SandboxClient) -> None:
    # a constant written past the runner can match the first test only
    tests = (CallTest("f", (), 42), CallTest("f", (), 43))
    every = "import os\nfor fd in range(256):\n    try: os.write(fd, b'42\\n')\n    except OSError: pass\nos._exit(0)"
    verdicts = client.grade([Submission("python", source, tests, LIMITS) for source in (every, *FORGING.values())])
    assert [verdict.reward for verdict in verdicts] == [0] * (1 + len(FORGING))


def test_assertions_can_be_forged_as_documented(client: SandboxClient) -> None:
    source = (
        "import os, re\ntext = open(__file__).read()\n"
        "os.write(1, re.findall(r\"write\\(1, b'([0-9a-f]+)'\", text)[-1].encode())\nos._exit(0)\n"
    )
    tests = (AssertTest("assert f(2) == 4"),)
    verdict = client.grade([Submission("python", source, tests, LIMITS)])[0]
    assert verdict.reward == 1, "the documentation may promise more now"


def test_legal_programs_that_look_odd_pass(client: SandboxClient) -> None:
    limits = Limits(time=3, memory_mb=256, processes=24, output_mb=8)
    submissions = [
        Submission(language, source, (StdioTest(given, expected),), limits)
        for language, source, given, expected in LEGAL.values()
    ]
    failed = {
        name: (verdict.reason, verdict.message, [run.stderr for run in verdict.tests])
        for name, verdict in zip(LEGAL, client.grade(submissions), strict=True)
        if verdict.reward != 1
    }
    assert failed == {}
