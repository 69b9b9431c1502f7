"""Hostile programs on every sandbox of this machine: the harm does not happen, whatever the verdict says."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from judge.attacks import ATTACKS, Attack
from sdzero.judge.backends import BACKENDS, SANDBOXES
from sdzero.judge.client import Judge
from sdzero.judge.server import UID
from sdzero.judge.types import AssertTest, CallTest, CodeVerdict, Limits, StdioTest, Submission

pytestmark = pytest.mark.sandbox
CANARY = "canary-5bd1c0"
LIMITS = Limits(time=1, memory_mb=160, processes=24, files_mb=16, output_mb=2, wall=2)
JUDGE_USER = UID if os.getuid() == 0 else os.getuid()
# where a sandbox holds less by its design: (backend, attack) -> what it does
WEAKER = {
    ("sandlock", "fills its folder"): "its folder is on disk: each file is limited, not their sum",
    ("sandlock", "memfd"): "allowed, and counted by the cgroup",
}


@dataclass
class World:
    """What attacks reach for, and what can be seen of them from outside."""

    judge: Judge
    secret: Path
    target: Path
    values: dict[str, object]
    heard: list[str] = field(default_factory=list)
    most_processes: int = 0
    verdicts: dict[tuple[str, str], CodeVerdict] = field(default_factory=dict)

    def filled(self, source: str) -> str:
        for name, value in self.values.items():
            source = source.replace(f"@{name}@", str(value))
        return source


def processes_of(uid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == uid:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def backends() -> list[str]:
    there = [kind.name for kind in SANDBOXES if kind().missing() is None]
    return [*there, "bubblewrap, no cgroup"] if "bubblewrap" in there else there or ["bubblewrap"]


@pytest.fixture(scope="module", params=backends())
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """All attacks, run once: what they did is then looked at one by one."""
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    folder.chmod(0o777)  # only the sandbox keeps programs from it
    secret, target = folder / "canary.h", folder / "target"
    secret.write_text(f'"{CANARY}"\n')
    os.environ["CANARY"] = CANARY
    tcp, udp, unix = (
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(type=socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX),
    )
    udp.bind(("127.0.0.1", 0))
    abstract = f"sdzero-{os.getpid()}-{request.param}"
    unix.bind(f"\0{abstract}")
    unix.listen()
    victim = subprocess.Popen(["/bin/sleep", "600"], user=JUDGE_USER if os.getuid() == 0 else None)
    name, _, without = request.param.partition(", ")
    with Judge(name, num_workers=2, cgroups=not without) as judge:
        assert judge._connection._process
        values = {
            "SECRET": secret,
            "TARGET": target,
            "PORT": tcp.getsockname()[1],
            "UDP": udp.getsockname()[1],
            "ABSTRACT": abstract,
            "VICTIM": victim.pid,
            "JUDGE": judge._connection._process.pid,
            "TEST": os.getpid(),
            "SOCKET": judge._connection.folder / "socket",
            "VENV": sys.prefix,
        }
        made = World(judge, secret, target, values)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                made.most_processes = max(made.most_processes, len(processes_of(JUDGE_USER)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        submissions = [
            Submission(
                "python" if attack.language == "python" else "cpp",
                made.filled(attack.source),
                (StdioTest("", "right"),),
                LIMITS,
                files=("input.txt", "output.txt") if attack.files else None,
            )
            for attack in ATTACKS
        ]
        verdicts = judge.judge(submissions)
        ended.set()
        watcher.join()
        made.verdicts = {(a.language, a.name): verdict for a, verdict in zip(ATTACKS, verdicts, strict=True)}
        for heard, socket_ in (("TCP", tcp), ("UDP", udp), ("unix", unix)):
            socket_.settimeout(0)
            try:
                socket_.recv(1) if heard == "UDP" else socket_.accept()
                made.heard.append(heard)
            except BlockingIOError:
                pass
        yield made
        assert victim.poll() is None, "a process of the judge's user was killed"
    victim.kill()
    victim.wait()
    for socket_ in (tcp, udp, unix):
        socket_.close()
    del os.environ["CANARY"]
    shutil.rmtree(folder)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.language}: {attack.name}")
def test_an_attack_does_no_harm(world: World, attack: Attack) -> None:
    verdict = world.verdicts[attack.language, attack.name]
    said = verdict.message + "".join(run.stdout + run.stderr for run in verdict.tests)
    assert CANARY not in said, said
    assert verdict.reward == 0 and verdict.reason in attack.reasons, (verdict.reason, said)
    if (world.judge.backend, attack.name) not in WEAKER:
        assert "HARM" not in said, said
    for run in verdict.tests:
        assert run.wall_seconds < LIMITS.wall_seconds + 5
        if world.judge.counted:
            assert run.memory_mb <= LIMITS.memory_mb + 1


def test_from_outside_nothing_was_reached(world: World) -> None:
    assert world.heard == []
    assert world.secret.read_text() == f'"{CANARY}"\n'
    time.sleep(2)  # a daemon would write now
    assert not world.target.exists() and [path.name for path in world.secret.parent.iterdir()] == [world.secret.name]
    assert not Path("/usr/x").exists() and not Path("/usr/bin/x").exists()
    assert world.most_processes <= 2 * (LIMITS.processes + 8) + 8


def test_nothing_is_left_and_the_judge_still_judges(world: World) -> None:
    right = Submission("python", "print('right')", (StdioTest("", "right"),), LIMITS)
    assert world.judge.judge([right])[0].reward == 1
    left = {*processes_of(JUDGE_USER)} - {world.values["JUDGE"], world.values["VICTIM"]}
    assert os.getuid() != 0 or left == set(), "processes outlived their runs"


def test_a_daemon_that_holds_the_output_open_delays_nothing(world: World) -> None:
    source = "import os, time\nprint('right', flush=True)\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"
    verdict = world.judge.judge([Submission("python", source, (StdioTest("", "right"),), LIMITS)])[0]
    assert verdict.reward == 1 and verdict.tests[0].wall_seconds < 1.5


def test_runs_see_nothing_of_each_other(world: World) -> None:
    places = ["/tmp/left", "/dev/shm/left", "left", "/work/left"]
    leaves = f"for p in {places}:\n    try: open(p, 'w').write('x')\n    except OSError: pass\nprint('right')"
    looks = f"import os\nprint(*[p for p in {places} if os.path.exists(p)], sorted(os.listdir('.')))"
    submissions = [
        Submission("python", leaves, (StdioTest("", "right"), StdioTest("", "right")), LIMITS),
        Submission("python", looks, (StdioTest("", "[]"),), LIMITS),
    ]
    for submission in submissions:
        verdict = world.judge.judge([submission])[0]
        assert verdict.reward == 1, verdict.tests[-1]


FORGED = [
    "class V(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return V(7)",
    "class V:\n    def __eq__(self, other): return True\n    def __repr__(self): return '9'\ndef f(x): return V()",
    "import os\nfor fd in range(256):\n    try: os.write(fd, b'9\\n')\n    except OSError: pass\nos._exit(0)\ndef f(x): pass",
    "import builtins, json\njson.dumps = lambda *a, **k: '9'\nbuiltins.print = None\ndef f(x): return 7",
    "import atexit, os\natexit.register(lambda: os.write(1, b'9\\n'))\ndef f(x): return 7",
    "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for v in [*frame.f_locals.values()]:\n"
    "            if isinstance(v, dict) and 'expected' in v: return v['expected']\n        frame = frame.f_back\n    return 7",
]


@pytest.mark.parametrize("source", FORGED)
def test_a_call_is_not_forged(world: World, source: str) -> None:
    # the second test's value differs: who writes a constant past the runner has guessed the first one only
    tests = (CallTest("f", (3,), 9), CallTest("f", (4,), 16))
    assert world.judge.judge([Submission("python", source, tests, LIMITS)])[0].reward == 0


def test_assertions_can_be_forged_and_so_the_page_says(world: World) -> None:
    source = (
        "import os, re\ntext = open(__file__).read()\n"
        "os.write(1, re.findall(r\"write\\(1, b'([0-9a-f]+)'\", text)[-1].encode())\nos._exit(0)\n"
    )
    tests = (AssertTest("assert f(2) == 4"),)
    verdict = world.judge.judge([Submission("python", source, tests, LIMITS)])[0]
    assert verdict.reward == 1, "the documentation may promise more now"


LEGAL = {
    "deep recursion in C++": ("cpp", "#include <cstdio>\nint f(int n) { volatile char x[64]; x[0] = n; return n ? f(n - 1) + 1 : "
                              "x[0]; }\nint main() { printf(\"%d\", f(900000)); }", "", "900000"),
    "deep recursion in Python": ("python", "import sys, threading\nsys.setrecursionlimit(200000)\n"
                                 "threading.stack_size(128 << 20)\ndef f(n): return n and f(n - 1) + 1\n"
                                 "t = threading.Thread(target=lambda: print(f(50000)))\nt.start(); t.join()", "", "50000"),
    "unread input": ("python", "print('right')", "x" * (4 << 20), "right"),
    "other bytes": ("python", "import sys; sys.stdout.buffer.write(b'\\xff\\xfe')", "", "\udcff\udcfe"),
    "no final newline": ("python", "import sys; sys.stdout.write(input())", "right", "right\n"),
    "line ends of Windows": ("cpp", "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << \"\\r\\n\"; }",
                             "1\r\n2\r\n", "3\r\n"),
    "threads in C++": ("cpp", "#include <atomic>\n#include <cstdio>\n#include <thread>\n#include <vector>\nint main() { "
                       "std::atomic<int> n{0}; std::vector<std::thread> t; for (int i = 0; i < 8; i++) t.emplace_back([&] { "
                       "n++; }); for (auto& x : t) x.join(); printf(\"%d\", n.load()); }", "", "8"),
    "threads in Python": ("python", "import threading\nd = []\nt = [threading.Thread(target=d.append, args=(1,)) for _ in range(8)]\n"
                          "[x.start() for x in t]; [x.join() for x in t]\nprint(len(d))", "", "8"),
    "nearly all memory": ("cpp", "#include <cstdio>\n#include <vector>\nint main() { std::vector<char> v(120 << 20, 1); "
                          "printf(\"%d\", v[7]); }", "", "1"),
    "scratch files": ("python", "open('/tmp/a' if __import__('os').access('/tmp', 2) else 'a', 'w').write('x'); print('right')",
                      "", "right"),
    "much output": ("python", "print('x ' * 900000)", "", "x " * 900000),
    "a program of its own": ("python", "import subprocess; print(subprocess.run(['/bin/echo', 'right'], capture_output=True, "
                             "text=True).stdout)", "", "right"),
    "everything included": ("cpp", "#include <bits/stdc++.h>\nint main() { std::cout << std::gcd(6, 9); }", "", "3"),
    "the standard library": ("python", "import asyncio, bisect, collections, decimal, fractions, functools, heapq, itertools, json,"
                             " math, random, re, statistics, string, typing\nprint('right')", "", "right"),
    "other alphabets": ("python", "größe = 'ñ'\nprint(größe, '✓')", "", "ñ ✓"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_program_that_looks_odd_passes(world: World, name: str) -> None:
    language, source, given, expected = LEGAL[name]
    submission = Submission(
        "cpp" if language == "cpp" else "python",
        source,
        (StdioTest(given, expected),),
        Limits(time=3, memory_mb=256, processes=24, output_mb=8),
    )
    verdict = world.judge.judge([submission])[0]
    assert verdict.reward == 1, (verdict.reason, verdict.message, [r.stderr for r in verdict.tests])


def test_the_suite_is_large_enough_and_every_weakness_is_of_an_attack() -> None:
    assert len(ATTACKS) >= 60 and len({(a.language, a.name) for a in ATTACKS}) == len(ATTACKS)
    assert {name for _, name in WEAKER} <= {attack.name for attack in ATTACKS}
    assert {name for name, _ in WEAKER} <= {*BACKENDS}
