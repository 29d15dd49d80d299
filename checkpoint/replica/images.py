"""Keeps a keeper's images in memory, one rank's files of one attempt each, and decides which go. No torch."""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass, field
from typing import Any

from ..manifest import Manifest, digest, manifest_name


class RefusedError(Exception):
    """Raised where a request cannot be met; the text says why."""


@dataclass(slots=True)
class Image:
    """One image: every file of a rank, one after the other."""

    attempt: str
    step: int
    rank: int
    world_size: int
    starts: dict[str, tuple[int, int]]
    """First byte and number of bytes, by file."""
    memory: mmap.mmap
    hashes: dict[tuple[str, int], str] = field(default_factory=dict)
    """Hashes of the chunks that have arrived, as they are here."""
    manifest: bytes | None = None
    """Manifest, once the image is complete and every chunk is what the manifest says."""

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.starts.values())

    def view(self, name: str, offset: int, length: int, *, cut: bool = False) -> memoryview:
        """Bytes of a file; RefusedError where it has no such bytes; `cut`: as many as it has."""
        if name not in self.starts:
            raise RefusedError(f"no file {name} in the image of rank {self.rank}")
        start, size = self.starts[name]
        if cut:
            length = max(0, min(length, size - offset))
        if offset < 0 or length < 0 or offset + length > size:
            raise RefusedError(f"{name} has {size} bytes, not {offset} to {offset + length}")
        return memoryview(self.memory)[start + offset : start + offset + length]

    def described(self) -> dict[str, Any]:
        """Describe the image as JSON, for whoever looks for a whole set."""
        hashed = digest(self.manifest) if self.manifest is not None else ""
        facts = {"attempt": self.attempt, "step": self.step, "rank": self.rank, "world_size": self.world_size}
        return {**facts, "manifest": hashed, "num_bytes": self.num_bytes}


class Images:
    """Holds at most two images of a rank: the one known to be whole on every rank, and the one that arrives. Thread-safe."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, int], Image] = {}
        self._session = ""
        self._lock = threading.Lock()

    def claim(self, session: str) -> None:
        """Begin a new life of the run: an older one's messages are refused from now on. What is stored stays until `keep`."""
        with self._lock:
            self._session = session

    def keep(self, attempt: str) -> None:
        """Drop every image of other attempts; all images where `attempt` is empty."""
        with self._lock:
            self._images = {key: image for key, image in self._images.items() if image.attempt == attempt}

    def begin(self, message: dict[str, Any]) -> Image:
        """Make room for a new image; those of the same rank go, but `agreed`. RefusedError where there is no memory."""
        attempt, rank = str(message["attempt"]), int(message["rank"])
        starts, end = {}, 0
        for name, size in message["files"]:
            starts[str(name)] = (end, int(size))
            end += -(-int(size) // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            if not attempt.startswith(f"{self._session}-"):
                raise RefusedError("a newer life of the run has begun")
            self._images = {k: image for k, image in self._images.items() if image.rank != rank or image.attempt == message["agreed"]}
        try:
            memory = mmap.mmap(-1, max(end, mmap.PAGESIZE))
        except OSError as error:
            raise RefusedError(f"no memory for {end} bytes: {error}") from error
        image = Image(attempt, int(message["step"]), rank, int(message["world_size"]), starts, memory)
        with self._lock:
            self._images[attempt, rank] = image
        return image

    def arrived(self, image: Image, name: str, offset: int, length: int) -> None:
        """Record that a chunk is in place."""
        image.hashes[name, offset] = digest(image.view(name, offset, length))

    def finish(self, image: Image, data: bytes) -> None:
        """Complete an image; RefusedError where it is not what the manifest says, or was let go meanwhile."""
        manifest = Manifest.from_bytes(data)
        for file in manifest.files:
            hashes = tuple(image.hashes.get((file.name, index * manifest.chunk_bytes), "") for index in range(len(file.chunks)))
            if file.name not in image.starts or image.starts[file.name][1] != file.num_bytes or hashes != file.chunks:
                raise RefusedError(f"{file.name} of rank {image.rank} did not arrive as it was sent")
        with self._lock:
            if self._images.get((image.attempt, image.rank)) is not image:
                raise RefusedError("given up for a newer one")
            image.manifest = data

    def drop(self, image: Image) -> None:
        """Drop an image that will not be completed."""
        with self._lock:
            if image.manifest is None and self._images.get((image.attempt, image.rank)) is image:
                del self._images[image.attempt, image.rank]

    def find(self, attempt: str, rank: int) -> Image:
        """Find a complete image; RefusedError otherwise."""
        with self._lock:
            image = self._images.get((attempt, rank))
        if image is None or image.manifest is None:
            raise RefusedError(f"{manifest_name(rank)} of attempt {attempt} is not held here")
        return image

    def described(self) -> list[dict[str, Any]]:
        with self._lock:
            return [image.described() for image in self._images.values()]
