"""A run of a tensor's numbers is saved and loaded as what it is: by torch's own DCP and by us, and never computed with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from efflaunch.checkpoint.archive import plan_files
from efflaunch.checkpoint.flat import Flat
from efflaunch.parallel.sharding import parts

FULL = torch.arange(60.0).reshape(5, 12)


def run(begin: int, end: int) -> Flat:
    return Flat(FULL.shape, FULL.flatten()[begin:end].clone(), begin)


def test_its_pieces_are_views_of_its_memory() -> None:
    flat = run(7, 53)
    for memory, offsets in flat.pieces():
        assert torch.equal(memory, FULL[tuple(slice(at, at + size) for at, size in zip(offsets, memory.shape, strict=True))])
        assert flat.at(offsets).data_ptr() == memory.data_ptr()
        memory.zero_()
    assert not flat.run.any() and tuple(flat.shape) == (5, 12) and flat.dtype == torch.float32
    with pytest.raises(KeyError):
        flat.at((4, 11))


def test_nothing_computes_with_it_as_if_it_were_whole() -> None:
    with pytest.raises(TypeError, match="in part"):
        torch.add(run(0, 31), 1)


def test_a_whole_tensor_is_written_into_it_by_its_part() -> None:
    flat = Flat((5, 12), torch.zeros(20), 30)
    parts.write_shard(flat, FULL)
    assert torch.equal(flat.run, FULL.flatten()[30:50]) and parts.is_sharded(flat)
    assert parts.sharding(flat) != parts.sharding(run(0, 20)) and parts.memory_of(flat).shape == (20,)


def test_torch_saves_it_under_plain_names_and_reads_it_whole(tmp_path: Path) -> None:
    dcp.save({"model.a": run(0, 60)}, checkpoint_id=tmp_path)
    whole = {"model.a": torch.zeros(5, 12)}
    dcp.load(whole, checkpoint_id=tmp_path)
    assert torch.equal(whole["model.a"], FULL)
    part = {"model.a": Flat((5, 12), torch.zeros(33), 9)}
    dcp.load(part, checkpoint_id=tmp_path)
    assert torch.equal(part["model.a"].run, FULL.flatten()[9:42])


def test_our_files_have_its_pieces_and_those_of_other_ranks() -> None:
    def other():
        planner = DefaultSavePlanner()
        planner.set_up_planner({"model.a": run(31, 60)}, None, False)
        return planner.create_local_plan()

    layout = plan_files(
        {"model.a": run(0, 31)}, rank=0, largest_chunk=1 << 20, gather=lambda plan: [plan, other()], scatter=lambda answers: answers[0]
    )
    assert [(piece.offsets, piece.shape) for piece in layout.pieces] == [((0, 0), (2, 12)), ((2, 0), (1, 7))]
