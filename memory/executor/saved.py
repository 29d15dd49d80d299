"""What layers leave for their backward: pieces on the device or with the host store, read back in a known order.

A piece is a tuple of tensors under (class, index of the rows' range, head group). The order in which a backward reads is
known before it starts, so that pieces come back from the host a few ahead of their use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

from torch import Tensor

from ..config import ActivationPlace
from ..policy import AHEAD

Key = tuple[str, int, int]


class HostStore(Protocol):
    """Host memory or files (memory/offload)."""

    def put(self, rows: Tensor) -> Any: ...
    def prefetch(self, parcel: Any) -> None: ...
    def get(self, parcel: Any) -> Tensor: ...
    def done(self, parcel: Any) -> None: ...
    def drop(self, parcel: Any) -> None: ...
    def reset(self) -> None: ...


class Saved:
    """The pieces of one layer in one micro-batch."""

    def __init__(self, store: HostStore | None) -> None:
        self._store = store
        self._kept: dict[Key, tuple[Tensor, ...]] = {}
        self._moved: dict[Key, tuple[Any, ...]] = {}
        self._order: deque[Key] = deque()
        self._open: dict[Key, tuple[Tensor, ...]] = {}
        self._read: set[Key] = set()
        """Since the last `release`."""
        self._then: Callable[[], None] | None = None

    def put(self, key: Key, tensors: Sequence[Tensor], place: ActivationPlace, *, share: bool = False) -> None:
        """Leave a piece where `place` says. `share`: what the rows are a part of stays in any case, so they need no copy of their own."""
        if place is ActivationPlace.KEEP:
            self._kept[key] = tuple(t.detach() if share else _own(t) for t in tensors)
        elif place is ActivationPlace.HOST:
            assert self._store is not None, "a policy that moves activations comes with a store"
            self._moved[key] = tuple(self._store.put(t.detach()) for t in tensors)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept or key in self._moved

    def read_in(self, order: Sequence[Key], then: Callable[[], None] | None = None) -> None:
        """The order of the coming reads, and what to do when the last ones are on their way."""
        self._order, self._then = deque(key for key in order if key in self._moved), then
        self._look_ahead()

    def get(self, key: Key) -> tuple[Tensor, ...]:
        """The tensors of a piece, on the device; those from the host until `release`."""
        if key in self._kept:
            return self._kept[key]
        if key not in self._read:
            self._read.add(key)
            if key in self._order:
                while self._order.popleft() != key:
                    pass
            self._look_ahead()
        if key not in self._open:
            assert self._store is not None
            self._open[key] = tuple(self._store.get(parcel) for parcel in self._moved[key])
        return self._open[key]

    def release(self) -> None:
        """What was read from the host so far is used by nothing that is still to be computed. What is read again at once stays."""
        soon = list(islice(self._order, AHEAD))
        for key in [key for key in self._open if key not in soon]:
            del self._open[key]
            for parcel in self._moved[key]:
                assert self._store is not None
                self._store.done(parcel)
        self._read.clear()

    def prefetch(self, keys: Sequence[Key]) -> None:
        """Start bringing back the first few of `keys`."""
        for key in [key for key in keys if key in self._moved][:AHEAD]:
            for parcel in self._moved[key]:
                assert self._store is not None
                self._store.prefetch(parcel)

    def clear(self) -> None:
        """Nothing of it is needed any more."""
        self._order.clear()
        self.release()
        for parcels in self._moved.values():
            for parcel in parcels:
                assert self._store is not None
                self._store.drop(parcel)
        self._kept.clear()
        self._moved.clear()
        self._then = None

    def _look_ahead(self) -> None:
        self.prefetch(list(islice(self._order, AHEAD)))
        if len(self._order) < AHEAD and self._then is not None:
            then, self._then = self._then, None
            then()


def _own(t: Tensor) -> Tensor:
    """`t` alone: a copy where it is part of something larger that it would keep alive."""
    t = t.detach()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
