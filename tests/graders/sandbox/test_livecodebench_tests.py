from __future__ import annotations

import base64
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdzero.graders.sandbox.livecodebench_tests import read_tests
from sdzero.graders.sandbox.types import CallTest, StdioTest


def rows(*pairs: tuple[str, str], testtype: str = "stdin") -> str:
    return json.dumps([{"input": read, "output": written, "testtype": testtype} for read, written in pairs])


def packed(pickled: bytes) -> str:
    return base64.b64encode(zlib.compress(pickled)).decode()


def private(text: str, protocol: int = 4) -> str:
    """Pack a text like the benchmark's rows."""
    return packed(pickle.dumps(text, protocol))


PUBLIC = rows(("1 2\n", "3\n"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_program_that_reads_and_writes(protocol: int) -> None:
    text = rows(("3 4\n", "7\n"), ("x" * 300_000, "ä"))  # one text beyond what a pickle's frame holds
    tests = read_tests(PUBLIC, private(text, protocol), "{}")
    assert tests == (StdioTest("1 2\n", "3\n"), StdioTest("3 4\n", "7\n"), StdioTest("x" * 300_000, "ä"))


def test_private_tests_in_plain_json() -> None:
    assert read_tests("[]", rows(("5", "6")), '{"func_name": null}') == (StdioTest("5", "6"),)


def test_a_function_is_called_with_one_value_a_line() -> None:
    public = rows(('[1, 2]\n"a\\u2028b"', "true"), testtype="functional")
    hidden = private(rows(("2.5\n{}\n", "[1.0, null]"), ("", "0"), testtype="functional"))
    assert read_tests(public, hidden, '{"func_name": "solve"}') == (
        CallTest("solve", ([1, 2], "a\u2028b"), True),
        CallTest("solve", (2.5, {}), [1.0, None]),
        CallTest("solve", (), 0),
    )


@pytest.mark.parametrize(
    ("public", "hidden", "metadata", "said"),
    [
        ("[", "[]", "{}", "public_test_cases: Expecting value"),
        ("{}", "[]", "{}", "public_test_cases: expected a list of tests, got a dict"),
        ('[{"input": "1"}]', "[]", "{}", "public_test_cases: expected tests with the strings"),
        ('[{"input": 1, "output": "1"}]', "[]", "{}", "public_test_cases: expected tests with the strings"),
        ("[1]", "[]", "{}", "public_test_cases: expected tests with the strings"),
        ("[]", "[]", "{}", "are empty"),
        (PUBLIC, "[]", "", "metadata: Expecting value"),
        (PUBLIC, "[]", '{"func_name": "f"}', "test 1: Extra data"),
        (PUBLIC, "[" * 100_000, "{}", "private_test_cases: nested too deeply"),
        (PUBLIC, "", "{}", "private_test_cases: the compressed data is truncated"),
        (PUBLIC, "***", "{}", "private_test_cases: .*base64"),
        (PUBLIC, "ä", "{}", "private_test_cases: .*ASCII"),
        (PUBLIC, base64.b64encode(b"no zlib").decode(), "{}", "private_test_cases: Error -3"),
        (PUBLIC, private("[]")[:-8], "{}", "private_test_cases: the compressed data is truncated"),
        (PUBLIC, packed(pickle.dumps("[]")[:-1]), "{}", "private_test_cases: pickle exhausted before seeing STOP"),
        (PUBLIC, packed(b""), "{}", "private_test_cases: pickle exhausted before seeing STOP"),
        (PUBLIC, packed(b"."), "{}", "private_test_cases: the pickle holds no string"),
        (PUBLIC, private("no json"), "{}", "private_test_cases: Expecting value"),
    ],
)
def test_columns_that_cannot_be_read(public: str, hidden: str, metadata: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_tests(public, hidden, metadata)


# --- hostile columns ------------------------------------------------------------------------------


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [Command(), [Command()], b"[]", ["[]"], ("[]", "[]"), os.system, 5, bytearray(b"[]")])
def test_a_pickle_of_anything_else_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, value: Any, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="private_test_cases: the pickle must hold one string and nothing else"):
        read_tests(PUBLIC, packed(pickle.dumps(value, protocol)), "{}")
    assert not (tmp_path / "it_ran").exists()


def test_a_bomb_does_not_expand() -> None:
    """No more than the limit of 256 MiB of zeros is ever in memory."""
    bomb = base64.b64encode(zlib.compress(bytes(256 * 2**20), 1)).decode()
    code = "import sys\nfrom sdzero.graders.sandbox.livecodebench_tests import read_tests\n"
    code += "read_tests('[]', sys.stdin.read(), '{}', 2**20)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=bomb,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (192 * 2**20, 192 * 2**20)),
    )
    assert done.stderr.splitlines()[-1] == ("ValueError: private_test_cases: more than 1048576 bytes when decompressed")


def test_the_limit_is_the_last_size_that_is_read() -> None:
    hidden, size = private(PUBLIC), len(pickle.dumps(PUBLIC, 4))
    assert read_tests("[]", hidden, "{}", size) == (StdioTest("1 2\n", "3\n"),)
    with pytest.raises(ValueError, match=f"more than {size - 1} bytes"):
        read_tests("[]", hidden, "{}", size - 1)


TEXT = pickle.dumps("[]", 2)[2:-1]
BOMBS = {
    "an integer of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "a long of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a long of many bytes": b"\x8b" + struct.pack("<i", 1_000_000) + b"\xff" * 1_000_000 + b".",
    "a memo of 4 billion places": TEXT + b"r" + struct.pack("<I", 2**32 - 1) + b"0" + TEXT + b".",
    "a byte array of a terabyte": b"\x96" + struct.pack("<Q", 2**40) + b".",
    "bytes of a terabyte": b"\x8e" + struct.pack("<Q", 2**40) + b".",
    "a text of a terabyte": b"\x8d" + struct.pack("<Q", 2**40) + b".",
    "a frame of a terabyte": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b".",
    "a million lists in lists": b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "tuples that double": b")" + b"2\x86" * 1_000_000 + b".",
    "a persistent id": b"Pid\n.",
    "an extension": b"\x82\x01.",
    "a global": b"cos\nsystem\n(S'true'\ntR.",
    "nested marks": b"(" * 1_000_000 + b".",
    "texts without end": TEXT * 100_000 + b".",
    "an unknown opcode": b"\xff.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_would_fill_memory_or_time(name: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match="private_test_cases: "):
        read_tests(PUBLIC, packed(BOMBS[name]), "{}")
    assert time.process_time() - begin < 2


@given(
    st.binary(max_size=40)
    | st.lists(st.sampled_from([TEXT, b"\x80\x04", b".", b"V[]\n", b"q\x01", b"(", b"l", b"S'a'\n", b"\x95"])).map(
        b"".join
    )
)
def test_any_pickle_is_a_text_or_an_error(pickled: bytes) -> None:
    try:
        tests = read_tests(PUBLIC, packed(pickled), "{}")
    except ValueError as error:
        assert str(error).startswith("private_test_cases: ")
    else:
        assert tests == (StdioTest("1 2\n", "3\n"),)
