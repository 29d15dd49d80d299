"""Ranks are bound to the cores beside their GPU, where the system says which, and else left alone with a word in the log."""

from __future__ import annotations

import pytest

from efflaunch.tests.cluster.test_numa import sysfs
from efflaunch.training.bind_cores import bound

__all__ = ["sysfs"]


@pytest.mark.parametrize(
    ("bus", "allowed", "cores", "says"),
    [
        ((0, 0x1B, 0), range(16), {0, 1, 2, 3, 8, 9, 10, 11}, "bound to 8 cores of NUMA node 0, beside GPU 0000:1b:00.0"),
        ((1, 0x9A, 2), {5, 6, 2}, {5, 6}, "bound to 2 cores of NUMA node 1, beside GPU 0001:9a:02.0"),
        ((0, 0x1B, 0), {4, 5}, None, "none of NUMA node 0, where GPU 0000:1b:00.0 is, is among those given"),
        ((0, 0x3C, 0), range(16), None, "the system does not say which are beside GPU 0000:3c:00.0"),
        ((0, 0x3D, 0), range(16), None, "the system does not say"),
        ((0, 0x77, 0), range(16), None, "the system does not say"),
        ((None, 0x1B, 0), range(16), None, "this torch does not say where the GPU is"),
    ],
)
def test_what_is_known_is_used_and_what_is_not_is_said(sysfs, bus, allowed, cores, says):
    asked = []
    assert says in bound(bus, frozenset(allowed), asked.append, sysfs)
    assert asked == ([] if cores is None else [cores])
