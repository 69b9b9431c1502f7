"""Hostile programs, as data. They print HARM when they succeed; the test also checks from outside.

The test fills in @NAMES@: SECRET a file, TARGET a file that must not be created, PORT and UDP of its listeners, ABSTRACT
its unix socket, VICTIM a process of the server's user, SERVER and TEST processes, SOCKET the server's, VENV the trainer's.
"""

from dataclasses import dataclass

from sdzero.graders.sandbox.types import Language
from sdzero.types import Reason

FAILED: tuple[Reason, ...] = ("wrong", "runtime_error")
STOPPED: tuple[Reason, ...] = ("timeout", "memory", "runtime_error", "wrong")
COMPILING: tuple[Reason, ...] = ("compile_error",)


@dataclass(frozen=True)
class Attack:
    """Hostile program: `reasons` are the acceptable verdicts, `files` runs it in file mode."""

    name: str
    source: str
    reasons: tuple[Reason, ...] = FAILED
    language: Language = "python"
    files: bool = False


PRELUDE = """
import ctypes, mmap, os, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(act, *args):
    try:
        print("HARM", act(*args), flush=True)
    except (Exception, SystemExit) as error:
        print("held", type(error).__name__, flush=True)
def call(number, *args):
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), "denied")
def read(path):
    return open(path, "rb").read(200)
def fill(path, most_mb):
    total = 0
    try:
        for number in range(100):
            with open(f"{path}/{number}", "wb", buffering=0) as file:
                for _ in range(8):
                    total += file.write(bytes(1 << 20))
    except OSError as error:
        print("held", error, flush=True)
    if total > most_mb << 20:
        print("HARM", total >> 20, flush=True)
"""


def python(name: str, body: str, reasons: tuple[Reason, ...] = FAILED, files: bool = False) -> Attack:
    return Attack(name, PRELUDE + body, reasons, "python", files)


def cpp(name: str, source: str, reasons: tuple[Reason, ...] = FAILED) -> Attack:
    return Attack(name, source, reasons, "cpp")


