"""Files of activations: order on a device that works when it likes, and every way in which a disk can fail."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efflaunch.errors import ConfigError, EfflaunchError, UserError
from efflaunch.memory.offload.allocator import Extent
from efflaunch.memory.offload.file_blocks import OffloadFile, WriteMeter, warn_slow
from efflaunch.memory.offload.file_store import FileStore, Piece, pieces_of
from efflaunch.memory.offload.host_pool import HostArena
from efflaunch.memory.offload.open import open_store
from efflaunch.memory.offload.staging import Staging

from .fake import COMPUTE, IN, OUT, FakeDevice
from .program import Program
from .test_order import SCHEDULES, chance

KIB = 1024
ROOT = Path(__file__).resolve().parents[3]


def file_store(directory: Path, device: FakeDevice, *, num_slots: int = 4) -> FileStore:
    staging = Staging(HostArena(num_slots * 4 * KIB, block_bytes=4 * KIB))
    file = OffloadFile(directory, 4 << 20)
    meter = WriteMeter(None, warn_slow(directory))
    return FileStore(file, staging, device, in_flight_bytes=6000, meter=meter, num_workers=2)


@pytest.mark.parametrize("eagerness", SCHEDULES)
@pytest.mark.parametrize("num_bytes", [3000, 9000, 40_000])
def test_training_steps(tmp_path: Path, eagerness: dict[str, float], num_bytes: int) -> None:
    """Parcels smaller and larger than a slot, and larger than all slots together."""
    device = FakeDevice(eagerness=eagerness)
    run = Program(device, file_store(tmp_path, device), sizes=(num_bytes,))
    for _ in range(2):
        run.training_step(num_layers=2, num_chunks=3)
    assert run.wrong() == [] and len(run.seen) == 12
    run.store.close()
    assert device.live_bytes == {COMPUTE: 0, IN: 0}


@given(st.integers(0, 10**6), chance, chance, chance, st.sampled_from([2, 5]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_program_on_any_schedule(tmp_path: Path, seed: int, compute: float, out: float, into: float, num_slots: int) -> None:
    device = FakeDevice(eagerness={COMPUTE: compute, OUT: out, IN: into}, seed=seed)
    run = Program(device, file_store(tmp_path, device, num_slots=num_slots), sizes=(0, 10, 3000, 3000, 4096, 70_000))
    random = Random(seed)
    for _ in range(30):
        run.random_step(random, most_parcels=8)
    assert run.wrong() == []
    run.store.close()


@pytest.mark.parametrize("fault", ["hold", "hold_landings", "out_after"])
def test_the_fake_device_shows_each_order_that_is_not_kept(tmp_path: Path, fault: str) -> None:
    assert any(_goes_wrong(tmp_path, eagerness, frozenset([fault])) for eagerness in SCHEDULES)


def _goes_wrong(directory: Path, eagerness: dict[str, float], faults: frozenset[str]) -> bool:
    device = FakeDevice(eagerness=eagerness, faults=faults)
    run = Program(device, file_store(directory, device), sizes=(3000,))
    for _ in range(2):
        run.training_step(num_layers=2, num_chunks=4)
    is_wrong = run.wrong() != []
    run.store.close()
    return is_wrong


def test_the_fake_device_shows_slots_used_before_their_copy_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give = Staging.give
    monkeypatch.setattr(Staging, "give", lambda staging, slot, mark=None: give(staging, slot))
    assert any(_goes_wrong(tmp_path, eagerness, frozenset()) for eagerness in SCHEDULES)


def test_pieces() -> None:
    extents: Sequence[Extent] = [Extent(0, 64 * KIB), Extent(192 * KIB, 128 * KIB)]
    pieces = pieces_of(extents, 100_000, 48 * KIB)
    assert pieces == (Piece(0, 0, 48 * KIB), Piece(48 * KIB, 48 * KIB, 16 * KIB), Piece(192 * KIB, 64 * KIB, 100_000 - 64 * KIB))
    assert pieces[-1].padded_bytes == 36 * KIB
    assert pieces_of([], 0, 4 * KIB) == ()


class Disk:
    """Stands in for os.pwrite and os.preadv: takes a page at a time, and fails when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails_with: int | None = None
        self._write, self._read = os.pwrite, os.preadv
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "preadv", self.preadv)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if self.fails_with is not None:
            raise OSError(self.fails_with, os.strerror(self.fails_with))
        return self._write(fd, data[: 4 * KIB], offset)

    def preadv(self, fd: int, into: list[memoryview], offset: int) -> int:
        return self._read(fd, [into[0][: 4 * KIB]], offset)


def small_store(directory: Path) -> FileStore:
    opened = open_store(
        device=torch.device("cpu"), capacity_bytes=4 << 20, offload_dir=str(directory), piece_bytes=64 * KIB, staging_bytes=256 * KIB
    )
    assert isinstance(opened, FileStore)
    return opened


