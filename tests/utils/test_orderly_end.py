"""What a block used is closed where it ends well, and left alone where an error leaves it; no source shuts a group down in a `finally`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import efflaunch
from efflaunch.utils.orderly_end import closed_in_order

ROOT = Path(efflaunch.__file__).resolve().parent
RANKS_RUN = ("training", "memory", "parallel", "model", "checkpoint/engine.py", "checkpoint/rank_coordination.py", "checkpoint/restore.py")
"""What runs in ranks between the start of their process group and its end."""
MEETS_OTHERS = {"destroy_process_group", "barrier", "all_reduce", "all_gather_object", "synchronize", "wait", "join", "closing"}
LOCAL = {
    "parallel/sequence/service.py": "its own child, killed in a moment",
}


def test_closed_after_a_block_that_ends_well() -> None:
    done: list[str] = []
    with closed_in_order(lambda: done.append("closed")):
        done.append("worked")
    assert done == ["worked", "closed"]


def test_closed_where_the_block_returns() -> None:
    done: list[str] = []

    def stopped() -> int:
        with closed_in_order(lambda: done.append("closed")):
            return 75

    assert (stopped(), done) == (75, ["closed"])


def test_left_alone_after_an_error() -> None:
    done: list[str] = []
    with pytest.raises(ZeroDivisionError), closed_in_order(lambda: done.append("closed")):
        _ = 1 // len(done)
    assert done == []


def test_no_error_waits_for_other_ranks() -> None:
    found = []
    for source in sorted(path for root in RANKS_RUN for path in ([ROOT / root] if root.endswith(".py") else (ROOT / root).rglob("*.py"))):
        name = source.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Try) and name not in LOCAL:
                called = {call for statement in node.finalbody for call in calls_in(statement)}
                found += [f"{name}:{node.lineno} {call}" for call in sorted(called & MEETS_OTHERS)]
    assert found == []


def calls_in(statement: ast.stmt) -> set[str]:
    """The last names of what it calls."""
    functions = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return {ast.unparse(function).rpartition(".")[2] for function in functions}
