"""The sandbox server is started once, shared and restarted, and its failures are never rewards."""

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdzero.graders.errors import GraderError, NoSandboxError
from sdzero.graders.sandbox import client as sandbox_client
from sdzero.graders.sandbox.client import SandboxClient
from sdzero.graders.sandbox.server import HEARTBEAT_SECONDS
from sdzero.graders.sandbox.types import AssertTest, CallTest, Checker, Limits, StdioTest, Submission
from support.sandboxes import command_line, server_pid

pytestmark = pytest.mark.sandbox

ADD = "a, b = map(int, input().split())\nprint(a + b)\n"
CPP = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }\n"
TESTS = (StdioTest("1 2", "3"), StdioTest("5 6", "11"))


def slow_echo(text: str) -> Submission:
    return Submission("python", f"import time; time.sleep(0.2); print('{text}')", (StdioTest("", text),))


@pytest.fixture(scope="module")
def client() -> Iterator[SandboxClient]:
    with SandboxClient(num_workers=2) as client:
        yield client


@pytest.fixture
def breakable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake bwrap that fails once for each line of the returned file."""
    real, failures = shutil.which("bwrap"), tmp_path / "failures"
    failures.touch()
    failures.chmod(0o666)
    tmp_path.chmod(0o777)
    fake = tmp_path / "bin/bwrap"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\nif [ -s {failures} ]; then sed -i 1d {failures}; echo broken >&2; exit 1; fi\nexec {real} "$@"\n'
    )
    fake.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    return failures


# --- verdicts -------------------------------------------------------------------------------------


def test_the_verdict_of_each_test_up_to_the_first_failed_one(client: SandboxClient) -> None:
    right, wrong = client.grade(
        [Submission("cpp", CPP, TESTS), Submission("python", ADD, (TESTS[0], StdioTest("2 2", "5"), TESTS[1]))]
    )
    assert (right.reward, right.reason, len(right.tests)) == (1, "correct", 2)
    assert right.tests[0].stdout == "3" and right.tests[0].cpu_seconds > 0 and right.tests[0].memory_mb > 0
    assert (wrong.reward, wrong.reason, [test.reason for test in wrong.tests]) == (0, "wrong", ["correct", "wrong"])


@pytest.mark.parametrize(
    ("language", "source", "reason"),
    [
        ("cpp", "int main() { return x; }", "compile_error"),
        ("python", "def f(:", "compile_error"),
        ("python", "1/0", "runtime_error"),
        ("cpp", "int main() { volatile int* p = 0; *p = 1; }", "runtime_error"),
        ("python", "while True: pass", "timeout"),
        ("python", "import time; time.sleep(60)", "timeout"),
        ("python", "x = [bytearray(1 << 24) for _ in range(99)]; print(3)", "memory"),
        ("cpp", "#include <vector>\nint main() { std::vector<char> x(900 << 20, 1); return x[7] - 1; }", "memory"),
        ("python", "while True: print('x' * 1000)", "output_limit"),
        (
            "cpp",
            '#include <cstdio>\nint main() { FILE* f = fopen("x", "w"); for (;;) fputs("0123456789", f); }',
            "output_limit",
        ),
    ],
)
def test_why_a_program_fails(client: SandboxClient, language, source: str, reason: str) -> None:
    seconds = (1, 2) if reason == "timeout" else (20, 60)  # on a busy machine the other ends take their time
    limits = Limits(time=seconds[0], memory_mb=256, output_mb=1, wall=seconds[1])
    assert client.grade([Submission(language, source, TESTS[:1], limits)])[0].reason == reason


def test_a_program_that_reads_and_writes_files(client: SandboxClient) -> None:
    source = (
        'a, b = map(int, open("input.txt").read().split())\nopen("output.txt", "w").write(str(a + b))\nprint("noise")'
    )
    silent = "print(3)"
    files = ("input.txt", "output.txt")
    verdicts = client.grade([Submission("python", text, TESTS[:1], files=files) for text in (source, silent)])
    assert [verdict.reason for verdict in verdicts] == ["correct", "wrong"]


def test_a_checker_decides_where_there_is_one(client: SandboxClient) -> None:
    # any even number from twice the input to the correct one; argv: input, correct, output
    read = "import sys\ngiven, most, output = (int(open(path).read()) for path in sys.argv[1:])\n"
    checker = Checker("python", f"{read}print(int(output % 2 == 0 and 2 * given <= output <= most))")
    outputs = {"4": "correct", "3": "wrong", "'four'": "wrong", "0": "wrong", "10": "wrong", "8": "correct"}
    tests = (StdioTest("1", "8"),)
    verdicts = client.grade([Submission("python", f"print({text})", tests, checker=checker) for text in outputs])
    assert [verdict.reason for verdict in verdicts] == [*outputs.values()]


def test_a_checker_may_give_a_score(client: SandboxClient) -> None:
    checker = Checker("python", "import sys\nprint(open(sys.argv[3]).read())")
    scores = {"1": 1, "100": 1, "0": 0, "50": 0, "0.5": 0}
    tests = (StdioTest("", "2"),)
    verdicts = client.grade([Submission("python", f"print({score})", tests, checker=checker) for score in scores])
    assert [verdict.reward for verdict in verdicts] == [*scores.values()]


@pytest.mark.parametrize("source", ["print('perhaps')", "import sys; sys.exit(0)"])
def test_a_checker_without_a_score_is_an_error(client: SandboxClient, source: str) -> None:
    submission = Submission("python", "print(1)", (StdioTest("", "1"),), checker=Checker("python", source))
    with pytest.raises(GraderError, match="checker printed"):
        client.grade([submission])
    assert client.grade([Submission("python", ADD, TESTS)])[0].reward == 1


def test_a_call_is_compared_outside(client: SandboxClient) -> None:
    source = "class Solution:\n    def double(self, x):\n        print('noise')\n        return [2 * x]\n"
    tests = (CallTest("double", (4,), [8]), CallTest("double", ("ab",), ["abab"]))
    stranger = "class Any(list):\n    def __eq__(self, other): return True\ndef double(x): return Any()\n"
    verdicts = client.grade([Submission("python", text, tests) for text in (source, stranger)])
    assert [verdict.reason for verdict in verdicts] == ["correct", "wrong"]


def test_assertions_must_be_reached(client: SandboxClient) -> None:
    tests = (AssertTest("assert double(4) == 8"),)
    programs = ["def double(x): return 2 * x", "def double(x): return x", "import sys; sys.exit(0)"]
    verdicts = client.grade([Submission("python", text, tests) for text in programs])
    assert [verdict.reason for verdict in verdicts] == ["correct", "runtime_error", "wrong"]


def test_invalid_utf8_goes_in_and_out(client: SandboxClient) -> None:
    text = b"\xff\xfe x".decode(errors="surrogateescape")
    source = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    verdict = client.grade([Submission("python", source, (StdioTest(text, text),))])[0]
    assert verdict.reward == 1


@pytest.mark.parametrize(
    ("submission", "message"),
    [
        (Submission("python", ADD, ()), "needs tests of one kind"),
        (Submission("python", ADD, (*TESTS, AssertTest(""))), "needs tests of one kind"),
        (Submission("cpp", CPP, (CallTest("f", (), 1),)), "CallTest is for python only"),
    ],
)
def test_submissions_that_cannot_be_graded_are_refused_before_anything_runs(
    client: SandboxClient, submission: Submission, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        client.grade([submission])


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_within_a_batch_is_restarted_for_the_rest(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(sandbox_client, "SILENCE_SECONDS", 2 * HEARTBEAT_SECONDS)
    with SandboxClient(num_workers=2) as client:
        hit: list[int] = []

        def interrupt(done: int) -> None:
            if done == 2 and not hit:
                hit.append(server_pid(client))
                os.kill(hit[0], number)

        verdicts = client.grade([slow_echo(str(n)) for n in range(6)], interrupt)
        assert [(v.reason, v.tests[0].stdout) for v in verdicts] == [("correct", f"{n}\n") for n in range(6)]
        assert server_pid(client) != hit[0] and not Path(f"/proc/{hit[0]}").exists()
        assert "restarting it" in caplog.text


def cgroup_folders() -> set[Path]:
    return {*Path("/sys/fs/cgroup").rglob("sdzero-sandbox-*")}


def test_a_server_that_always_dies_is_an_error() -> None:
    before = cgroup_folders()
    with SandboxClient(num_workers=2) as client:
        with pytest.raises(GraderError, match="died 3 times"):
            client.grade(
                [slow_echo(str(number)) for number in range(8)],
                lambda done: os.kill(server_pid(client), signal.SIGKILL),
            )
        assert client.grade([slow_echo("again")])[0].reward == 1
        folder = client._connection.folder
    named = [path.name for path in Path("/proc").glob("[0-9]*") if os.fsencode(folder) in command_line(path.name)]
    assert not named, "sandboxes outlived the killed servers"
    assert not cgroup_folders() - before, "cgroups outlived the killed servers"


def test_a_long_run_is_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_client, "SILENCE_SECONDS", 2 * HEARTBEAT_SECONDS)
    with SandboxClient(num_workers=1) as client:
        slow = Submission("python", "import time; time.sleep(3); print(1)", (StdioTest("", "1"),))
        pid = server_pid(client)
        assert client.grade([slow])[0].reward == 1 and server_pid(client) == pid


def test_a_failing_sandbox_is_retried_and_then_an_error(breakable: Path) -> None:
    with SandboxClient("bubblewrap", num_workers=1) as client:
        breakable.write_text("1\n2\n")
        assert client.grade([Submission("python", ADD, TESTS)])[0].reward == 1
        assert not breakable.read_text()
        breakable.write_text("1\n" * 99)
        with pytest.raises(GraderError, match="3 tries failed; the last: bubblewrap: broken"):
            client.grade([Submission("python", ADD, TESTS)])


def test_no_sandbox_no_run(breakable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breakable.write_text("1\n" * 99)
    (tmp_path / "bin/nsjail").symlink_to("/bin/false")
    (tmp_path / "sandlock.py").write_text("def landlock_abi_version(): return -1\ndef min_landlock_abi(): return 6\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(NoSandboxError) as refused:
        SandboxClient()
    broken = "bubblewrap: it does not run: bubblewrap: broken"
    assert all(part in str(refused.value) for part in (broken, "nsjail: it does not run", "kernel has -1", "unsafe"))


def test_unsafe_only_by_name_and_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with SandboxClient("unsafe") as client:
        assert client.grade([Submission("cpp", CPP, TESTS)])[0].backend == "unsafe"
    assert [r.levelno for r in caplog.records if "WITHOUT a sandbox" in r.message] == [logging.WARNING]


def test_it_gets_nothing_of_the_environment(client: SandboxClient) -> None:
    names = Path(f"/proc/{server_pid(client)}/environ").read_bytes()
    assert {part.split(b"=")[0] for part in names.split(b"\0") if part} <= {b"PATH", b"PYTHONPATH", b"LC_CTYPE"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can drop its rights")
def test_it_drops_from_root(client: SandboxClient) -> None:
    status = Path(f"/proc/{server_pid(client)}/status").read_text()
    rows = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert len({*rows["Uid"].split()}) == 1 and rows["Uid"].split()[0] != "0" and not rows["Groups"].strip()
    assert int(rows["CapEff"], 16) == int(rows["CapPrm"], 16) == 0


def test_processes_of_one_job_share_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"test-{os.getpid()}")
    script = (
        "from sdzero.graders.sandbox.client import SandboxClient\n"
        "with SandboxClient() as client: print(client._connection.process is None, client.backend)"
    )
    with SandboxClient() as client:
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert other.stdout.split() == ["True", client.backend]
        assert client.grade([Submission("python", ADD, TESTS)])[0].reward == 1


def test_it_ends_with_the_trainer(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom sdzero.graders.sandbox.client import SandboxClient\nclient = SandboxClient()\n"
        "print(client._connection.process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    deadline = time.monotonic() + 20
    while command_line(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
