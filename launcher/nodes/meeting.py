"""Where the agents of an attempt meet, as a word on a command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the agents of an attempt meet, `3@10.0.0.7:21234`, and how long they wait there, `+300`."""

    attempt: int
    address: str
    port: int
    timeout_s: int

    def __str__(self) -> str:
        return f"{self.attempt}@{self.address}:{self.port}+{self.timeout_s}"

    @classmethod
    def parse(cls, text: str) -> Meeting:
        """ValueError for anything `str` did not make."""
        attempt, _, rest = text.partition("@")
        rest, _, timeout_s = rest.partition("+")
        address, _, port = rest.rpartition(":")
        return cls(int(attempt), address, int(port), int(timeout_s))
