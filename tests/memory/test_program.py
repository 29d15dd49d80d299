"""The linear program of the shares: MEMO's closed form, brute force over grids, and duals against solving again."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.estimate.solver.linear_program import Affine, PolicyProgram, Row, least_growth, solve_program

PER_LAYER, LAYERS = 16.0, 32
"""MEMO's skeletal activations of a layer in units of tokens x hidden: layer input 1, attention output 1, the others 14."""


def memo(*, bandwidth: float, layer_s: float, host: float) -> PolicyProgram:
    """One share, of the tokens of all other activations that move (MEMO, section 4.2); recomputing them takes a third of a forward."""
    must, other, moved = 2.0, 14.0, LAYERS - 2
    return PolicyProgram(
        forward_s=Affine(LAYERS * layer_s, (0.0,)),
        backward_s=Affine(LAYERS * layer_s * 2.33, (-LAYERS * layer_s * 0.33,)),
        to_host_s=Affine(LAYERS * must / bandwidth, (LAYERS * other / bandwidth,)),
        from_host_s=Affine(LAYERS * must / bandwidth, (LAYERS * other / bandwidth,)),
        rows=(Row("host", Affine(moved * must, (moved * other,)), host),),
    )


@pytest.mark.parametrize(
    ("bandwidth", "layer_s", "host"), [(2.0, 4.0, 256.0), (3.0, 2.0, 1e4), (10.0, 4.0, 256.0), (10.0, 4.0, 1e4), (1.0, 1.0, 100.0)]
)
def test_memos_alpha_where_classes_are_tied_and_nothing_is_kept(bandwidth, layer_s, host):
    """max alpha with (S_in + S_attn + alpha S_oth) / B <= T and (n - 2)(...) <= M, where stalling costs more than recomputing."""
    closed = min((bandwidth * layer_s - 2.0) / 14.0, (host / (LAYERS - 2) - 2.0) / 14.0)
    solution = solve_program(memo(bandwidth=bandwidth, layer_s=layer_s, host=host))
    assert solution is not None
    # A second of moving more than the link hides stalls for a second, and saves 0.33 layer_s x B / 14 of recomputing.
    if 0.33 * layer_s * bandwidth / 14.0 < 1.0:
        assert solution.x[0] == pytest.approx(min(1.0, max(0.0, closed)), abs=1e-9)


def test_seven_billion_at_one_million_tokens():
    """The example of MEMO's constraint (2): 256 GiB of host, 1 GiB a unit: alpha = (256 / 30 - 2) / 14."""
    solution = solve_program(memo(bandwidth=1e3, layer_s=1.0, host=256.0))
    assert solution is not None and solution.x[0] == pytest.approx((256 / 30 - 2) / 14, abs=1e-9)


@st.composite
def programs(draw):
    """Two classes, each kept, moved or recomputed; one device, one host, one link."""
    number = st.floats(0.1, 10.0)
    sizes, costs = [draw(number), draw(number)], [draw(number), draw(number)]
    base, bandwidth = draw(number), draw(number)
    device, host = draw(st.floats(0.5, 30.0)), draw(st.floats(0.5, 30.0))
    moved = (0.0, sizes[0] / bandwidth, 0.0, sizes[1] / bandwidth)
    return PolicyProgram(
        forward_s=Affine(base, (0.0,) * 4),
        backward_s=Affine(2 * base + sum(costs), (-costs[0], -costs[0], -costs[1], -costs[1])),
        to_host_s=Affine(0.0, moved),
        from_host_s=Affine(0.0, moved),
        rows=(
            Row("device", Affine(0.5, (4 * sizes[0], 0.5 * sizes[0], 4 * sizes[1], 0.5 * sizes[1])), device),
            Row("host", Affine(0.0, (0.0, 4 * sizes[0], 0.0, 4 * sizes[1])), host),
        ),
        exclusive=((0, 1), (2, 3)),
        hidden_s=draw(st.floats(0.0, 20.0)),
    )


def fits(program, x):
    return all(row.num_bytes(x) <= row.limit * (1 + 1e-9) + 1e-9 for row in program.rows) and all(
        sum(x[index] for index in together) <= 1 + 1e-9 for together in program.exclusive
    )


@settings(max_examples=60, deadline=None)
@given(programs())
def test_no_grid_point_is_better(program):
    solution = solve_program(program)
    grid = [index / 8 for index in range(9)]
    inside = [x for x in itertools.product(grid, repeat=4) if fits(program, x)]
    if solution is None:
        assert not inside
        return
    assert fits(program, solution.x)
    assert min(map(program.time_s, inside), default=float("inf")) >= solution.time_s - 1e-5 * (1 + solution.time_s)


@settings(max_examples=60, deadline=None)
@given(programs(), st.floats(0.0, 10.0), st.sampled_from(["device", "host"]))
def test_more_memory_is_never_slower(program, extra, name):
    before = solve_program(program)
    rows = tuple(replace(row, limit=row.limit + extra * (row.name == name)) for row in program.rows)
    after = solve_program(replace(program, rows=rows))
    if before is not None:
        assert after is not None and after.time_s <= before.time_s + 1e-5 * (1 + before.time_s)


