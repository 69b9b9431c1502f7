"""The Code task with a real sandbox: from a response's text to a reward."""

import json
from pathlib import Path

import pytest

from sdzero.tasks import Code

pytestmark = pytest.mark.sandbox

CPP = (
    "#include <cstdio>\n#include <iostream>\nusing namespace std;\n"
    "int main() { %s long long a, b; cin >> a >> b; cout << a + b; }"
)
FILES = 'freopen("input.txt", "r", stdin); freopen("output.txt", "w", stdout);'
ANY_EVEN = "import sys\nprint(int(int(open(sys.argv[3]).read()) % 2 == 0))"


def fenced(source: str, name: str = "cpp") -> str:
    return f"So this:\n```{name}\n{source}\n```\n"


def test_from_a_response_to_a_reward(tmp_path: Path) -> None:
    tests = [{"input": "1 2\r\n", "output": "3\r\n"}, {"input": "5 7", "output": "12"}]
    rows = [
        {"question": "Add.", "tests": tests, "time_limit": 2.0, "memory_limit": 256.0},
        {"question": "Add in files.", "tests": tests, "input_mode": "file"},
        {"question": "Say any even number.", "tests": [{"input": "", "output": "2"}], "generated_checker": ANY_EVEN},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Code(str(tmp_path / "rows.jsonl"), language="cpp")
    add, files, even = (question for _, question in task._all)
    say = '#include <cstdio>\nint main() { puts("%d"); }'
    responses = [
        (add, fenced(CPP % "")),
        (add, fenced(CPP % "") + fenced(say % 3)),  # the last block counts
        (add, fenced(CPP % "for (;;);")),
        (add, fenced("int main() { nonsense }")),
        (add, "I would add them."),
        (files, fenced(CPP % FILES)),
        (files, fenced(CPP % "")),
        (even, fenced(say % 8, "c++")),
        (even, fenced(say % 7)),
    ]
    verdicts = task.verify_all(responses)
    assert [verdict.reason for verdict in verdicts] == [
        "correct", "wrong", "timeout", "compile_error", "unparseable", "correct", "wrong", "correct", "wrong",
    ]  # fmt: skip
    assert [verdict.reward for verdict in verdicts] == [1, 0, 0, 0, 0, 1, 0, 1, 0]
