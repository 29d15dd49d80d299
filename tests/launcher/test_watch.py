"""Silences, allowances and blame, on made-up beats and stacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.agent import hang_verdict as watch
from efflaunch.launcher.agent.hang_verdict import (
    Blame,
    Frame,
    Limits,
    RankFacts,
    Silences,
    blame,
    describe_hang,
    parse_stacks,
    short_file,
    training_frames,
)
from efflaunch.launcher.config.checks import check_config
from efflaunch.launcher.config.compose import compose
from efflaunch.utils.heartbeat import Beat

LIMITS = Limits(factor=5.0, min_s=300.0, long_s=1800.0)
SITE = "/venv/lib/python3.11/site-packages"
OURS = "/home/me/efflaunch"
HERE = Path(watch.__file__).parents[2]
COLLECTIVE = Frame(f"{SITE}/torch/distributed/distributed_c10d.py", 10, "all_reduce")
GATHER = Frame(f"{OURS}/training/reporting/step_results.py", 50, "gather_results")
READ = Frame(f"{OURS}/training/data/shard.py", 7, "build_shard")


def beat(count: int, step: int = 3, *, long: bool = False, expected_s: float = 2.0) -> Beat:
    return Beat(count=count, step=step, layer=None, is_long=long, expected_s=expected_s, thread=1, phase="forward")


def test_the_allowance_follows_the_step_but_not_below_the_floor() -> None:
    assert LIMITS.allowance_s(beat(1)) == 300 and LIMITS.allowance_s(beat(1, expected_s=100.0)) == 500
    assert LIMITS.allowance_s(beat(1, long=True)) == 1800 == LIMITS.allowance_s(None)
    assert LIMITS.allowance_s(beat(1, long=True, expected_s=1000.0)) == 5000


def test_silence_is_what_was_looked_at() -> None:
    silences = Silences()
    for now in range(100, 500, 10):
        silences.look({0: beat(now), 1: beat(7)}, float(now))
    assert silences.silent_s == {0: 0.0, 1: 390.0} and silences.hang(LIMITS)
    silences.look({0: beat(1), 1: beat(8)}, 500.0)
    assert not silences.hang(LIMITS) and not silences.quiet(LIMITS)


def test_a_suspended_machine_is_no_hang() -> None:
    """The agent was stopped with its ranks: most of the time in between counts for nobody."""
    silences = Silences()
    silences.look({0: beat(1)}, 0.0)
    silences.look({0: beat(1)}, 100_000.0)
    assert silences.silent_s[0] == 30.0 and not silences.hang(LIMITS)


def test_one_rank_in_a_long_phase_gives_the_others_time() -> None:
    silences = Silences()
    for now in range(0, 1700, 10):
        silences.look({0: beat(1, long=True), 1: beat(1)}, float(now))
    assert not silences.hang(LIMITS) and silences.quiet(LIMITS)
    for now in range(1700, 1900, 10):
        silences.look({0: beat(1, long=True), 1: beat(1)}, float(now))
    assert silences.hang(LIMITS)


def test_a_rank_that_never_spoke_is_starting() -> None:
    silences = Silences()
    for now in range(0, 1830, 10):
        silences.look({0: None}, float(now))
    assert silences.hang(LIMITS) and not silences.hang(Limits(factor=None, min_s=300.0, long_s=1800.0))


@pytest.mark.parametrize("override", ["launcher.hang_factor=0", "launcher.hang_min_s=0", "launcher.hang_startup_s=0s"])
def test_limits_that_are_none_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="more than 0"):
        check_config(compose(["+experiment=quickstart", override]))


def test_hang_detection_can_be_turned_off() -> None:
    config = compose(["+experiment=quickstart", "launcher.hang_factor=null", "launcher.hang_min_s=10m"])
    check_config(config)
    assert config.launcher.hang_factor is None and config.launcher.hang_min_s == 600


def rank(number: int, *frames: Frame, process: str = "S (sleeping)", step: int = 4, count: int = 9) -> RankFacts:
    return RankFacts(
        rank=number, host=f"node-{number}", silent_s=310.0, step=step, phase="forward", count=count, process=process, frames=frames
    )


def test_stacks_of_faulthandler() -> None:
    text = (
        'Thread 0x00000000000000ff (most recent call first):\n  File "/a/b/threading.py", line 5 in wait\n\n'
        "Current thread 0x0000000000000001 (most recent call first):\n"
        '  File "/x/y.py", line 1 in <lambda>\n  File "/x/z.py", line 22 in main\n'
    )
    blamed = parse_stacks(text)
    assert blamed == {255: (Frame("/a/b/threading.py", 5, "wait"),), 1: (Frame("/x/y.py", 1, "<lambda>"), Frame("/x/z.py", 22, "main"))}
    newer = text + 'Thread 0x0000000000000001 (most recent call first):\n  File "/x/new.py", line 3 in late\n'
    assert parse_stacks(newer)[1] == (Frame("/x/new.py", 3, "late"),)
    assert parse_stacks("") == {}


def test_a_backward_runs_in_a_thread_of_its_own() -> None:
    main = (Frame(f"{SITE}/torch/autograd/graph.py", 1, "_engine_run_backward"), GATHER)
    inner = (READ, Frame(f"{SITE}/torch/autograd/function.py", 307, "apply"))
    assert training_frames({1: main, 2: (COLLECTIVE,), 3: inner}, 1) == inner
    assert training_frames({1: main, 2: (COLLECTIVE,)}, 1) == main and training_frames({}, 1) == ()


def test_files_are_named_from_the_package_on() -> None:
    assert short_file(f"{OURS}/training/trainer.py") == "training/trainer.py"
    assert short_file(f"{SITE}/torch/distributed/distributed_c10d.py") == "torch/distributed/distributed_c10d.py"
    assert short_file("/home/me/my_code/train.py") == "my_code/train.py"


def test_a_stopped_process_is_to_blame() -> None:
    blamed = blame([rank(0, COLLECTIVE, GATHER), rank(1, READ, process="T (stopped)"), rank(2, COLLECTIVE, GATHER)])
    assert blamed.ranks == (1,) and "rank 1 on node-1 is stopped and cannot run" in blamed.reason
    assert blamed.reason.endswith("the others wait at training/reporting/step_results.py:50 in gather_results")


def test_who_is_not_in_the_collective_is_to_blame() -> None:
    blamed = blame([rank(0, READ), rank(1, COLLECTIVE, GATHER), rank(2, COLLECTIVE, GATHER)])
    assert blamed.ranks == (0,) and "rank 0 on node-0 is at training/data/shard.py:7 in build_shard" in blamed.reason
    ring = Frame(f"{OURS}/parallel/sequence/ring.py", 51, "wait")
    assert blame([rank(0, ring, GATHER), rank(1, READ)]).ranks == (1,)


def test_frames_around_our_own_do_not_make_a_collective() -> None:
    """FSDP calls the layer that hangs, so its files are in the stack of a rank that waits for nobody."""
    fsdp = Frame(f"{SITE}/torch/distributed/fsdp/_fully_shard/_fsdp_state.py", 3, "forward")
    assert not rank(0, READ, fsdp).waits and rank(0, fsdp, READ).waits


def test_who_is_elsewhere_than_most_is_to_blame() -> None:
    """Collectives of a GPU do not block where they are called: everybody is at some other line of ours."""
    facts = [rank(number, GATHER) for number in range(3)]
    assert blame([*facts, rank(3, READ)]).ranks == (3,)


def test_who_has_come_less_far_is_to_blame() -> None:
    assert blame([rank(0, GATHER), rank(1, READ, count=8)]).ranks == (1,)
    assert blame([rank(0, GATHER, step=3, count=30), rank(1, READ)]).ranks == (0,)


def test_nobody_is_to_blame_where_all_are_at_one_place() -> None:
    blamed = blame([rank(0, COLLECTIVE, GATHER), rank(1, COLLECTIVE, GATHER)])
    assert blamed.ranks == () and "all ranks are at training/reporting/step_results.py:50 in gather_results" in blamed.reason


def test_a_rank_alone_and_ranks_all_stopped() -> None:
    assert blame([rank(0, READ)]).ranks == (0,)
    assert blame([rank(0, process="T (stopped)"), rank(1, process="T (stopped)")]) == Blame(
        ranks=(0, 1), reason="all ranks are stopped and cannot run"
    )


def test_many_ranks_make_a_short_sentence() -> None:
    facts = [rank(number, READ) for number in range(40)] + [rank(number, COLLECTIVE, GATHER) for number in range(40, 99)]
    blamed = blame(facts)
    assert len(blamed.ranks) == 40 and "36 more; the others wait at" in blamed.reason


def test_the_message_names_all_that_matters() -> None:
    facts = [rank(0, COLLECTIVE, GATHER), rank(1, READ)]
    text = describe_hang(facts, blame(facts), allowance_s=300.0, missing=[2], stacks="logs/attempt-1/stacks-*.txt")
    assert text.startswith("no progress for 5 min 10 s, more than the 5 min 0 s allowed (launcher.hang_*): rank 1 on node-1 is at ")
    assert "no word from the agents of nodes 2" in text and text.endswith("stacks of all ranks: logs/attempt-1/stacks-*.txt")


def test_files_of_the_package_wherever_it_is_installed():
    """A checkout may have any name and hold its virtual environment; a package may be installed beside torch."""
    for file, name in (
        (f"{HERE}/training/trainer.py", "training/trainer.py"),
        (f"{OURS}/training/trainer.py", "training/trainer.py"),
        (f"{SITE}/efflaunch/training/trainer.py", "training/trainer.py"),
        (f"{HERE}/.venv/lib/python3.11/site-packages/torch/distributed/x.py", "torch/distributed/x.py"),
        (f"{OURS}/.venv/lib/python3.11/site-packages/torch/distributed/x.py", "torch/distributed/x.py"),
    ):
        assert short_file(file) == name
        facts = RankFacts(
            rank=0, host="a", silent_s=1.0, step=1, phase="", frames=(Frame(SITE + "/torch/y.py", 1, "f"), Frame(file, 2, "g"))
        )
        assert facts.own == facts.frames[1 if name.startswith("training") else 0]