@settings(max_examples=60, deadline=None)
@given(programs(), st.sampled_from(["device", "host"]))
def test_a_dual_is_what_a_little_more_memory_saves(program, name):
    """A convex function: the saving per byte is at most the dual, and between the duals of both ends."""
    before, step = solve_program(program), 1e-2
    if before is None:
        return
    rows = tuple(replace(row, limit=row.limit + step * (row.name == name)) for row in program.rows)
    after = solve_program(replace(program, rows=rows))
    assert after is not None
    saved, slack = (before.time_s - after.time_s) / step, 1e-3 * (1 + before.time_s)
    assert after.prices[name] - slack <= saved <= before.prices[name] + slack


def test_the_link_stalls_only_where_recomputing_is_dearer():
    """Moving the one class takes 2 s each way, recomputing it 10 s; the link has 1 s to hide in."""
    program = PolicyProgram(
        forward_s=Affine(1.0, (0.0,)),
        backward_s=Affine(11.0, (-10.0,)),
        to_host_s=Affine(0.0, (2.0,)),
        from_host_s=Affine(0.0, (2.0,)),
        rows=(Row("device", Affine(1.0, (0.0,)), 2.0),),
    )
    solution = solve_program(program)
    # What is not moved is recomputed beside the copies: 11 - 10 x = 2 x.
    assert solution is not None and solution.x[0] == pytest.approx(11 / 12) and solution.time_s == pytest.approx(2 * 2 * 11 / 12)
    cheap = replace(program, backward_s=Affine(1.5, (-0.5,)))
    solution = solve_program(cheap)
    assert solution is not None and solution.x[0] == pytest.approx(0.5) and solution.time_s == pytest.approx(1.0 + 1.25)


def test_of_equally_fast_shares_those_that_move_least():
    program = PolicyProgram(
        forward_s=Affine(10.0, (0.0, 0.0)),
        backward_s=Affine(21.0, (-1.0, -1.0)),
        to_host_s=Affine(0.0, (0.0, 2.0)),
        from_host_s=Affine(0.0, (0.0, 2.0)),
        rows=(Row("device", Affine(0.0, (4.0, 1.0)), 2.0),),
        exclusive=((0, 1),),
    )
    fastest = solve_program(program)
    assert fastest is not None and fastest.time_s == pytest.approx(30.0) and fastest.x == pytest.approx((1 / 3, 2 / 3))
    frugal = solve_program(program, within_s=30.5)
    assert frugal is not None and frugal.time_s == pytest.approx(30.5) and frugal.x == pytest.approx((0.5, 0.0))


def test_how_much_is_missing():
    program = PolicyProgram(
        forward_s=Affine(1.0, (0.0,)),
        backward_s=Affine(1.0, (0.0,)),
        to_host_s=Affine(0.0, (1.0,)),
        from_host_s=Affine(0.0, (1.0,)),
        rows=(Row("device, forward", Affine(12.0, (-4.0,)), 4.0), Row("host", Affine(0.0, (10.0,)), 5.0)),
    )
    assert solve_program(program) is None
    growth, x = least_growth(program, "device")
    assert (growth, x[0]) == (pytest.approx(1.5), pytest.approx(0.5))
    growth, x = least_growth(replace(program, rows=(program.rows[0], Row("host", Affine(20.0, (10.0,)), 5.0))), "device")
    assert growth == pytest.approx(3.0) and x[0] == pytest.approx(0.0)


def kept_or_moved(always: float) -> PolicyProgram:
    """One share that is kept or moved in the same time; the device holds `always` of 20 whatever the share."""
    link = Affine(8.0, (-8.0,))
    rows = (Row("device, forward", Affine(always, (12.0,)), 20.0), Row("host, forward", Affine(16.0, (-8.0,)), 32.0))
    return PolicyProgram(
        forward_s=Affine(10.0, (0.0,)), backward_s=Affine(20.0, (0.0,)), to_host_s=link, from_host_s=link, rows=rows,
        roomy=("device, ", "host, "),
    )  # fmt: skip


@pytest.mark.parametrize(("always", "share", "fullness"), [(1.0, 0.75, 0.5), (4.0, 0.5, 0.5), (14.0, 0.0, 0.7), (8.0, 1 / 6, 0.5)])
def test_of_equal_times_the_one_with_most_room(always: float, share: float, fullness: float) -> None:
    """The fullest memory is emptied as far as half of it; then nothing more moves than must."""
    program = kept_or_moved(always)
    fastest, roomy = solve_program(program), solve_program(program, within_s=30.0)
    assert fastest is not None and roomy is not None and fastest.time_s == roomy.time_s == 30.0
    assert roomy.x[0] == pytest.approx(share) and program.fullness(roomy.x) == pytest.approx(fullness)
