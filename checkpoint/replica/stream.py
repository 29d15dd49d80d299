"""Exchanges messages between flushers, keepers and restores: a length, JSON, then as many bytes as it says. No torch."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]
_LENGTH = struct.Struct(">I")
_MAX_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Address:
    """Where a keeper listens: `path` for processes of its node, host and port for others, who need the token."""

    node: str
    path: str
    host: str
    port: int
    token: str

    @classmethod
    def from_json(cls, fields: list[Any]) -> Address:
        node, path, host, port, token = fields
        return cls(str(node), str(path), str(host), int(port), str(token))

    def to_json(self) -> list[Any]:
        return [self.node, self.path, self.host, self.port, self.token]


class GoneError(OSError):
    """Raised where the other end closed the connection, or said that it cannot."""


class Stream:
    """One connection. OSError (TimeoutError too) where the other end does not answer; not for several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, message: Message, payload: memoryview | bytes = b"") -> None:
        data = json.dumps({**message, "bytes": len(payload)}).encode()
        self.sock.sendall(_LENGTH.pack(len(data)) + data)
        if payload:
            self.sock.sendall(payload)

    def receive(self) -> Message | None:
        """The next message, whose `bytes` bytes are to be taken next; None at the end."""
        head = bytearray(_LENGTH.size)
        if not self._fill(memoryview(head), at_end_ok=True):
            return None
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_BYTES:
            raise GoneError(f"a message of {length} bytes: not one of ours")
        data = bytearray(length)
        self._fill(memoryview(data))
        message = json.loads(data)
        if not isinstance(message, dict):
            raise GoneError("not a message of ours")
        return message

    def take(self, view: memoryview) -> None:
        """Receive the payload of the message just received, into `view`."""
        self._fill(view)

    def payload(self, message: Message) -> bytes:
        data = bytearray(int(message["bytes"]))
        self._fill(memoryview(data))
        return bytes(data)

    def ask(self, message: Message, payload: memoryview | bytes = b"") -> Message:
        """Ask and return the answer; GoneError where it is an error, or none."""
        self.send(message, payload)
        answer = self.receive()
        if answer is None:
            raise GoneError("the connection was closed")
        if "error" in answer:
            raise GoneError(str(answer["error"]))
        return answer

    def interrupt(self) -> None:
        """Interrupt from another thread: whoever sends or receives gets an error."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It is gone already.
            pass

    def close(self) -> None:
        self.sock.close()

    def _fill(self, view: memoryview, *, at_end_ok: bool = False) -> bool:
        done = 0
        while done < len(view):
            count = self.sock.recv_into(view[done:])
            if count == 0:
                if at_end_ok and done == 0:
                    return False
                raise GoneError("the connection was closed in the middle of a message")
            done += count
        return True


def connect(address: Address, node: str, timeout_s: float) -> Stream:
    """Connect to a keeper, on the node this process runs on (`node`) past the network."""
    if address.node == node:
        return connect_here(Path(address.path), timeout_s)
    sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _greeted(sock, address.token)


def connect_here(path: Path, timeout_s: float) -> Stream:
    """Connect to a keeper of this node."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return _greeted(sock, "")


def _greeted(sock: socket.socket, token: str) -> Stream:
    stream = Stream(sock)
    try:
        stream.ask({"do": "hello", "token": token})
    except OSError:
        stream.close()
        raise
    return stream