def test_a_disk_that_takes_and_gives_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch)
    store, rows = small_store(tmp_path), torch.randn(200_000)
    assert torch.equal(store.get(store.put(rows)), rows)
    store.close()


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, UserError, "found no room left on the disk while activations were written; expected the room that was free"),
        (errno.EDQUOT, UserError, "found no room left on the disk while activations were written; expected the room that was free"),
        (errno.EIO, EfflaunchError, "Input/output error. The activations of this step are lost; the last checkpoint is not."),
    ],
)
def test_a_write_that_fails_is_raised_by_the_next_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    store, disk = small_store(tmp_path), Disk(monkeypatch)
    disk.fails_with = number
    parcel = store.put(torch.ones(100))
    with pytest.raises(kind) as caught:
        store.get(parcel)
    assert message in str(caught.value) and f"memory.offload_dir={tmp_path}" in str(caught.value)
    assert isinstance(caught.value, UserError) == (kind is UserError), "what may pass is tried again, what will not is not"
    for call in (lambda: store.put(torch.ones(1)), lambda: store.prefetch(parcel), lambda: store.done(parcel)):
        with pytest.raises(kind):
            call()
    store.reset()
    store.close()


def test_a_full_disk_stops_a_put_that_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the staging buffers hold: it must not wait for writes that never succeed."""
    store, disk = small_store(tmp_path), Disk(monkeypatch)
    disk.fails_with = errno.ENOSPC
    with pytest.raises(UserError, match="no room left"):
        for _ in range(10):
            store.put(torch.ones(100_000))
    store.close()


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        OffloadFile(tmp_path / "none", 10)
    assert str(caught.value) == (
        f"memory.offload_dir={tmp_path}/none: found no such file or directory; expected a directory on a local disk of every node that "
        f"this user may write to.\n  Try: mkdir -p {tmp_path}/none on every node, or memory.offload_dir=ANOTHER"
    )


def test_a_disk_with_less_room_than_the_plan_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"expected 1024.0 TiB for what is moved there"):
        OffloadFile(tmp_path, 1 << 50)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match="for what is moved there"):
        OffloadFile(tmp_path, 1 << 20)
    assert os.listdir(tmp_path) == [] and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_filesystems_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    real = getattr(os, refused)

    def refuse(first: object, second: object, *rest: object) -> object:
        if refused == "pwrite" or (isinstance(second, int) and second & os.O_DIRECT):
            raise OSError(errno.EINVAL, "invalid argument")
        return real(first, second, *rest)

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(os, refused, refuse)
        store = small_store(tmp_path)
    assert not store.file.is_direct
    assert [record.message for record in caplog.records] == [
        f"memory.offload_dir={tmp_path}: the filesystem takes no direct writes, so they pass through the system's cache"
    ]
    rows = torch.randn(100_000)
    assert torch.equal(store.get(store.put(rows)), rows)
    store.close()


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    file = OffloadFile(tmp_path, 64 * KIB)
    with pytest.raises(OSError, match="ends before"):
        file.read(memoryview(bytearray(4096)), 64 * KIB)
    file.close()


def test_killed_processes_leave_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from efflaunch.memory.offload.open import open_store\n"
        "store = open_store(device=torch.device('cpu'), capacity_bytes=1 << 20, offload_dir=sys.argv[1])\n"
        "store.put(torch.ones(1000)); print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT.parent, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    files = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert any(file.startswith(str(tmp_path)) and file.endswith("(deleted)") for file in files), "in use, without a name"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert os.listdir(tmp_path) == []


def test_closing_gives_everything_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = small_store(tmp_path)
    for _ in range(5):
        store.prefetch(store.put(torch.ones(50_000)))
    store.close()
    assert os.listdir(tmp_path) == [] and len(os.listdir("/proc/self/fd")) == before


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_slow_directory_is_reported_once() -> None:
    clock, reports = Clock(), []
    meter = WriteMeter(1000.0, lambda *rates: reports.append(rates), clock=clock, least_s=2.0)

    def write(num_bytes: int, seconds: float) -> None:
        with meter:
            clock.now += seconds
        meter.wrote(num_bytes)

    write(400, 1.0)
    assert reports == [], "too early to tell"
    clock.now += 50  # nothing is written meanwhile
    write(400, 1.0)
    assert reports == [(400.0, 1000.0)] and meter.bytes_per_s == 400
    write(1, 10.0)
    assert len(reports) == 1


def test_writes_side_by_side_count_their_time_once() -> None:
    clock = Clock()
    meter = WriteMeter(None, lambda *_: None, clock=clock)
    with meter:
        clock.now += 1
        with meter:
            clock.now += 1
        clock.now += 2
    meter.wrote(800)
    assert (meter.busy_s, meter.bytes_per_s) == (4.0, 200.0)


def test_what_the_log_says_of_a_slow_directory(caplog: pytest.LogCaptureFixture) -> None:
    warn_slow(Path("/disk"))(400e6, 2e9)
    assert caplog.messages == [
        "memory.offload_dir=/disk takes 381.5 MiB/s; the plan rests on 1.9 GiB/s. Steps wait for the disk. A faster disk, a smaller "
        "memory.host_fraction or memory.segment_layers=2 would help"
    ]
