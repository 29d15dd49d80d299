"""Out-of-memory reports from an allocator's numbers: what is named, and that the cure really fits the smaller device."""

from __future__ import annotations

import re
from functools import partial

import pytest

from efflaunch.errors import EXIT_USER
from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.oom_report import Numbers, _phases, host_report, oom_report, requested_bytes, usable_bytes
from efflaunch.memory.config import MemoryConfig
from efflaunch.memory.position import Position

from .settings import GIB, Ledgers, cluster, make_ledger, policy

K = 1 << 10
MIB = 1 << 20
RESUME = "efflaunch resume runs/x"
AUTO = MemoryConfig(name="auto", solve=True)
LEDGERS = Ledgers(
    {
        "solved": partial(make_ledger, length=1 << 20, tokens_per_rank=128 * K, memory=AUTO),
        "given": partial(make_ledger, length=64 * K, tokens_per_rank=16 * K, memory=policy("keep", "keep")),
    }
)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which ...", 5 * GIB // 2),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20 * MIB),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes. Error code 12", 4 * MIB),
        ("Unable to allocate an array", 0),
    ],
)
def test_what_was_asked_for(message, size):
    assert requested_bytes(message) == size


def numbers(**changes: int) -> Numbers:
    fields = {"requested": 2 * GIB, "active": 70 * GIB, "reserved": 76 * GIB, "total": 80 * GIB, **changes}
    return Numbers(**fields)


def at(phase: str, layer: int | None = None) -> Position:
    position = Position()
    position.at(phase, layer)
    return position


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"active": 30 * GIB, "reserved": 78 * GIB}, "lost between the allocator's blocks"),
        ({"active": 78 * GIB, "reserved": 78 * GIB}, "tensors beyond the ledger's"),
        ({"active": 30 * GIB, "reserved": 31 * GIB, "others": 12 * GIB}, "held by others on the device"),
        ({"active": 40 * GIB, "reserved": 41 * GIB, "total": 44 * GIB}, "less room than cluster.device_memory_bytes"),
    ],
)
def test_the_largest_unplanned_thing_is_named(changes, name):
    error = oom_report(LEDGERS["solved"], numbers(**changes), at("backward", 31), rank=3, step=7, resume=RESUME)
    text = str(error)
    assert error.exit_code == EXIT_USER and "out of memory on rank 3, step 7, backward of layer 31" in text
    assert f"largest that was not planned: {name}" in text and "by the ledger:" in text and "reserved" in text


def test_weight_gradients_that_were_put_off_are_planned_as_the_end_of_backward():
    assert _phases(at("weight gradients", 3)) == (Phase.REDUCE,)


@pytest.mark.parametrize("name", LEDGERS)
def test_the_cure_fits_a_device_that_is_smaller_by_what_is_missing(name: str):
    ledger = LEDGERS[name]
    changes = {"active": ledger.device.peak_bytes - 4 * GIB} if name == "given" else {}
    text = str(oom_report(ledger, numbers(**changes), at("backward", 0), rank=0, step=1, resume=RESUME))
    hint = re.search(rf"Try: {RESUME} (.*)\n  \(certified: at most ([0-9.]+) GiB; (.*), by the estimate\)", text)
    assert hint is not None, text
    (size,) = re.findall(r"cluster\.device_memory_bytes=(\d+)MiB", hint[1])
    usable = (int(size) << 20) * (1 - ledger.asked.cluster.reserve)
    assert float(hint[2]) * GIB <= usable + 52 * MIB and usable < ledger.device.peak_bytes
    assert ("memory=auto" in hint[1]) == (not ledger.asked.memory.solve)


def test_a_device_that_holds_less_than_it_says_is_taken_at_its_word():
    """It failed with 20 GiB in tensors and 2 asked for: that, and what no tensor shows, is what it has."""
    small = numbers(active=20 * GIB, reserved=21 * GIB, total=24 * GIB)
    size = usable_bytes(LEDGERS["solved"], small, planned=75 * GIB)
    assert 20 * GIB < size < 28 * GIB and size % MIB == 0


def test_a_reserve_is_not_taken_twice():
    """What a plan may take of the smaller device is the same whatever cluster.reserve leaves: the present plan less what was asked for."""
    given = {"length": 64 * K, "tokens_per_rank": 16 * K, "memory": policy("keep", "keep")}
    sizes = {}
    for reserve in (0.0, 0.2):
        ledger = make_ledger(**given, machines=cluster(reserve=reserve))
        failed = numbers(active=ledger.device.peak_bytes - 2 * GIB, total=ledger.device.capacity_bytes)
        sizes[reserve] = usable_bytes(ledger, failed, planned=ledger.device.peak_bytes)
        assert sizes[reserve] * (1 - reserve) < ledger.device.peak_bytes, "it would have been refused"
    assert sizes[0.2] * 0.8 == pytest.approx(sizes[0.0], abs=2 * MIB)


def test_nothing_is_promised_where_nothing_fits():
    ledger = make_ledger(length=8 * K, tokens_per_rank=1 * K, memory=AUTO, machines=cluster(device_memory_bytes=40 * GIB))
    text = str(
        oom_report(ledger, numbers(active=GIB, reserved=GIB, requested=0, total=2 * GIB), at("start"), rank=0, step=0, resume=RESUME)
    )
    assert "certified" not in text or "cluster.num_nodes" in text or "optim.state_device=host" in text


def test_a_host_that_runs_out_is_named_before_the_kernel_kills():
    text = str(host_report(LEDGERS["solved"], 100 * MIB, "available on the machine", rank=2, node="n7", step=5, resume=RESUME))
    assert "host memory, on n7, the node of rank 2, after step 5" in text and "100.0 MiB left (available on the machine)" in text
    assert "cluster.host_memory_bytes=" in text and "certified" in text
