"""The files are everybody's: what plain torch reads of them, on any number of ranks, and how tensors lie in them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from efflaunch.checkpoint.archive import Piece, cut, frame
from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.checkpoint.reader import Reader
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.parallel.sharding.parts import pieces
from efflaunch.tests.ranks import RankPool

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (0, 4), (300, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_around_numbers_is_what_torch_saves(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    head, tail = frame(shape, dtype)
    numbers = torch.arange(max(1, int(torch.Size(shape).numel()))).to(torch.float32)[: torch.Size(shape).numel()].to(dtype).reshape(shape)
    raw = bytes(numbers.reshape(-1).view(torch.uint8).tolist())
    loaded = torch.load(io.BytesIO(head + raw + tail), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == shape
    assert torch.equal(loaded.reshape(-1).view(torch.uint8), numbers.reshape(-1).view(torch.uint8))


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8), chunk=st.sampled_from([64, 128, 4096]), gaps=st.lists(st.integers(0, 70))
)
def test_chunks_cover_the_file_once_and_in_order(sizes: list[int], chunk: int, gaps: list[int]) -> None:
    pieces, at = [], 0
    for number, size in enumerate(sizes):
        start = at + (gaps[number] if number < len(gaps) else 0)
        head, tail = b"h" * (number + 1), b"t" * 3
        data = start + len(head)
        at = data + size + len(tail)
        pieces.append(Piece("k", (), (size,), torch.uint8, start, data, size, at, head, tail, None))  # type: ignore[arg-type]
    wanted = bytearray(at)
    for number, piece in enumerate(pieces):
        wanted[piece.start : piece.end] = piece.head + bytes([number + 10]) * piece.num_bytes + piece.tail
    restored = bytearray()
    for copies in cut(pieces, chunk):
        assert [copy.at for copy in copies] == sorted(copy.at for copy in copies)
        for copy in copies:
            assert copy.at == len(restored) % chunk
            restored += copy.text if copy.piece < 0 else bytes([copy.piece + 10]) * copy.num_bytes
    assert bytes(restored) == bytes(wanted)


class Model(nn.Module):
    """Plain or sharded along several dims and by rows of unequal number; more than one block, less than one, scalars."""

    def __init__(self, *, sharded: bool, dim: int = 0) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
        for number, shape in enumerate([(7, 40), (1200, 301), (5,), (3, 4, 6)]):
            whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + number / 2
            placed = distribute_tensor(whole, mesh, [Shard(min(dim, whole.ndim - 1))]) if mesh else whole
            self.register_parameter(f"w{number}", nn.Parameter(placed))
        self.register_buffer("table", torch.linspace(0, 1, 9, dtype=torch.bfloat16))

    def whole(self) -> dict[str, Tensor]:
        return {f"model.{name}": _whole(value) for name, value in (*self.named_parameters(), *self.named_buffers())}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor().detach() if hasattr(value, "full_tensor") else value.detach()


def _save(folder: Path) -> dict[str, Tensor]:
    model = Model(sharded=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = CheckpointEngine(CheckpointConfig(name="test"), folder, state=Fsdp2State(model, optimizer), metadata={}, segment_bytes=65536)
    engine.save(3, {})
    engine.wait()
    engine.close()
    return model.whole()


def _plain_load(path: Path, dim: int) -> dict[str, Tensor]:
    """Our code is not used to read."""
    model = Model(sharded=True, dim=dim)
    tensors = {f"model.{name}": value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}
    for value in tensors.values():
        value.zero_()
    dcp.load(tensors, checkpoint_id=str(path))
    return {key: _whole(value) for key, value in tensors.items()}


def _our_load(path: Path, dim: int) -> dict[str, Tensor]:
    model = Model(sharded=True, dim=dim)
    tensors = {f"model.{name}": value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}
    for value in tensors.values():
        value.zero_()
    Reader(path).read(tensors, pieces)
    return {key: _whole(value) for key, value in tensors.items()}


@pytest.mark.parametrize("saved_on", [1, 3])
def test_plain_dcp_and_our_reader_agree_on_any_number_of_ranks_and_any_sharding(pool: RankPool, tmp_path: Path, saved_on: int) -> None:
    wanted = pool.run(_save, tmp_path, ranks=saved_on)[0]
    path = tmp_path / "step-00000003"
    for ranks, dim in ((1, 0), (2, 1), (4, 0), (3, 2)):
        for load in (_plain_load, _our_load):
            for restored in pool.run(load, path, dim, ranks=ranks):
                assert restored.keys() == wanted.keys()
                assert all(torch.equal(restored[key], value) for key, value in wanted.items())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_torch_makes_one_file_of_it(pool: RankPool, tmp_path: Path) -> None:
    wanted = pool.run(_save, tmp_path, ranks=2)[0]
    dcp_to_torch_save(tmp_path / "step-00000003", tmp_path / "all.pt")
    restored = torch.load(tmp_path / "all.pt", weights_only=True)
    assert all(torch.equal(restored[key], value) for key, value in wanted.items())


def test_the_twin_says_what_the_pickle_says(pool: RankPool, tmp_path: Path) -> None:
    pool.run(_save, tmp_path, ranks=2)
    path = tmp_path / "step-00000003"
    theirs = dcp.FileSystemReader(path).read_metadata()
    ours = Reader(path).tensors
    assert ours.keys() == theirs.state_dict_metadata.keys()
    for key, entry in theirs.state_dict_metadata.items():
        assert ours[key].size == entry.size and ours[key].dtype == entry.properties.dtype
        assert {(p.offsets, p.shape) for p in ours[key].pieces} == {(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks}
    assert len(json.loads((path / "index.json").read_text())["tensors"]["model.w1"]["pieces"]) == 2


def test_a_cast_while_reading_rounds_once(pool: RankPool, tmp_path: Path) -> None:
    wanted = pool.run(_save, tmp_path, ranks=2)[0]
    target = {"model.w1": torch.zeros(1200, 301, dtype=torch.bfloat16)}
    Reader(tmp_path / "step-00000003").read(target)
    assert torch.equal(target["model.w1"], wanted["model.w1"].bfloat16())