ATTACKS = [
    # --- processes
    python("fork bomb", "while True:\n    try: os.fork()\n    except OSError: pass", STOPPED),
    cpp("fork bomb", "#include <unistd.h>\nint main() { for (;;) fork(); }", STOPPED),
    python("shell fork bomb", "subprocess.run(['/bin/sh', '-c', 'f() { f | f & }; f; sleep 9'])", STOPPED),
    cpp(
        "thread bomb",
        "#include <cstdio>\n#include <thread>\n#include <vector>\n#include <unistd.h>\nint main() { int n = 0; "
        'try { for (;; n++) new std::thread([] { sleep(9); }); } catch (...) {} if (n > 99) puts("HARM"); _exit(1); }',
        STOPPED,
    ),
    python("busy in many processes", "for _ in range(12): os.fork()\nwhile True: pass", STOPPED),
    python("sleeps for ever", "while True: time.sleep(99)", ("timeout",)),
    python("stops itself", "os.kill(os.getpid(), signal.SIGSTOP)", ("timeout", "wrong")),
    python(
        "ignores signals",
        "for s in (signal.SIGTERM, signal.SIGXCPU, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        ("timeout",),
    ),
    python(
        "daemons that write later",
        """
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(0.5)
            open("@TARGET@", "w").write("late")
        os._exit(0)
""",
    ),
    # --- other processes
    python("kills all", "os.kill(-1, signal.SIGKILL)"),
    python("kills by number", "for pid in (@VICTIM@, @SERVER@, @TEST@): attempt(os.kill, pid, signal.SIGKILL)"),
    python("kills its parents", "attempt_ = [os.kill(pid, signal.SIGKILL) for pid in (os.getppid(),) if pid > 1]"),
    python("stops its parents", "os.kill(os.getppid(), signal.SIGSTOP)", ("timeout", *FAILED)),
    python("ptraces", "for pid in (@VICTIM@, @SERVER@, os.getppid()): attempt(call, 101, 16, pid, 0, 0)"),
    python("reads memory", "for pid in (@VICTIM@, @SERVER@): attempt(read, f'/proc/{pid}/mem')"),
    python(
        "signals through a descriptor",
        "for pid in (@VICTIM@, @SERVER@): attempt(call, 424, libc.syscall(434, pid, 0), signal.SIGKILL, 0, 0)",
    ),
    # --- memory
    python("memory", "held = []\nwhile True: held.append(bytearray(b'x') * (8 << 20))", ("memory",)),
    python(
        "memory in many processes",
        "for _ in range(4): os.fork()\nheld = bytearray(b'x') * (24 << 20)\ntime.sleep(9)",
        ("memory", "timeout"),
    ),
    cpp(
        "memory in C++",
        "#include <cstdlib>\n#include <cstring>\nint main() { for (;;) { void* p = malloc(1 << 23); if (!p) abort(); "
        "memset(p, 1, 1 << 23); } }",
        ("memory", "runtime_error"),
    ),
    python(
        "shared mappings",
        "held = []\nfor _ in range(64):\n    m = mmap.mmap(-1, 8 << 20); m.write(b'x' * (8 << 20)); held.append(m)\n"
        "print('HARM')",
        ("memory", "runtime_error"),
    ),
    python(
        "memfd",
        """
total = 0
for _ in range(40):
    fd = os.memfd_create("x")
    total += os.write(fd, bytes(8 << 20))
print("HARM" if total > 200 << 20 else "held")
""",
        ("memory", *FAILED),
    ),
    python(
        "System V segments",
        """
libc.shmat.restype = ctypes.c_void_p
for number in range(40):
    segment = libc.shmget(number + 77, 8 << 20, 0o1666)
    address = libc.shmat(segment, None, 0)
    ctypes.memset(address, 1, 8 << 20) if segment >= 0 else sys.exit(3)
    libc.shmdt(ctypes.c_void_p(address))
print("HARM")
""",
        ("memory", *FAILED),
    ),
    python("fills /dev/shm", "fill('/dev/shm', 40)", ("memory", "timeout", *FAILED)),
    python("fills /tmp", "fill('/tmp', 40)", ("memory", "timeout", *FAILED)),
    python("fills /usr/local", "fill('/usr/local', 1)"),
    python("fills its folder", "fill('.', 40)", ("memory", "timeout", *FAILED)),
    python("a huge hole", "open('x', 'w').truncate(1 << 40)\nprint('HARM')", ("output_limit", *FAILED)),
    python("many files", "n = 0\nwhile True: open(f'f{n}', 'w'); n += 1", STOPPED),
    python(
        "many descriptors",
        """
held = []
try:
    while len(held) < 5000: held.append(os.open("/dev/null", os.O_RDONLY))
    print("HARM")
except OSError:
    print("held")
""",
    ),
    # --- output
    python("floods stdout", "while True: os.write(1, b'x' * 65536)", ("output_limit",)),
    python("floods stderr", "while True: os.write(2, b'x' * 65536)", ("output_limit",)),
    python("closes everything", "os.closerange(0, 256)\ntime.sleep(0.2)\nos._exit(0)"),
    # --- network
    python("TCP", "attempt(socket.create_connection, ('127.0.0.1', @PORT@), 1)"),
    python("UDP", "s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', @UDP@))"),
    python("an abstract socket", "s = socket.socket(socket.AF_UNIX); attempt(s.connect, '\\0@ABSTRACT@')"),
    python("a socket to the virtual machine's host", "attempt(socket.socket, 40, socket.SOCK_STREAM)"),
    python("the server's socket", "s = socket.socket(socket.AF_UNIX); attempt(s.connect, '@SOCKET@')"),
    # --- files
    python("reads a file", "attempt(read, '@SECRET@')"),
    python(
        "reads the machine's", "for p in ('/etc/shadow', '/etc/passwd', '/root/.bashrc', '/dev/mem'): attempt(read, p)"
    ),
    python(
        "reads environments",
        """
print(os.environ)
for pid in (1, os.getppid(), os.getpid(), @SERVER@, @TEST@):
    try: print(read(f"/proc/{pid}/environ"))
    except OSError: pass
""",
    ),
    python("looks for the trainer", "attempt(os.listdir, '@VENV@')"),
    python(
        "looks everywhere",
        """
for folder, _, names in os.walk("/"):
    if folder.startswith(("/proc", "/usr")): continue
    for name in names:
        if "canary" in name: print("HARM", folder, name)
""",
        ("timeout", *FAILED),
    ),
    python("writes a file", "attempt(lambda: open('@TARGET@', 'w').write('x'))"),
    python(
        "writes the system",
        "for p in ('/usr/x', '/usr/bin/x', '/etc/x', '/proc/sys/kernel/core_pattern'): "
        "attempt(lambda: open(p, 'w').write('x'))",
    ),
    python("the magic key", "attempt(lambda: open('/proc/sysrq-trigger', 'w').write('h'))"),
    python("dumps core", "held = bytearray(32 << 20)\nos.abort()", ("runtime_error",)),
    python("links its output", "os.symlink('@SECRET@', 'output.txt')", FAILED, files=True),
    python("a pipe as its output", "os.mkfifo('output.txt')", FAILED, files=True),
    python(
        "a huge output file",
        "fill_ = [open('output.txt', 'ab').write(bytes(1 << 20)) for _ in range(64)]",
        ("output_limit", *FAILED),
        files=True,
    ),
    # --- rights
    python(
        "setuid programs",
        """
for argv in (["/usr/bin/su", "-c", "id"], ["/usr/bin/mount", "-t", "tmpfs", "x", "/tmp"], ["/usr/bin/unshare", "-Ur", "id"]):
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    print("HARM" if done.returncode == 0 or "uid=0(" in done.stdout else "held")
""",
    ),
    python("becomes root", "attempt(os.setuid, 0); attempt(os.setgroups, [0])"),
    python("new namespaces", "for flag in (0x10000000, 0x10020000, 0x40000000): attempt(call, 272, flag)"),
    python("mounts", "attempt(call, 165, b'x', b'/tmp', b'tmpfs', 0, 0); attempt(os.chroot, '/tmp')"),
    python("odd system calls", "for n in (321, 298, 425, 323, 248, 250, 246, 304): attempt(call, n, 0, 0, 0, 0, 0)"),
    python("types for others", "import fcntl\nfor fd in range(3): attempt(fcntl.ioctl, fd, 0x5412, b'x')"),
    # --- forged verdicts
    python(
        "claims an exit code",
        """
for fd in range(3, 256):
    try: os.write(fd, b'{"exit-code": 0}\\n0\\nexited with status: 0\\n')
    except OSError: pass
print("right", flush=True)
os._exit(3)
""",
        ("runtime_error",),
    ),
    python("right and then an error", "print('right', flush=True)\nsys.exit(1)", ("runtime_error",)),
    python("right and then a crash", "print('right', flush=True)\nctypes.string_at(0)", ("runtime_error",)),
    python("right, too much", "print('right'); print('right')"),
    # --- while it compiles
    cpp("includes a secret", '#include "@SECRET@"\nint main() {}', COMPILING),
    cpp("embeds a secret", 'asm(".incbin \\"@SECRET@\\"");\nint main() {}', COMPILING),
    cpp("includes the environment", '#include "/proc/self/environ"\nint main() {}', ("compile_error", "wrong")),
    cpp("includes without end", '#include "/dev/zero"\nint main() {}', COMPILING),
    cpp("includes itself", "#include __FILE__\nint main() {}", COMPILING),
    cpp("includes its input", '#include "/dev/stdin"\nint main() {}', ("compile_error", "wrong")),
    cpp("a huge array", "int a[1 << 29] = {1};\nint main() { return a[0] - 1; }", ("compile_error", "memory", *FAILED)),
    cpp(
        "endless templates",
        "template <int N> struct A { typedef typename A<N + 1>::T T; };\nA<0>::T x;\nint main() {}",
        COMPILING,
    ),
    cpp(
        "endless constants",
        "constexpr int f() { for (;;) {} return 1; }\nconstexpr int x = f();\nint main() {}",
        COMPILING,
    ),
    cpp(
        "doubling macros",
        "\n".join([f'#define A0 "{"x" * 4000}"'] + [f"#define A{n} A{n - 1} A{n - 1}" for n in range(1, 21)])
        + "\nconst char* x = A20;\nint main() {}",
        COMPILING,
    ),
]


# --- programs that look odd, and must pass: name -> (language, source, input, output)
LEGAL: dict[str, tuple[Language, str, str, str]] = {
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
    "scratch files": ("python", "import tempfile\nwith tempfile.TemporaryFile() as file: file.write(b'x')\nprint('right')",
                      "", "right"),
    "much output": ("python", "print('x ' * 900000)", "", "x " * 900000),
    "a program of its own": ("python", "import subprocess; print(subprocess.run(['/bin/echo', 'right'], capture_output=True, "
                             "text=True).stdout)", "", "right"),
    "everything included": ("cpp", "#include <bits/stdc++.h>\nint main() { std::cout << std::gcd(6, 9); }", "", "3"),
    "the standard library": ("python", "import asyncio, bisect, collections, decimal, fractions, functools, heapq, itertools, json,"
                             " math, random, re, statistics, string, typing\nprint('right')", "", "right"),
    "other alphabets": ("python", "größe = 'ñ'\nprint(größe, '✓')", "", "ñ ✓"),
}  # fmt: skip
