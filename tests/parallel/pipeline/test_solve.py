"""The search keeps the fastest candidate that fits, and says what stands in the way of the others."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.generators import one_f_one_b, zero_bubble
from efflaunch.parallel.pipeline.pipeline_plan import check
from efflaunch.parallel.pipeline.simulate import simulate
from efflaunch.parallel.pipeline.solve import PipelineProblem, candidates, peak_tokens, solve, try_candidate
from efflaunch.parallel.pipeline.virtual_stages import zbv
from efflaunch.parallel.pipeline.work import Batch, LayerLoad, ModelLoad, Recompute, unit_costs
from efflaunch.tests.parallel.pipeline.random_problems import random_problem

LAYER = LayerLoad(token_s=1.0, pair_s=0.01, kept_bytes=16.0, attention_bytes=1.0, input_bytes=1.0, fixed_bytes=100.0)
MODEL = ModelLoad(layers=(LAYER,) * 16)
PROBLEM = PipelineProblem(model=MODEL, batch=Batch.equal(8, 64), ranks=4, cap_bytes=(1e9,) * 4)


def test_nothing_that_was_left_out_is_faster() -> None:
    rng = random.Random(6)
    for _ in range(30):
        problem = random_problem(rng, cap_bytes=rng.choice((1e9, 1500.0, 700.0)))
        trials = [try_candidate(problem, candidate) for candidate in candidates(problem)]
        times = [trial.timeline.step_s for trial in trials if trial.timeline is not None]
        if not times:
            with pytest.raises(PlanError, match="schedules that fits"):
                solve(problem)
            continue
        found = solve(problem)
        made = "list order" in found.candidate.name
        assert found.timeline.step_s == pytest.approx(min(times)) or (made and found.timeline.step_s < min(times))
        assert found.gap >= -1e-9
        assert all(peak <= cap for peak, cap in zip(found.timeline.peak_bytes, problem.cap_bytes, strict=True))
        check(found.timeline.schedule)
        costs = unit_costs(problem.model, problem.batch, found.partition.counts, found.sizes, found.partition.recompute)
        assert simulate(found.timeline.schedule, costs).step_s == found.timeline.step_s
        assert all(trial.reason for trial in found.trials if trial.timeline is None)


def test_room_decides_what_is_kept() -> None:
    free = solve(PROBLEM)
    assert set(free.partition.recompute) == {Recompute.NONE} and sum(free.partition.counts) == 16
    # 16 x 64 bytes a layer and micro-batch: room for the weights and for less than what 1F1B keeps on its first rank.
    tight = solve(replace(PROBLEM, cap_bytes=(400 + 5 * 1024.0,) * 4, slices=(1,)))
    assert tight.timeline.step_s > free.timeline.step_s and Recompute.LINEAR in tight.partition.recompute
    sliced = solve(replace(PROBLEM, cap_bytes=(400 + 8 * 1024.0,) * 4))
    assert sliced.candidate.slices > 1 and max(sliced.timeline.peak_bytes) <= 400 + 8 * 1024


def test_the_choice_in_words() -> None:
    words = solve(PROBLEM).describe()
    assert "above the lower bound of" in words and "recomputed: none,none,none,none" in words and "idle" in words


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(PlanError) as error:
        solve(replace(PROBLEM, cap_bytes=(500.0,) * 4))
    # The fewest tokens wait under the most slices.
    assert "none of 10 schedules that fits; nearest is sliced_1f1b, 4 slices: " in str(error.value)
    assert "of the nearest partition [3,4,4,5]" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"ranks": 0}, {"ranks": 17, "cap_bytes": (1.0,) * 17}, {"cap_bytes": (1.0,)}, {"batch": Batch(())}, {"batch": Batch(((0,),))}],
)
def test_problems_without_a_pipeline_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="as many ranks as layers at most"):
        solve(replace(PROBLEM, **change))


def test_candidates_have_layers_and_tokens_enough() -> None:
    names = {str(candidate) for candidate in candidates(PROBLEM)}
    assert {"gpipe", "1f1b", "zero_bubble", "zbv, 2 stages a rank", "dual_pipe_v, 2 stages a rank", "interleaved, 2 stages a rank"} <= names
    assert {"sliced_1f1b, 2 slices", "sliced_1f1b, 4 slices", "sliced interleaved, 2 stages a rank, 4 slices"} <= names
    few = replace(PROBLEM, model=ModelLoad(layers=(LAYER,) * 4), batch=Batch.equal(2, 3))
    assert {str(candidate) for candidate in candidates(few)} == {"1f1b", "zero_bubble", "sliced_1f1b, 2 slices", "gpipe"}


def test_tokens_in_flight() -> None:
    peaks = peak_tokens(one_f_one_b(3, 5), [[5], [3], [7], [1], [1]])
    # Rank 0 of three holds micro-batches 0 to 2 at one time.
    assert peaks.waiting == peaks.held == peaks.of_ranks == [15, 10, 7] and peaks.deferred == [0, 0, 0]
    equal = [[1]] * 8
    peaks = peak_tokens(zero_bubble(3, 8), equal)
    assert (peaks.waiting, peaks.held, peaks.of_ranks) == ([3, 3, 3], [3, 2, 1], [3, 3, 3])
    # One more where the oldest gradients of weights come right behind the newest of inputs.
    assert peaks.deferred == [1, 2, 3]
    peaks = peak_tokens(zbv(3, 8), equal)
    assert peaks.of_ranks == [6, 6, 6] and all(
        peaks.waiting[rank] <= 6 <= peaks.waiting[rank] + peaks.waiting[5 - rank] for rank in range(3)
    )


def test_limits_of_unequal_slices_are_not_those_of_the_largest() -> None:
    """The first slice has half of all tokens where attention is all: room for seven such slices is not needed."""
    model = ModelLoad(layers=(replace(LAYER, token_s=0.0, pair_s=1.0),) * 4)
    problem = PipelineProblem(model=model, batch=Batch.equal(2, 4096), ranks=4, cap_bytes=(100 + 16 * 4096 * 1.95,) * 4)
    (candidate,) = [one for one in candidates(problem) if (one.virtual_stages, one.slices) == (1, 4)]
    trial = try_candidate(problem, candidate)
    assert trial.partition is not None and set(trial.partition.recompute) == {Recompute.NONE}


def test_orders_are_made_for_unequal_micro_batches() -> None:
    rng = random.Random(9)
    batch = Batch(tuple((int(16 * rng.paretovariate(1.3)),) for _ in range(24)))
    found = solve(replace(PROBLEM, batch=batch))
    published = [trial.timeline.step_s for trial in found.trials if trial.timeline and "list order" not in trial.candidate.name]
    assert found.candidate.name.startswith("list order") and found.timeline.step_s < min(published)
    assert found.candidate.make() == found.timeline.schedule
    assert not any("list order" in trial.candidate.name for trial in solve(PROBLEM).trials)
