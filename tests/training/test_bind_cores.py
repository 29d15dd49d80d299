"""Ranks are bound to the cores beside their GPU, where the system says which, and else left alone with a word in the log."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from efflaunch.launcher.config.compose import compose
from efflaunch.tests.cluster.test_numa import sysfs
from efflaunch.training import bind_cores, session
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
    assert says in bound(bus, frozenset(allowed), asked.append, sysfs, ranks=2)
    assert asked == ([] if cores is None else [cores])


@pytest.mark.parametrize(
    ("ranks", "allowed", "count"), [(2, range(16), 8), (1, range(16), 0), (4, range(2, 16), 6), (2, (3, 4, 5, 6, 7), 0)]
)
def test_a_rank_is_not_bound_to_less_than_its_share(sysfs, ranks, allowed, count):
    """Of five cores allowed one is beside the GPU: two ranks would share two and a half each."""
    asked = []
    says = bound((0, 0x1B, 0), frozenset(allowed), lambda cores: asked.append(len(cores)), sysfs, ranks=ranks)
    assert asked == [count] * (count > 0) and ("bound to" in says)
    assert ("fewer than the share of one of" in says) == (count == 0)


def test_threads_of_the_process_group_start_on_the_bound_cores(monkeypatch):
    """Cores go from a thread to those it starts, so the process group comes last."""
    done = []
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setattr(session.torch.cuda, "set_device", lambda device: done.append(device.index))
    monkeypatch.setattr(session, "bind_to_gpu", lambda device, ranks: done.append((device.index, ranks)))
    monkeypatch.setattr(session.dist, "init_process_group", lambda *args, **options: done.append("group"))
    device = session._join_ranks(compose(["+experiment=llama8b_1M"]).cluster, None)
    assert done == [3, (3, 8), "group"] and device == torch.device("cuda", 3)


def test_what_is_bound_is_said(monkeypatch, caplog):
    caplog.set_level("INFO")
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x77)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    bind_cores.bind_to_gpu(torch.device("cuda", 0), 1)
    assert "this torch does not say where the GPU is" in caplog.text
