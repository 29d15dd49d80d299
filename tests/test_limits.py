"""No test depends on how fast the machine is: limits of time are ENDS_S (limits.py), and no assertion reads a clock.

The rows of sources without a test of their name are in test_mirrors.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
EXEMPT = {"limits.py", "ranks.py", "test_limits.py", "test_house.py"}
"""The first two are what waits for the others; the last two hold such texts or are about other things."""
WAITS = {"wait", "join", "communicate", "run_page"}
CLOCKS = {"time.monotonic", "time.time", "time.perf_counter"}
NAPS = {
    "launcher/test_hang_runs.py": "a second Ctrl-C counts as one of its own half a second after the first",
    "launcher/test_local_runs.py": "a second Ctrl-C counts as one of its own half a second after the first",
    "checkpoint/test_files.py": "a writer that takes its time is waited for",
}
"""Why a test sleeps: each needs that at least so much time passes, and none that no more does."""
SHORTEST_NAP_S, SHORTEST_HANG_S = 0.1, 600


def mistakes(tree: ast.AST) -> Iterator[str]:
    """What in a test file makes its outcome depend on the speed of the machine."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            for word in node.keywords:
                if word.arg in ("timeout", "timeout_s") and _is_number(word.value):
                    yield f"line {node.lineno}: {word.arg}={ast.unparse(word.value)}; expected limits.ENDS_S"
            if name.rpartition(".")[2] in WAITS and node.args and _is_number(node.args[0]):
                yield f"line {node.lineno}: {name} with a limit of its own; expected limits.ENDS_S"
            if name == "pytest.mark.timeout":
                yield f"line {node.lineno}: a limit of its own for a test; the one of pyproject.toml is for all"
            if name == "time.sleep" and _is_number(node.args[0]) and SHORTEST_NAP_S < ast.literal_eval(node.args[0]) < SHORTEST_HANG_S:
                yield f"line {node.lineno}: sleeps; expected limits.wait_until, or a reason in {Path(__file__).name}"
        if isinstance(node, ast.Compare) and CLOCKS & {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}:
            yield f"line {node.lineno}: a clock is compared; expected an event that is awaited, or a clock that is given"


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def test_no_test_has_a_limit_of_its_own() -> None:
    limits = {}
    for path in sorted(TESTS.rglob("*.py")):
        name = str(path.relative_to(TESTS))
        if name not in EXEMPT:
            limits[name] = [text for text in mistakes(ast.parse(path.read_text())) if not ("sleeps" in text and name in NAPS)]
    assert {name: texts for name, texts in limits.items() if texts} == {}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("subprocess.run(command, timeout=60)", "timeout=60"),
        ("thread.join(10)", "thread.join"),
        ("assert time.monotonic() - began < 2", "a clock is compared"),
        ("pytestmark = pytest.mark.timeout(600)", "a limit of its own for a test"),
        ("time.sleep(0.5)", "sleeps"),
    ],
)
def test_a_limit_is_found(code: str, words: str) -> None:
    (mistake,) = mistakes(ast.parse(code))
    assert words in mistake


def test_what_may_be() -> None:
    code = "process.wait(ENDS_S); time.sleep(0.02); time.sleep(600); event.wait(); run(timeout=ENDS_S); ', '.join(words)"
    assert list(mistakes(ast.parse(code))) == []
