"""What can be done is what nothing is missing for."""

from __future__ import annotations

from efflaunch.launcher.doctor.finding import Work


def test_a_work_with_a_reason_cannot_be_done() -> None:
    assert Work(name="train", missing=()).can_be_done
    assert not Work(name="train", missing=("torch: it is not installed",)).can_be_done
