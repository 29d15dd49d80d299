"""The event simulation against times by hand, with contention, deadlocks and pooled reductions; compiled and plain loops alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from efflaunch.parallel.experts.engine import PIECE_ELEMENTS, PIECE_HIGH, PIECE_START, PIECE_STOP, START, STOP, TURN, run, runner

COMPUTE, INTRA, INTER = 0, 1, 2
IDEAL = np.zeros(9)
SLOW = np.array([0.0, 0.1, 0.1, 0.0, 0.0, 0.5, 0.0, 0.5, 0.0])
NO_POOL = (0.0,) * 6


def simulate(
    tasks: list[tuple[int, float, tuple[int, ...]]],
    *,
    key: list[float] | None = None,
    strict: bool = True,
    slow: Any = IDEAL,
    pool: tuple[float, ...] = NO_POOL,
    gradient: list[int] | None = None,
    function: Any = run,
) -> Any:
    """`tasks` = (resource, seconds, needs), one stream a resource."""
    resource = np.array([task[0] for task in tasks], dtype=np.int64)
    need = np.array([need for task in tasks for need in task[2]], dtype=np.int64)
    need_end = np.cumsum([len(task[2]) for task in tasks], dtype=np.int64)
    seconds = np.array([task[1] for task in tasks])
    of = np.array(gradient or [-1] * len(tasks), dtype=np.int64)
    keys = np.array(key or range(len(tasks)), dtype=np.float64)
    return function(resource, seconds, need_end, need, of, resource, keys, strict, slow, pool)


def test_tasks_wait_for_their_needs_and_their_stream() -> None:
    seconds, ints, floats, _ = simulate([(COMPUTE, 2.0, ()), (INTER, 1.0, (0,)), (COMPUTE, 3.0, ()), (INTRA, 0.5, ())])
    assert seconds == 5.0
    assert floats[START].tolist() == [0.0, 2.0, 2.0, 0.0] and floats[STOP].tolist() == [2.0, 3.0, 5.0, 0.5]
    assert sorted(ints[TURN].tolist()) == [0, 1, 2, 3]


def test_both_links_slow_each_other_down() -> None:
    """3 s of one and 1 s of the other at 1 / 1.5: 1.5 s together, then 2 s alone."""
    seconds, _, floats, _ = simulate([(INTRA, 3.0, ()), (INTER, 1.0, ())], slow=SLOW)
    assert floats[STOP].tolist() == pytest.approx([3.5, 1.5]) and seconds == pytest.approx(3.5)


def test_compute_slows_down_with_every_active_link() -> None:
    seconds, _, floats, _ = simulate([(COMPUTE, 2.0, ()), (INTRA, 1.0, ()), (INTER, 1.0, ())], slow=SLOW)
    # 1.5 s beside two links at 1 / 1.2, the rest alone.
    assert floats[STOP].tolist() == pytest.approx([1.5 + (2.0 - 1.5 / 1.2), 1.5, 1.5]) and seconds == floats[STOP, 0]


def test_a_strict_stream_waits_for_its_first_a_free_one_does_not() -> None:
    tasks = [(COMPUTE, 2.0, ()), (INTER, 1.0, (0,)), (INTER, 1.0, ())]
    assert simulate(tasks)[0] == 4.0 and simulate(tasks, strict=False)[0] == 3.0


def test_the_least_key_goes_first() -> None:
    _, _, floats, _ = simulate([(COMPUTE, 2.0, ()), (COMPUTE, 1.0, ())], key=[5.0, 4.0], strict=False)
    assert floats[START].tolist() == [1.0, 0.0]


def test_orders_that_wait_for_each_other_take_for_ever() -> None:
    tasks = [(COMPUTE, 1.0, (3,)), (COMPUTE, 1.0, ()), (INTER, 1.0, (1,)), (INTER, 1.0, ())]
    assert simulate(tasks, key=[0.0, 1.0, 0.0, 1.0])[0] == -1.0
    assert simulate(tasks, key=[0.0, 1.0, 1.0, 0.0])[0] == 4.0


def test_a_pool_fills_the_gap_and_sends_the_rest_at_the_end() -> None:
    """Gradient of 10 elements after 1 s; the link's next task comes 4 s later: 1 s to start and 3 elements of 1 s fit."""
    tasks = [(COMPUTE, 1.0, ()), (COMPUTE, 4.0, (0,)), (INTER, 2.0, (1,))]
    pool = (float(INTER), 1.0, 1.0, 10.0, 1.0, 1.0)
    seconds, _, floats, sends = simulate(tasks, strict=False, pool=pool, gradient=[0, -1, -1])
    assert floats[START, 2] == 5.0
    assert sends[PIECE_ELEMENTS].tolist() == [3.0, 7.0] and sends[PIECE_HIGH].tolist() == [0.0, 0.0]
    assert sends[PIECE_START].tolist() == [1.0, 7.0] and sends[PIECE_STOP].tolist() == [5.0, 15.0] and seconds == 15.0


def test_a_gap_that_does_not_pay_for_a_start_stays_empty() -> None:
    tasks = [(COMPUTE, 1.0, ()), (COMPUTE, 1.5, (0,)), (INTER, 2.0, (1,))]
    pool = (float(INTER), 1.0, 1.0, 10.0, 1.0, 1.0)
    _, _, _, sends = simulate(tasks, strict=False, pool=pool, gradient=[0, -1, -1])
    assert sends[PIECE_ELEMENTS].tolist() == [10.0]


def test_gradients_of_later_layers_wait_for_those_before() -> None:
    """The second layer's is complete first: nothing is sent until the first one's is."""
    tasks = [(COMPUTE, 1.0, ()), (COMPUTE, 1.0, (0,))]
    pool = (float(INTER), 1.0, 1.0, 2.0, 2.0, 1.0)
    _, _, _, sends = simulate(tasks, strict=False, pool=pool, gradient=[1, 0])
    assert sends[PIECE_START].tolist() == [2.0] and sends[PIECE_ELEMENTS].tolist() == [4.0]


def test_compiled_loops_simulate_the_same() -> None:
    random = np.random.default_rng(0)
    for strict in (False, True):
        tasks = []
        for task in range(60):
            needs = tuple(sorted(set(random.integers(0, task, 2).tolist()))) if task else ()
            tasks.append((int(random.integers(0, 3)), float(random.uniform(0.1, 1.0)), needs))
        gradient = [-1] * 60
        gradient[10], gradient[40] = 0, 1
        pool = NO_POOL if strict else (float(INTER), 0.1, 0.5, 3.0, 2.0, 1.02)
        words: dict[str, Any] = {"strict": strict, "slow": SLOW, "pool": pool, "gradient": gradient}
        plain, compiled = simulate(tasks, **words), simulate(tasks, function=runner(), **words)
        assert plain[0] == pytest.approx(compiled[0], rel=1e-12) and plain[0] > 0
        assert plain[2][START].tolist() == pytest.approx(compiled[2][START].tolist(), rel=1e-9, abs=1e-12)
        assert plain[3].tolist() == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in compiled[3].tolist()]
