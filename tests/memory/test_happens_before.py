"""Offload, checkpoint copies and the host optimizer ask for every order they need; each wait that is taken out of them is missed.

The checker's proof: every statement that waits, in a copy of its module without it, gives a race that names the memory. What may be left
out without one is listed, with the reason.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from efflaunch.checkpoint import saver
from efflaunch.checkpoint.archive import Copy
from efflaunch.checkpoint.segment_pool import SegmentPool
from efflaunch.memory.offload import cuda, host_store, streams
from efflaunch.memory.offload.host_pool import HostArena
from efflaunch.tests.happens_before import Machine, clocked_queue, clocked_threading
from efflaunch.training.optimizers import buckets, host, transfer
from efflaunch.training.optimizers.config import OptimConfig, StateDevice, Update

GPU = torch.device("cuda", 0)
WAITS = ("wait_event", "wait_stream", "synchronize", "wait", "hold", "hold_landings", "drain", "release", "join")
"""Names of what waits, or has something wait."""


# What is watched.


def offload(machine: Machine) -> None:
    """Two steps, a step that is given up, and the end of a store."""
    store = sys.modules[host_store.__name__].ArenaStore(HostArena(4096, block_bytes=16), cuda.CudaDevice(GPU), 60)
    slab = machine.watch("the host pool", store.arena._slabs[0], on_device=False)

    def rows() -> torch.Tensor:
        made = machine.tensor(24)
        made.fill_(1)
        return made

    with machine.watching():
        for given_up in (False, True, False):
            parcels = []
            for _ in range(2 if given_up else 6):
                parcels.append(store.put(rows()))
                rows()
            for parcel in reversed([] if given_up else parcels):
                store.prefetch(parcel)
                store.get(parcel).sum()
                store.done(parcel)
                store.drop(parcel)
            if given_up:
                store.reset()
                kept = [rows() for _ in range(6)]
                del kept
    put = [store.put(rows()) for _ in range(3)]
    with machine.watching():
        store.prefetch(put[0])
        store.close()
        # Unmapped, and somebody else's from now on.
        machine.touch(slab, writes=True)


def updates(machine: Machine, update: Update) -> None:
    """Three steps of two micro-batches with states on the host."""
    model, masters = (nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))) for _ in range(2))
    for index, (own, master) in enumerate(zip(model.parameters(), masters.parameters(), strict=True)):
        machine.watch(f"weights {index}", own.data, on_device=True)
        machine.watch(f"weights {index} on the host", master.data, on_device=False)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=0.1, fused=True)
    config = OptimConfig(name="o", lr=0.1, state_device=StateDevice.HOST, update=update, grad_clip=None)

    class Watched(host.HostUpdater):  # type: ignore[name-defined, misc]
        def _work(self) -> None:
            with machine.watching():
                super()._work()

    with mock.patch.object(buckets, "reduces_together", lambda module: isinstance(module, nn.Linear)), machine.watching():
        updater = Watched(model, masters, optimizer, config, GPU)
        updater.weights_changed()
    reduction = machine.torch.cuda.Stream(GPU)
    with machine.watching(), torch.no_grad():
        for _ in range(3):
            updater.start(0.1, lambda: None)
            for last in (False, True):
                if last:
                    updater.before_final_backward()
                _forward_and_backward(machine, model, updater, reduction)
            machine.compute.wait_stream(reduction)
            updater.finish()
            updater.apply()
    updater.close()


def _forward_and_backward(machine: Machine, model: nn.Module, updater: host.HostUpdater, reduction: object) -> None:
    for parameter in model.parameters():
        parameter.sum()
    for bucket in reversed(updater._live):
        bucket.parameters[0].sum()
        # FSDP2: the reduction waits for backward's compute, and hooks run on its stream.
        reduction.wait_stream(machine.compute)  # type: ignore[attr-defined]
        with machine.on(reduction):  # type: ignore[arg-type]
            gradient = machine.tensor(64).view(torch.float32).view(4, 4)
            gradient.fill_(0.1)
            bucket.parameters[0].grad = gradient
            bucket.arrived.update(bucket.parameters)
            del gradient
            updater._reduced(bucket)


def snapshots(machine: Machine) -> None:
    """Three checkpoints while training goes on: weights change behind the copies, which begin after the update before."""
    weights = machine.watch("weights", torch.zeros(64, dtype=torch.uint8), on_device=True)
    pool = machine.watch("the snapshot pool", torch.zeros(64, dtype=torch.uint8), on_device=False)
    ring = SegmentPool(2)
    flusher = SimpleNamespace(begin=lambda attempt: None, is_alive=True)

    def send(message: dict[str, object]) -> None:
        """The flusher reads a chunk as soon as it hears of it, and gives the segment back."""
        if message["do"] == "chunk":
            at = int(str(message["segment"])) * 32
            machine.touch(pool[at : at + 32], writes=False)
            ring.release(saver.Ticket(int(str(message["segment"])), int(str(message["generation"]))))

    flusher.send = send
    worker = object.__new__(sys.modules[saver.__name__].Saver)
    vars(worker).update(
        flusher=flusher, ring=ring, segment_bytes=32, delay_s=0.0, device=GPU, _replicate=lambda attempt: None,
        _stream=machine.torch.cuda.Stream(GPU), pool=SimpleNamespace(view=pool, address=pool.data_ptr(), wait_ready=lambda: None),
    )  # fmt: skip
    chunks = tuple((Copy(0, 32, piece=0, begin=begin),) for begin in (0, 32))
    with machine.watching(), mock.patch.object(torch.Tensor, "device", GPU):
        for _ in range(3):
            weights.fill_(1)
            attempt = SimpleNamespace(
                name="a", cancelled=False, after=machine.compute.record_event(), sources=[weights], texts=[], started=0.0, replica=None,
                layout=SimpleNamespace(chunks=chunks, num_bytes=64), enqueued=SimpleNamespace(set=lambda: None), copy_event=None,
                settled=SimpleNamespace(is_set=lambda: False),
            )  # fmt: skip
            worker._copy(attempt)
            machine.compute.wait_event(attempt.copy_event)


SCENES = {
    "offload": (offload, (cuda, streams, host_store)),
    "updates at the end": (lambda machine: updates(machine, Update.STEP), (transfer, host)),
    "updates in backward": (lambda machine: updates(machine, Update.BACKWARD), (transfer, host)),
    "snapshots": (snapshots, (saver,)),
}


def races_of(scene: str, *, answer: bool = False) -> Machine:
    """The machine after a scene, with its races."""
    machine, (play, _) = Machine(answer=answer), SCENES[scene]
    with contextlib.ExitStack() as patches:
        for module in (cuda, transfer, host, saver):
            patches.enter_context(mock.patch.object(module, "torch", machine.torch))
        patches.enter_context(mock.patch.object(host, "queue", clocked_queue(machine)))
        for module in (host, transfer):
            patches.enter_context(mock.patch.object(module, "threading", clocked_threading(machine)))
        play(machine)
    return machine


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("scene", SCENES)
def test_every_order_that_is_needed_is_asked_for(scene: str, answer: bool) -> None:
    machine = races_of(scene, answer=answer)
    assert machine.races == [] and machine.num_accesses > 20


# Waits that are left out.


def waits_of(module: ModuleType) -> list[ast.Expr]:
    """Every statement of a module that only waits, or has something wait."""
    tree = ast.parse(inspect.getsource(module))
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    found = [node for node in statements if isinstance(node.value.func, ast.Attribute) and node.value.func.attr in WAITS]
    # A semaphore that is never released is no missing order but a hang.
    return [node for node in found if "_room" not in ast.unparse(node)]


def home_of(module: ModuleType, wait: ast.Expr) -> tuple[str, ...]:
    """The names that lead from the module to the function the statement is in: of a class and its method, or of a function."""
    path: tuple[str, ...] = ()
    node: ast.AST = ast.parse(inspect.getsource(module))
    while not isinstance(node, ast.FunctionDef):
        node = next(each for each in node.body if each.lineno <= wait.lineno <= each.end_lineno)  # type: ignore[attr-defined]
        path += (node.name,)  # type: ignore[attr-defined]
    return path


@contextlib.contextmanager
def without(module: ModuleType, wait: ast.Expr) -> Iterator[None]:
    """Let the function have the code of a copy of the module that lacks the statement."""

    class Leaving(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            return ast.copy_location(ast.Pass(), node) if node.lineno == wait.lineno else node

    tree = Leaving().visit(ast.parse(inspect.getsource(module)))
    copy = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), copy)
    first, *rest = home_of(module, wait)
    function, other = vars(module)[first], copy[first]
    for name in rest:
        function, other = vars(function)[name], vars(other)[name]
    code = function.__code__
    function.__code__ = other.__code__
    try:
        yield
    finally:
        function.__code__ = code


def label(module: ModuleType, wait: ast.Expr) -> str:
    return f"{'.'.join((module.__name__.rpartition('.')[2], *home_of(module, wait)))}: {ast.unparse(wait)}"


RETIRED = "the host has waited for the same copies in _retire"
NOT_NEEDED = {
    "host_store.ArenaStore.reset: self._transfers.drain()": "sources are held until their copies are done all the same",
    "host_store.ArenaStore.close: self.device.to_host([], []).synchronize()": "drain has waited for every copy to the host",
    "transfer.Link.join: torch.cuda.current_stream(self.device).wait_stream(self._up)": RETIRED,
    "host.HostUpdater.apply: self._link.join()": RETIRED,
    "host.HostUpdater.weights_changed: self._link.join()": RETIRED,
    "host.HostUpdater.close: self._worker.join()": "the end of a thread that has nothing left to do",
    "saver.Saver._new_flusher: self._stream.synchronize()": "not in the scene: a flusher that died",
    "saver.Saver.close: self._thread.join(timeout_s)": "not in the scene: the end of a run",
}
"""Waits without which nothing that is watched here goes wrong, and why."""
PROVED = ("offload", "updates at the end", "snapshots")


def test_every_wait_that_is_left_out_is_seen() -> None:
    unseen, named = [], {}
    for scene in PROVED:
        for module in SCENES[scene][1]:
            for wait in waits_of(module):
                with without(module, wait):
                    races = races_of(scene).races
                if races:
                    named[label(module, wait)] = races[0]
                else:
                    unseen.append(label(module, wait))
    assert sorted(unseen) == sorted(NOT_NEEDED) and len(named) >= 12
    assert named["streams.Transfers.drain: copy.mark.synchronize()"].startswith("device memory")
    assert "weights" in named["saver.Saver._copy: self._stream.wait_event(attempt.after)"]
    assert "the snapshot pool" in named["saver.Saver._hand_over: pending[0].event.synchronize()"]
    assert "a host buffer" in named["host.HostUpdater._retire: copied.wait()"]
    assert all(races_of(scene).races == [] for scene in PROVED), "the modules are whole again"
