"""Every test can fail: it asserts something, expects an error, or calls a helper that does, named check_, expect_ or assert_."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
_HELPER = re.compile(r"_?(check|expect|assert)(_|$)")


def functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def asserts(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function's own text can fail: `pool.run(check_sums, ...)` names a helper as well as a call of it does.

    A helper may raise its error itself; in a test, what is raised is most often what a fake does.
    """
    fails = ast.Assert if function.name.startswith("test_") else (ast.Assert, ast.Raise)
    for node in ast.walk(function):
        if isinstance(node, fails):
            return True
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in ("raises", "fail") or _HELPER.match(name):
            return True
    return False


def idle(text: str) -> list[str]:
    """Names of tests, and of helpers that say they check, which assert nothing."""
    claims = (function for function in functions(text) if function.name.startswith("test_") or _HELPER.match(function.name))
    return [function.name for function in claims if not asserts(function)]


def test_every_test_and_every_check_asserts_something() -> None:
    files = sorted(TESTS.rglob("*.py"))
    named = [f"{path.relative_to(TESTS)}: {name}" for path in files for name in idle(path.read_text(encoding="utf-8"))]
    assert len(files) > 200 and not named, f"compare a value: {named}"


def test_what_counts_as_an_assertion() -> None:
    assert idle("def test_a():\n    run()\n") == ["test_a"]
    assert idle("def check_b():\n    run()\n\ndef helper():\n    run()\n") == ["check_b"]
    assert idle("def test_c():\n    checkpoint(1)\n") == ["test_c"], "the name of another thing"
    assert idle("def test_e():\n    def fake():\n        raise OSError\n    run(fake)\n") == ["test_e"]
    for body in (
        "assert run()",
        "with pytest.raises(ValueError):\n        run()",
        "check_sums(run())",
        "pool.run(check_sums)",
        "np.assert_equal(1, 1)",
    ):
        assert idle(f"def test_d():\n    {body}\n") == [], body
