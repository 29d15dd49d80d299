"""The learning rate over starts with more or fewer steps: kept, stretched or warmed up anew, for every schedule, and never silently."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.errors import ConfigError
from efflaunch.training.optimizers.config import OptimConfig, ScheduleOnResume
from efflaunch.training.optimizers.lr_course import Course, first_course, load_course, resumed_course
from efflaunch.training.optimizers.lr_schedule import SCHEDULES, learning_rate

BASE = OptimConfig(name="test", lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
STEPS, MORE = 20, 40
KEEP, STRETCH, REWARM = ScheduleOnResume


def config_of(schedule: str, policy: ScheduleOnResume = KEEP) -> OptimConfig:
    return replace(BASE, schedule=schedule, decay_steps=6 if schedule == "wsd" else None, schedule_on_resume=policy)


def saved_at(config: OptimConfig, done: int, steps: int = STEPS) -> Course:
    saved = load_course(first_course(config, steps).dump(config, done), config)
    assert saved is not None
    return saved


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_steps_follow_the_same_course(schedule: str) -> None:
    config = config_of(schedule)
    for done in (0, 7, STEPS):
        course, change = resumed_course(config, saved_at(config, done), done, STEPS)
        assert change is None
        assert [course.rate(config, step) for step in range(STEPS)] == [learning_rate(config, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("steps", [15, MORE])
@pytest.mark.parametrize("done", [2, 10, STEPS])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_keep_changes_the_rate_of_no_step(schedule: str, done: int, steps: int) -> None:
    config = config_of(schedule)
    if schedule in ("linear", "wsd") and steps == MORE:
        with pytest.raises(
            ConfigError, match=rf"(?s)schedule_on_resume: found keep, and a {schedule} schedule over 20 steps.*=stretch.*=rewarm"
        ):
            resumed_course(config, saved_at(config, done), done, steps)
        return
    course, change = resumed_course(config, saved_at(config, done), done, steps)
    rates = [course.rate(config, step) for step in range(steps)]
    assert rates[:STEPS] == [learning_rate(config, step, STEPS) for step in range(min(steps, STEPS))]
    assert rates[STEPS:] == [pytest.approx(0.1 if schedule == "cosine" else 1.0)] * max(0, steps - STEPS)
    if done < steps and schedule != "constant":
        assert change is not None and "kept as it was, over 20 steps" in change and "stretch, rewarm" in change


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stretch_takes_the_schedule_over_the_new_total(schedule: str) -> None:
    config = config_of(schedule, STRETCH)
    course, change = resumed_course(config, saved_at(config_of(schedule), 15), 15, MORE)
    assert [course.rate(config, step) for step in range(MORE)] == [learning_rate(config, step, MORE) for step in range(MORE)]
    if schedule == "cosine":
        assert change == (
            "learning rate: cosine schedule stretched from 20 to 40 steps: 0.808 at step 16, 0.102 at step 40; was 0.378 "
            "(optim.schedule_on_resume=stretch; or keep, rewarm)"
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rewarm_rises_from_the_last_rate_and_decays_over_what_is_left(schedule: str) -> None:
    config = config_of(schedule, REWARM)
    course, change = resumed_course(config, saved_at(config_of(schedule), STEPS), STEPS, MORE)
    last = learning_rate(config, STEPS - 1, STEPS)
    rates = [course.rate(config, step) for step in range(STEPS, MORE)]
    assert rates[:4] == pytest.approx([last + (1 - last) * k / 4 for k in (1, 2, 3, 4)])
    assert rates[4:] == [learning_rate(config, step, MORE - STEPS) for step in range(4, MORE - STEPS)]
    if schedule == "constant":
        assert change is None, "it never left the peak"
        return
    assert change is not None and "begun anew, 4 steps of warm-up and the decay to step 40" in change
    # A crash later on: the same settings go on with the new course, and a longer run yet is a matter of its own.
    reloaded = load_course(course.dump(config, 30), config)
    assert reloaded is not None and resumed_course(config, reloaded, 30, MORE)[1] is None
    assert [reloaded.rate(config, step) for step in range(STEPS, MORE)] == rates
    third, _ = resumed_course(config, reloaded, 30, 60)
    assert (third.start, third.total_steps, third.base) == (30, 60, course.rate(config, 29))


def test_rewarm_starts_from_the_rate_that_was_whatever_the_peak_is_now() -> None:
    config = replace(config_of("cosine", REWARM), lr=0.5)
    course, _ = resumed_course(config, saved_at(config_of("cosine"), 10), 10, MORE)
    assert course.base == learning_rate(BASE, 9, STEPS) and course.rate(config, 13) == 0.5


def test_rewarm_needs_room() -> None:
    config = config_of("wsd", REWARM)
    with pytest.raises(ConfigError, match=r"(?s)rewarm with 5 steps left, which do not hold it"):
        resumed_course(config, saved_at(config_of("wsd"), STEPS), STEPS, STEPS + 5)


def test_a_changed_policy_decides_anew_with_the_same_steps() -> None:
    kept, _ = resumed_course(config_of("cosine"), saved_at(config_of("cosine"), 15), 15, MORE)
    config = config_of("cosine", STRETCH)
    course, change = resumed_course(config, kept, 18, MORE)
    assert course.total_steps == MORE and change is not None


def test_a_default_warm_up_is_that_of_the_schedule_not_of_the_longer_run() -> None:
    config = replace(config_of("cosine"), warmup_steps=None)
    course, _ = resumed_course(config, saved_at(config, 10), 10, 400)
    assert [course.rate(config, step) for step in range(STEPS)] == [learning_rate(config, step, STEPS) for step in range(STEPS)]


def test_checkpoints_of_earlier_versions_hold_the_total_alone() -> None:
    saved = load_course({"name": "cosine", "total_steps": STEPS}, BASE)
    assert saved == Course(total_steps=STEPS, steps=STEPS, policy="keep") and load_course({}, BASE) is None
