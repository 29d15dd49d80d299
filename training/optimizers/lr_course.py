"""Decides which schedule a run's learning rate follows over starts with other step counts. Pure; no torch.

A course is kept in every checkpoint. A start with the same train.steps follows it on; one with others decides by
optim.schedule_on_resume, and says what that makes of the rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...errors import ConfigError
from .config import OptimConfig, ScheduleOnResume
from .lr_schedule import check_optim, learning_rate, warmup_steps

_KEY = "optim.schedule_on_resume"


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """A schedule over the updates from `start` to `total_steps`, and what it was decided for."""

    total_steps: int
    """Where the schedule ends; the run may be longer or shorter."""
    start: int = 0
    base: float = 0.0
    """Learning rate that the warm-up rises from."""
    steps: int
    """train.steps of the start that decided it."""
    policy: str
    """optim.schedule_on_resume of that start."""
    last_rate: float | None = None
    """Learning rate of the update before the checkpoint this was read from, whatever the settings are now."""

    def rate(self, config: OptimConfig, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        return learning_rate(config, step, self.total_steps, start=self.start, base=self.base)

    def dump(self, config: OptimConfig, done: int) -> dict[str, Any]:
        """The course as a checkpoint after `done` updates keeps it."""
        last = self.rate(config, done - 1) if done > self.start else self.last_rate
        return {"name": config.schedule, **asdict(self), "last_rate": last}

    def rate_before(self, config: OptimConfig, done: int) -> float:
        """The learning rate of the last of `done` updates; 0 before the first."""
        if self.last_rate is not None:
            return self.last_rate
        return self.rate(config, done - 1) if done else 0.0


def first_course(config: OptimConfig, steps: int) -> Course:
    """The course of a run that begins."""
    return Course(total_steps=steps, steps=steps, policy=config.schedule_on_resume.value)


def load_course(saved: Mapping[str, Any], config: OptimConfig) -> Course | None:
    """Read what `Course.dump` gave a checkpoint; older ones hold the total alone. None where nothing is known."""
    if "total_steps" not in saved:
        return None
    total = int(saved["total_steps"])
    steps, policy = int(saved.get("steps", total)), str(saved.get("policy", config.schedule_on_resume.value))
    return Course(
        total_steps=total,
        start=int(saved.get("start", 0)),
        base=float(saved.get("base", 0.0)),
        steps=steps,
        policy=policy,
        last_rate=saved.get("last_rate"),
    )


def resumed_course(config: OptimConfig, saved: Course, done: int, steps: int) -> tuple[Course, str | None]:
    """The course of a start after `done` updates with train.steps=`steps`, and one line on it where it was decided anew.

    ConfigError where the steps that are left would have no learning rate, or do not hold a new warm-up and decay.
    """
    policy = config.schedule_on_resume
    if saved.steps == steps and (saved.policy == policy.value or done >= steps):
        return saved, None
    course = replace(_decided(config, saved, done, steps), steps=steps, policy=policy.value)
    if done >= steps:
        return course, None
    if course.rate(config, steps - 1) == 0:
        raise _without_rate(config, course, done, steps)
    is_plain = course.total_steps == steps or config.schedule == "constant"
    is_same = all(course.rate(config, step) == saved.rate(config, step) for step in (done, (done + steps) // 2, steps - 1))
    return course, None if is_same and is_plain else _described(config, saved, course, done)


def _decided(config: OptimConfig, saved: Course, done: int, steps: int) -> Course:
    if config.schedule_on_resume is ScheduleOnResume.KEEP:
        return saved
    if config.schedule_on_resume is ScheduleOnResume.STRETCH:
        return replace(saved, total_steps=steps)
    _check_rewarm(config, steps - done)
    return replace(saved, start=done, total_steps=steps, base=saved.rate_before(config, done))


def _check_rewarm(config: OptimConfig, left: int) -> None:
    if left < 1:
        return
    try:
        check_optim(config, left)
    except ConfigError as error:
        actual = f"rewarm with {left} steps left, which do not hold it ({str(error).splitlines()[0]})"
        raise ConfigError(_KEY, found=actual, expected="room for a warm-up and a decay", hint="a larger train.steps, or keep") from error


def _without_rate(config: OptimConfig, course: Course, done: int, steps: int) -> ConfigError:
    end = max(course.total_steps, done)
    stretched = replace(course, total_steps=steps).rate(config, done)
    ends = f"a {config.schedule} schedule over {course.total_steps} steps that ends at 0"
    return ConfigError(
        _KEY,
        found=f"{config.schedule_on_resume.value}, and {ends}: nothing is learnt in steps {end + 1} to {steps}",
        expected="a schedule that reaches the last step",
        hint=f"{_KEY}=stretch (over all {steps} steps: {stretched:.3g} at once) or {_KEY}=rewarm (a new warm-up and decay from here)",
    )


def _described(config: OptimConfig, saved: Course, course: Course, done: int) -> str:
    first, last = course.rate(config, done), course.rate(config, course.steps - 1)
    rates = f"{first:.3g} at step {done + 1}, {last:.3g} at step {course.steps}; was {saved.rate_before(config, done):.3g}"
    if config.schedule_on_resume is ScheduleOnResume.KEEP:
        what = f"kept as it was, over {course.total_steps} steps"
    elif config.schedule_on_resume is ScheduleOnResume.STRETCH:
        what = f"stretched from {saved.total_steps} to {course.total_steps} steps"
    else:
        warmup = warmup_steps(config, course.total_steps - course.start)
        what = f"begun anew, {warmup} step{'' if warmup == 1 else 's'} of warm-up and the decay to step {course.total_steps}"
    others = ", ".join(one.value for one in ScheduleOnResume if one is not config.schedule_on_resume)
    return f"learning rate: {config.schedule} schedule {what}: {rates} ({_KEY}={config.schedule_on_resume.value}; or {others})"
