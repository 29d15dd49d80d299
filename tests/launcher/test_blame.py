"""Which node a failure is put down to, and when a run stops using it; lists of nodes as SLURM writes them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.launcher.config.run_config import RayConfig, SeveralNodes, SlurmConfig
from efflaunch.launcher.nodes.faulty_nodes import blame, excluded_names, exclusions, leave_out
from efflaunch.launcher.rundir.state import Attempt, Failure, RunState, new_state
from efflaunch.launcher.slurm.hosts import expand_hosts, lost_hosts

HOSTS = ("n0", "n1", "n2", "n3")


def failure(rank: int, message: str = "rank 5 was killed", code: int | None = -9, *, mistake: bool = False) -> Failure:
    return Failure(rank=rank, message=message, traceback="", log="", is_user_error=mistake, exit_code=code)


@pytest.mark.parametrize(
    ("broken", "lost", "blamed"),
    [
        (failure(5), (), {"n2": "rank 5 was killed"}),
        (failure(0, code=-11), (), {"n0": "rank 5 was killed"}),
        (failure(5, code=-6), (), {}),
        (failure(5, code=1), (), {}),
        (failure(5, mistake=True), (), {}),
        (failure(5, "rank 5: AcceleratorError: CUDA error: uncorrectable ECC error encountered", None), (), {"n2": ...}),
        (failure(5, "rank 5: RuntimeError: the wheels came off", None), (), {}),
        (failure(-1, "n1 ended without a word", None), ("n1",), {"n1": "ended without a word"}),
        (failure(5), ("n2",), {"n2": "ended without a word"}),
        (failure(5, mistake=True), ("n1",), {}),
        (None, ("n3",), {"n3": "ended without a word"}),
    ],
)
def test_what_looks_like_the_hardware(broken: Failure | None, lost: tuple[str, ...], blamed: dict[str, object]) -> None:
    reasons = blame(broken, hosts=HOSTS, lost=lost, ranks_per_node=2)
    assert reasons.keys() == blamed.keys() and all(why is ... or reasons[host] == why for host, why in blamed.items())


def attempt(number: int, blamed: dict[str, str], code: int = 1) -> Attempt:
    return Attempt(number=number, started=0.0, exit_code=code, hosts=HOSTS, blamed=blamed)


def test_a_preflight_counts_at_once_and_a_death_the_second_time() -> None:
    refused = attempt(1, {"n1": "no GPU"}, code=93)
    assert exclusions([refused], {}, 2) == {"n1": "failed the preflight: no GPU"}
    once, twice = attempt(1, {"n1": "gone"}), attempt(2, {"n1": "killed"})
    assert exclusions([once], {}, 2) == {}
    assert exclusions([once, twice], {}, 2) == {"n1": "2 attempts failed on it, the last one: killed"}
    assert exclusions([once, attempt(2, {"n2": "gone"})], {}, 2) == {}
    assert exclusions([once, twice, attempt(3, {})], {}, 2) == {}


def test_limits_of_leaving_out() -> None:
    refused = attempt(1, {"n1": "no GPU"}, code=93)
    assert exclusions([refused], {}, 0) == {} and exclusions([refused], {"n7": "gone", "n8": "gone"}, 2) == {}
    assert exclusions([refused], {"n1": "no GPU"}, 2) == {}
    most = replace(refused, blamed=dict.fromkeys(HOSTS[:3], "another version"))
    assert exclusions([most], {}, 9) == {}, "then it is the head, or the run"
    assert len(exclusions([replace(refused, blamed=dict.fromkeys(HOSTS[:2], "no GPU"))], {}, 9)) == 2


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[0-2]", ["n0", "n1", "n2"]),
        ("n[08-11,3],gpu1", ["n08", "n09", "n10", "n11", "n3", "gpu1"]),
        ("r[1-2]n[0,5]-ib", ["r1n0-ib", "r1n5-ib", "r2n0-ib", "r2n5-ib"]),
        ("", []),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert expand_hosts(text) == names


def test_a_list_that_is_none() -> None:
    with pytest.raises(ValueError, match="is no list of nodes"):
        expand_hosts("n[1-2")


def test_which_nodes_are_gone() -> None:
    assert lost_hosts(HOSTS, ["n0", "n2", "n3"], [False] * 4) == ["n1"], "SLURM took the node from the job, and killed the others' agents"
    assert lost_hosts(HOSTS, HOSTS, [True, True, False, True]) == ["n2"] and lost_hosts(HOSTS, HOSTS, [True] * 4) == []
    assert lost_hosts(HOSTS, HOSTS, [False] * 4) == [], "nothing tells which"
    assert lost_hosts(HOSTS, [], [True, False, True, True]) == ["n1"]


def launched(*attempts: Attempt) -> RunState:
    """A run whose launch began with the second of `attempts`; n9 is left out already."""
    fresh = new_state(world_size=8, revision=1, attempts=attempts)
    return replace(fresh, attempts_before=1, excluded={"n9": "gone"})


@pytest.mark.parametrize("nodes", [SlurmConfig(exclude=["n8", "n9"]), RayConfig(exclude=["n8", "n9"])])
def test_leaving_out_asks_for_the_nodes_that_are_left(nodes: SeveralNodes) -> None:
    refused = replace(attempt(2, {"n1": "no GPU"}, code=93), failure=failure(-1, mistake=True))
    before, asked = launched(attempt(1, {"n1": "gone"}), refused), list[list[str]]()
    after, new = leave_out(before, nodes, lambda names: not asked.append(names))  # type: ignore[func-returns-value]
    assert new == {"n1": "failed the preflight: no GPU"} and asked == [["n8", "n9", "n1"]] == [excluded_names(after, nodes)]
    assert after.excluded == {"n9": "gone", **new}
    last = after.attempts[-1]
    assert last.exit_code == 1 and last.failure is not None and not last.failure.is_user_error, "without them it may well start"
    assert leave_out(before, nodes, lambda names: False) == (before, {})


def test_a_death_of_an_earlier_launch_does_not_count() -> None:
    run_state = launched(attempt(1, {"n1": "gone"}), attempt(2, {"n1": "killed"}))
    assert leave_out(run_state, SlurmConfig(), lambda names: True) == (run_state, {})
