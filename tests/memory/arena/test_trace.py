"""Traces: built from events, the same from real and from fake tensors, read from CUDA snapshots."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from efflaunch.errors import DataError
from efflaunch.memory.arena.fake import fake_tensors, trace_step
from efflaunch.memory.arena.snapshot import read_snapshot, snapshot_trace
from efflaunch.memory.arena.trace import Trace, trace_of
from efflaunch.memory.arena.tracer import StorageTracer
from efflaunch.memory.policy import KEPT, MemoryPolicy
from efflaunch.tests.memory.arena.steps import SmallStep

HISTORY = Path(__file__).parent / "snapshot.pickle"


def test_a_trace_of_events() -> None:
    trace = trace_of([(7, 100), (8, 50), (99, 0), (7, 0), (7, 30), (8, 0)])
    assert trace == Trace((100, 50, 30), (0, 1, 3), (2, 4, 5), 5), "releases of what was there before take no time"
    assert trace.live_bytes() == [100, 150, 50, 80, 30] and trace.max_live() == 150
    assert trace.max_live(64) == 192 and [trace.outlives(index) for index in range(3)] == [False, False, True]
    assert trace.within() == Trace((100, 50), (0, 1), (2, 4), 5)
    assert trace.digest() != trace.within().digest()


@pytest.mark.parametrize(
    "columns", [((1,), (0, 1), (1,)), ((0,), (0,), (1,)), ((1,), (1,), (1,)), ((1,), (0,), (3,))], ids=["ragged", "empty", "dead", "late"]
)
def test_a_trace_that_is_none(columns: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError):
        Trace(*columns, 2)


def test_an_output_is_there_before_its_input_goes() -> None:
    """The reason why time is counted in events: x and y live at one time."""
    with StorageTracer() as tracer:
        x = torch.zeros(1024)
        x = x + 1
    trace = tracer.trace()
    assert trace.max_live() == 8192 == tracer.peak_bytes
    assert (trace.births[1], trace.deaths[0]) == (1, 2)


def test_a_resized_storage_is_a_new_allocation() -> None:
    with StorageTracer([outer := torch.zeros(8)]) as tracer:
        a = torch.zeros(256)
        a.untyped_storage().resize_(0)
        a.untyped_storage().resize_(2048)
        outer.untyped_storage().resize_(0)
    assert tracer.trace() == Trace((1024, 2048), (0, 2), (1, 3), 3), "weights that were there before are no part of it"


@pytest.mark.parametrize("policy", [MemoryPolicy(graph=True), MemoryPolicy(attention_output=KEPT), MemoryPolicy(chunk_tokens=40)])
def test_fake_and_real_steps_have_the_same_trace(policy: MemoryPolicy) -> None:
    real = SmallStep(policy)
    traced = trace_step(real, real.external)
    assert len(traced) > 100 and traced == trace_step(real, real.external), "two real steps"
    with fake_tensors():
        fake = SmallStep(policy)
        assert trace_step(fake, fake.external) == traced


def test_a_cuda_snapshot() -> None:
    """Of a history in the format of torch.cuda.memory._snapshot; made by hand (snapshot.py in this folder)."""
    trace = read_snapshot(HISTORY)
    assert trace.sizes == (1000, 4096, 512, 2048)
    assert trace.births == (0, 1, 3, 4), "segments, out-of-memory marks and releases of older blocks take no time"
    assert trace.deaths == (2, 6, 6, 5), "a block dies when it may be used again, not when its owner lets go"
    assert trace.outlives(1) and trace.outlives(2)
    with pytest.raises(ValueError, match="no history of device 1"):
        snapshot_trace(pickle.loads(HISTORY.read_bytes()), 1)


def test_files_that_are_no_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "step.pickle"
    for content in (b"", b"text", pickle.dumps({"segments": []}), pickle.dumps({"device_traces": [[]]}), pickle.dumps(Path("/"))):
        path.write_bytes(content)
        with pytest.raises(DataError, match="no memory snapshot"):
            read_snapshot(path)
