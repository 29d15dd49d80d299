"""Connects the ranks of one checkpoint engine, never on the communicators of training.

In the caller's thread over a gloo group of their own (a few bytes at save, objects at plan and restore); in background
threads over a TCPStore of their own, whose server lives in rank 0.
"""

from __future__ import annotations

import json
import logging
import socket
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .storage import FAILURES, describe

log = logging.getLogger(__name__)
_MEET_S = 300.0


class Peers:
    """The ranks of an engine; a world of one needs neither group nor store."""

    def __init__(self, timeout_s: float) -> None:
        # A checkpoint is of the whole run.
        world = dist.group.WORLD
        self.rank = dist.get_rank(world) if world is not None else 0
        self.world_size = dist.get_world_size(world) if world is not None else 1
        self.timeout_s = timeout_s
        self.session = uuid.uuid4().hex[:8]
        self._group: Any = None
        self._store: Any = None
        self._address: tuple[str, int] | None = None
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(_MEET_S, timeout_s)))
            self.session = self.share(self.session)

    def open_store(self) -> None:
        """Open the store, before the first vote. Collective."""
        if self.world_size == 1 or self._address is not None:
            return
        timeout = timedelta(seconds=_MEET_S)
        host, port = _own_address(), 0
        failure = ""
        if self.rank == 0:
            try:
                # Bound to that address alone: a run on one machine is not reached from outside.
                listener = socket.create_server((host, 0))
                port = listener.getsockname()[1]
            except OSError as error:
                failure = f"{host}: {error}"
        host, port, failure = self.share((host, port, failure))
        if failure:
            raise OSError(f"rank 0 cannot listen for the votes of checkpoints on {failure}")
        if self.rank == 0:
            self._store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
            )
        self._address = (host, port)

    def own_address(self) -> str:
        """The address of this rank on the way to where the ranks meet; loopback where that is on one machine."""
        meeting = _own_address() if self.world_size > 1 else "127.0.0.1"
        family, _, _, _, place = socket.getaddrinfo(meeting, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the kernel says from which of our addresses it would.
            probe.connect(place)
            return str(probe.getsockname()[0])

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank; collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank; collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_first(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on rank 0; an empty list elsewhere. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values or []

    def scatter(self, values: list[Any] | None) -> Any:
        """Rank 0's list, one for each rank; collective."""
        if self.world_size == 1:
            assert values is not None
            return values[0]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, values, group=self._group, group_src=0)
        return mine[0]

    def largest(self, values: list[float]) -> list[float]:
        """The maximum over ranks of each number; collective, a few bytes."""
        if self.world_size == 1:
            return values
        mine = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._group)
        return mine.tolist()

    def agreed(self, action: Callable[[], object]) -> str | None:
        """Runs `action` on this rank, then meets all ranks: the first failure of any of them, on every one."""
        mine: str | None = None
        try:
            action()
        except FAILURES as error:
            mine = describe(error)
            log.debug("checkpoint failure on rank %d", self.rank, exc_info=True)
        if self.world_size == 1:
            return mine
        theirs = self.gather(mine)
        return next((text if "(rank " in text else f"{text} (rank {rank})" for rank, text in enumerate(theirs) if text is not None), None)

    def votes(self) -> Votes:
        """A connection of its own to the store, for one background thread; after open_store."""
        if self.world_size == 1:
            return Votes(None)
        assert self._address is not None
        timeout = timedelta(seconds=_MEET_S)
        return Votes(dist.TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=timeout))

    def close(self) -> None:
        """Close this rank's connections; the store's server goes with rank 0."""
        self._store = None
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
            self._group = None


class Votes:
    """Messages between background threads of all ranks. A world of one exchanges none."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def post(self, key: str, value: object) -> None:
        """Post a value for `collect` on another rank; RuntimeError where the store is gone."""
        if self._store is not None:
            self._store.set(key, json.dumps(value))

    def collect(self, keys: list[str], timeout_s: float) -> dict[str, Any]:
        """Collect what was posted under the keys within `timeout_s`; RuntimeError where the store is gone."""
        if self._store is None or not keys:
            return {}
        try:
            self._store.wait(keys, timedelta(seconds=timeout_s))
            there = keys
        except RuntimeError:
            there = [key for key in keys if self._store.check([key])]
        return {key: json.loads(value) for key, value in zip(there, self._store.multi_get(there) if there else [], strict=True)}

    def there(self, keys: list[str]) -> dict[str, Any]:
        """Return what has been posted under the keys by now; RuntimeError where the store is gone."""
        if self._store is None:
            return {}
        return {key: json.loads(self._store.get(key)) for key in keys if self._store.check([key])}

    def forget(self, keys: list[str]) -> None:
        """Delete keys, on rank 0, to keep the store small."""
        if self._store is not None:
            for key in keys:
                self._store.delete_key(key)


def _own_address() -> str:
    """The address where the ranks already meet; loopback where they meet through a file."""
    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return str(store.host) if isinstance(store, dist.TCPStore) else "127.0.0.1"
