"""A layer executor in small: puts, prefetches, uses and drops parcels in any order, and knows what each must hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from efflaunch.memory.offload.host_store import HostStore, Parcel

from .fake import FakeDevice


@dataclass
class Program:
    """Each parcel is filled with one number; compute writes rubbish into whatever memory it is given next."""

    device: FakeDevice
    store: HostStore
    parcels: dict[Parcel, int] = field(default_factory=dict)
    seen: list[tuple[int, bytes]] = field(default_factory=list)
    """(the number it should be, what compute read)."""
    sizes: tuple[int, ...] = (24, 24, 24, 24, 64, 200)
    counter: int = 0

    def put(self, num_bytes: int) -> None:
        self.counter = self.counter % 250 + 1
        value = self.counter
        rows = self.device.tensor(num_bytes)
        self._fill(rows, value)
        self.parcels[self.store.put(rows)] = value
        del rows
        self.scribble(num_bytes)

    def scribble(self, num_bytes: int) -> None:
        """What compute does with memory that is free."""
        rubbish = self.device.tensor(num_bytes)
        self._fill(rubbish, 255)

    def _fill(self, tensor: object, value: int) -> None:
        target = self.device.address(tensor)  # type: ignore[arg-type]

        def work() -> None:
            target[:] = value

        self.device.compute(work)

    def use(self, parcel: Parcel) -> None:
        tensor = self.store.get(parcel)
        source, value = self.device.address(tensor), self.parcels[parcel]
        self.device.compute(lambda: self.seen.append((value, source.tobytes())))
        del tensor
        self.store.done(parcel)

    def drop(self, parcel: Parcel) -> None:
        self.store.drop(parcel)
        del self.parcels[parcel]

    def random_step(self, random: Random, most_parcels: int) -> None:
        verbs = ["put", "prefetch", "use", "use", "drop"] if self.parcels else ["put"]
        verb = random.choice(verbs)
        if verb == "put":
            if len(self.parcels) < most_parcels:
                self.put(random.choice(self.sizes))
            return
        parcel = random.choice(list(self.parcels))
        {"prefetch": self.store.prefetch, "use": self.use, "drop": self.drop}[verb](parcel)

    def training_step(self, num_layers: int, num_chunks: int) -> None:
        """Forward puts chunk by chunk; backward gets them last first, one ahead, and drops each after its use."""
        before = set(self.parcels)
        for _ in range(num_layers * num_chunks):
            self.put(self.sizes[0])
        backward = [parcel for parcel in reversed(self.parcels) if parcel not in before]
        for parcel, ahead in zip(backward, [*backward[1:], None], strict=True):
            self.store.prefetch(parcel)
            if ahead is not None:
                self.store.prefetch(ahead)
            self.use(parcel)
            self.drop(parcel)

    def wrong(self) -> list[tuple[int, bytes]]:
        """What compute read that was not what had been put."""
        self.device.finish()
        return [(value, read) for value, read in self.seen if set(read) - {value}]
