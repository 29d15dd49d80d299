"""Real gloo ranks for tests: workers forked from a server that has torch loaded, kept alive between calls.

    @pytest.fixture(scope="module")
    def pool():
        with RankPool() as pool:
            yield pool

    def test_sum(pool):
        assert pool.run(_all_reduce, 3.0, ranks=2) == [6.0, 6.0]

`_all_reduce` is a module-level function of the test file; it runs on every rank with the default process group
ready (`torch.distributed.get_rank()`), its arguments and results are pickled. An exception of a rank is raised in
the test with the rank's traceback as a note, and the world it came from is replaced before the next call.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from efflaunch.tests.limits import ENDS_S

FAMILIES = (
    *("cohere2", "gemma2", "gemma3", "glm4", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen2_moe"),
    *("qwen3", "qwen3_moe", "smollm3"),
)
"""Whose layers rows are made of."""
PRELOAD = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint.state_dict",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
    "efflaunch.training.trainer",
    "efflaunch.tests.uncollected",
)
"""Loaded once by the fork server; a worker then starts in tens of milliseconds."""
_LOOK_S = 0.2
_STACKS_S = 30.0
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says of one."""


class RankDiedError(Exception):
    """A rank ended without an answer, or none came in time."""


class RankPool:
    """Worlds of gloo ranks by size, each started at its first use; a failed world is replaced at its next use."""

    def __init__(self) -> None:
        self._worlds: dict[int, _World] = {}

    def run(self, fn: Callable[..., Any], *args: Any, ranks: int, given_up: Callable[[], bool] = lambda: False) -> list[Any]:
        """`fn(*args)` on each of `ranks` ranks; their results in rank order. `given_up`: whether to wait no longer, before ENDS_S."""
        world = self._worlds.get(ranks)
        if world is None:
            world = self._worlds[ranks] = _World(ranks)
        try:
            return world.run(fn, args, given_up)
        except BaseException:
            self._worlds.pop(ranks).close()
            raise

    def close(self) -> None:
        """Ends every worker; none is left when this returns."""
        while self._worlds:
            self._worlds.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`fn(*args)` on `world_size` fresh ranks that end with the call."""
    with RankPool() as pool:
        return pool.run(fn, *args, ranks=world_size)


@dataclass(frozen=True, slots=True)
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    stacks: Path
    """Where the worker writes its stacks on SIGUSR1."""


class _World:
    """Workers of one world size that share one default process group."""

    def __init__(self, size: int) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        folder = Path(self._scratch.name)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self.workers: list[_Worker] = []
        with _SingleThreaded():
            for rank in range(size):
                pipe, far = context.Pipe()
                stacks = folder / f"stacks-{rank}"
                process = context.Process(target=_serve, args=(far, rank, size, folder / "store", stacks), daemon=True)
                process.start()
                far.close()
                self.workers.append(_Worker(process, pipe, stacks))

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], given_up: Callable[[], bool]) -> list[Any]:
        call = _Call(fn.__module__, sys.modules[fn.__module__].__file__ or "", fn.__qualname__, pickle.dumps(args))
        for worker in self.workers:
            worker.pipe.send_bytes(pickle.dumps(call))
        deadline = time.monotonic() + ENDS_S
        results: dict[int, Any] = {}
        while len(results) < len(self.workers):
            waiting = {worker.pipe: rank for rank, worker in enumerate(self.workers) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), _LOOK_S)
            if not ready and (given_up() or time.monotonic() > deadline):
                raise RankDiedError(f"ranks {sorted(waiting.values())} gave no answer\n{self._stacks()}")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(self.workers))]

    def _receive(self, rank: int) -> Any:
        try:
            ok, payload, text = pickle.loads(self.workers[rank].pipe.recv_bytes())
        except EOFError:
            self.workers[rank].process.join(ENDS_S)
            raise RankDiedError(f"rank {rank} died with exit code {self.workers[rank].process.exitcode}") from None
        if ok:
            return pickle.loads(payload)
        error = pickle.loads(payload) if payload else RankDiedError(f"rank {rank} failed")
        error.add_note(f"--- on rank {rank} ---\n{text}")
        # A rank whose peer died often speaks first; the death is the cause, and the kernel may take a while to tell of it.
        patience_s = 60.0 if any(words in str(error) for words in _LOST_PEER) else 0.2
        dead = multiprocessing.connection.wait([worker.process.sentinel for worker in self.workers], patience_s)
        for peer, worker in enumerate(self.workers):
            if worker.process.sentinel in dead:
                raise RankDiedError(f"rank {peer} died with exit code {worker.process.exitcode}") from error
        raise error

    def _stacks(self) -> str:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid or 0, signal.SIGUSR1)
        # A rank that hangs in the kernel never writes any.
        deadline = time.monotonic() + _STACKS_S
        while time.monotonic() < deadline and not all(_ended_stacks(worker.stacks) for worker in self.workers):
            time.sleep(0.05)
        return "\n".join(f"rank {rank}:\n{worker.stacks.read_text()}" for rank, worker in enumerate(self.workers) if worker.stacks.exists())

    def close(self) -> None:
        for worker in self.workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
        self._scratch.cleanup()


@dataclass(frozen=True, slots=True)
class _Call:
    module: str
    file: str
    name: str
    args: bytes

    def __call__(self) -> Any:
        # By file where the name cannot be imported: pytest's importlib mode names modules that are on no path.
        if self.module not in sys.modules:
            spec = importlib.util.spec_from_file_location(self.module, self.file)
            assert spec is not None and spec.loader is not None, self.file
            module = importlib.util.module_from_spec(spec)
            sys.modules[self.module] = module
            spec.loader.exec_module(module)
        return getattr(sys.modules[self.module], self.name)(*pickle.loads(self.args))


class _SingleThreaded:
    """The fork server takes its environment from its first start: two cores serve all ranks."""

    def __enter__(self) -> None:
        self._before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"

    def __exit__(self, *exc: object) -> None:
        del os.environ["OMP_NUM_THREADS"]
        if self._before is not None:
            os.environ["OMP_NUM_THREADS"] = self._before


def _ended_stacks(path: Path) -> bool:
    """Whether a worker has written its stacks to the end: its outermost frame is this module's or the interpreter's."""
    return path.exists() and "in <module>" in path.read_text()


def _serve(pipe: Connection, rank: int, size: int, store: Path, stacks: Path) -> None:
    """A worker's life: join the group, answer calls until the pipe closes."""
    import torch
    import torch.distributed as dist

    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        torch.set_num_threads(1)
        os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=ENDS_S))
        while True:
            try:
                call: _Call = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            _leave_groups()
            torch.manual_seed(0)
            pipe.send_bytes(pickle.dumps(_answer(call)))


def _leave_groups() -> None:
    """Ends the groups of the call before, which every rank has left by now: each has threads of gloo's that wake a hundred times a second.

    After a hundred calls there would be a thousand of them in every rank, and two cores would do nothing else.
    """
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    made = [group for group in c10d._world.pg_map if group is not c10d._get_default_group()]
    # DeepSpeed makes its groups once in a process, and keeps them.
    if not made or "deepspeed" in sys.modules:
        return
    # Layouts that torch remembers hold the first mesh of its kind, and its groups.
    _clear_sharding_prop_cache()
    while made:
        c10d.destroy_process_group(made.pop())
    gc.collect()


def _answer(call: _Call) -> tuple[bool, bytes, str]:
    try:
        return True, pickle.dumps(call()), ""
    except BaseException as error:  # the test's to judge, whatever it is
        text = traceback.format_exc()
        try:
            payload = pickle.dumps(error)
            pickle.loads(payload)
        except Exception:  # an error that does not travel: its text does
            payload = b""
        return False, payload, text
