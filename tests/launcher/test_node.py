"""What the agent of one node among several shares with the others, without their store."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.nodes.node import NodePeers


class Ends:
    """Counters that several agents share, as the store has them."""

    def __init__(self) -> None:
        self.told, self.elsewhere = 0, False

    def report_failed(self) -> None:
        self.told += 1

    def failed_elsewhere(self) -> bool:
        return self.elsewhere


class Ranks:
    """Ranks by number, with the exit codes of those that ended."""

    def __init__(self, codes: dict[int, int | None]) -> None:
        self.processes = {rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}
        self.ended = 0

    def end_the_rest(self) -> None:
        self.ended += 1


def never() -> None:
    raise AssertionError("ranks were killed")


def peers(run_dir: Path, node: int, *, other: Any = None) -> NodePeers:
    presence = SimpleNamespace(show=lambda: other) if node == 0 else None
    visit: Any = SimpleNamespace(run_dir=run_dir, place=SimpleNamespace(node=node, num_nodes=3), ends=Ends(), presence=presence)
    return NodePeers(visit, compose(["+experiment=quickstart"]).launcher)


def test_ranks_are_numbered_node_by_node_and_the_head_writes(tmp_path: Path) -> None:
    assert [peers(tmp_path, node).ranks(4) for node in range(3)] == [range(4), range(4, 8), range(8, 12)]
    assert [peers(tmp_path, node).writes_state for node in range(3)] == [True, False, False]


def test_healthy_ranks_end_for_a_failure_elsewhere_and_say_so(tmp_path: Path) -> None:
    here, ranks = peers(tmp_path, 1), Ranks({2: None, 3: 0})
    here.look(ranks, never)  # type: ignore[arg-type]
    assert here.end_reason is None and not ranks.ended
    here.visit.ends.elsewhere = True  # type: ignore[attr-defined]
    here.look(ranks, never)  # type: ignore[arg-type]
    assert here.end_reason == "ended: ranks of another node had failed" and ranks.ended == 1
    assert here.visit.ends.told == 0  # type: ignore[attr-defined]


def test_a_failure_here_is_passed_on_and_is_its_own_reason(tmp_path: Path) -> None:
    here, ranks = peers(tmp_path, 1), Ranks({2: None, 3: 1})
    here.visit.ends.elsewhere = True  # type: ignore[attr-defined]
    here.look(ranks, never)  # type: ignore[arg-type]
    assert here.visit.ends.told == 1 and here.end_reason is None and not ranks.ended  # type: ignore[attr-defined]


def test_a_head_whose_directory_was_taken_kills_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed: list[bool] = []
    owner = SimpleNamespace(describe=lambda now: "efflaunch 7 on n9")
    peers(tmp_path, 0, other=owner).look(Ranks({0: None}), lambda: killed.append(True))  # type: ignore[arg-type]
    assert killed == [True] and "efflaunch 7 on n9, has taken the run directory" in capsys.readouterr().err
    peers(tmp_path, 1, other=owner).look(Ranks({2: None}), never)  # type: ignore[arg-type]
