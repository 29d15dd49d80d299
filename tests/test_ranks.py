"""The helper that gives tests real ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from efflaunch.errors import ConfigError
from efflaunch.tests.ranks import RankDiedError, RankPool, run_ranks


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def _sum(value: float) -> float:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return total.item()


def _pid() -> int:
    return os.getpid()


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ConfigError("here", found="a", expected="b", hint="c")
    dist.barrier()


def _die() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang(begun: Path) -> None:
    begun.touch()
    time.sleep(600)


def test_results_come_in_rank_order_from_one_group(pool: RankPool) -> None:
    assert pool.run(_sum, 1.0, ranks=2) == [3.0, 3.0]
    assert pool.run(_sum, 1.0, ranks=1) == [1.0]
    assert pool.run(_pid, ranks=2) == pool.run(_pid, ranks=2)


def test_an_error_of_one_rank_is_raised_with_its_traceback_and_the_next_call_works(pool: RankPool) -> None:
    with pytest.raises(ConfigError, match="here: found a") as caught:
        pool.run(_fail_on_one, ranks=2)
    assert "on rank 1" in caught.value.__notes__[0] and "_fail_on_one" in caught.value.__notes__[0]
    assert pool.run(_sum, 1.0, ranks=2) == [3.0, 3.0]


def test_a_dead_rank_is_named(pool: RankPool) -> None:
    with pytest.raises(RankDiedError, match="rank 1 died with exit code -9"):
        pool.run(_die, ranks=2)


def test_a_hang_shows_where(pool: RankPool, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with pytest.raises(RankDiedError, match=r"(?s)no answer.*in _hang"):
        pool.run(_hang, begun, ranks=1, given_up=begun.exists)


def test_no_worker_is_left_behind() -> None:
    pids = run_ranks(_pid, 2)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
