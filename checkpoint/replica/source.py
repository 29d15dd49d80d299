"""Reads a checkpoint from keepers' memory. Every rank may read every image; near copies are asked first."""

from __future__ import annotations

import threading
from typing import Any

from ..manifest import Manifest, digest, manifest_name
from .plan import ReplicaSet
from .stream import Address, Stream, connect


class ReplicaSource:
    """The images of one set."""

    def __init__(self, replicas: ReplicaSet, node: str, timeout_s: float) -> None:
        """Open the set; `node`: of this process."""
        self.replicas, self._node, self._timeout_s = replicas, node, timeout_s
        manifests = {manifest_name(rank): hashed for rank, hashed in enumerate(replicas.manifests)}
        self.commit: dict[str, Any] = {
            "step": replicas.step,
            "attempt": replicas.attempt,
            "world_size": len(replicas.manifests),
            "manifests": manifests,
        }

    @property
    def name(self) -> str:
        nodes = sorted({address.node for keepers in self.replicas.keepers for address in keepers})
        return f"the memory of {', '.join(nodes)} (step {self.replicas.step})"

    def manifest(self, rank: int) -> Manifest:
        reached = self._near_first(rank)
        for address in reached:
            try:
                data = self._ask(address, {"do": "manifest", "attempt": self.replicas.attempt, "rank": rank})
            except OSError:
                if address is reached[-1]:
                    raise
                continue
            if digest(data) == self.replicas.manifests[rank]:
                return Manifest.from_bytes(data)
        raise ValueError(f"{manifest_name(rank)} is not what was sent")

    def open(self, name: str, num_bytes: int) -> ReplicaFile:
        rank = int(name.removeprefix("__").partition("_")[0]) if name.startswith("__") else 0
        return ReplicaFile(name, rank, self.replicas.attempt, self._near_first(rank), self._node, self._timeout_s)

    def _near_first(self, rank: int) -> list[Address]:
        return sorted(self.replicas.keepers[rank], key=lambda address: address.node != self._node)

    def _ask(self, address: Address, message: dict[str, Any]) -> bytes:
        stream = connect(address, self._node, self._timeout_s)
        try:
            return stream.payload(stream.ask(message))
        finally:
            stream.close()


class ReplicaFile:
    """One file of one image; a connection for each thread that reads and each copy."""

    def __init__(self, name: str, rank: int, attempt: str, addresses: list[Address], node: str, timeout_s: float) -> None:
        self._question = {"do": "read", "attempt": attempt, "rank": rank, "file": name}
        self._addresses, self._node, self._timeout_s = addresses, node, timeout_s
        self._streams: dict[tuple[int, int], Stream] = {}

    @property
    def num_copies(self) -> int:
        return len(self._addresses)

    def read_into(self, view: memoryview, offset: int, copy: int) -> int:
        stream = self._stream(copy)
        # The view may go up to the end of a block, beyond the file's.
        answer = stream.ask({**self._question, "offset": offset, "length": len(view)})
        count = int(answer["bytes"])
        stream.take(view[:count])
        return count

    def _stream(self, copy: int) -> Stream:
        key = (threading.get_ident(), copy)
        if key not in self._streams:
            self._streams[key] = connect(self._addresses[copy], self._node, self._timeout_s)
        return self._streams[key]

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
